"""What of a sample is given, in latents: the same conditions that a training batch carries."""

from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.conditioning.conditions import NO_CONDITIONS, Conditions
from musubi_tuner.ltxv2 import geometry
from musubi_tuner.prompts.sample_prompts import ConditioningInputs, PreviewPrompt, Span


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """Of one sample; batch 1."""

    video: Tensor | None = None
    """(1, 128, F, h, w) latents, zero where they are to be generated; None = nothing of them is given."""
    audio: Tensor | None = None
    """(1, 8, T, 16)"""
    conditions: Conditions = NO_CONDITIONS


TEXT_ALONE = Given()


def video_cells(prompt: PreviewPrompt) -> tuple[int, int, int]:
    """(F, h, w) in latent cells."""
    width, height = geometry.latent_size(prompt.width, prompt.height)
    return geometry.latent_frames(prompt.frames), height, width


def audio_steps(prompt: PreviewPrompt) -> int:
    return geometry.audio_latent_steps(prompt.frames, prompt.fps)


def kept_video(prompt: PreviewPrompt) -> Tensor:
    """(F, h, w) bool: cells of the input clip that are kept. What is generated lies in the span and in the box (around the crop)."""
    inputs, cells = prompt.inputs, video_cells(prompt)
    if inputs.video is None:
        return torch.zeros(cells, dtype=torch.bool)
    if inputs.video_span is None and inputs.box is None and inputs.crop is None:
        return torch.ones(cells, dtype=torch.bool)
    times = geometry.frame_bounds(cells[0]) / prompt.fps
    return ~(_within(times, inputs.video_span)[:, None, None] & _generated_area(inputs, cells))


def kept_sound(prompt: PreviewPrompt) -> Tensor:
    """(T,) bool: steps of the input sound that are kept."""
    steps = audio_steps(prompt)
    if prompt.inputs.audio is None or prompt.inputs.audio_span is None:
        return torch.full((steps,), prompt.inputs.audio is not None)
    return ~_within(geometry.audio_positions(steps, 1)[0, 0], prompt.inputs.audio_span)


def keyframe_cell(frame: int) -> int:
    """Latent frame that holds a frame: 0 holds the first one alone, each other holds eight."""
    return -(-frame // geometry.TEMPORAL_SCALE)


def _within(bounds: Tensor, span: Span | None) -> Tensor:
    """(n,) bool of (n, 2) seconds [start, end): those that the span touches; all where there is none."""
    if span is None:
        return torch.ones(len(bounds), dtype=torch.bool)
    slack = 1e-6
    return (bounds[:, 0] < span.end - slack) & (bounds[:, 1] > span.start + slack)


def _generated_area(inputs: ConditioningInputs, cells: tuple[int, int, int]) -> Tensor:
    area = inputs.box or inputs.crop
    if area is None:
        return torch.ones(cells, dtype=torch.bool)
    inside = torch.zeros(cells, dtype=torch.bool)
    top, left, rows, columns = (value // geometry.SPATIAL_SCALE for value in (area.top, area.left, area.height, area.width))
    inside[:, top : top + rows, left : left + columns] = True
    return inside if inputs.box is not None else ~inside
