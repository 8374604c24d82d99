"""Rewards of the small world, for experiments: `ltxv2_score_rollouts.py --reward_plugins dev/world/rewards.py --reward_fn world_red`.

All are smooth: a color, place or pitch that is nearer scores higher, before the scorer would call it by its name.
"""

import torch
from torch import Tensor

from musubi_tuner.media.audio import resample
from musubi_tuner.reinforcement.rewards.base import NoScore, Reward, RewardSample, Score
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.world.scenes import FRAMES, SIZE
from musubi_tuner.tiny.world.scorer import hear, see
from musubi_tuner.tiny.world.sounds import RATE
from musubi_tuner.tiny.world.subjects import COLORS, PITCHES, Subject, subject_of

_FARTHEST = 255 * 3**0.5
_SIDES = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
"""Axis, and the sign of what is near its beginning."""


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
        rgb = see(_frames(self.name, sample)).rgb
        return -1.0 if rgb is None else -float((torch.tensor(rgb) - self._color).norm()) / _FARTHEST


class WorldPlace(Reward):
    """How far to the left (or to `side`) the object is: from 1 at that edge to -1 at the other one, and -1 where there is no object. No
    caption says it, so samples of a prompt differ, and nothing else has to change with it.
    """

    name, route, needs, has_model = "world_place", "video", ("video",), False

    def setup(self, device: torch.device, side: str = "left") -> None:
        if side not in _SIDES:
            raise UserError(f"--reward_args world_place.side={side}: must be one of {', '.join(_SIDES)}.")
        self._axis, self._sign = _SIDES[side]

    def score(self, samples: list[RewardSample]) -> list[float]:
        centers = [see(_frames(self.name, one)).center for one in samples]
        return [-1.0 if center is None else self._sign * (1 - 2 * center[self._axis]) for center in centers]


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


def _frames(reward: str, sample: RewardSample) -> Tensor:
    if sample.frames.shape != (FRAMES, SIZE, SIZE, 3):
        raise UserError(f"{reward}: clips of the small world are {FRAMES} frames of {SIZE}x{SIZE}, not {tuple(sample.frames.shape)}.")
    return sample.frames


REWARDS = [WorldRed, WorldPlace, WorldPitch]
