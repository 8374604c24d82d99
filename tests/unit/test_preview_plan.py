"""Which sampling a prompt gets."""

import logging

import pytest
import torch

from musubi_tuner.config.preview import PreviewOptions
from musubi_tuner.config.validation import validated
from musubi_tuner.flow.guidance import GuidanceScales
from musubi_tuner.flow.schedule import distilled_sigmas, flowmatch_discrete_sigmas, ltx2_sigmas
from musubi_tuner.generation.sampling import describe_plans, make_plan
from musubi_tuner.runtime.errors import UserError
from tests.preview_parts import prompt


def plan(options: PreviewOptions | None = None, *, mode: str = "av", version: str = "2.3", num_layers: int = 48, **values: object):
    return make_plan(options or PreviewOptions(), prompt(**values), mode=mode, version=version, num_layers=num_layers)


@pytest.mark.parametrize(("version", "steps", "block"), [("2.0", 40, 29), ("2.3", 30, 28), ("2.5", 30, 28)])
def test_a_plain_prompt_gets_the_official_recipe(version: str, steps: int, block: int) -> None:
    found = plan(version=version)
    assert torch.equal(found.sigmas, ltx2_sigmas(steps))
    assert found.video == GuidanceScales(cfg=3, stg=1, rescale=0.7, modality=3)
    assert found.audio == GuidanceScales(cfg=7, stg=1, rescale=0.7, modality=3)
    assert found.stg_blocks == (block,) and found.streams == ("video", "audio") and not found.ancestral


def test_the_prompt_wins_over_the_command_line_and_that_over_the_version() -> None:
    options = PreviewOptions(
        sample_steps=12, video_cfg_scale=2.0, audio_cfg_scale=4.0, stg_scale=0.0, rescale_scale=0.0, modality_scale=1.0
    )
    assert (plan(options).steps, plan(options, steps=5).steps) == (12, 5)
    assert (plan(options).video.cfg, plan(options, video_cfg=1.0).video.cfg) == (2.0, 1.0)
    assert (plan(options).audio.cfg, plan(options, audio_cfg=0.0).audio.cfg) == (4.0, 0.0)
    found = plan(options)
    assert not found.needs_perturbed and not found.needs_isolated and found.needs_negative
    assert found.video.rescale == 0.0


@pytest.mark.parametrize(
    ("mode", "frames", "streams"),
    [("video", 9, ("video",)), ("av", 9, ("video", "audio")), ("audio", 9, ("audio",)), ("av", 1, ("video",))],
)
def test_the_mode_decides_what_is_made_and_a_still_has_no_sound(mode: str, frames: int, streams: tuple[str, ...]) -> None:
    found = plan(mode=mode, frames=frames)
    assert found.streams == streams
    assert found.needs_isolated == (len(streams) == 2)


def test_guidance_passes_depend_on_the_streams_that_are_made() -> None:
    options = PreviewOptions(video_cfg_scale=1.0, audio_cfg_scale=7.0)
    assert plan(options).needs_negative and not plan(options, mode="video").needs_negative


@pytest.mark.parametrize(("version", "ancestral"), [("2.0", False), ("2.3", False), ("2.5", True)])
def test_distilled_has_fixed_levels_and_no_guidance(version: str, ancestral: bool, caplog: pytest.LogCaptureFixture) -> None:
    options = PreviewOptions(sample_sampling_preset="distilled")
    found = plan(options, version=version)
    assert torch.equal(found.sigmas, distilled_sigmas()) and found.ancestral == ancestral
    assert not (found.needs_negative or found.needs_perturbed or found.needs_isolated)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        plan(options, steps=4)
    assert "do not apply" in caplog.text


def test_flowmatch_discrete_takes_its_shift() -> None:
    options = PreviewOptions(sample_scheduler="flowmatch_discrete", discrete_flow_shift=5.0, sample_steps=6)
    assert torch.equal(plan(options).sigmas, flowmatch_discrete_sigmas(6, 5.0))


def test_a_shallow_model_perturbs_its_last_block_and_an_asked_block_must_exist() -> None:
    assert plan(num_layers=2).stg_blocks == (1,)
    assert plan(PreviewOptions(stg_blocks=(0, 1)), num_layers=2).stg_blocks == (0, 1)
    with pytest.raises(UserError, match="--stg_blocks 2: this model's blocks are 0 to 1"):
        plan(PreviewOptions(stg_blocks=(2,)), num_layers=2)


def test_the_table_shows_mu_and_shift_of_preview_and_training() -> None:
    prompts = [prompt(width=768, height=512, frames=121)]
    table = describe_plans(PreviewOptions(), prompts, [plan(width=768, height=512, frames=121)], "shifted_logit_normal")
    assert "2.05 (7.77)" in table
    assert "video 2.78 (16.17)" in table and "audio 0.63 (1.87)" in table  # 6144 and 126 tokens
    assert "uniform" in describe_plans(PreviewOptions(), prompts, [plan()], "uniform")
    assert "the same at every size" in describe_plans(PreviewOptions(), prompts, [plan()], "logit_normal")
    assert "video 1.50 (4.48), audio 1.50" in describe_plans(PreviewOptions(), prompts, [plan()], "stratified", 1.5)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"sample_every_n_steps": 0}, "sample_every_n_steps = 0: must be "),
        ({"sample_every_n_epochs": -1}, "sample_every_n_epochs = -1: must be "),
        ({"sample_steps": 0}, "sample_steps = 0: must be "),
        ({"stg_scale": -1.0}, "stg_scale = "),
        ({"rescale_scale": 1.5}, "rescale_scale = 1.5: must be "),
        ({"discrete_flow_shift": 0.0}, "discrete_flow_shift = "),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, float], name: str) -> None:
    with pytest.raises(UserError, match=name):
        validated(PreviewOptions, values)
