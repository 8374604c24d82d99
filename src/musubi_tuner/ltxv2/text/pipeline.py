"""Prompts -> what is cached: contexts of 1024 tokens, or features before the connectors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.ltxv2.text.connectors import Connectors, connector_names, load_connectors
from musubi_tuner.ltxv2.text.encoders import EncoderOptions, TextEncoder, load_encoder
from musubi_tuner.ltxv2.text.features import FeatureExtractor, extractor_names, load_feature_extractor
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPipeline:
    """Encoder, extractor and connectors, loaded once; dropped as a whole when the work is done."""

    encoder: TextEncoder
    extractor: FeatureExtractor | None
    """None with T5."""
    connectors: Connectors | None
    """None with T5 and for features."""
    both_streams: bool
    max_length: int
    device: torch.device

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """(text, mask) of each prompt, on the CPU.

        With connectors (1024, Cv) or (1024, Cv + Ca) and a mask of ones; features (n, ...) of valid tokens alone;
        T5 (max_length, W), padded with zeros, and a mask of its valid tokens.
        """
        states = self.encoder.encode(prompts)
        if self.extractor is None:
            return [self._pad(one[0]) for one in states]
        features = [self.extractor(one) for one in states]
        if self.connectors is None:
            return [(self._joined(video, audio), torch.ones(video.shape[0], dtype=torch.bool)) for video, audio in features]
        contexts = self._connect(features)
        return [(self._joined(video, audio), torch.ones(video.shape[0], dtype=torch.bool)) for video, audio in contexts]

    def token_count(self, prompt: str) -> int:
        return len(self.encoder.tokenize(prompt))

    def _connect(self, features: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        lengths = torch.tensor([video.shape[0] for video, _ in features], device=self.device)
        video, audio = (torch.nn.utils.rnn.pad_sequence([pair[stream] for pair in features], batch_first=True) for stream in (0, 1))
        return list(zip(*self.connectors(video, audio, lengths), strict=True))

    def _joined(self, video: Tensor, audio: Tensor) -> Tensor:
        return (torch.cat([video, audio], dim=-1) if self.both_streams else video).float().cpu()

    def _pad(self, states: Tensor) -> tuple[Tensor, Tensor]:
        missing = self.max_length - states.shape[0]
        mask = torch.arange(self.max_length) < states.shape[0]
        return torch.nn.functional.pad(states.float().cpu(), (0, 0, 0, missing)), mask


def load_text_pipeline(
    checkpoint: Checkpoint, config: TransformerConfig, options: EncoderOptions, *, mode: str, stage: str
) -> TextPipeline:
    """Load everything that captions need.

    Args:
        mode: `video` keeps the video context alone; `av` and `audio` both.
        stage: `context` or `features`.

    Raises:
        UserError: an encoder whose width fits neither the projection nor, with T5, the transformer.
    """
    encoder = load_encoder(options)
    extractor = connectors = None
    if options.backend == "t5":
        if encoder.width != config.video_context_width:
            raise UserError(
                f"--text_encoder {options.path}: T5 is {encoder.width} wide, and the transformer of {checkpoint.path.name} "
                "takes a context of "
                ""
                f"{config.video_context_width}. Use an encoder of that width, or --text_encoder_backend gemma, which the "
                "released models were trained with."
            )
    else:
        extractor = load_feature_extractor(checkpoint, encoder.width, device=options.device, dtype=options.dtype)
        if stage == "context":
            connectors = load_connectors(checkpoint, device=options.device, dtype=options.dtype)
    return TextPipeline(
        encoder=encoder,
        extractor=extractor,
        connectors=connectors,
        both_streams=mode != "video",
        max_length=options.max_length,
        device=options.device,
    )


def projection_fingerprint(checkpoint: Checkpoint) -> str:
    """Identity of what lies between the encoder and the transformer: text projection and connectors."""
    return checkpoint.fingerprint(extractor_names(checkpoint) | connector_names(checkpoint))


def text_widths(config: TransformerConfig, mode: str) -> tuple[int, ...]:
    """Widths of the cached text: the video context alone, or both."""
    return (config.video_context_width,) if mode == "video" else (config.video_context_width, config.audio_context_width)
