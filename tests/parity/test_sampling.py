"""Schedule, steps and guidance against ltx-core 1.0.0 and diffusers."""

import math

import pytest
import torch

from musubi_tuner.flow.guidance import GuidanceScales, guide
from musubi_tuner.flow.path import velocity_to_x0
from musubi_tuner.flow.schedule import euler_step, ltx2_sigmas, mu_for_tokens


@pytest.mark.parametrize("steps", [8, 15, 30, 40])
def test_schedule_equals_ltx_core(steps: int) -> None:
    from ltx_core.components.schedulers import LTX2Scheduler

    assert (ltx2_sigmas(steps) - LTX2Scheduler().execute(steps)).abs().max() <= 2e-7


@pytest.mark.parametrize("shape", [(3, 16, 24), (16, 16, 24), (2, 4, 8)])
def test_schedule_of_a_latent_equals_ltx_core(shape: tuple[int, int, int]) -> None:
    from ltx_core.components.schedulers import LTX2Scheduler

    theirs = LTX2Scheduler().execute(20, latent=torch.zeros(1, 128, *shape))
    assert (ltx2_sigmas(20, math.prod(shape)) - theirs).abs().max() <= 4e-7


@pytest.mark.parametrize("steps", [8, 40])
def test_schedule_equals_diffusers(steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=mu_for_tokens(4096), device="cpu")
    assert (ltx2_sigmas(steps) - scheduler.sigmas).abs().max() <= 4e-7


def test_euler_equals_ltx_core(global_seed: None) -> None:
    from ltx_core.components.diffusion_steps import EulerDiffusionStep

    sigmas = ltx2_sigmas(12)
    x = torch.randn(1, 11, 12)
    for index in range(12):
        velocity = torch.randn_like(x)
        x0 = velocity_to_x0(x, velocity, sigmas[index])
        theirs = EulerDiffusionStep().step(x, x0, sigmas, index)
        x = euler_step(x, x0, sigmas[index], sigmas[index + 1])
        assert (x - theirs).abs().max() <= 2e-7 * x.abs().max().clamp(min=1)


@pytest.mark.parametrize(
    "scales",
    [
        GuidanceScales(cfg=3.0, stg=1.0, rescale=0.7, modality=3.0),
        GuidanceScales(cfg=7.0),
        GuidanceScales(stg=0.5, rescale=1.0),
        GuidanceScales(modality=2.0),
    ],
    ids=str,
)
def test_guidance_equals_ltx_core(scales: GuidanceScales, global_seed: None) -> None:
    from ltx_core.components.guiders import MultiModalGuider, MultiModalGuiderParams

    c, n, s, m = torch.randn(4, 1, 11, 12).unbind(0)
    params = MultiModalGuiderParams(
        cfg_scale=scales.cfg, stg_scale=scales.stg, rescale_scale=scales.rescale, modality_scale=scales.modality
    )
    theirs = MultiModalGuider(params).calculate(c, n, s, m)
    assert torch.equal(guide(c, scales, negative=n, perturbed=s, isolated=m), theirs)
