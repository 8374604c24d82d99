"""Prompts -> what is cached: contexts of 1024 tokens, or features before the connectors.

Two stages, never in memory together: the text encoder with the text projection, which `placement.text` loads, then the connectors. Between
them wait the features of a chunk of prompts, on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from musubi_tuner.ltxv2.text.connectors import Connectors, connector_names, load_connectors
from musubi_tuner.ltxv2.text.encoders import EncoderOptions, PromptTokenizer, TextEncoder, read_encoder_config, read_encoder_shape
from musubi_tuner.ltxv2.text.features import FeatureExtractor, check_encoder_fits, extractor_names
from musubi_tuner.ltxv2.text.packed import check_belongs, with_projection
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.runtime.errors import UserError

Features = tuple[Tensor, ...]
"""One prompt's real tokens, on the CPU: (n, Wv) and (n, Wa) of the two streams; with T5 the (n, W) of its last layer alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRecipe:
    """What turns a prompt into a cached text."""

    checkpoint: Checkpoint
    """Holds the connectors, and the projection where the encoder's file does not."""
    config: TransformerConfig
    options: EncoderOptions
    mode: Literal["video", "av", "audio"]
    """`video` keeps the video stream alone."""
    stage: Literal["context", "features"]

    @property
    def whole(self) -> Checkpoint:
        """The checkpoint with its text projection, wherever that lies."""
        return with_projection(self.checkpoint, self.options.path)

    def check(self) -> None:
        """Whether the parts fit each other, from configs and headers alone.

        Raises:
            UserError: an encoder whose width fits neither the projection nor, with T5, the transformer, or that the checkpoint was not
                trained with; missing projection or connectors.
        """
        shape = read_encoder_shape(self.options)
        if self.options.backend == "t5":
            if shape.width != self.config.video_context_width:
                raise UserError(
                    f"--text_encoder {self.options.path}: T5 is {shape.width} wide, and the transformer of {self.checkpoint.path.name} "
                    f"takes a context of {self.config.video_context_width}. Use an encoder of that width, or --text_encoder_backend "
                    "gemma, which the released models were trained with."
                )
            return
        extractor_names(self.whole)
        check_belongs(self.checkpoint, self.options.path, read_encoder_config(self.options))
        check_encoder_fits(self.whole, shape.width, shape.states)
        if self.stage == "context":
            connector_names(self.checkpoint)


class FeatureStage:
    """Encoder and projection: prompts -> features."""

    def __init__(self, encoder: TextEncoder, extractor: FeatureExtractor | None, dtype: torch.dtype) -> None:
        self._encoder = encoder
        self._extractor = extractor
        self._dtype = dtype

    @property
    def tokenizer(self) -> PromptTokenizer:
        return self._encoder.tokenizer

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> list[Features]:
        """Features of prompts, run together: best of similar length."""
        states = self._encoder.encode(prompts)
        packed = states.layers if self._extractor is None else self._extractor(states.layers, states.lengths)
        streams = [one.to(device="cpu", dtype=self._dtype).split(list(states.lengths)) for one in packed]
        return list(zip(*streams, strict=True))


class FinishStage:
    """Features -> text and mask as they are cached."""

    def __init__(self, connectors: Connectors | None, recipe: TextRecipe) -> None:
        self._connectors = connectors
        self._recipe = recipe

    @torch.inference_mode()
    def finish(self, features: Sequence[Features]) -> list[tuple[Tensor, Tensor]]:
        """(text, mask) of each prompt, on the CPU, float32.

        With connectors (1024, Cv) or (1024, Cv + Ca) and a mask of ones; features (n, ...) of real tokens alone;
        T5 (max_length, W), padded with zeros, and a mask of its real tokens.
        """
        if self._recipe.options.backend == "t5":
            return [self._padded(one[0]) for one in features]
        streams = features if self._connectors is None else self._connect(self._connectors, features)
        return [(text, torch.ones(text.shape[0], dtype=torch.bool)) for text in map(self._joined, streams)]

    def _connect(self, connectors: Connectors, features: Sequence[Features]) -> list[Features]:
        device = self._recipe.options.device
        lengths = torch.tensor([video.shape[0] for video, _ in features], device=device)
        video, audio = (pad_sequence([pair[stream] for pair in features], batch_first=True).to(device) for stream in (0, 1))
        return list(zip(*connectors(video, audio, lengths), strict=True))

    def _joined(self, streams: Features) -> Tensor:
        wanted = streams[:1] if self._recipe.mode == "video" else streams
        return torch.cat(wanted, dim=-1).float().cpu()

    def _padded(self, states: Tensor) -> tuple[Tensor, Tensor]:
        length = self._recipe.options.max_length
        mask = torch.arange(length) < states.shape[0]
        return torch.nn.functional.pad(states.float(), (0, 0, 0, length - states.shape[0])), mask


def load_finish_stage(recipe: TextRecipe) -> FinishStage:
    """Load the connectors, where the recipe has any."""
    options, connectors = recipe.options, None
    if options.backend != "t5" and recipe.stage == "context":
        connectors = load_connectors(recipe.checkpoint, device=options.device, dtype=options.dtype)
    return FinishStage(connectors, recipe)


def projection_fingerprint(checkpoint: Checkpoint) -> str:
    """Identity of what lies between the encoder and the transformer: text projection and connectors."""
    return checkpoint.fingerprint(extractor_names(checkpoint) | connector_names(checkpoint))


def text_widths(config: TransformerConfig, mode: str) -> tuple[int, ...]:
    """Widths of the cached text: the video context alone, or both."""
    return (config.video_context_width,) if mode == "video" else (config.video_context_width, config.audio_context_width)
