"""Rewards of the small world, for experiments: `ltxv2_score_rollouts.py --reward_plugins dev/world/rewards.py --reward_fn world_red`.

Both are smooth: a color or a pitch that is nearer scores higher, before the scorer would call it by its name.
"""

import torch

from musubi_tuner.media.audio import resample
from musubi_tuner.reinforcement.rewards.base import NoScore, Reward, RewardSample, Score
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.world.scenes import FRAMES, SIZE
from musubi_tuner.tiny.world.scorer import hear, see
from musubi_tuner.tiny.world.sounds import RATE
from musubi_tuner.tiny.world.subjects import COLORS, PITCHES, Subject, subject_of

_FARTHEST = 255 * 3**0.5


class WorldRed(Reward):
    """How near the object's color is to red (or to `color`): -(distance in RGB / the largest there is); -1 where there is no object."""

    name, route, needs, has_model = "world_red", "video", ("video",), False

    def setup(self, device: torch.device, color: str = "red") -> None:
        if color not in COLORS:
            raise UserError(f"--reward_args world_red.color={color}: must be one of {', '.join(COLORS)}.")
        self._color = torch.tensor(COLORS[color])

    def score(self, samples: list[RewardSample]) -> list[float]:
        return [self._nearness(one) for one in samples]

    def _nearness(self, sample: RewardSample) -> float:
        if sample.frames.shape != (FRAMES, SIZE, SIZE, 3):
            raise UserError(f"world_red: clips of the small world are {FRAMES} frames of {SIZE}x{SIZE}, not {tuple(sample.frames.shape)}.")
        rgb = see(sample.frames).rgb
        return -1.0 if rgb is None else -float((torch.tensor(rgb) - self._color).norm()) / _FARTHEST


class WorldPitch(Reward):
    """How much more the sound is like a voice of the caption's pitch (or of `pitch`) than like one of another: the difference of the best
    cosines of spectra. Prompts without a pitch have no score.
    """

    name, route, needs, has_model = "world_pitch", "audio", ("audio",), False

    def setup(self, device: torch.device, pitch: str = "caption") -> None:
        if pitch not in ("caption", *PITCHES):
            raise UserError(f"--reward_args world_pitch.pitch={pitch}: must be caption or one of {', '.join(PITCHES)}.")
        self._pitch = pitch

    def score(self, samples: list[RewardSample]) -> list[Score]:
        return [self._likeness(one) for one in samples]

    def _likeness(self, sample: RewardSample) -> Score:
        pitch = self._pitch
        if pitch == "caption":
            subject = subject_of(sample.prompt)
            if not isinstance(subject, Subject):
                return NoScore("its prompt names no pitch")
            pitch = subject.pitch
        alike = hear(resample(sample.sound.samples, sample.sound.rate, RATE)).alike
        voices = [(name.split()[0], value) for name, value in alike.items() if name.split()[0] in PITCHES]
        return max(value for name, value in voices if name == pitch) - max(value for name, value in voices if name != pitch)


REWARDS = [WorldRed, WorldPitch]
