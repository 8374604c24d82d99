"""Steps that are drawn, and their log densities, against other implementations: diffusers' scheduler, and Flow-Factory's where
`pytest tests/parity/test_stochastic_steps.py --flow-factory CHECKOUT` names a checkout of it (github.com/X-GenGroup/Flow-Factory).
"""

import importlib
import sys
import types
from itertools import pairwise

import pytest
import torch

from musubi_tuner.flow.path import velocity_to_x0
from musubi_tuner.flow.schedule import ltx2_sigmas
from musubi_tuner.flow.stochastic import STEP_KINDS, NextStep, next_step

TOLERANCE = 1e-6
"""Relative to the largest number."""
LEVELS = ltx2_sigmas(8).tolist()
PACKAGE = "flow_factory"
KINDS = dict(zip(STEP_KINDS, ("CPS", "Flow-SDE"), strict=True))


@pytest.fixture(scope="module")
def flow_factory(request):
    """Its scheduler's module, by itself: what its packages import besides is left alone."""
    folder = request.config.getoption("--flow-factory", default=None)
    if folder is None:
        pytest.skip("needs --flow-factory CHECKOUT")
    root = folder / "src" / PACKAGE
    if not root.is_dir():
        pytest.fail(f"--flow-factory {folder}: no checkout of it: {root} is not there")
    before = dict(sys.modules)
    for name, place in ((PACKAGE, root), (f"{PACKAGE}.scheduler", root / "scheduler"), (f"{PACKAGE}.utils", root / "utils")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(place)]
    yield importlib.import_module(f"{PACKAGE}.scheduler.flow_match_euler_discrete")
    for name in [name for name in sys.modules if name not in before and name.startswith(PACKAGE)]:
        del sys.modules[name]


def ours(kind, x: torch.Tensor, velocity: torch.Tensor, sigma: float, following: float, level: float) -> NextStep:
    levels = [torch.tensor(value) for value in (sigma, following, LEVELS[1])]
    return next_step(kind, x, velocity_to_x0(x, velocity, levels[0]), levels[0], levels[1], level, levels[2])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0.2, 0.7, 1.0])
def test_steps_and_log_densities_are_those_of_flow_factory(flow_factory, kind, level):
    scheduler = flow_factory.FlowMatchEulerDiscreteSDEScheduler(noise_level=level, dynamics_type=KINDS[kind])
    furthest = {"next": 0.0, "mean": 0.0, "log density": 0.0, "log density of another value": 0.0}
    for number, (sigma, following) in enumerate(pairwise(LEVELS[:-1])):  # the last step of all is never drawn
        generator = torch.Generator().manual_seed(number)
        x, velocity, other = (torch.randn(3, 40, 128, generator=generator) for _ in range(3))
        step = ours(kind, x, velocity, sigma, following, level)

        def theirs(values=None, number=number, sigma=sigma, following=following, x=x, velocity=velocity):
            return scheduler.step(
                noise_pred=velocity,
                timestep=torch.tensor([1000 * sigma] * 3),
                timestep_next=torch.tensor([1000 * following] * 3),
                latents=x,
                next_latents=values,
                generator=torch.Generator().manual_seed(100 + number),
                noise_level=level,
                sigma_max=LEVELS[1],
            )

        drawn = theirs()
        value = step.draw(torch.randn(x.shape, generator=torch.Generator().manual_seed(100 + number)))
        given = theirs(other)
        found = {
            "next": apart(value, drawn.next_latents),
            "mean": apart(step.mean, drawn.next_latents_mean),
            "log density": apart(step.log_density(kind, drawn.next_latents).mean((1, 2)), drawn.log_prob),
            "log density of another value": apart(step.log_density(kind, other).mean((1, 2)), given.log_prob),
        }
        furthest = {name: max(furthest[name], found[name]) for name in found}
    print(kind, level, {name: f"{value:.1e}" for name, value in furthest.items()})
    assert max(furthest.values()) < TOLERANCE


def test_cps_of_the_whole_level_is_the_stochastic_sampling_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=LEVELS[:-1])
    x = torch.randn(2, 40, 128, generator=torch.Generator().manual_seed(0))
    for number, (sigma, following) in enumerate(pairwise(scheduler.sigmas.tolist()[:-1])):
        velocity = torch.randn(x.shape, generator=torch.Generator().manual_seed(1 + number))
        step = ours("cps", x, velocity, sigma, following, 1.0)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(100 + number))
        theirs = scheduler.step(
            velocity, scheduler.timesteps[number], x, generator=torch.Generator().manual_seed(100 + number), return_dict=False
        )[0]
        assert apart(step.draw(noise), theirs) < TOLERANCE
        x = theirs
