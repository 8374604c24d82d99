"""Conditioning that is kept in part: levels, starts and what is drawn back, against the official rules written out."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from musubi_tuner.conditioning.apply import condition
from musubi_tuner.conditioning.conditions import Conditions, KeyframeLatents, Reference, StreamConditions
from musubi_tuner.conditioning.tokens import model_input, video_stream
from musubi_tuner.generation.denoise import SampleInputs, generate
from musubi_tuner.generation.encode import ConditioningLatents
from musubi_tuner.prompts.sample_prompts import PromptDefaults, prompts_of_lines
from musubi_tuner.runtime.errors import UserError
from tests import preview_parts as parts


@pytest.fixture(scope="module")
def wrapper(tiny_family):
    return parts.load_wrapper(tiny_family.ltx23)


def latents(frames: int = 2) -> torch.Tensor:
    return torch.randn(1, 128, frames, 1, 2, generator=torch.Generator().manual_seed(4))


def sampled(wrapper, conditions: StreamConditions | None, video: torch.Tensor | None = None) -> torch.Tensor:
    made = parts.sample(wrapper)
    given = ConditioningLatents(video=video, conditions=Conditions(video=conditions or StreamConditions()))
    return generate(
        wrapper, SampleInputs(prompt=made.prompt, plan=made.plan, positive=made.positive, negative=made.negative, conditioning=given)
    ).video


def first_frame(strength: float | None) -> StreamConditions:
    clean = torch.tensor([[True, True, False, False]])
    return StreamConditions(clean=clean, strength=None if strength is None else torch.full((1, 4), strength))


def test_strength_one_is_as_without_and_zero_as_no_conditioning(wrapper):
    video = latents()
    video[:, :, 1] = 0
    assert torch.equal(sampled(wrapper, first_frame(1.0), video), sampled(wrapper, first_frame(None), video))
    assert torch.allclose(sampled(wrapper, first_frame(0.0), video), sampled(wrapper, None), atol=1e-5)


def test_a_strength_between_comes_nearer_to_the_picture_the_larger_it_is(wrapper):
    video = latents()
    video[:, :, 1] = 0
    apart = [float((sampled(wrapper, first_frame(strength), video)[:, :, 0] - video[:, :, 0]).norm()) for strength in (0.0, 0.4, 0.8, 1.0)]
    assert apart == sorted(apart, reverse=True) and apart[-1] == 0


def test_levels_of_tokens_are_the_rest_of_their_strength():
    clean, strength = torch.tensor([[True, True, False, False]]), torch.tensor([[0.75, 0.75, 1.0, 1.0]])
    beside = KeyframeLatents(latents=latents(1), frames=torch.tensor([[8]]), fps=torch.tensor([24.0]), strengths=torch.tensor([[0.5]]))
    reference = Reference(latents=latents(1), fps=torch.tensor([24.0]), strength=1.0)
    conditions = Conditions(video=StreamConditions(clean=clean, strength=strength, keyframes=beside, reference=reference))
    stream = condition({"video": video_stream(latents(), torch.tensor([24.0]))}, conditions)["video"]
    given = model_input(stream, torch.zeros(1, 8, 128), torch.tensor([0.8]))
    assert torch.allclose(given.timesteps, 0.8 * torch.tensor([[0.25, 0.25, 1, 1, 0.5, 0.5, 0, 0]]))
    assert torch.equal(given.latent[:, 6:], stream.clean[:, 6:]) and not given.latent[:, :6].any()


def test_a_reference_of_no_strength_leaves_its_tokens_noise(wrapper):
    def with_reference(strength: float) -> torch.Tensor:
        return sampled(wrapper, StreamConditions(reference=Reference(latents=latents(), fps=torch.tensor([24.0]), strength=strength)))

    full, half, none = (with_reference(strength) for strength in (1.0, 0.5, 0.0))
    assert not torch.allclose(full, half, atol=1e-3) and not torch.allclose(half, none, atol=1e-3)
    assert full.shape == half.shape == none.shape


def test_strengths_are_read_from_prompts(tmp_path: Path):
    for name in ("a.png", "b@0.5"):
        Image.new("RGB", (32, 32)).save(tmp_path / name, format="png")
    line = f"x --f 17 --i {tmp_path}/a.png --is 0.7 --k 8={tmp_path}/a.png@0.25;16={tmp_path}/b@0.5@.9 --v {tmp_path}/a.png --vs 0.5"
    (prompt,) = prompts_of_lines([line], "--prompt", tmp_path, PromptDefaults())
    inputs = prompt.inputs
    assert (inputs.image_strength, inputs.strengths, inputs.reference_strength) == (0.7, ((8, 0.25), (16, 0.9)), 0.5)
    assert [path.name for _, path in inputs.keyframes] == ["a.png", "b@0.5"]
    for bad, says in (("x --is 0.5", "--is says how far"), (f"x --i {tmp_path}/a.png --is 1.5", "--is '1.5'")):
        with pytest.raises(UserError, match=says):
            prompts_of_lines([bad], "--prompt", tmp_path, PromptDefaults())
