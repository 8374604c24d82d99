"""How noisy the gradient of an update is: of one round's samples, over many draws of noise and noise level, on the small world.

python -m dev.world.gradient_noise FOLDER --reward world_pitch --rl_loss nft --draws 16

The gradient of all samples of a round is made for each draw; its mean over draws is the signal, its variance the noise. Ways of drawing
are compared: each sample by itself, one draw for the samples of a group, noise and its opposite, levels by strata of a group, one level
for all.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dev.world.lab import Lab
from dev.world.rl_trials import RlTrial, Rounds
from dev.world.rollouts import VIDEO_TOKENS, batch_of
from musubi_tuner.dataset.batch import Batch
from musubi_tuner.flow.sigma import SigmaSettings, draw_sigma
from musubi_tuner.runtime.draws import generator_for
from musubi_tuner.runtime.tables import format_table

LEVELS = (0.3, 0.5, 0.7, 0.85, 0.95)
Change = Callable[[Batch, int, int], Batch]
"""Of a group's batch, by draw and group."""


class RoundGradient:
    """The gradient of a round's samples at the policy that made them."""

    def __init__(self, lab: Lab, trial: RlTrial) -> None:
        self._lab, self._trial = lab, trial
        self._rounds = Rounds(lab, trial)
        self._clips, self._step, objective = self._rounds.first_step()
        groups = [
            [name for name in names if any(objective.advantages[f"samples/{name}"].values())] for names in self._clips.groups.values()
        ]
        self._groups = [names for names in groups if names]
        self.levels = SigmaSettings(**trial.sigma)

    def of(self, draw: int, change: Change | None = None, *, shared: bool = False) -> Tensor:
        """Flat, of all adapters.

        Args:
            shared: one draw for all samples of a group.
        """
        parameters = list(self._rounds.network.parameters())
        for parameter in parameters:
            parameter.grad = None
        for group, names in enumerate(self._groups):
            turns = [f"{draw}|{names[0] if shared else name}" for name in names]
            keys = [f"samples/{name}" for name in names]
            batch = batch_of(self._clips, names, keys, self._lab, self.levels, turns, self._trial.seed)
            self._step.backward(batch if change is None else change(batch, draw, group), len(self._groups))
        return torch.cat([torch.zeros_like(one).flatten() if one.grad is None else one.grad.flatten() for one in parameters])


def at_level(level: float) -> Change:
    return lambda batch, draw, group: _with_levels(batch, torch.full_like(batch.video_sigma, level))


def opposite(batch: Batch, draw: int, group: int) -> Batch:
    assert batch.video_noise is not None and batch.audio_noise is not None
    return replace(batch, video_noise=-batch.video_noise, audio_noise=-batch.audio_noise)


def by_strata(levels: SigmaSettings) -> Change:
    """One level of each equal share of the distribution for the samples of a group, in a mixed order."""
    drawn = torch.tensor([draw_sigma(levels, VIDEO_TOKENS, generator_for(0, f"level {place}")) for place in range(4000)])

    def change(batch: Batch, draw: int, group: int) -> Batch:
        rng, count = random.Random(f"{draw}|{group}|strata"), len(batch.names)
        shares = torch.tensor([(place + rng.random()) / count for place in rng.sample(range(count), count)])
        return _with_levels(batch, torch.quantile(drawn, shares))

    return change


def _with_levels(batch: Batch, levels: Tensor) -> Batch:
    return replace(batch, video_sigma=levels, audio_sigma=levels)


def told(name: str, gradients: Sequence[Tensor]) -> tuple[str, str, str, str]:
    """Signal (squared norm of the mean, without what noise adds to it), noise (variance), their ratio."""
    stacked = torch.stack(list(gradients))
    mean = stacked.mean(0)
    noise = float((stacked - mean).square().sum() / (len(stacked) - 1))
    signal = float(mean.square().sum()) - noise / len(stacked)
    return name, f"{signal:.2e}", f"{noise:.2e}", f"{signal / noise:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reward", default="world_pitch")
    parser.add_argument("--rl_loss", default="nft")
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    is_sound = options.reward == "world_pitch"
    trial = RlTrial(
        reward=options.reward,
        reward_args={"pitch": "high"} if is_sound else {},
        rl={"rl_loss": options.rl_loss, "nft_adv_clip_max": 2.0, "ppo_clip_eps": 0.02},
        args={"preset": "audio" if is_sound else "video"},
        sigma={"shift": 2.05, "uniform_prob": 0.0},
        dim=16,
        alpha=16.0,
        seed=options.seed,
    )
    gradient = RoundGradient(Lab(options.folder), trial)
    draws = range(options.draws)
    own = [gradient.of(draw) for draw in draws]
    pairs = [(one + gradient.of(draw, opposite)) / 2 for draw, one in zip(draws, own, strict=True)]
    rows = [
        told("each by itself", own),
        told("one draw for a group", [gradient.of(draw, shared=True) for draw in draws]),
        told("mean of two draws", [(one + other) / 2 for one, other in zip(own[::2], own[1::2], strict=False)]),
        told("mean of noise and its opposite", pairs),
        told("levels by strata of a group", [gradient.of(draw, by_strata(gradient.levels)) for draw in draws]),
        *(told(f"level {level}", [gradient.of(draw, at_level(level)) for draw in draws]) for level in LEVELS),
    ]
    print(format_table(rows, ("draws", "signal", "noise", "signal / noise")))


if __name__ == "__main__":
    main()
