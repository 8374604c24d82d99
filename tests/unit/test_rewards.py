"""Formulas of the built-in rewards on synthetic media whose order is known."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from musubi_tuner.media.audio import Waveform
from musubi_tuner.reinforcement.rewards.base import Reward, RewardSample
from musubi_tuner.reinforcement.rewards.onsets import Onsets, agreement
from musubi_tuner.reinforcement.rewards.picture import Motion, Saturation, sharpness
from musubi_tuner.reinforcement.rewards.sound import SILENT, Clipping, Silence, loudness

CPU = torch.device("cpu")
RATE, FPS, FRAMES = 48_000, 24.0, 48


def tone(level: float, hertz: float = 997.0, seconds: float = 2.0, rate: int = RATE) -> Waveform:
    wave = level * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * rate)) / rate)
    return Waveform(wave.expand(2, -1).clone(), rate)


def score(reward: Reward, frames: Tensor | None = None, sound: Waveform | None = None, **arguments: object) -> float:
    reward.setup(CPU, **arguments)
    (found,) = reward.score([RewardSample(name="a", group=0, prompt="", fps=FPS, decoded_frames=frames, decoded_sound=sound)])
    assert isinstance(found, float)
    return found


def test_loudness_is_that_of_the_recommendation():
    """BS.1770: a full-scale sine of 997 Hz on one channel reads -3.01 LKFS; both channels are 3.01 more."""
    one = tone(1.0)
    one.samples[1] = 0
    assert loudness(one) == pytest.approx(-3.01, abs=0.01)
    assert loudness(tone(1.0)) == pytest.approx(0.0, abs=0.01)
    assert loudness(tone(0.1, rate=44_100)) == pytest.approx(-20.0, abs=0.01)
    assert loudness(tone(1.0, hertz=30)) < -5 and loudness(tone(1.0, hertz=6000)) > 3, "a shelf above, a high pass below"


def test_loudness_leaves_silence_out():
    """Its gates: half of it silent is as loud as none of it, but for the blocks between."""
    half = tone(0.1, seconds=8)
    half.samples[:, : 4 * RATE] = 0
    assert loudness(half) == pytest.approx(-20, abs=0.3)
    assert loudness(tone(0.0)) == SILENT and loudness(tone(1e-6)) == SILENT
    assert loudness(tone(0.1, seconds=0.1)) == pytest.approx(-20, abs=0.5), "shorter than a block"


def test_silence_and_clipping_are_shares():
    half = tone(0.5)
    half.samples[:, :RATE] = 0
    assert [score(Silence(), sound=sound) for sound in (tone(0.5), half, tone(0.001), tone(0.0))] == [0.0, -0.5, -1.0, -1.0]
    assert score(Silence(), sound=tone(0.001), below=-80.0) == 0.0
    assert score(Clipping(), sound=tone(0.9)) == 0.0
    loud, louder = (Waveform((tone(1.0).samples * gain).clamp(-1, 1), RATE) for gain in (2.0, 8.0))
    assert score(Clipping(), sound=loud) == pytest.approx(-(1 - 2 * math.asin(0.99 / 2) / math.pi), abs=1e-3)
    assert score(Clipping(), sound=louder) < score(Clipping(), sound=loud) < 0


def disc(radius: float = 30.0, x: float = 64.0, size: int = 128) -> Tensor:
    """(H, W) in 0..255."""
    rows, columns = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    return (((columns - x) ** 2 + (rows - size / 2) ** 2).sqrt() < radius).float() * 150 + 50 + ((rows // 16 + columns // 16) % 2) * 30


def film(*pictures: Tensor) -> Tensor:
    """(F, H, W, 3) of gray pictures, or of colored ones."""
    frames = torch.stack([one if one.ndim == 3 else one[..., None].expand(-1, -1, 3) for one in pictures])
    return frames.round().clamp(0, 255).to(torch.uint8)


def blurred(picture: Tensor, times: int) -> Tensor:
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None] / 16
    for _ in range(times):
        picture = functional.conv2d(functional.pad(picture[None, None], (1, 1, 1, 1), mode="replicate"), kernel)[0, 0]
    return picture


def test_sharper_pictures_score_higher():
    found = [sharpness(film(blurred(disc(), times))) for times in (0, 1, 4, 16, 64)]
    assert found == sorted(found, reverse=True) and found[0] > 3 * found[-1] > 0
    assert sharpness(film(torch.full((64, 64), 120.0))) == 0.0


def test_noise_does_not_make_a_picture_sharp(global_seed):
    """Of any strength, on a sharp picture or a blurred one; noise alone scores least, whether of single pixels or coarser, or salt."""
    for picture in (disc(), blurred(disc(), 16)):
        found = [sharpness(film(picture + strength * torch.randn(128, 128))) for strength in (0, 3, 10, 30, 90)]
        assert max(found[1:]) < found[0] and found[2] < 0.8 * found[0] and found[4] < 0.05 * found[0]
    soft = sharpness(film(blurred(disc(), 64)))
    for strength in (2, 10, 40, 120):
        assert sharpness(film(128 + strength * torch.randn(128, 128))) < 0.1 * soft
    coarse = blurred(torch.randn(128, 128), 2)
    assert sharpness(film(128 + 50 * coarse / coarse.std())) < 0.5 * soft
    assert sharpness(film(blurred(disc(), 16) + 200 * (torch.rand(128, 128) < 0.05))) < 0.1 * soft


def test_more_motion_scores_higher_and_neither_noise_nor_flicker_is_motion(global_seed):
    still, slow, fast = (film(*(disc(12, 30 + step * frame) for frame in range(8))) for step in (0, 1, 4))
    noisy = film(*(disc(12, 30) + 20 * torch.randn(128, 128) for _ in range(8)))
    flicker = film(*(disc(12, 30) * (1 - 0.3 * (frame % 2)) for frame in range(8)))
    found = {name: score(Motion(), frames) for name, frames in zip(("still", "slow", "fast"), (still, slow, fast), strict=True)}
    assert found["still"] == 0.0 < found["slow"] < found["fast"]
    assert score(Motion(), noisy) < found["slow"] and score(Motion(), flicker) < found["slow"] / 5
    assert score(Motion(), fast, most=0.1) == 0.1 and score(Motion(), film(disc())) == 0.0


def test_saturation_is_the_mean_chroma():
    red, pale = torch.zeros(32, 32, 3), torch.full((32, 32, 3), 102.0)
    red[..., 0], pale[..., 0] = 255.0, 153.0
    assert score(Saturation(), film(red)) == 1.0 and score(Saturation(), film(pale)) == pytest.approx(0.2)
    assert score(Saturation(), film(disc())) == 0.0 and score(Saturation(), film(red, pale), target=0.6) == pytest.approx(0.0, abs=1e-6)


def clap_film(seen: tuple[int, ...], heard: tuple[int, ...], rate: int = RATE) -> tuple[Tensor, Waveform]:
    """A square jumps at frames of `seen`; a burst of sound begins at those of `heard`."""
    place, pictures = 8, []
    for frame in range(FRAMES):
        place = 64 - place if frame in seen else place
        picture = torch.full((64, 64), 40.0)
        picture[20:44, place - 8 : place + 8] = 220.0
        pictures.append(picture)
    samples = torch.zeros(round(FRAMES / FPS * rate))
    for frame in heard:
        start = round(frame / FPS * rate)
        burst = torch.sin(torch.arange(rate // 20) * 0.3) * torch.linspace(1, 0, rate // 20) * 0.5
        samples[start : start + len(burst)] += burst
    return film(*pictures), Waveform(samples.expand(2, -1), rate)


@pytest.mark.parametrize("rate", [16_000, 24_000, 48_000])
def test_sound_that_begins_with_what_is_seen_scores_highest(rate):
    beats = (10, 19, 33)
    at = {late: agreement(*clap_film(beats, tuple(beat + late for beat in beats), rate), FPS, 0.05) for late in (-4, 0, 1, 4)}
    assert at[0] > 0.9 and at[1] > 0.8 and max(at[-4], at[4]) < 0.3
    assert agreement(*clap_film(beats, (14, 25, 40), rate), FPS, 0.05) < 0.3
    assert agreement(*clap_film(beats, beats[:2], rate), FPS, 0.05) < at[0]


def test_what_is_still_or_silent_agrees_with_nothing():
    frames, sound = clap_film((10, 20), (10, 20))
    nothing = Waveform(torch.zeros(2, RATE * 2), RATE)
    assert score(Onsets(), frames, sound) > 0.9
    assert score(Onsets(), frames, nothing) == 0.0 and score(Onsets(), frames[:1].expand(FRAMES, -1, -1, -1), sound) == 0.0
    assert score(Onsets(), frames[:3], sound) == 0.0
