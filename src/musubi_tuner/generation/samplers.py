"""From noise to clean streams by predictions at falling noise levels: Euler, ancestral Euler, res_2s."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from musubi_tuner.flow.res_2s import LAST_LEVEL, Res2Step, normal_noise, with_fresh_noise
from musubi_tuner.flow.schedule import STOCHASTIC_SEED_OFFSET, ancestral_euler_step, euler_step
from musubi_tuner.runtime.draws import generator_for

Sampler = Literal["euler", "ancestral", "res_2s"]
Streams = dict[str, Tensor]
"""(1, N, C) of each stream"""
Predict = Callable[[Mapping[str, Tensor], Tensor, int], Streams]
"""Values at a noise level, and the number of the step from 1 -> clean predictions; conditioning tokens come back clean."""
Keep = Callable[[str, Tensor], Tensor]
"""A stream's values with its conditioning tokens laid over them."""


class Solver(Protocol):
    """`sample`, or what stands in its place."""

    def __call__(
        self, sampler: Sampler, values: Streams, levels: Tensor, predict: Predict, keep: Keep, *, seed: int, advance: Callable[[], object]
    ) -> Streams: ...


def sample(
    sampler: Sampler, values: Streams, levels: Tensor, predict: Predict, keep: Keep, *, seed: int, advance: Callable[[], object]
) -> Streams:
    """Clean streams from `values` at the first level.

    Args:
        levels: (steps + 1,) float32, falling, ends with 0, on the streams' device.
        seed: of the noise that a sampler adds on its way; drawn on the CPU, so that every device draws the same.
        advance: called after each step.
    """
    if sampler == "res_2s":
        return _res_2s(values, levels, predict, keep, seed, advance)
    fresh = {name: generator_for(seed + STOCHASTIC_SEED_OFFSET, "preview", name) for name in values}
    for step, (sigma, following) in enumerate(pairwise(levels), start=1):
        for name, x0 in predict(values, sigma, step).items():
            if sampler == "ancestral":
                noise = torch.randn(x0.shape, generator=fresh[name]).to(x0.device)
                values[name] = ancestral_euler_step(values[name], x0, sigma, following, noise)
            else:
                values[name] = euler_step(values[name], x0, sigma, following)
        advance()
    return values


def _res_2s(values: Streams, levels: Tensor, predict: Predict, keep: Keep, seed: int, advance: Callable[[], object]) -> Streams:
    """In float64 between predictions, as errors of a step are of its third order."""
    numbers = [*levels.tolist()[:-1], LAST_LEVEL]
    draws = {
        (name, half): generator_for(seed + STOCHASTIC_SEED_OFFSET, "res_2s", half, name) for name in values for half in ("middle", "end")
    }

    def noised(name: str, half: str, x: Tensor, moved: Tensor, sigma: float, following: float) -> Tensor:
        noise = normal_noise(x.shape, draws[name, half]).to(x.device)
        return keep(name, with_fresh_noise(x, moved, sigma, following, noise))

    def predicted(at: Streams, level: float, step: int) -> Streams:
        given = {name: value.float() for name, value in at.items()}
        return {name: x0.double() for name, x0 in predict(given, levels.new_tensor(level), step).items()}

    at = {name: value.double() for name, value in values.items()}
    for number, (sigma, following) in enumerate(pairwise(numbers), start=1):
        step = Res2Step.between(sigma, following)
        first = predicted(at, sigma, number)
        middle = {name: noised(name, "middle", x, step.to_middle(x, first[name]), sigma, step.middle) for name, x in at.items()}
        start = {name: step.anchor(x, middle[name], first[name]) for name, x in at.items()}
        second = predicted(middle, step.middle, number)
        end = {name: step.to_end(start[name], first[name], second[name]) for name in at}
        at = {name: noised(name, "end", start[name], end[name], sigma, following) for name in at}
        advance()
    return {name: value.float() for name, value in predicted(at, LAST_LEVEL, len(numbers) - 1).items()}
