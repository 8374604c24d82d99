"""What a reward is, and what it is given of a sample. A reward of one's own subclasses `Reward` (docs/how-to/rewards.md)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from musubi_tuner.media.audio import Waveform
from musubi_tuner.reinforcement.advantages import Route
from musubi_tuner.runtime.errors import UserError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
"""Of a reward; it names a file."""
Need = Literal["video", "audio", "latents"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSample:
    """One sample, with those of its media that rewards need."""

    name: str
    """Such as g0003_k02."""
    group: int
    """Number of its prompt."""
    prompt: str
    fps: float
    decoded_frames: Tensor | None = None
    decoded_sound: Waveform | None = None
    cached_latents: Mapping[str, Tensor] | None = None
    prompt_sound: Path | None = None
    """A sound or video file that the prompt names (`audio`), to compare the sample with."""

    @property
    def frames(self) -> Tensor:
        """(F, H, W, 3) uint8 on the CPU. Needs "video"."""
        if self.decoded_frames is None:
            raise UserError(_LACKS.format("frames", "video"))
        return self.decoded_frames

    @property
    def sound(self) -> Waveform:
        """As long as the pictures, at the vocoder's rate, on the CPU. Needs "audio"."""
        if self.decoded_sound is None:
            raise UserError(_LACKS.format("sound", "audio"))
        return self.decoded_sound

    @property
    def latents(self) -> Mapping[str, Tensor]:
        """`video` (128, F, h, w) and, in mode av, `audio` (8, T, 16), as they are cached. Needs "latents"."""
        if self.cached_latents is None:
            raise UserError(_LACKS.format("latents", "latents"))
        return self.cached_latents


_LACKS = 'the reward reads `{}` of a sample, and its `needs` do not name "{}". Add it there.'


@dataclass(frozen=True, slots=True)
class NoScore:
    """In place of a number: why a sample has none."""

    reason: str


Score = float | NoScore | None
"""None and what is not finite count as no score too."""


class Reward:
    """Judges samples: higher is better. Made anew for each run."""

    name: ClassVar[str]
    """Letters, digits, - and _: its name in --reward_fn and of its file of scores."""
    route: ClassVar[Route]
    """Which stream learns from it: video, audio, or sync for both."""
    needs: ClassVar[Sequence[Need]]
    """What is decoded for it."""
    has_model: ClassVar[bool] = True
    """Whether it holds weights: it then has the device to itself, apart from the decoder."""
    indifferent: ClassVar[Sequence[str]] = ()
    """Arguments that no score depends on, such as how long a server is waited for, or where files lie whose content counts."""
    version: ClassVar[int] = 1
    """Of its formula: scores by another version are made again."""

    def weight_files(self, *none: Any, **arguments: Any) -> Sequence[Path]:
        """Files that its scores depend on, such as weights and references; scores are made again where they change. Called before `setup`,
        with the same arguments.

        Raises:
            UserError: they are not there.
        """
        return ()

    def setup(self, *device: Any, **arguments: Any) -> None:
        """Called once as `setup(device, **arguments)`, before anything is scored: `device` is a `torch.device`, `arguments` are those of
        --reward_args. Their names, types and defaults are those of its own signature.
        """

    def score(self, samples: Sequence[RewardSample]) -> Sequence[Score]:
        """A score of each sample."""
        raise NotImplementedError

    def score_groups(self, groups: Sequence[Sequence[RewardSample]]) -> Sequence[Sequence[Score]]:
        """In place of `score`, for rewards that compare the samples of a prompt with each other: a whole group is then decoded at once."""
        raise NotImplementedError

    def teardown(self) -> None:
        """Called at the end, before the reward itself is let go of with all that it holds."""


def scores_groups(kind: type[Reward]) -> bool:
    """Whether a reward compares whole groups."""
    return kind.score_groups is not Reward.score_groups
