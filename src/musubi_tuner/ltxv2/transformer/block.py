"""One transformer block: video, audio, and the two cross attentions between them (docs/explanation/model.md, "blocks").

Written to compile as one graph for all blocks: no block index, no autocast, no mask where it is all ones, no host sync.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.ltxv2.transformer.adaln import Modulation, modulate
from musubi_tuner.ltxv2.transformer.attention import Attention, RopeTable
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.modality import Skip

SCALE_A2V, SHIFT_A2V, SCALE_V2A, SHIFT_V2A, GATE = range(5)
"""Rows of the cross-attention tables; note that scale comes before shift here, and after it everywhere else."""


class CrossInputs(NamedTuple):
    """What the cross attentions between the streams read of one of them."""

    modulation: Modulation
    """(B, U, 4, D)"""
    gate: Modulation
    """(B, U, 1, D)"""
    rope: RopeTable
    """Of time alone."""


class StreamInputs(NamedTuple):
    """What every block reads of one stream; the same for all blocks of a step."""

    modulation: Modulation
    """(B, U, 6 or 9, D)"""
    prompt_modulation: Modulation | None
    """(B, 1, 2, D) for the text's keys and values; None in 2.0 and where only the static table is used."""
    cross: CrossInputs | None
    """None where the other stream is absent."""
    context: Tensor
    """(B, S, context width)"""
    context_mask: Tensor | None
    """(B, 1, 1, S)"""
    rope: RopeTable
    self_mask: Tensor | None
    """(B, 1, N or 1, N)"""
    key_mask: Tensor | None
    """(B, 1, 1, N) for the other stream's queries."""
    enabled: bool


class BlockSkips(NamedTuple):
    """What one block leaves out."""

    video_self: Skip = False
    audio_self: Skip = False
    audio_to_video: Skip = False
    video_to_audio: Skip = False


class BlockInputs(NamedTuple):
    """What a block reads beside its states."""

    video: StreamInputs | None
    """None where the stream is absent, as is `audio`."""
    audio: StreamInputs | None
    skips: BlockSkips


States = tuple[Tensor | None, Tensor | None]
"""(B, N, D) of video and audio; None where the stream is absent. A block takes them and returns the next ones."""


def sequence_axes(states: States, inputs: BlockInputs) -> list[tuple[Tensor, int]]:
    """Axes of a block's arguments whose length follows the clip: a compiled block takes any, without compiling again."""
    found: list[tuple[Tensor | None, int]] = [(state, 1) for state in states]
    for stream in (inputs.video, inputs.audio):
        if stream is None:
            continue
        cross = stream.cross
        for table in (stream.rope,) if cross is None else (stream.rope, cross.rope):
            found += [(table.cos, 2), (table.sin, 2)]
        for modulation in (stream.modulation,) if cross is None else (stream.modulation, cross.modulation, cross.gate):
            found.append((modulation.index, 1))
        found += [(stream.self_mask, 3), (stream.key_mask, 3)]
        if stream.self_mask is not None and stream.self_mask.shape[2] > 1:
            found.append((stream.self_mask, 2))
    return [(tensor, axis) for tensor, axis in found if tensor is not None]


class StreamLayers(NamedTuple):
    """What a block holds of one stream, under one set of names."""

    self_attention: Attention
    text_attention: Attention
    feed_forward: "FeedForward"
    table: Tensor
    """(6 or 9, D): shift, scale and gate of self-attention, of the feed-forward, and from 2.3 on of the text attention."""
    text_table: Tensor | None
    """(2, D): shift and scale of the text; None in 2.0."""


class GeluProjection(nn.Module):
    """Only there for the official name `net.0.proj`."""

    def __init__(self, dim: int, inner: int, *, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """(..., dim) -> (..., dim): linear to 4 dim, GELU (tanh), linear back, under the official names `net.0.proj` and `net.2`."""

    def __init__(self, dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.net = nn.ModuleList([GeluProjection(dim, 4 * dim, bias=bias), nn.Identity(), nn.Linear(4 * dim, dim, bias=bias)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """`streams` is ("video", "audio"), ("video",) or ("audio",). What is annotated here is there in the streams that it serves."""

    attn1: Attention
    attn2: Attention
    ff: FeedForward
    scale_shift_table: Tensor
    prompt_scale_shift_table: Tensor
    audio_attn1: Attention
    audio_attn2: Attention
    audio_ff: FeedForward
    audio_scale_shift_table: Tensor
    audio_prompt_scale_shift_table: Tensor
    audio_to_video_attn: Attention
    video_to_audio_attn: Attention
    scale_shift_table_a2v_ca_video: Tensor
    scale_shift_table_a2v_ca_audio: Tensor

    def __init__(self, config: TransformerConfig, streams: tuple[str, ...]) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.modulates_text = config.cross_attention_adaln
        if "video" in streams:
            dim = config.video_dim
            self.attn1 = _attention(config, dim, dim, config.attention_head_dim)
            self.attn2 = _attention(config, dim, config.cross_attention_dim, config.attention_head_dim)
            self.ff = FeedForward(dim, bias=config.ff_bias)
            self.scale_shift_table = nn.Parameter(torch.empty(config.modulation_rows, dim))
            if config.cross_attention_adaln:
                self.prompt_scale_shift_table = nn.Parameter(torch.empty(2, dim))
        if "audio" in streams:
            dim = config.audio_dim
            self.audio_attn1 = _attention(config, dim, dim, config.audio_attention_head_dim)
            self.audio_attn2 = _attention(config, dim, config.audio_cross_attention_dim, config.audio_attention_head_dim)
            self.audio_ff = FeedForward(dim, bias=config.audio_ff_bias)
            self.audio_scale_shift_table = nn.Parameter(torch.empty(config.modulation_rows, dim))
            if config.cross_attention_adaln:
                self.audio_prompt_scale_shift_table = nn.Parameter(torch.empty(2, dim))
        if len(streams) == 2:
            self.audio_to_video_attn = _attention(config, config.video_dim, config.audio_dim, config.audio_attention_head_dim)
            self.video_to_audio_attn = _attention(config, config.audio_dim, config.video_dim, config.audio_attention_head_dim)
            self.scale_shift_table_a2v_ca_video = nn.Parameter(torch.empty(5, config.video_dim))
            self.scale_shift_table_a2v_ca_audio = nn.Parameter(torch.empty(5, config.audio_dim))

    def video_layers(self) -> StreamLayers:
        """Looked up at each use, as weights are replaced when they are loaded or streamed."""
        text_table = self.prompt_scale_shift_table if self.modulates_text else None
        return StreamLayers(self.attn1, self.attn2, self.ff, self.scale_shift_table, text_table)

    def audio_layers(self) -> StreamLayers:
        text_table = self.audio_prompt_scale_shift_table if self.modulates_text else None
        return StreamLayers(self.audio_attn1, self.audio_attn2, self.audio_ff, self.audio_scale_shift_table, text_table)

    def forward(self, states: States, inputs: BlockInputs) -> States:
        """The next states.

        x += gate * self_attention(modulated norm of x), x += [gate *] text_attention(norm of x), then each stream attends to the other,
        then x += gate * feed_forward(modulated norm of x). A stream that is not enabled keeps its states.
        """
        v, a, skips = inputs
        streams = ((self.video_layers, v, skips.video_self), (self.audio_layers, a, skips.audio_self))
        next_states = [*states]
        for place, (layers_of, stream, skip) in enumerate(streams):
            x = next_states[place]
            if x is None or stream is None or not stream.enabled:
                continue
            layers = layers_of()
            rows = stream.modulation.plus(layers.table)
            h = modulate(self._rms(x), rows.row(0), rows.row(1))
            x = x + rows.row(2) * layers.self_attention(
                h, h, query_rope=stream.rope, key_rope=stream.rope, mask=stream.self_mask, skip=skip
            )
            next_states[place] = self._attend_to_text(x, stream, layers, rows)
        video, audio = next_states
        if video is not None and audio is not None and v is not None and a is not None:
            next_states = [*self._attend_across(video, audio, v, a, skips)]
        for place, (layers_of, stream, _) in enumerate(streams):
            x = next_states[place]
            if x is not None and stream is not None and stream.enabled:
                layers = layers_of()
                rows = stream.modulation.plus(layers.table)
                next_states[place] = x + rows.row(5) * layers.feed_forward(modulate(self._rms(x), rows.row(3), rows.row(4)))
        return next_states[0], next_states[1]

    def _rms(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=self.eps)

    def _attend_to_text(self, x: Tensor, inputs: StreamInputs, layers: StreamLayers, rows: Modulation) -> Tensor:
        table = layers.text_table
        if table is None:
            return x + layers.text_attention(self._rms(x), inputs.context, mask=inputs.context_mask)
        if inputs.prompt_modulation is None:
            text_shift, text_scale = table[0].to(x.dtype), table[1].to(x.dtype)
        else:
            text_rows = inputs.prompt_modulation.plus(table)
            text_shift, text_scale = text_rows.row(0), text_rows.row(1)
        h = modulate(self._rms(x), rows.row(6), rows.row(7))
        return x + rows.row(8) * layers.text_attention(h, modulate(inputs.context, text_shift, text_scale), mask=inputs.context_mask)

    def _attend_across(self, video: Tensor, audio: Tensor, v: StreamInputs, a: StreamInputs, skips: BlockSkips) -> tuple[Tensor, Tensor]:
        assert v.cross is not None and a.cross is not None
        video_table, audio_table = self.scale_shift_table_a2v_ca_video, self.scale_shift_table_a2v_ca_audio
        v_rows, a_rows = v.cross.modulation.plus(video_table[:GATE]), a.cross.modulation.plus(audio_table[:GATE])
        v_normed, a_normed = self._rms(video), self._rms(audio)
        video_next, audio_next = video, audio
        if v.enabled and skips.audio_to_video is not True:
            heard = self.audio_to_video_attn(
                modulate(v_normed, v_rows.row(SHIFT_A2V), v_rows.row(SCALE_A2V)),
                modulate(a_normed, a_rows.row(SHIFT_A2V), a_rows.row(SCALE_A2V)),
                query_rope=v.cross.rope,
                key_rope=a.cross.rope,
                mask=a.key_mask,
            )
            video_next = video + v.cross.gate.plus(video_table[GATE:]).row(0) * _kept(heard, skips.audio_to_video)
        if a.enabled and skips.video_to_audio is not True:
            seen = self.video_to_audio_attn(
                modulate(a_normed, a_rows.row(SHIFT_V2A), a_rows.row(SCALE_V2A)),
                modulate(v_normed, v_rows.row(SHIFT_V2A), v_rows.row(SCALE_V2A)),
                query_rope=a.cross.rope,
                key_rope=v.cross.rope,
                mask=v.key_mask,
            )
            audio_next = audio + a.cross.gate.plus(audio_table[GATE:]).row(0) * _kept(seen, skips.video_to_audio)
        return video_next, audio_next


def _attention(config: TransformerConfig, query_dim: int, context_dim: int, head_dim: int) -> Attention:
    return Attention(
        query_dim,
        context_dim,
        config.num_attention_heads,
        head_dim,
        gated=config.apply_gated_attention,
        eps=config.norm_eps,
        rope_type=config.rope_type,
    )


def _kept(contribution: Tensor, skip: Skip) -> Tensor:
    if isinstance(skip, Tensor):
        return torch.where(skip[:, None, None], torch.zeros((), dtype=contribution.dtype, device=contribution.device), contribution)
    return contribution
