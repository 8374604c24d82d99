"""Text feature extractors: hidden states of all encoder layers -> one feature vector a token (docs/explanation/model.md,
"text path").

The projection is split by layer and accumulated, so the (tokens, width * layers) matrix is never built.
Feature index = d * layers + layer.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from musubi_tuner.ltxv2.filling import fill
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.runtime.errors import UserError

PREFIX = "text_embedding_projection."


class FeatureExtractor(nn.Module):
    """V1 (2.0): one projection for both streams. V2 (2.3, 2.5): one for each, with bias."""

    def __init__(self, encoder_width: int, layers: int, video_width: int, audio_width: int, *, version: str) -> None:
        super().__init__()
        self.encoder_width = encoder_width
        self.layers = layers
        self.version = version
        flat = encoder_width * layers
        if version == "V1":
            self.aggregate_embed = nn.Linear(flat, video_width, bias=False)
        else:
            self.video_aggregate_embed = nn.Linear(flat, video_width)
            self.audio_aggregate_embed = nn.Linear(flat, audio_width)

    def forward(self, hidden_states: Sequence[Tensor], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features of the tokens of one prompt or of several, one after the other.

        Args:
            hidden_states: of every layer, (N, width), valid tokens alone.
            lengths: tokens of each prompt; their sum is N.

        Returns:
            (N, Wv) and (N, Wa), float32.
        """
        width, count = self.encoder_width, self.layers
        assert len(hidden_states) == count and hidden_states[0].shape[-1] == width
        totals = [torch.zeros(sum(lengths), one.out_features, device=one.weight.device) for one in self._projections]
        for layer, state in enumerate(hidden_states):
            normed = _normalize_v1(state, lengths) if self.version == "V1" else _normalize_v2(state)
            for total, projection in zip(totals, self._projections, strict=True):
                scale = 1.0 if self.version == "V1" else math.sqrt(projection.out_features / width)
                weight = projection.weight.view(-1, width, count)[:, :, layer]
                total += ((normed * scale).to(weight.dtype) @ weight.T).float()
        features = [one if projection.bias is None else one + projection.bias.float() for one, projection in zip(totals, self._projections)]
        return features[0], features[-1]

    @property
    def _projections(self) -> tuple[nn.Linear, ...]:
        return (self.aggregate_embed,) if self.version == "V1" else (self.video_aggregate_embed, self.audio_aggregate_embed)


def _normalize_v1(states: Tensor, lengths: Sequence[int]) -> Tensor:
    """8 (x - mean) / (max - min), over a prompt's tokens and the width."""
    prompts = states.float().split(list(lengths))
    return torch.cat([8 * (one - one.mean()) / (one.amax() - one.amin() + 1e-6) for one in prompts])


def _normalize_v2(state: Tensor) -> Tensor:
    """RMS norm of each token."""
    state = state.float()
    return state * torch.rsqrt(state.pow(2).mean(-1, keepdim=True) + 1e-6)


def extractor_names(checkpoint: Checkpoint) -> dict[str, str]:
    """{official name: full name} of the projection's tensors.

    Raises:
        UserError: the file holds none.
    """
    names = checkpoint.with_prefix(PREFIX)
    if not any(name.endswith("aggregate_embed.weight") for name in names):
        raise UserError(
            f"{checkpoint.path}: holds no text projection ('{PREFIX}...'). Give --ltxv2_model the full checkpoint, or, of LTX-2.5, "
            "--text_encoder the encoder's file, which holds the projection (gemma4-12b-with-proj-ltx-2.5...)."
        )
    shapes = {name: checkpoint.shape(full) for name, full in names.items() if name.endswith("aggregate_embed.weight")}
    if flat := [f"'{name}' {shape}" for name, shape in shapes.items() if len(shape) != 2]:
        raise UserError(f"{checkpoint.path}: the text projection is damaged: {flat[0]} is no matrix. Download the file again.")
    return names


def check_encoder_fits(checkpoint: Checkpoint, width: int, states: int) -> None:
    """Whether the projection was made for an encoder.

    Args:
        width: of its hidden states.
        states: how many it gives: its layers and the embeddings.

    Raises:
        UserError: no projection, or one for another width or number of layers.
    """
    names = extractor_names(checkpoint)
    flat = checkpoint.shape(next(full for name, full in names.items() if name.endswith("aggregate_embed.weight")))[1]
    if flat != width * states:
        raise UserError(
            f"the text encoder gives {states} states of width {width}, {width * states} features a token; the text projection of "
            f"{checkpoint.path.name} takes {flat}. It is the wrong --text_encoder for this --ltxv2_model "
            "(LTX-2 and 2.3 take Gemma 3 12B, and 2.5 its own Gemma 4: 49 x 3840 = 188160)."
        )


_OF_STREAMS = ("video_aggregate_embed.weight", "audio_aggregate_embed.weight")


def load_feature_extractor(
    checkpoint: Checkpoint, encoder_width: int, *, device: torch.device | str, dtype: torch.dtype
) -> FeatureExtractor:
    """Build and fill the extractor, frozen; its shape follows from the tensors.

    Args:
        encoder_width: of the text encoder, which `check_encoder_fits` has seen; it tells width from layers in the flattened axis.

    Raises:
        UserError: no projection, or a mixture of both versions.
    """
    names = extractor_names(checkpoint)
    one, both = "aggregate_embed.weight" in names, "video_aggregate_embed.weight" in names
    if one == both:
        raise UserError(f"{checkpoint.path}: the text projection is a mixture of versions: {', '.join(sorted(names))}.")
    first = names["aggregate_embed.weight" if one else "video_aggregate_embed.weight"]
    shapes = [checkpoint.shape(first)] if one else [checkpoint.shape(names[name]) for name in _OF_STREAMS if name in names]
    if len(shapes) < (1 if one else 2) or any(len(shape) != 2 or shape[1] % encoder_width for shape in shapes):
        raise UserError(f"{checkpoint.path}: the text projection is not whole: its weights have the shapes {shapes}. Download it again.")
    (video_width, flat), (audio_width, _) = shapes[0], shapes[-1]
    with torch.device("meta"):
        extractor = FeatureExtractor(encoder_width, flat // encoder_width, video_width, audio_width, version="V1" if one else "V2")
    fill(extractor, names, checkpoint, device=device, dtype=dtype)
    return extractor.requires_grad_(False).eval()
