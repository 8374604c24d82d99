"""How strongly a clip and its reference attend to each other: the mask, the prompts that give it, and what it does to a sample."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from musubi_tuner.conditioning.apply import condition
from musubi_tuner.conditioning.conditions import Conditions, KeyframeLatents, Reference, StreamConditions
from musubi_tuner.conditioning.tokens import model_input, video_stream
from musubi_tuner.generation.denoise import SampleInputs, generate
from musubi_tuner.generation.encode import ConditioningEncoders, ConditioningLatents, encode_conditioning, mask_of_cells
from musubi_tuner.generation.windows import WindowSize
from musubi_tuner.ltxv2.transformer.attention import reference_bias
from musubi_tuner.ltxv2.transformer.modality import ReferenceAttention
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.prompts.sample_prompts import PromptDefaults, prompts_of_lines
from musubi_tuner.runtime.errors import UserError
from tests import preview_parts as parts

FPS = torch.tensor([24.0])


@pytest.fixture(scope="module")
def wrapper(tiny_family):
    return parts.load_wrapper(tiny_family.ltx23)


def latents(frames: int, seed: int = 4) -> torch.Tensor:
    return torch.randn(1, 128, frames, 1, 2, generator=torch.Generator().manual_seed(seed))


def shown(attention: torch.Tensor | None, frames: int = 2) -> StreamConditions:
    beside = KeyframeLatents(latents=latents(1, 5), frames=torch.tensor([[8]]), fps=FPS)
    return StreamConditions(keyframes=beside, reference=Reference(latents=latents(frames), fps=FPS, attention=attention))


def sampled(wrapper, conditions: StreamConditions, window: WindowSize | None = None, mode: str = "av") -> torch.Tensor:
    made = parts.sample(wrapper, mode=mode)
    given = ConditioningLatents(conditions=Conditions(video=conditions))
    inputs = SampleInputs(
        prompt=made.prompt, plan=made.plan, positive=made.positive, negative=made.negative, conditioning=given, window=window
    )
    return generate(wrapper, inputs).video


def test_the_mask_is_that_of_the_blocks():
    """Of 3 tokens of a clip, 2 of a keyframe and 2 of a reference, written out."""
    strength = torch.tensor([[0.5, 0.0]])
    low, half = torch.finfo(torch.float32).min, math.log(0.5)
    expected = torch.zeros(7, 7)
    expected[:3, 5] = expected[5, :3] = half
    expected[:3, 6] = expected[6, :3] = low
    expected[3:5, 5:] = expected[5:, 3:5] = low
    mask = reference_bias(ReferenceAttention(strength, own=3, beside=2), torch.float32)
    assert mask.shape == (1, 1, 7, 7) and torch.allclose(mask[0, 0], expected) and mask.stride(2) % 8 == 0


def test_a_streams_attention_counts_the_clips_tokens_and_those_of_keyframes():
    stream = condition({"video": video_stream(latents(3), FPS)}, Conditions(video=shown(torch.full((1, 4), 0.5))))["video"]
    given = model_input(stream, torch.zeros(1, 6, 128), torch.tensor([0.8])).reference_attention
    assert given is not None and (given.own, given.beside, given.strength.shape) == (6, 2, (1, 4))
    plain = condition({"video": video_stream(latents(3), FPS)}, Conditions(video=shown(None)))["video"]
    assert plain.attention is None


def test_no_attention_is_a_clip_without_the_reference_and_less_is_nearer_to_it(wrapper):
    """Of pictures alone: sound, which the official code lets see the whole reference, would pass it on."""

    def of(conditions: StreamConditions) -> torch.Tensor:
        return sampled(wrapper, conditions, mode="video")

    without = of(StreamConditions(keyframes=shown(None).keyframes))
    found = [of(shown(torch.full((1, 4), strength))) for strength in (0.0, 0.3, 1.0)]
    assert torch.allclose(found[0], without, atol=1e-5), "tokens that nobody attends to change nothing"
    assert 1e-4 < float((found[1] - without).norm()) < float((found[2] - without).norm())
    by_token = of(shown(torch.tensor([[1.0, 1.0, 0.0, 0.0]])))
    assert not torch.allclose(by_token, found[2], atol=1e-5) and not torch.allclose(by_token, without, atol=1e-5)


def test_windows_see_the_same_reference(wrapper):
    conditions = shown(torch.full((1, 4), 0.5))
    assert torch.equal(sampled(wrapper, conditions), sampled(wrapper, conditions, WindowSize(2, 1)))


def test_the_mask_of_all_passes_is_made_once(wrapper, monkeypatch):
    from musubi_tuner.ltxv2.transformer import model

    made = []
    monkeypatch.setattr(model, "reference_bias", lambda *a: made.append(a) or reference_bias(*a))
    sampled(wrapper, shown(torch.full((1, 4), 0.5)))
    assert len(made) == 1 and wrapper.transformer._reference_bias is None


def test_pixels_become_cells_by_their_means():
    """The first frame is a cell of its own, each other cell is the mean of its eight frames."""
    frames = torch.zeros(17, 64, 64, 3, dtype=torch.uint8)
    frames[0, :32] = 255
    frames[1:5, :, 32:] = 255
    frames[9:, 32:48, :32] = torch.tensor([0, 255, 0], dtype=torch.uint8)
    mask = mask_of_cells(frames, (3, 2, 2))
    assert torch.allclose(mask, torch.tensor([[[1, 1], [0, 0]], [[0, 0.5], [0, 0.5]], [[0, 0], [1 / 6, 0]]]))
    assert mask_of_cells(frames, (1, 1, 1)).item() == pytest.approx(0.5), "a picture as the reference sees the first frame alone"


def test_prompts_name_strength_and_mask(tiny_family, tmp_path: Path):
    picture = Image.new("RGB", (64, 32), "black")
    picture.paste("white", (0, 0, 32, 32))
    picture.save(tmp_path / "mask.png")
    vae = open_checkpoint(tiny_family.ltx23)
    encoders = ConditioningEncoders(vae, vae, torch.device("cpu"), still_crf=None)

    def attention(flags: str) -> torch.Tensor | None:
        line = f"x --w 64 --h 32 --f 9 --v {tmp_path}/mask.png {flags}"
        (prompt,) = prompts_of_lines([line], "--prompt", tmp_path, PromptDefaults())
        reference = encode_conditioning(prompt, ("video",), encoders).conditions.video.reference
        assert reference is not None
        return reference.attention

    assert attention("") is None and attention("--va 1") is None
    assert torch.equal(attention("--va 0.25"), torch.full((1, 2), 0.25))
    assert torch.equal(attention("--vm mask.png"), torch.tensor([[1.0, 0.0]]))
    assert torch.equal(attention("--vm mask.png --va 0.5"), torch.tensor([[0.5, 0.0]]))
    for bad, says in (
        ("x --va 0.5", "--va says how strongly a reference is attended to; give the reference by --v"),
        ("x --vm mask.png", "--vm says how strongly"),
        (f"x --v {tmp_path}/mask.png --va 2", "--va '2'"),
        (f"x --v {tmp_path}/mask.png --vm none.png", "--vm 'none.png': no such file"),
    ):
        with pytest.raises(UserError, match=says):
            prompts_of_lines([bad], "--prompt", tmp_path, PromptDefaults())
