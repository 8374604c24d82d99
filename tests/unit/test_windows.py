"""Long clips in windows: what windows cover, how they blend, and that a clip of one window is the clip itself."""

import dataclasses

import pytest
import torch

from musubi_tuner.conditioning.conditions import Conditions, KeyframeLatents, StreamConditions
from musubi_tuner.generation import denoise
from musubi_tuner.generation.denoise import generate
from musubi_tuner.generation.encode import ConditioningLatents
from musubi_tuner.generation.windows import WindowSize, spans_of
from musubi_tuner.ltxv2 import geometry
from tests import preview_parts as parts


@pytest.fixture(scope="module")
def wrapper(tiny_family):
    return parts.load_wrapper(tiny_family.ltx23)


@pytest.mark.parametrize(("frames", "size"), [(16, WindowSize(6, 2)), (31, WindowSize(16, 4)), (13, WindowSize(6, 1))])
def test_windows_cover_both_streams_at_the_same_seconds_and_their_weights_add_up(frames, size):
    fps = 24.0
    steps = geometry.audio_latent_steps((frames - 1) * 8 + 1, fps)
    spans = spans_of(frames, steps, fps, size)
    for name, count in (("video", frames), ("audio", steps)):
        total = torch.zeros(count)
        for window in spans:
            total[window[name].start : window[name].end] += window[name].weights
        assert (total > 0).all()
        inner = total[: spans[-1][name].start]
        assert torch.allclose(inner, torch.ones_like(inner)), "but for the last window, which is moved back, weights add up to 1"
    assert all(window["video"].end - window["video"].start == size.frames for window in spans)
    for window in spans[1:]:
        second = geometry.frame_bounds(frames)[window["video"].start, 0] / fps
        assert abs(float(geometry.audio_positions(steps, 1)[0, 0, window["audio"].start, 0] - second)) <= 0.5 / 25 + 1e-6


def test_a_clip_that_fits_a_window_is_the_clip_itself(wrapper):
    made = parts.sample(wrapper, of_prompt=parts.prompt(frames=17))
    windowed = dataclasses.replace(made, window=WindowSize(3, 1))
    one, other = generate(wrapper, made), generate(wrapper, windowed)
    assert torch.equal(one.video, other.video) and torch.equal(one.audio, other.audio)


def test_what_the_model_sees_at_once_does_not_grow_with_the_clip(wrapper):
    longest = {}
    for frames in (49, 97):
        seen = []
        handle = wrapper.register_forward_pre_hook(
            lambda module, given, seen=seen: seen.append((given[0].latent.shape[1], given[1].latent.shape[1]))
        )
        made = dataclasses.replace(parts.sample(wrapper, of_prompt=parts.prompt(frames=frames)), window=WindowSize(4, 1))
        clip = generate(wrapper, made)
        handle.remove()
        longest[frames] = tuple(map(max, zip(*seen, strict=True)))
        assert clip.video.shape[2] == geometry.latent_frames(frames)
    assert longest[49][0] == longest[97][0] == 8 and abs(longest[49][1] - longest[97][1]) <= 1


def test_there_is_no_seam(wrapper):
    """Between latent frames, and steps of sound, at the borders of windows against those inside them, over four windows."""
    made = dataclasses.replace(parts.sample(wrapper, of_prompt=parts.prompt(frames=113)), window=WindowSize(6, 3))
    clip = generate(wrapper, made)
    spans = spans_of(15, clip.audio.shape[2], 24.0, WindowSize(6, 3))
    assert len(spans) == 4
    for name, latents in (("video", clip.video), ("audio", clip.audio)):
        jumps = (latents[:, :, 1:] - latents[:, :, :-1]).flatten(3).norm(dim=3).mean((0, 1))
        borders = {edge - 1 for window in spans for edge in (window[name].start, window[name].end) if 0 < edge < latents.shape[2]}
        at = torch.stack([jumps[place] for place in borders]).mean()
        inside = torch.stack([jump for place, jump in enumerate(jumps) if place not in borders]).mean()
        assert at < 1.25 * inside, name


def test_windows_without_overlap_in_weight_would_show_one(wrapper, monkeypatch):
    """The same measure finds windows that are sampled apart."""
    from musubi_tuner.generation.windows import Span

    def apart(frames, steps, fps, size):
        edges = [0, 5, 10, 15]
        cut = [round(edge / 15 * steps) for edge in edges]
        return [
            {"video": Span(a, b, torch.ones(b - a)), "audio": Span(c, d, torch.ones(d - c))}
            for a, b, c, d in zip(edges, edges[1:], cut, cut[1:], strict=False)
        ]

    monkeypatch.setattr(denoise, "spans_of", apart)
    made = dataclasses.replace(parts.sample(wrapper, of_prompt=parts.prompt(frames=113)), window=WindowSize(5, 0))
    latents = generate(wrapper, made).video
    jumps = (latents[:, :, 1:] - latents[:, :, :-1]).flatten(3).norm(dim=3).mean((0, 1))
    assert jumps[[4, 9]].mean() > jumps[[2, 6, 7, 12]].mean()


def test_conditioning_reaches_its_window_and_keyframes_all_of_them(wrapper):
    latents = torch.zeros(1, 128, 7, 1, 2)
    latents[:, :, 0] = 1.5
    clean = (torch.arange(14) < 2)[None]
    beside = KeyframeLatents(
        latents=torch.ones(1, 128, 1, 1, 2), frames=torch.tensor([[48]]), fps=torch.tensor([24.0]), strengths=torch.tensor([[0.5]])
    )
    own = StreamConditions(clean=clean, keyframes=beside)
    made = dataclasses.replace(
        parts.sample(wrapper, of_prompt=parts.prompt(frames=49)),
        conditioning=ConditioningLatents(video=latents, conditions=Conditions(video=own)),
        window=WindowSize(4, 2),
    )
    clip = generate(wrapper, made)
    assert clip.video.shape == (1, 128, 7, 1, 2)
    assert torch.allclose(clip.video[:, :, 0], latents[:, :, 0], atol=1e-5) and not torch.allclose(clip.video[:, :, 1], latents[:, :, 0])
