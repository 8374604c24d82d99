"""Text feature extractors: hidden states of all encoder layers -> one feature vector a token (architecture sheet 5.2 and 5.3).

The projection is split by layer and accumulated, so the (tokens, width * layers) matrix is never built.
Feature index = d * layers + layer.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from musubi_tuner.ltxv2.weights import Checkpoint, fill
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

    def forward(self, hidden_states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden states of one prompt's valid tokens, (n, width) each -> features (n, Wv) and (n, Wa).

        Raises:
            UserError: another encoder than the projection was made for.
        """
        width, count = hidden_states[0].shape[-1], len(hidden_states)
        if (width, count) != (self.encoder_width, self.layers):
            raise UserError(
                f"the text encoder gives {count} layers of width {width}; this model's text projection takes {self.layers} of width "
                f"{self.encoder_width}. It is the wrong --text_encoder for this --ltxv2_model (LTX-2 and 2.3 take Gemma 3 12B)."
            )
        if self.version == "V1":
            features = self._project(self.aggregate_embed, [_normalize_v1(state) for state in hidden_states], 1.0)
            return features, features
        normed = [_normalize_v2(state) for state in hidden_states]
        video = self._project(self.video_aggregate_embed, normed, math.sqrt(self.video_aggregate_embed.out_features / width))
        audio = self._project(self.audio_aggregate_embed, normed, math.sqrt(self.audio_aggregate_embed.out_features / width))
        return video, audio

    def _project(self, projection: nn.Linear, states: Sequence[Tensor], scale: float) -> Tensor:
        weight = projection.weight.view(-1, self.encoder_width, self.layers)
        total = torch.zeros(states[0].shape[0], weight.shape[0], dtype=torch.float32, device=weight.device)
        for layer, state in enumerate(states):
            total += ((state * scale).to(weight.dtype) @ weight[:, :, layer].T).float()
        return total if projection.bias is None else total + projection.bias.float()


def _normalize_v1(state: Tensor) -> Tensor:
    """8 (x - mean) / (max - min) over the prompt's tokens and the width."""
    state = state.float()
    return 8 * (state - state.mean()) / (state.amax() - state.amin() + 1e-6)


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
            f"{checkpoint.path}: holds no text projection ('{PREFIX}...'). Give --ltxv2_model the full checkpoint, or, of a split pack, "
            "its folder with the text encoder file in it."
        )
    return names


def load_feature_extractor(
    checkpoint: Checkpoint, encoder_width: int, *, device: torch.device | str, dtype: torch.dtype
) -> FeatureExtractor:
    """Build and fill the extractor, frozen; its shape follows from the tensors.

    Args:
        encoder_width: of the text encoder, to tell width from layers in the flattened axis.

    Raises:
        UserError: no projection, a mixture of both versions, or a flattened axis that `encoder_width` does not divide.
    """
    names = extractor_names(checkpoint)
    one, both = "aggregate_embed.weight" in names, "video_aggregate_embed.weight" in names
    if one == both:
        raise UserError(f"{checkpoint.path}: the text projection is a mixture of versions: {', '.join(sorted(names))}.")
    first = names["aggregate_embed.weight" if one else "video_aggregate_embed.weight"]
    video_width, flat = checkpoint.shape(first)
    audio_width = video_width if one else checkpoint.shape(names["audio_aggregate_embed.weight"])[0]
    if flat % encoder_width:
        raise UserError(
            f"the text encoder is {encoder_width} wide, and the text projection of {checkpoint.path.name} takes {flat} "
            "features, which is no "
            f"multiple of it. It is the wrong --text_encoder for this --ltxv2_model (LTX-2 and 2.3 take Gemma 3 12B: 3840 x 49 = 188160)."
        )
    with torch.device("meta"):
        extractor = FeatureExtractor(encoder_width, flat // encoder_width, video_width, audio_width, version="V1" if one else "V2")
    fill(extractor, names, checkpoint, device=device, dtype=dtype)
    return extractor.requires_grad_(False).eval()
