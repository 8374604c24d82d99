"""The LTX-2 transformer: tokens of one or two streams in, velocity out. Names are the official ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.ltxv2.transformer.adaln import AdaLN, Modulation, modulate
from musubi_tuner.ltxv2.transformer.attention import attention_bias, key_bias
from musubi_tuner.ltxv2.transformer.block import Block, BlockSkips, StreamInputs
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.modality import Modality, Perturbations, Skip, Velocity
from musubi_tuner.ltxv2.transformer.rope import RopeTable, rope_table

TIMESTEP_RULES = ("official", "cross", "own")
"""Who drives the cross attentions between the streams (architecture sheet 2.8).

`official` (v1.2.0): scale and shift from the stream's own tokens, gate from the other stream's sigma.
`cross` (ltx-core 1.0.0): both from the other stream's sigma. `own`: both from the stream's own tokens.
"""

States = tuple[Tensor | None, Tensor | None]
"""(B, N, D) of video and audio; None where the stream is absent."""

RunBlock = Callable[..., States]
"""(block, its arguments) -> its next states. `memory` puts checkpointing, streaming and compiled blocks in its place."""


def run_plain(block: Block, *arguments: Any) -> States:
    """How a block is run unless something else takes the place of `LTXModel.run_block`."""
    return block(*arguments)


class TextProjection(nn.Module):
    """2.0 only: text context to the stream's width."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))


@dataclass(frozen=True, slots=True)
class StreamShape:
    """One stream's widths, and the prefix of its parameter names."""

    prefix: str
    dim: int
    in_channels: int
    out_channels: int
    max_pos: tuple[int, ...]


class LTXModel(nn.Module):
    """`streams` chooses the subset that is built: ("video", "audio"), ("video",) or ("audio",)."""

    def __init__(
        self, config: TransformerConfig, streams: tuple[str, ...] = ("video", "audio"), *, timestep_rule: str = "official"
    ) -> None:
        super().__init__()
        assert timestep_rule in TIMESTEP_RULES, timestep_rule
        self.config = config
        self.streams = streams
        self.timestep_rule = timestep_rule
        self.run_block: RunBlock = run_plain
        for stream in streams:
            self._build_stream(_shape(config, stream))
        if len(streams) == 2:
            self.av_ca_video_scale_shift_adaln_single = AdaLN(config.video_dim, 4)
            self.av_ca_audio_scale_shift_adaln_single = AdaLN(config.audio_dim, 4)
            self.av_ca_a2v_gate_adaln_single = AdaLN(config.video_dim, 1)
            self.av_ca_v2a_gate_adaln_single = AdaLN(config.audio_dim, 1)
        self.transformer_blocks = nn.ModuleList([Block(config, streams) for _ in range(config.num_layers)])

    def _build_stream(self, shape: StreamShape) -> None:
        config, prefix, dim = self.config, shape.prefix, shape.dim
        self.add_module(f"{prefix}patchify_proj", nn.Linear(shape.in_channels, dim))
        if config.has_caption_projection:
            self.add_module(f"{prefix}caption_projection", TextProjection(config.caption_channels, dim))
        self.add_module(f"{prefix}adaln_single", AdaLN(dim, config.modulation_rows))
        if config.has_prompt_adaln:
            self.add_module(f"{prefix}prompt_adaln_single", AdaLN(dim, 2))
        self.register_parameter(f"{prefix}scale_shift_table", nn.Parameter(torch.empty(2, dim)))
        self.add_module(f"{prefix}proj_out", nn.Linear(dim, shape.out_channels))
        if config.use_keyframes_abs_pos_embedding and not prefix:
            self.keyframes_abs_pos_embedding = nn.Parameter(torch.empty(1, dim))

    def forward(self, video: Modality | None, audio: Modality | None, perturbations: Perturbations | None = None) -> Velocity:
        """Velocity of each stream that is there and enabled.

        A stream that the model has may be left out (None): the other one then runs as if the cross attentions were off.
        """
        pairs = {"video": (video, audio), "audio": (audio, video)}
        streams = [(_shape(self.config, name), own, other) for name, (own, other) in pairs.items() if own is not None]
        inputs, embedded, tokens = {}, {}, {}
        for shape, own, other in streams:
            tokens[shape.prefix] = self._embed_tokens(shape, own)
            inputs[shape.prefix], embedded[shape.prefix] = self._stream_inputs(shape, own, other)
        skips = perturbations or Perturbations()
        skip_a2v, skip_v2a = _with_absent(skips.skip_audio_to_video, audio), _with_absent(skips.skip_video_to_audio, video)
        states: States = (tokens.get(""), tokens.get("audio_"))
        for index, block in enumerate(self.transformer_blocks):
            block_skips = BlockSkips(skips.skip_video_self.get(index, False), skips.skip_audio_self.get(index, False), skip_a2v, skip_v2a)
            states = self.run_block(block, *states, inputs.get(""), inputs.get("audio_"), block_skips)
        outputs = {}
        for shape, own, _ in streams:
            state = states[1] if shape.prefix else states[0]
            outputs[shape.prefix] = self._head(shape, own, state, embedded[shape.prefix]) if own.enabled else None
        return Velocity(outputs.get(""), outputs.get("audio_"))

    def _embed_tokens(self, shape: StreamShape, stream: Modality) -> Tensor:
        projection = self.get_submodule(f"{shape.prefix}patchify_proj")
        tokens = projection(stream.latent.to(projection.weight.dtype))
        if stream.keyframe_marker is not None and self.config.use_keyframes_abs_pos_embedding and not shape.prefix:
            tokens = tokens + stream.keyframe_marker[..., None].to(tokens.dtype) * self.keyframes_abs_pos_embedding.to(tokens.dtype)
        return tokens

    def _stream_inputs(self, shape: StreamShape, own: Modality, other: Modality | None) -> tuple[StreamInputs, Tensor]:
        config, prefix = self.config, shape.prefix
        rows, embedded = self.get_submodule(f"{prefix}adaln_single")(own.levels * config.timestep_scale_multiplier)
        prompt = None
        if config.has_prompt_adaln:
            prompt_rows, _ = self.get_submodule(f"{prefix}prompt_adaln_single")(own.sigma[:, None] * config.timestep_scale_multiplier)
            prompt = Modulation(prompt_rows, None)
        cross = self._cross_inputs(shape, own, other) if other is not None else (None, None, None)
        mid_points = own.positions.float().mean(-1)
        self_mask = key_bias(own.token_mask)
        if own.attention_mask is not None:
            strength = attention_bias(own.attention_mask, rows.dtype)
            self_mask = strength if self_mask is None else _both(strength, self_mask)
        inputs = StreamInputs(
            modulation=Modulation(rows, own.level_index),
            prompt_modulation=prompt,
            cross_modulation=cross[0],
            cross_gate=cross[1],
            cross_rope=cross[2],
            context=self._context(shape, own, rows.dtype),
            context_mask=key_bias(own.context_mask),
            rope=self._rope(mid_points, shape.max_pos, shape.dim),
            self_mask=self_mask,
            key_mask=key_bias(own.token_mask),
            enabled=own.enabled,
        )
        return inputs, embedded

    def _cross_inputs(self, shape: StreamShape, own: Modality, other: Modality) -> tuple[Modulation, Modulation, RopeTable]:
        """Modulation, gate and time-only positions of the cross attentions, by the chosen timestep rule."""
        config, rule = self.config, self.timestep_rule
        names = ("av_ca_audio_scale_shift_adaln_single", "av_ca_v2a_gate_adaln_single")
        if not shape.prefix:
            names = ("av_ca_video_scale_shift_adaln_single", "av_ca_a2v_gate_adaln_single")
        own_levels = (own.levels, own.level_index)
        other_level = (other.sigma[:, None], None)
        levels, index = other_level if rule == "cross" else own_levels
        rows, _ = self.get_submodule(names[0])(levels * config.timestep_scale_multiplier)
        gate_levels, gate_index = own_levels if rule == "own" else other_level
        gate, _ = self.get_submodule(names[1])(gate_levels * config.av_ca_timestep_scale_multiplier)
        times = own.positions[:, :1].float().mean(-1)
        longest = max(config.positional_embedding_max_pos[0], config.audio_positional_embedding_max_pos[0])
        return Modulation(rows, index), Modulation(gate, gate_index), self._rope(times, (longest,), config.audio_cross_attention_dim)

    def _context(self, shape: StreamShape, own: Modality, dtype: torch.dtype) -> Tensor:
        context = own.context.to(dtype)
        if self.config.has_caption_projection:
            context = self.get_submodule(f"{shape.prefix}caption_projection")(context)
        return context

    def _rope(self, mid_points: Tensor, max_pos: tuple[int, ...], dim: int) -> RopeTable:
        config = self.config
        double = config.frequencies_precision == "float64"
        return rope_table(
            mid_points, max_pos, dim=dim, heads=config.num_attention_heads, theta=config.positional_embedding_theta, double=double
        )

    def _head(self, shape: StreamShape, own: Modality, x: Tensor, embedded: Tensor) -> Tensor:
        rows = Modulation(embedded[:, :, None], own.level_index).plus(self.get_parameter(f"{shape.prefix}scale_shift_table"))
        normed = F.layer_norm(x, (x.shape[-1],), eps=self.config.norm_eps)
        return self.get_submodule(f"{shape.prefix}proj_out")(modulate(normed, rows.row(0), rows.row(1)))


def _shape(config: TransformerConfig, stream: str) -> StreamShape:
    if stream == "video":
        return StreamShape("", config.video_dim, config.in_channels, config.out_channels, config.positional_embedding_max_pos)
    return StreamShape(
        "audio_", config.audio_dim, config.audio_in_channels, config.audio_out_channels, config.audio_positional_embedding_max_pos
    )


def _with_absent(skip: Skip, source: Modality | None) -> Skip:
    """A sample whose source stream is absent skips what it would have heard or seen of it."""
    if source is None or source.present is None or skip is True:
        return skip
    return ~source.present if skip is False else skip | ~source.present


def _both(strength: Tensor, keys: Tensor) -> Tensor:
    """An attention mask (bool or additive) and a bool key mask together."""
    if strength.dtype == torch.bool:
        return strength & keys
    return strength.masked_fill(~keys, torch.finfo(strength.dtype).min)
