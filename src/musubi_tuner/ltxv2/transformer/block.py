"""One transformer block: video, audio, and the two cross attentions between them (architecture sheet 2.6).

Written to compile as one graph for all blocks: no block index, no autocast, no mask where it is all ones, no host sync.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.ltxv2.transformer.adaln import Modulation, modulate
from musubi_tuner.ltxv2.transformer.attention import Attention
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.feed_forward import FeedForward
from musubi_tuner.ltxv2.transformer.modality import Skip
from musubi_tuner.ltxv2.transformer.rope import RopeTable

SCALE_A2V, SHIFT_A2V, SCALE_V2A, SHIFT_V2A, GATE = range(5)
"""Rows of the cross-attention tables; note that scale comes before shift here, and after it everywhere else."""


class StreamInputs(NamedTuple):
    """What every block reads of one stream; the same for all blocks of a step."""

    modulation: Modulation
    """(B, U, 6 or 9, D)"""
    prompt_modulation: Modulation | None
    """(B, 1, 2, D) for the text's keys and values; None in 2.0 and where only the static table is used."""
    cross_modulation: Modulation | None
    """(B, U, 4, D); None in models of one stream, as the two below."""
    cross_gate: Modulation | None
    """(B, U, 1, D)"""
    cross_rope: RopeTable | None
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


def sequence_axes(
    video: Tensor | None, audio: Tensor | None, v: StreamInputs | None, a: StreamInputs | None, skips: BlockSkips
) -> list[tuple[Tensor, int]]:
    """Axes of a block's arguments whose length follows the clip: a compiled block takes any, without compiling again."""
    found: list[tuple[Tensor | None, int]] = [(video, 1), (audio, 1)]
    for inputs in (v, a):
        if inputs is None:
            continue
        for table in (inputs.rope, inputs.cross_rope):
            found += [] if table is None else [(table.cos, 2), (table.sin, 2)]
        for modulation in (inputs.modulation, inputs.cross_modulation, inputs.cross_gate):
            found += [] if modulation is None else [(modulation.index, 1)]
        found += [(inputs.self_mask, 3), (inputs.key_mask, 3)]
        if inputs.self_mask is not None and inputs.self_mask.shape[2] > 1:
            found.append((inputs.self_mask, 2))
    return [(tensor, axis) for tensor, axis in found if tensor is not None]


class Block(nn.Module):
    """`streams` is ("video", "audio"), ("video",) or ("audio",)."""

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

    def forward(
        self, video: Tensor | None, audio: Tensor | None, v: StreamInputs | None, a: StreamInputs | None, skips: BlockSkips
    ) -> tuple[Tensor | None, Tensor | None]:
        """States (B, N, D) of both streams in, the next states out; a stream that is absent is None."""
        runs_video = v is not None and v.enabled
        runs_audio = a is not None and a.enabled
        if runs_video:
            video = self._attend_self_and_text(video, v, "", skips.video_self)
        if runs_audio:
            audio = self._attend_self_and_text(audio, a, "audio_", skips.audio_self)
        if v is not None and a is not None:
            video, audio = self._attend_across(video, audio, v, a, skips)
        if runs_video:
            video = self._feed_forward(video, v, "")
        if runs_audio:
            audio = self._feed_forward(audio, a, "audio_")
        return video, audio

    def _rms(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=self.eps)

    def _attend_self_and_text(self, x: Tensor, inputs: StreamInputs, prefix: str, skip: Skip) -> Tensor:
        rows = inputs.modulation.plus(getattr(self, f"{prefix}scale_shift_table"))
        h = modulate(self._rms(x), rows.row(0), rows.row(1))
        attended = getattr(self, f"{prefix}attn1")(h, h, query_rope=inputs.rope, key_rope=inputs.rope, mask=inputs.self_mask, skip=skip)
        x = x + rows.row(2) * attended
        text_attention = getattr(self, f"{prefix}attn2")
        if not self.modulates_text:
            return x + text_attention(self._rms(x), inputs.context, mask=inputs.context_mask)
        table = getattr(self, f"{prefix}prompt_scale_shift_table")
        if inputs.prompt_modulation is None:
            text_shift, text_scale = table[0].to(x.dtype), table[1].to(x.dtype)
        else:
            text_rows = inputs.prompt_modulation.plus(table)
            text_shift, text_scale = text_rows.row(0), text_rows.row(1)
        h = modulate(self._rms(x), rows.row(6), rows.row(7))
        return x + rows.row(8) * text_attention(h, modulate(inputs.context, text_shift, text_scale), mask=inputs.context_mask)

    def _attend_across(self, video: Tensor, audio: Tensor, v: StreamInputs, a: StreamInputs, skips: BlockSkips) -> tuple[Tensor, Tensor]:
        video_table, audio_table = self.scale_shift_table_a2v_ca_video, self.scale_shift_table_a2v_ca_audio
        v_rows, a_rows = v.cross_modulation.plus(video_table[:GATE]), a.cross_modulation.plus(audio_table[:GATE])
        v_normed, a_normed = self._rms(video), self._rms(audio)
        video_next, audio_next = video, audio
        if v.enabled and skips.audio_to_video is not True:
            heard = self.audio_to_video_attn(
                modulate(v_normed, v_rows.row(SHIFT_A2V), v_rows.row(SCALE_A2V)),
                modulate(a_normed, a_rows.row(SHIFT_A2V), a_rows.row(SCALE_A2V)),
                query_rope=v.cross_rope,
                key_rope=a.cross_rope,
                mask=a.key_mask,
            )
            video_next = video + v.cross_gate.plus(video_table[GATE:]).row(0) * _kept(heard, skips.audio_to_video)
        if a.enabled and skips.video_to_audio is not True:
            seen = self.video_to_audio_attn(
                modulate(a_normed, a_rows.row(SHIFT_V2A), a_rows.row(SCALE_V2A)),
                modulate(v_normed, v_rows.row(SHIFT_V2A), v_rows.row(SCALE_V2A)),
                query_rope=a.cross_rope,
                key_rope=v.cross_rope,
                mask=v.key_mask,
            )
            audio_next = audio + a.cross_gate.plus(audio_table[GATE:]).row(0) * _kept(seen, skips.video_to_audio)
        return video_next, audio_next

    def _feed_forward(self, x: Tensor, inputs: StreamInputs, prefix: str) -> Tensor:
        rows = inputs.modulation.plus(getattr(self, f"{prefix}scale_shift_table"))
        h = modulate(self._rms(x), rows.row(3), rows.row(4))
        return x + rows.row(5) * getattr(self, f"{prefix}ff")(h)


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
