"""Sampling with some stochastic steps, which are recorded: what was there before and after each, in the precision in which it is kept."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from musubi_tuner.flow.schedule import euler_step
from musubi_tuner.flow.stochastic import StepKind, next_step
from musubi_tuner.generation.samplers import Keep, Predict, Sampler, Streams
from musubi_tuner.generation.samplers import sample as without_record
from musubi_tuner.runtime.draws import generator_for


@dataclass(frozen=True, kw_only=True, slots=True)
class Stochastic:
    """Which steps are drawn, and how."""

    kind: StepKind
    level: float
    streams: tuple[str, ...]
    """The others take Euler's step."""
    steps: tuple[int, ...]
    """From 0."""


def choose_steps(seed: str, window: tuple[int, int], count: int, total: int) -> tuple[int, ...]:
    """`count` of the steps from `window[0]` up to but not with `window[1]`, and never the last of all, which ends at the clean clip.

    Args:
        seed: names the group, all samples of which have the same steps.
    """
    last = min(window[1], total - 1)
    open_steps = range(min(window[0], max(0, last - 1)), last)
    return tuple(sorted(random.Random(seed).sample(open_steps, min(count, len(open_steps)))))


@dataclass(slots=True)
class Recorder:
    """A `generation.samplers.Solver` that keeps what its stochastic steps did."""

    stochastic: Stochastic | None
    dtype: torch.dtype = torch.bfloat16
    """Values before and after such a step are rounded to it, so that what is learned from is exactly what was done."""
    _steps: tuple[dict[str, Tensor], ...] = ()

    def steps(self, place: int = 0) -> dict[str, Tensor]:
        """Of the newest batch's sample `place`: `levels` (T, 2) float32, the noise levels of each step; `second` (), that of the schedule's
        second; and of each stream `NAME_before` and `NAME_after` (T, N, C). `NAME_after` of a stream that took Euler's steps is left out.
        Empty where no step was drawn.
        """
        return self._steps[place] if self._steps else {}

    def __call__(
        self, sampler: Sampler, values: Streams, levels: Tensor, predict: Predict, keep: Keep, *, seed: int, advance: Callable[[], object]
    ) -> Streams:
        if self.stochastic is None:
            self._steps = ()
            return without_record(sampler, values, levels, predict, keep, seed=seed, advance=advance)
        chosen, kept = self.stochastic, _Kept()
        for number, (sigma, following) in enumerate(pairwise(levels)):
            if number not in chosen.steps:
                x0s = predict(values, sigma, number + 1)
                values = {name: euler_step(values[name], x0, sigma, following) for name, x0 in x0s.items()}
            else:
                before = {name: keep(name, value.to(self.dtype).float()) for name, value in values.items()}
                x0s, values = predict(before, sigma, number + 1), {}
                for name, x0 in x0s.items():
                    if name in chosen.streams:
                        step = next_step(chosen.kind, before[name], x0, sigma, following, chosen.level, levels[1])
                        noise = torch.randn(x0.shape, generator=generator_for(seed, "rollout", name, number)).to(x0.device)
                        values[name] = keep(name, step.draw(noise).to(self.dtype).float())
                    else:
                        values[name] = euler_step(before[name], x0, sigma, following)
                kept.add(before, {name: values[name] for name in chosen.streams if name in values}, (sigma, following))
            advance()
        self._steps = tuple(kept.tensors(place, self.dtype, levels) for place in range(kept.size))
        return values


@dataclass(slots=True)
class _Kept:
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    levels: list[tuple[float, float]] = field(default_factory=list)

    def add(self, before: Streams, after: Streams, levels: Sequence[Tensor]) -> None:
        for kind, streams in (("before", before), ("after", after)):
            for name, value in streams.items():
                self.rows.setdefault(f"{name}_{kind}", []).append(value.cpu())
        sigma, following = (float(level) for level in levels)
        self.levels.append((sigma, following))

    @property
    def size(self) -> int:
        """Of the batch; 0 where no step was drawn."""
        return max((len(rows[0]) for rows in self.rows.values()), default=0)

    def tensors(self, place: int, dtype: torch.dtype, levels: Tensor) -> dict[str, Tensor]:
        levels_of = {"levels": torch.tensor(self.levels), "second": levels[1].cpu()}
        return levels_of | {name: torch.stack([row[place] for row in rows]).to(dtype) for name, rows in self.rows.items()}
