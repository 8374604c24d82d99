"""Clips longer than the model, or the card, takes at once: windows that overlap in both streams, denoised together.

At every step each window is predicted by itself, as a piece of the clip at its own time, and where windows overlap their predictions are
blended, by weights that rise and fall over the overlap. The step is then taken for the clip as a whole. So there is no seam to be joined
afterwards, neighbors agree from the first step on, and pictures and sound are cut at the same moments. What a step takes on the card is one
window's, whatever the length of the clip. (Bar-Tal et al. 2023, "MultiDiffusion", arXiv 2302.08113, in time and in two streams.)

Rotary positions are relative, so a window deep in a clip is to the model what one at its beginning is, but for the first latent frame.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.conditioning.tokens import NoiseShare, TokenStream
from musubi_tuner.ltxv2 import geometry


@dataclass(frozen=True, slots=True)
class WindowSize:
    """In latent frames, each eight of the clip but for the first of all."""

    frames: int
    overlap: int


@dataclass(frozen=True, slots=True)
class Span:
    """One window's part of one stream."""

    start: int
    end: int
    weights: Tensor
    """(end - start,) float32: of its predictions, 1 but where it overlaps another window"""


def spans_of(frames: int, steps: int, fps: float, size: WindowSize) -> list[dict[str, Span]]:
    """The windows of a clip of `frames` latent frames and `steps` of sound, by stream; the last one is moved back to be whole.

    Sound is cut where the pictures are, at the step that begins nearest.
    """
    if frames <= size.frames:
        whole = {"video": frames, "audio": steps}
        return [{name: Span(0, count, torch.ones(count)) for name, count in whole.items()}]
    stride = size.frames - size.overlap
    starts = [*range(0, frames - size.frames, stride), frames - size.frames]
    ends = [start + size.frames for start in starts]
    video = [_span(starts, ends, place, frames) for place in range(len(starts))]
    bounds = geometry.frame_bounds(frames) / fps
    begins = geometry.audio_positions(steps, 1)[0, 0, :, 0]
    step_at = [int((begins - time).abs().argmin()) for time in bounds[:, 0].tolist()] + [steps]
    step_starts = [step_at[start] if start else 0 for start in starts]
    step_ends = [step_at[end] if end < frames else steps for end in ends]
    audio = [_span(step_starts, step_ends, place, steps) for place in range(len(starts))]
    return [{"video": one, "audio": other} for one, other in zip(video, audio, strict=True)]


def _span(starts: list[int], ends: list[int], place: int, count: int) -> Span:
    """Weights rise over what it shares with the window before and fall over what it shares with the next."""
    start, end = starts[place], ends[place]
    weights = torch.ones(end - start)
    if place and (shared := ends[place - 1] - start) > 0:
        weights[:shared] = torch.minimum(weights[:shared], (torch.arange(shared) + 0.5) / shared)
    if place + 1 < len(starts) and (shared := end - starts[place + 1]) > 0:
        weights[-shared:] = torch.minimum(weights[-shared:], (torch.arange(shared).flip(0) + 0.5) / shared)
    return Span(start, end, weights)


@dataclass(frozen=True, slots=True)
class Piece:
    """A window of one stream's tokens."""

    stream: TokenStream
    index: Tensor
    """(n,) its tokens in the clip's stream, those of keyframes and references behind"""
    weights: Tensor
    """(n, 1) float32"""


def cut(stream: TokenStream, span: Span, *, tokens: int, per_cell: int) -> Piece:
    """A window of a stream, with all that is shown beside the clip.

    Args:
        tokens: of the clip itself; those of keyframes and references come behind.
        per_cell: tokens of one latent frame, or of one step of sound.
    """
    device = stream.clean.device
    own = torch.arange(span.start * per_cell, span.end * per_cell, device=device)
    index = torch.cat([own, torch.arange(tokens, stream.clean.shape[1], device=device)])
    weights = torch.ones(len(index), 1, device=device)
    weights[: len(own), 0] = span.weights.to(device).repeat_interleave(per_cell)

    def chosen(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[:, index]

    piece = dataclasses.replace(
        stream,
        clean=stream.clean[:, index],
        positions=stream.positions[:, :, index],
        noisy=chosen(stream.noisy),
        weight=chosen(stream.weight),
        token_mask=chosen(stream.token_mask),
        keyframe_marker=chosen(stream.keyframe_marker),
        attention=None if stream.attention is None else dataclasses.replace(stream.attention, own=len(own)),
        share=None if stream.share is None else NoiseShare(stream.share.shares, stream.share.index[:, index]),
    )
    return Piece(piece, index, weights)
