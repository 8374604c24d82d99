"""Sampling with the tiny transformer: passes, seeds, conditioning, and what it shares with training."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from musubi_tuner.conditioning.tokens import audio_stream, noised, video_stream
from musubi_tuner.config.model import MemoryOptions
from musubi_tuner.flow.path import model_sigma
from musubi_tuner.generation.contexts import TextContext
from musubi_tuner.generation.denoise import SampledLatents, SampleInputs, generate
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.transformer.modality import Modality
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.networks.stack import Strength
from musubi_tuner.placement.load import load_for_generation
from musubi_tuner.placement.planning import place_by_hand
from musubi_tuner.preview.previewer import untouched
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.checkpoint import save_lora
from tests import preview_parts as parts


@pytest.fixture(scope="module")
def wrapper(tiny_family) -> OfficialLTXV2Wrapper:
    return parts.load_wrapper(tiny_family.ltx23)


def record_calls(wrapper: OfficialLTXV2Wrapper, made: SampleInputs) -> list[tuple]:
    """Arguments of every forward while `made` is sampled."""
    calls = []
    handle = wrapper.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
    try:
        generate(wrapper, made)
    finally:
        handle.remove()
    return calls


def same(left: SampledLatents, right: SampledLatents) -> bool:
    return torch.equal(left.video, right.video) and torch.equal(left.audio, right.audio)


def test_latents_have_the_prompts_size(wrapper: OfficialLTXV2Wrapper) -> None:
    found = generate(wrapper, parts.sample(wrapper, of_prompt=parts.prompt(frames=17, fps=16.0)))
    assert found.video.shape == (1, 128, 3, 1, 2)
    assert found.audio.shape == (1, 8, 27, 16)  # round(17 / 16 * 25)
    assert found.video.isfinite().all() and found.audio.isfinite().all()


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"video_cfg_scale": 1.0, "audio_cfg_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0}, 1),
        ({"video_cfg_scale": 1.0, "audio_cfg_scale": 1.01, "stg_scale": 0.0, "modality_scale": 1.0}, 2),
        ({"video_cfg_scale": 1.0, "audio_cfg_scale": 1.0, "stg_scale": 0.5, "modality_scale": 1.0}, 2),
        ({"video_cfg_scale": 1.0, "audio_cfg_scale": 1.0, "stg_scale": 0.0, "modality_scale": 3.0}, 2),
        ({}, 4),
    ],
)
def test_each_guidance_costs_one_pass_where_it_is_on(wrapper: OfficialLTXV2Wrapper, options: dict, passes: int) -> None:
    assert len(record_calls(wrapper, parts.sample(wrapper, of_options=parts.options(**options)))) == 3 * passes


def test_distilled_takes_eight_passes(wrapper: OfficialLTXV2Wrapper) -> None:
    options = parts.options(sample_sampling_preset="distilled")
    assert len(record_calls(wrapper, parts.sample(wrapper, of_options=options))) == 8
    assert len(record_calls(wrapper, parts.sample(wrapper, version="2.5", of_options=options))) == 8


def test_ancestral_steps_draw_noise_of_their_own(wrapper: OfficialLTXV2Wrapper) -> None:
    options = parts.options(sample_sampling_preset="distilled")
    plain, ancestral, again = (generate(wrapper, parts.sample(wrapper, version=v, of_options=options)) for v in ("2.3", "2.5", "2.5"))
    assert same(ancestral, again) and not same(plain, ancestral)


def test_negative_and_isolated_passes_see_what_they_should(wrapper: OfficialLTXV2Wrapper) -> None:
    made = parts.sample(wrapper)
    plain, negative, perturbed, isolated = record_calls(wrapper, made)[:4]
    assert torch.equal(plain[2], made.positive.text) and torch.equal(negative[2], made.negative.text)
    assert plain[4] is None and negative[4] is None
    assert dict(perturbed[4].skip_video_self) == dict(perturbed[4].skip_audio_self) == {1: True}
    assert isolated[4].skip_audio_to_video and isolated[4].skip_video_to_audio


def test_the_seed_alone_decides(wrapper: OfficialLTXV2Wrapper) -> None:
    torch.manual_seed(1)
    first = generate(wrapper, parts.sample(wrapper))
    torch.manual_seed(2)
    assert same(first, generate(wrapper, parts.sample(wrapper)))
    assert not same(first, generate(wrapper, parts.sample(wrapper, of_prompt=parts.prompt(seed=4))))


def test_random_state_and_train_mode_are_left_alone(wrapper: OfficialLTXV2Wrapper) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    wrapper.train()
    wrapper.transformer.transformer_blocks[0].eval()
    with untouched(wrapper, torch.device("cpu")):
        assert not wrapper.transformer.training
        generate(wrapper, parts.sample(wrapper))
        torch.randn(3), random.random(), np.random.rand()
    assert wrapper.training and wrapper.transformer.training and not wrapper.transformer.transformer_blocks[0].training
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    wrapper.eval()


@pytest.mark.parametrize("name", ["flowmatch_1_1000", "legacy_0_1000", "sd3_0_1"])
def test_the_model_sees_in_a_preview_what_it_sees_in_training(tiny_family, name: str) -> None:
    """First step of a preview: pure noise. Training on the same shapes, with the same noise at sigma 1, hands over the same inputs."""
    wrapper = parts.load_wrapper(tiny_family.ltx23, timestep_format=name)
    video, audio = record_calls(wrapper, parts.sample(wrapper))[0][:2]
    sigma = model_sigma(torch.ones(1), name)
    streams = (
        video_stream(torch.zeros(1, 128, 2, 1, 2), torch.tensor([24.0])),
        audio_stream(torch.zeros(1, 8, 9, 16), None),
    )
    for seen, stream in zip((video, audio), streams, strict=True):
        expected, _ = noised(stream, seen.latent, sigma)
        assert_same_modality(seen, expected)


def assert_same_modality(left: Modality, right: Modality) -> None:
    for field in ("latent", "sigma", "levels", "level_index", "positions", "keyframe_marker", "token_mask", "present"):
        a, b = getattr(left, field), getattr(right, field)
        assert (a is None and b is None) or torch.equal(a, b), field


def test_noise_levels_pass_through_the_timestep_format(tiny_family) -> None:
    wrapper = parts.load_wrapper(tiny_family.ltx23, timestep_format="flowmatch_1_1000")
    made = parts.sample(wrapper, of_options=parts.options(video_cfg_scale=1.0, audio_cfg_scale=1.0, stg_scale=0.0, modality_scale=1.0))
    seen = torch.stack([call[0].sigma[0] for call in record_calls(wrapper, made)])
    assert torch.equal(seen, model_sigma(made.plan.sigmas[:-1], "flowmatch_1_1000"))


def test_a_first_image_stays_as_it_is_at_level_zero(wrapper: OfficialLTXV2Wrapper) -> None:
    image = torch.randn(1, 128, 1, 1, 2, generator=torch.Generator().manual_seed(9))
    made = parts.sample(wrapper, image=image)
    calls = record_calls(wrapper, made)
    assert all(torch.equal(call[0].timesteps[0, :2], torch.zeros(2)) for call in calls)
    assert all(torch.equal(call[0].latent[0, :2], image[0].flatten(1).T) for call in calls)
    assert all(bool((call[0].timesteps[0, 2:] == call[0].sigma).all()) for call in calls)
    found = generate(wrapper, made)
    assert torch.equal(found.video[:, :, :1], image)
    assert not torch.equal(found.video, generate(wrapper, parts.sample(wrapper)).video)


def test_nan_is_an_error_that_names_step_pass_and_tensor(wrapper: OfficialLTXV2Wrapper) -> None:
    made = parts.sample(wrapper)
    broken = torch.full_like(made.negative.text, float("nan"))
    bad = SampleInputs(prompt=made.prompt, plan=made.plan, positive=made.positive, negative=TextContext(broken, None))
    with pytest.raises(UserError, match="prompts.txt, line 1: NaN or infinity in the video velocity of the negative pass, step 1 of 3"):
        generate(wrapper, bad)


def test_a_fresh_lora_and_a_disabled_one_give_the_base_models_preview(tiny_family) -> None:
    base = parts.load_wrapper(tiny_family.ltx23)
    expected = generate(base, parts.sample(base))
    fresh = parts.load_wrapper(tiny_family.ltx23)
    parts.add_lora(fresh, random_b=False)
    assert same(generate(fresh, parts.sample(fresh)), expected)
    trained = parts.load_wrapper(tiny_family.ltx23)
    network = parts.add_lora(trained, random_b=True)
    assert not same(generate(trained, parts.sample(trained)), expected)
    with network.disabled():
        assert same(generate(trained, parts.sample(trained)), expected)


@pytest.mark.parametrize("mode", ["video", "audio"])
def test_one_stream_alone_can_be_sampled(tiny_family, mode: str) -> None:
    wrapper = parts.load_wrapper(tiny_family.ltx23, mode=mode)
    found = generate(wrapper, parts.sample(wrapper, mode=mode))
    assert (found.video is None) == (mode == "audio") and (found.audio is None) == (mode == "video")


def test_bfloat16_weights_sample_too_and_repeat_to_the_bit(tiny_family, wrapper: OfficialLTXV2Wrapper) -> None:
    half = parts.load_wrapper(tiny_family.ltx23, dtype=torch.bfloat16)
    first, second = (generate(half, parts.sample(half)) for _ in range(2))
    assert same(first, second) and first.video.dtype == torch.float32
    full = generate(wrapper, parts.sample(wrapper))
    assert torch.nn.functional.cosine_similarity(first.video.flatten(), full.video.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("swapped", [0, 1])
def test_a_model_can_be_loaded_to_generate_without_network_plan_or_trial(tiny_family, wrapper: OfficialLTXV2Wrapper, swapped: int) -> None:
    loaded = load_to_generate(tiny_family.ltx23, blocks_to_swap=swapped)
    assert same(generate(loaded, parts.sample(loaded)), generate(wrapper, parts.sample(wrapper)))


def test_a_lora_that_is_merged_for_generation_samples_as_the_trained_network(tiny_family, tmp_path: Path) -> None:
    trained = parts.load_wrapper(tiny_family.ltx23)
    save_lora(parts.add_lora(trained, random_b=True), tmp_path / "lora.safetensors", {}, torch.float32, name="lora")
    expected = generate(trained, parts.sample(trained))
    merged = load_to_generate(tiny_family.ltx23, loras=[(tmp_path / "lora.safetensors", Strength(1.0, 1.0))])
    plain = load_to_generate(tiny_family.ltx23)
    found = generate(merged, parts.sample(merged))
    assert torch.allclose(found.video, expected.video, atol=1e-3) and torch.allclose(found.audio, expected.audio, atol=1e-3)
    assert not torch.allclose(generate(plain, parts.sample(plain)).video, expected.video, atol=1e-2)


def load_to_generate(path: Path, *, loras: object = (), **memory: object) -> OfficialLTXV2Wrapper:
    checkpoint, cpu = open_checkpoint(path), torch.device("cpu")
    options = MemoryOptions(**{"weight_format": "bf16", "blocks_to_swap": 0, "compile": False, "gradient_checkpointing": False, **memory})
    placement = place_by_hand(options, read_config(checkpoint).num_layers, cpu)
    return load_for_generation(
        checkpoint, placement, mode="av", timestep_format="flowmatch_1_1000", device=cpu, dtype=torch.float32, loras=loras
    )


def test_padded_texts_bring_their_mask(wrapper: OfficialLTXV2Wrapper) -> None:
    made = parts.sample(wrapper)
    mask = torch.arange(parts.TEXT_TOKENS)[None] < 5
    padded = SampleInputs(prompt=made.prompt, plan=made.plan, positive=TextContext(made.positive.text, mask), negative=made.negative)
    calls = record_calls(wrapper, padded)
    assert torch.equal(calls[0][3], mask) and calls[1][3] is None
    junk = TextContext(torch.where(mask[..., None], made.positive.text, 100.0), mask)
    other = SampleInputs(prompt=made.prompt, plan=made.plan, positive=junk, negative=made.negative)
    assert torch.allclose(generate(wrapper, padded).video, generate(wrapper, other).video, atol=1e-5)
