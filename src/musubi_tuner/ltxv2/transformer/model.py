"""The LTX-2 transformer: tokens of one or two streams in, velocity out. Names are the official ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.ltxv2.transformer.adaln import AdaLN, Modulation, modulate
from musubi_tuner.ltxv2.transformer.attention import RopeTable, attention_bias, key_bias, reference_bias, rope_table
from musubi_tuner.ltxv2.transformer.block import Block, BlockInputs, BlockSkips, CrossInputs, States, StreamInputs
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.modality import Modality, Perturbations, ReferenceAttention, Skip, Velocity

TIMESTEP_RULES = ("official", "cross", "own")
"""Who drives the cross attentions between the streams (docs/explanation/model.md, "timestep rules").

`official` (v1.2.0): scale and shift from the stream's own tokens, gate from the other stream's sigma.
`cross` (ltx-core 1.0.0): both from the other stream's sigma. `own`: both from the stream's own tokens.
"""


class RunBlock(Protocol):
    """How a model runs each of its blocks. `memory.engine` puts checkpointing, compiled graphs and streamed weights in its place."""

    def __call__(self, block: nn.Module, states: States, inputs: BlockInputs) -> States:
        """The block's next states."""
        ...


def run_plain(block: nn.Module, states: States, inputs: BlockInputs) -> States:
    """The block's own forward pass; autograd keeps what it likes."""
    return block(states, inputs)


class TextProjection(nn.Module):
    """2.0 only: text context to the stream's width."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))


class StreamParts(NamedTuple):
    """What the model holds of one stream around its blocks, under one set of names."""

    patchify: nn.Linear
    caption_projection: TextProjection | None
    """2.0 only."""
    adaln: AdaLN
    prompt_adaln: AdaLN | None
    cross_adaln: AdaLN | None
    """Scale and shift of the cross attention into this stream; None in models of one stream, as the gate's."""
    cross_gate_adaln: AdaLN | None
    table: Tensor
    """(2, D): shift and scale before `proj_out`."""
    proj_out: nn.Linear
    keyframe_embedding: Tensor | None
    """(1, D); 2.5 only, and of video alone."""
    dim: int
    max_pos: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Entered:
    """One pass between its entry into the blocks and its way out."""

    video: Modality | None
    audio: Modality | None
    states: States
    v: StreamInputs | None
    a: StreamInputs | None
    v_embedded: Tensor | None
    a_embedded: Tensor | None
    skips: Perturbations
    skip_a2v: Skip
    skip_v2a: Skip

    def inputs_of(self, index: int) -> BlockInputs:
        own = self.skips
        skips = BlockSkips(own.skip_video_self.get(index, False), own.skip_audio_self.get(index, False), self.skip_a2v, self.skip_v2a)
        return BlockInputs(self.v, self.a, skips)


class LTXModel(nn.Module):
    """`streams` chooses the subset that is built: ("video", "audio"), ("video",) or ("audio",)."""

    patchify_proj: nn.Linear
    caption_projection: TextProjection
    adaln_single: AdaLN
    prompt_adaln_single: AdaLN
    scale_shift_table: Tensor
    proj_out: nn.Linear
    keyframes_abs_pos_embedding: Tensor
    audio_patchify_proj: nn.Linear
    audio_caption_projection: TextProjection
    audio_adaln_single: AdaLN
    audio_prompt_adaln_single: AdaLN
    audio_scale_shift_table: Tensor
    audio_proj_out: nn.Linear
    av_ca_video_scale_shift_adaln_single: AdaLN
    av_ca_audio_scale_shift_adaln_single: AdaLN
    av_ca_a2v_gate_adaln_single: AdaLN
    av_ca_v2a_gate_adaln_single: AdaLN

    def __init__(
        self, config: TransformerConfig, streams: tuple[str, ...] = ("video", "audio"), *, timestep_rule: str = "official"
    ) -> None:
        super().__init__()
        assert timestep_rule in TIMESTEP_RULES, timestep_rule
        self.config = config
        self.streams = streams
        self.timestep_rule = timestep_rule
        self.run_block: RunBlock = run_plain
        self._rotations: dict[tuple[int, tuple[int, ...], int], tuple[Tensor, RopeTable]] | None = None
        self._reference_bias: tuple[ReferenceAttention, Tensor] | None = None
        if "video" in streams:
            dim = config.video_dim
            self.patchify_proj = nn.Linear(config.in_channels, dim)
            if config.has_caption_projection:
                self.caption_projection = TextProjection(config.caption_channels, dim)
            self.adaln_single = AdaLN(dim, config.modulation_rows)
            if config.has_prompt_adaln:
                self.prompt_adaln_single = AdaLN(dim, 2)
            self.scale_shift_table = nn.Parameter(torch.empty(2, dim))
            self.proj_out = nn.Linear(dim, config.out_channels)
            if config.use_keyframes_abs_pos_embedding:
                self.keyframes_abs_pos_embedding = nn.Parameter(torch.empty(1, dim))
        if "audio" in streams:
            dim = config.audio_dim
            self.audio_patchify_proj = nn.Linear(config.audio_in_channels, dim)
            if config.has_caption_projection:
                self.audio_caption_projection = TextProjection(config.caption_channels, dim)
            self.audio_adaln_single = AdaLN(dim, config.modulation_rows)
            if config.has_prompt_adaln:
                self.audio_prompt_adaln_single = AdaLN(dim, 2)
            self.audio_scale_shift_table = nn.Parameter(torch.empty(2, dim))
            self.audio_proj_out = nn.Linear(dim, config.audio_out_channels)
        if len(streams) == 2:
            self.av_ca_video_scale_shift_adaln_single = AdaLN(config.video_dim, 4)
            self.av_ca_audio_scale_shift_adaln_single = AdaLN(config.audio_dim, 4)
            self.av_ca_a2v_gate_adaln_single = AdaLN(config.video_dim, 1)
            self.av_ca_v2a_gate_adaln_single = AdaLN(config.audio_dim, 1)
        self.transformer_blocks = nn.ModuleList([Block(config, streams) for _ in range(config.num_layers)])

    def forward(self, video: Modality | None, audio: Modality | None, perturbations: Perturbations | None = None) -> Velocity:
        """Velocity of each stream that is there and enabled.

        A stream that the model has may be left out (None): the other one then runs as if the cross attentions were off.
        """
        entered = self._enter(video, audio, perturbations)
        states = entered.states
        for index, block in enumerate(self.transformer_blocks):
            states = self.run_block(block, states, entered.inputs_of(index))
        return self._leave(entered, states)

    def forward_together(self, passes: Sequence[tuple[Modality | None, Modality | None, Perturbations | None]]) -> list[Velocity]:
        """What `forward` gives for each of several passes, bit for bit; without gradients. Each block runs them all before the next block
        does, so that weights that are streamed are copied once."""
        together = getattr(self.run_block, "together", self._together)
        entered = [self._enter(*one) for one in passes]
        states = [one.states for one in entered]
        for index, block in enumerate(self.transformer_blocks):
            states = together(block, states, [one.inputs_of(index) for one in entered])
        return [self._leave(one, after) for one, after in zip(entered, states, strict=True)]

    @contextmanager
    def remembering_positions(self) -> Iterator[None]:
        """Inside, rotations are computed once for each tensor of positions, and the mask of a reference once for all passes, neither of
        which may be written to: around the sampling of a clip."""
        self._rotations = {}
        try:
            yield
        finally:
            self._rotations = self._reference_bias = None

    def _together(self, block: nn.Module, states: Sequence[States], inputs: Sequence[BlockInputs]) -> list[States]:
        return [self.run_block(block, one, given) for one, given in zip(states, inputs, strict=True)]

    def _enter(self, video: Modality | None, audio: Modality | None, perturbations: Perturbations | None) -> "_Entered":
        skips = perturbations or Perturbations()
        skip_a2v, skip_v2a = _with_absent(skips.skip_audio_to_video, audio), _with_absent(skips.skip_video_to_audio, video)
        states: States = (None, None)
        v = a = v_embedded = a_embedded = None
        if video is not None:
            states = (_embed_tokens(self.video_parts(), video), None)
            v, v_embedded = self._stream_inputs(self.video_parts(), video, audio)
        if audio is not None:
            states = (states[0], _embed_tokens(self.audio_parts(), audio))
            a, a_embedded = self._stream_inputs(self.audio_parts(), audio, video)
        return _Entered(video, audio, states, v, a, v_embedded, a_embedded, skips, skip_a2v, skip_v2a)

    def _leave(self, entered: "_Entered", states: States) -> Velocity:
        video, audio = entered.video, entered.audio
        return Velocity(
            self._head(self.video_parts(), video, states[0], entered.v_embedded) if video is not None and video.enabled else None,
            self._head(self.audio_parts(), audio, states[1], entered.a_embedded) if audio is not None and audio.enabled else None,
        )

    def video_parts(self) -> StreamParts:
        """Looked up at each use, as weights are replaced when they are loaded."""
        config, crosses = self.config, len(self.streams) == 2
        return StreamParts(
            patchify=self.patchify_proj,
            caption_projection=self.caption_projection if config.has_caption_projection else None,
            adaln=self.adaln_single,
            prompt_adaln=self.prompt_adaln_single if config.has_prompt_adaln else None,
            cross_adaln=self.av_ca_video_scale_shift_adaln_single if crosses else None,
            cross_gate_adaln=self.av_ca_a2v_gate_adaln_single if crosses else None,
            table=self.scale_shift_table,
            proj_out=self.proj_out,
            keyframe_embedding=self.keyframes_abs_pos_embedding if config.use_keyframes_abs_pos_embedding else None,
            dim=config.video_dim,
            max_pos=config.positional_embedding_max_pos,
        )

    def audio_parts(self) -> StreamParts:
        config, crosses = self.config, len(self.streams) == 2
        return StreamParts(
            patchify=self.audio_patchify_proj,
            caption_projection=self.audio_caption_projection if config.has_caption_projection else None,
            adaln=self.audio_adaln_single,
            prompt_adaln=self.audio_prompt_adaln_single if config.has_prompt_adaln else None,
            cross_adaln=self.av_ca_audio_scale_shift_adaln_single if crosses else None,
            cross_gate_adaln=self.av_ca_v2a_gate_adaln_single if crosses else None,
            table=self.audio_scale_shift_table,
            proj_out=self.audio_proj_out,
            keyframe_embedding=None,
            dim=config.audio_dim,
            max_pos=config.audio_positional_embedding_max_pos,
        )

    def _stream_inputs(self, parts: StreamParts, own: Modality, other: Modality | None) -> tuple[StreamInputs, Tensor]:
        """What all blocks read of a stream, and the embedded noise levels (B, U, D) of its head."""
        config = self.config
        rows, embedded = parts.adaln(own.levels * config.timestep_scale_multiplier)
        prompt = None
        if parts.prompt_adaln is not None:
            prompt_rows, _ = parts.prompt_adaln(own.sigma[:, None] * config.timestep_scale_multiplier)
            prompt = Modulation(prompt_rows, None)
        assert own.context is not None, "the wrapper gives the context"
        context = own.context.to(rows.dtype)
        inputs = StreamInputs(
            modulation=Modulation(rows, own.level_index),
            prompt_modulation=prompt,
            cross=None if other is None else self._cross_inputs(parts, own, other),
            context=context if parts.caption_projection is None else parts.caption_projection(context),
            context_mask=key_bias(own.context_mask),
            rope=self._rope(own.positions, parts.max_pos, parts.dim),
            self_mask=self._self_mask(own, rows.dtype),
            key_mask=key_bias(own.token_mask),
            enabled=own.enabled,
        )
        return inputs, embedded

    def _self_mask(self, own: Modality, dtype: torch.dtype) -> Tensor | None:
        """(B, 1, N or 1, N) of a stream's attention to itself."""
        keys = key_bias(own.token_mask)
        if own.reference_attention is not None:
            strength = self._mask_of_reference(own.reference_attention, dtype)
        elif own.attention_mask is not None:
            strength = attention_bias(own.attention_mask, dtype)
        else:
            return keys
        if keys is None:
            return strength
        return strength & keys if strength.dtype == torch.bool else strength.masked_fill(~keys, torch.finfo(dtype).min)

    def _mask_of_reference(self, attention: ReferenceAttention, dtype: torch.dtype) -> Tensor:
        """Of the clip, or window of it, that was last asked for: it is as large as all pairs of tokens."""
        if self._reference_bias is not None and self._reference_bias[0] is attention:
            return self._reference_bias[1]
        self._reference_bias = None
        bias = reference_bias(attention, dtype)
        if self._rotations is not None:
            self._reference_bias = (attention, bias)
        return bias

    def _cross_inputs(self, parts: StreamParts, own: Modality, other: Modality) -> CrossInputs:
        """Modulation, gate and time-only positions of the cross attentions, by the chosen timestep rule."""
        config, rule = self.config, self.timestep_rule
        assert parts.cross_adaln is not None and parts.cross_gate_adaln is not None
        own_levels, other_level = (own.levels, own.level_index), (other.sigma[:, None], None)
        levels, index = other_level if rule == "cross" else own_levels
        rows, _ = parts.cross_adaln(levels * config.timestep_scale_multiplier)
        gate_levels, gate_index = own_levels if rule == "own" else other_level
        gate, _ = parts.cross_gate_adaln(gate_levels * config.av_ca_timestep_scale_multiplier)
        longest = max(config.positional_embedding_max_pos[0], config.audio_positional_embedding_max_pos[0])
        rope = self._rope(own.positions, (longest,), config.audio_cross_attention_dim)
        return CrossInputs(Modulation(rows, index), Modulation(gate, gate_index), rope)

    def _rope(self, positions: Tensor, max_pos: tuple[int, ...], dim: int) -> RopeTable:
        """Of as many axes of (B, P, N, 2) positions as there are longest ones, from the first."""
        key = (id(positions), max_pos, dim)
        if self._rotations is not None and key in self._rotations:
            return self._rotations[key][1]
        config = self.config
        table = rope_table(
            positions[:, : len(max_pos)].float().mean(-1),
            max_pos,
            dim=dim,
            heads=config.num_attention_heads,
            theta=config.positional_embedding_theta,
            double=config.frequencies_precision == "float64",
        )
        if self._rotations is not None:
            self._rotations[key] = (positions, table)  # which keeps the tensor, and so its id
        return table

    def _head(self, parts: StreamParts, own: Modality, x: Tensor | None, embedded: Tensor | None) -> Tensor:
        assert x is not None and embedded is not None
        rows = Modulation(embedded[:, :, None], own.level_index).plus(parts.table)
        normed = F.layer_norm(x, (x.shape[-1],), eps=self.config.norm_eps)
        return parts.proj_out(modulate(normed, rows.row(0), rows.row(1)))


def _embed_tokens(parts: StreamParts, stream: Modality) -> Tensor:
    tokens = parts.patchify(stream.latent.to(parts.patchify.weight.dtype))
    if stream.keyframe_marker is not None and parts.keyframe_embedding is not None:
        tokens = tokens + stream.keyframe_marker[..., None].to(tokens.dtype) * parts.keyframe_embedding.to(tokens.dtype)
    return tokens


def _with_absent(skip: Skip, source: Modality | None) -> Skip:
    """A sample whose source stream is absent skips what it would have heard or seen of it."""
    if source is None or source.present is None or skip is True:
        return skip
    return ~source.present if skip is False else skip | ~source.present
