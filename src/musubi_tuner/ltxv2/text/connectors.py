"""Text connectors: features of a prompt -> the 1024-token context that the transformer reads (docs/explanation/model.md,
"text path").

Stored under the transformer's prefix, but part of the text side. Frozen as a rule; may be trained.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.ltxv2.filling import fill
from musubi_tuner.ltxv2.transformer.attention import Attention, RopeTable, rope_table
from musubi_tuner.ltxv2.transformer.block import FeedForward
from musubi_tuner.ltxv2.versions import CONNECTORS, transformer_prefix
from musubi_tuner.ltxv2.weights import Checkpoint, building_from
from musubi_tuner.runtime.errors import UserError

CONTEXT_TOKENS = 1024
_EPS = 1e-6


class ConnectorBlock(nn.Module):
    """x += attn1(RMS(x)); x += ff(RMS(x))."""

    def __init__(self, width: int, heads: int, *, gated: bool, ff_bias: bool, rope_type: str) -> None:
        super().__init__()
        self.attn1 = Attention(width, width, heads, width // heads, gated=gated, eps=_EPS, rope_type=rope_type)
        self.ff = FeedForward(width, bias=ff_bias)

    def forward(self, x: Tensor, rope: RopeTable) -> Tensor:
        normed = _rms(x)
        x = x + self.attn1(normed, normed, query_rope=rope, key_rope=rope)
        return x + self.ff(_rms(x))


class Connector(nn.Module):
    """One stream's connector."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        layers: int,
        registers: int,
        max_pos: int,
        theta: float,
        double: bool,
        gated: bool,
        ff_bias: bool,
        rope_type: str,
    ) -> None:
        super().__init__()
        self.heads, self.max_pos, self.theta, self.double_rope = heads, max_pos, theta, double
        self.learnable_registers = nn.Parameter(torch.empty(registers, width))
        self.transformer_1d_blocks = nn.ModuleList(
            [ConnectorBlock(width, heads, gated=gated, ff_bias=ff_bias, rope_type=rope_type) for _ in range(layers)]
        )

    @property
    def width(self) -> int:
        return self.learnable_registers.shape[1]

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """(B, n, W) features whose first (B,) `lengths` tokens are real -> (B, 1024, W) context; every position may be attended to.

        Position p beyond a prompt's length holds register p mod (number of registers).
        """
        x = self.padded(features, lengths)
        positions = torch.arange(CONTEXT_TOKENS, dtype=torch.float32, device=x.device)[None, None]
        rope = rope_table(positions, (self.max_pos,), dim=self.width, heads=self.heads, theta=self.theta, double=self.double_rope)
        for block in self.transformer_1d_blocks:
            x = block(x, rope)
        return _rms(x)

    def padded(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Real tokens first, registers by absolute position after them."""
        registers = self.learnable_registers
        filled = registers.repeat(CONTEXT_TOKENS // registers.shape[0], 1)[None].expand(features.shape[0], -1, -1)
        longest = features.shape[1]
        real = torch.arange(CONTEXT_TOKENS, device=features.device)[None] < lengths[:, None]
        wide = F.pad(features.to(registers.dtype), (0, 0, 0, CONTEXT_TOKENS - longest))
        return torch.where(real[..., None], wide, filled)


class Connectors(nn.Module):
    """Both streams' connectors, under the official names."""

    def __init__(self, config: Mapping[str, Any], registers: int) -> None:
        super().__init__()
        self.video_embeddings_connector = _build(config, "", registers)
        self.audio_embeddings_connector = _build(config, "audio_", registers)

    def forward(self, video_features: Tensor, audio_features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, n, Wv) and (B, n, Wa) -> contexts (B, 1024, Wv) and (B, 1024, Wa)."""
        return self.video_embeddings_connector(video_features, lengths), self.audio_embeddings_connector(audio_features, lengths)


def connector_names(checkpoint: Checkpoint) -> dict[str, str]:
    """{official name: full name} of the connectors' tensors.

    Raises:
        UserError: the file holds none.
    """
    prefix = transformer_prefix(checkpoint.names()) or ""
    found = {name: full for name, full in checkpoint.with_prefix(prefix).items() if name.startswith(CONNECTORS)}
    if not found:
        raise UserError(
            f"{checkpoint.path}: holds no text connectors ('{CONNECTORS[0]}...'). Give --ltxv2_model the full checkpoint or the "
            "transformer file of its release; files stripped of the connectors cannot make contexts."
        )
    return found


def load_connectors(checkpoint: Checkpoint, *, device: torch.device | str, dtype: torch.dtype) -> Connectors:
    """Build from the checkpoint's `transformer` section and fill, frozen.

    Raises:
        UserError: no connectors, no config, or a number of registers that does not divide 1024.
    """
    names = connector_names(checkpoint)
    config = checkpoint.config.get("transformer")
    if config is None:
        raise UserError(f"{checkpoint.path}: its 'config' metadata has no 'transformer' section, so the connectors' heads are not known.")
    first = f"{CONNECTORS[0]}learnable_registers"
    if first not in names:
        raise UserError(f"{checkpoint.path}: lacks the text connectors' '{first}'. Download the file again.")
    registers = next(iter(checkpoint.shape(names[first])), 0)
    if not registers or CONTEXT_TOKENS % registers:
        raise UserError(f"{checkpoint.path}: {registers} connector registers do not divide the context of {CONTEXT_TOKENS} tokens.")
    with building_from(checkpoint, "transformer"), torch.device("meta"):
        connectors = Connectors(config, registers)
    fill(connectors, names, checkpoint, device=device, dtype=dtype)
    return connectors.requires_grad_(False).eval()


def _build(config: Mapping[str, Any], prefix: str, registers: int) -> Connector:
    """The audio connector's keys fall back to the video's (2.0)."""

    def value(key: str, default: Any) -> Any:
        return config.get(f"{prefix}connector_{key}", config.get(f"connector_{key}", default))

    heads = value("num_attention_heads", 30)
    return Connector(
        width=heads * value("attention_head_dim", 128),
        heads=heads,
        layers=value("num_layers", 2),
        registers=registers,
        max_pos=config.get("connector_positional_embedding_max_pos", [1])[0],
        theta=config.get("positional_embedding_theta", 10000.0),
        double=config.get("frequencies_precision") == "float64",
        gated=config.get("connector_apply_gated_attention", False),
        ff_bias=config.get("connector_ff_bias", True),
        rope_type=config.get("rope_type", "split"),
    )


def _rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=_EPS)
