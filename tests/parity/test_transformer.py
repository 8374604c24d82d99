"""Our transformer against ltx-core 1.0.0 and diffusers: float32, CPU, one set of random weights (docs/explanation/model.md)."""

import dataclasses
import itertools

import pytest
import torch

from musubi_tuner.ltxv2.transformer.modality import Perturbations
from tests.parity import models

TOLERANCE = 1e-5
STYLES = ("2.0", "2.3")
CASES = list(itertools.product(STYLES, ("split", "interleaved")))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def official_perturbations(*kinds: str, blocks: list[int] | None, samples: int = models.BATCH):
    from ltx_core.guidance.perturbations import BatchedPerturbationConfig, Perturbation, PerturbationConfig, PerturbationType

    config = PerturbationConfig([Perturbation(PerturbationType[kind], blocks) for kind in kinds])
    return BatchedPerturbationConfig([config] * samples + [PerturbationConfig.empty()] * (models.BATCH - samples))


@pytest.mark.parametrize(("style", "rope"), CASES)
def test_cross_rule_equals_ltx_core(style, rope):
    model = models.ours(style, rope, rule="cross")
    data = models.inputs(style)
    assert models.difference(model(*models.modalities(data)), models.run_official(models.official(model, style, rope), data)) < TOLERANCE


@pytest.mark.parametrize("style", ["2.0", "2.3", "2.5", "kv"])
@pytest.mark.parametrize("sigmas", ["different", "uniform"])
def test_every_rule_equals_diffusers(style, sigmas):
    data = models.inputs(style)
    if sigmas == "uniform":
        data = models.uniform(data)
    extra, video_extra = {}, {}
    if style == "2.5":
        marker = torch.zeros(models.BATCH, models.VIDEO_TOKENS, dtype=torch.bool)
        marker[:, : models.HEIGHT * models.WIDTH] = True
        extra, video_extra = {"video_keyframes_mask": marker[..., None].float()}, {"keyframe_marker": marker}
    runs = {
        "cross": models.run_diffusers,
        "own": lambda reference, values, **more: models.run_diffusers(reference, values, cross_timestep=False, **more),
        "official": models.run_diffusers_hybrid,
    }
    for rule, run in runs.items():
        model = models.ours(style, rule=rule)
        reference = models.diffusers_model(model, style)
        assert models.difference(model(*models.modalities(data, **video_extra)), run(reference, data, **extra)) < TOLERANCE, rule


@pytest.mark.parametrize("style", STYLES)
def test_rules_differ_where_sigmas_differ(style):
    data = models.inputs(style)
    outputs = {rule: models.ours(style, rule=rule)(*models.modalities(data)) for rule in ("official", "cross", "own")}
    for left, right in itertools.combinations(outputs, 2):
        assert models.difference(outputs[left], outputs[right]) > 0.05, (left, right)


@pytest.mark.parametrize(("style", "rope"), CASES)
def test_spatio_temporal_guidance_pass_equals_ltx_core(style, rope):
    model = models.ours(style, rope, rule="cross")
    reference = models.official(model, style, rope)
    data = models.inputs(style)
    whole = official_perturbations("SKIP_VIDEO_SELF_ATTN", "SKIP_AUDIO_SELF_ATTN", blocks=[1])
    one = official_perturbations("SKIP_VIDEO_SELF_ATTN", "SKIP_AUDIO_SELF_ATTN", blocks=[1], samples=1)
    first = torch.tensor([True, False])
    video, audio = models.modalities(data)
    plain = model(video, audio)
    skipped = model(video, audio, Perturbations(skip_video_self={1: True}, skip_audio_self={1: True}))
    assert models.difference(skipped, models.run_official(reference, data, whole)) < TOLERANCE
    assert models.difference(skipped, plain) > 1e-2
    partly = model(video, audio, Perturbations(skip_video_self={1: first}, skip_audio_self={1: first}))
    assert models.difference(partly, models.run_official(reference, data, one)) < TOLERANCE


@pytest.mark.parametrize(("style", "rope"), CASES)
def test_isolated_modalities_equal_ltx_core_and_single_stream_models(style, rope):
    model = models.ours(style, rope, rule="cross")
    data = models.inputs(style)
    video, audio = models.modalities(data)
    isolated = model(video, audio, Perturbations.isolated())
    off = official_perturbations("SKIP_A2V_CROSS_ATTN", "SKIP_V2A_CROSS_ATTN", blocks=None)
    assert models.difference(isolated, models.run_official(models.official(model, style, rope), data, off)) < TOLERANCE
    alone = models.ours(style, rope, streams=("video",))(video, None), models.ours(style, rope, streams=("audio",))(None, audio)
    assert torch.equal(alone[0].video, isolated.video) and torch.equal(alone[1].audio, isolated.audio)
    assert torch.equal(model(video, None).video, isolated.video), "an absent stream is an isolated one"


@pytest.mark.parametrize(("style", "rope"), CASES)
def test_self_attention_masks_equal_ltx_core(style, rope):
    model = models.ours(style, rope, rule="cross")
    reference = models.official(model, style, rope)
    data = models.inputs(style)
    tokens = models.VIDEO_TOKENS
    binary = (torch.rand(models.BATCH, tokens, tokens, generator=torch.Generator().manual_seed(1)) > 0.3).float()
    binary = torch.maximum(binary, torch.eye(tokens)[None])
    fractional = binary.clone()
    fractional[:, :, : tokens // 2] *= 0.5
    for mask in (binary, fractional):
        expected = models.run_official(reference, data, self_mask=mask)
        assert models.difference(model(*models.modalities(data, attention_mask=mask)), expected) < TOLERANCE
    as_bool = model(*models.modalities(data, attention_mask=binary.bool()))
    assert models.difference(as_bool, models.run_official(reference, data, self_mask=binary)) < TOLERANCE


@pytest.mark.parametrize("style", STYLES)
def test_disabled_stream_stays_as_it_is_but_is_heard(style):
    model = models.ours(style, rule="cross")
    data = models.inputs(style)
    video, audio = models.modalities(data)
    ours = model(video, dataclasses.replace(audio, enabled=False))
    expected = models.run_official(models.official(model, style), data, enabled=(True, False))
    assert ours.audio is None
    assert float((ours.video - expected[0]).abs().max()) < TOLERANCE
    assert float((ours.video - model(video, audio).video).abs().max()) > 1e-2


def test_padded_audio_tokens_and_absent_audio_change_nothing():
    model = models.ours("2.3")
    data = models.inputs("2.3")
    video, audio = models.modalities(data)
    short = 7
    mask = torch.ones(models.BATCH, models.STEPS, dtype=torch.bool)
    mask[:, short:] = False
    garbage = audio.latent.clone()
    garbage[:, short:] = 1e3
    padded = model(video, dataclasses.replace(audio, latent=garbage, token_mask=mask))
    cut_audio = dataclasses.replace(
        audio, latent=audio.latent[:, :short], positions=audio.positions[:, :, :short], level_index=audio.level_index[:, :short],
    )  # fmt: skip
    exact = model(video, cut_audio)
    assert float((padded.video - exact.video).abs().max()) < TOLERANCE
    assert float((padded.audio[:, :short] - exact.audio).abs().max()) < TOLERANCE
    absent = model(video, dataclasses.replace(audio, present=torch.tensor([False, True])))
    alone, both = model(video, None), model(video, audio)
    assert float((absent.video[0] - alone.video[0]).abs().max()) < TOLERANCE
    assert float((absent.video[1] - both.video[1]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("style", ["2.0", "2.3", "2.5"])
def test_names_round_trip_through_diffusers(style):
    model = models.ours(style)
    reference = models.diffusers_model(model, style)
    assert len(reference.state_dict()) == len(model.state_dict())
