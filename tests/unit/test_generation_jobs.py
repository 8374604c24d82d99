"""From flags to the clips of a run: what flags add to prompts, and what they cannot say together."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from safetensors.torch import save_file

from musubi_tuner.config.flags import parse
from musubi_tuner.config.generation import GenerateConfig
from musubi_tuner.generation.contexts import EncodedBy
from musubi_tuner.generation.denoise import SampledLatents
from musubi_tuner.generation.jobs import LoraUse, chosen_loras, make_jobs, read_prompts
from musubi_tuner.generation.pipelines import make_stages, without_effect
from musubi_tuner.generation.recipe import KEY, Recipe, recipe_of
from musubi_tuner.generation.recreate import Again, flags_of, read_again
from musubi_tuner.generation.setting import Setting
from musubi_tuner.generation.unfinished import Unfinished
from musubi_tuner.media.write import write_image
from musubi_tuner.networks.stack import Strength
from musubi_tuner.runtime.errors import UserError

UNKNOWN = EncodedBy(None, None, None)


def config_of(*words: str) -> GenerateConfig:
    return parse(GenerateConfig, ["--ltxv2_model", "m", *words], prog="p", description="d")


def inputs_of(folder: Path, flags: str, *words: str):
    for name in "ab":
        (folder / name).touch()
    (prompt,) = read_prompts(config_of("--prompt", f"a dog --f 17 {flags.format(folder)}", *words))
    return prompt.inputs


def test_a_picture_of_frame_0_in_place_is_the_first_image(tmp_path: Path):
    given = ("--image", str(tmp_path / "b"))
    assert inputs_of(tmp_path, "--kp 0={0}/a", *given).image is None, "--image: where a prompt names none"
    assert inputs_of(tmp_path, "--kp 8={0}/a", *given).image == tmp_path / "b"


@pytest.mark.parametrize("flags", ["--k 8={0}/a --kp 8={0}/b", "--ei {0}/a --kp 16={0}/b", "--i {0}/a --k 0={0}/b"])
def test_two_pictures_of_one_frame_cannot_both_be_beside_the_clip(tmp_path: Path, flags: str):
    assert inputs_of(tmp_path, flags), "one is in place"
    with pytest.raises(UserError, match="are both of that frame; keep one"):
        inputs_of(tmp_path, flags, "--pipeline", "keyframes")


def recipes(*words: str) -> list[Recipe]:
    config = config_of(*words)
    return [recipe_of(job, config, {}, UNKNOWN, (1, 1)) for job in make_jobs(config, read_prompts(config), ())]


def kept(folder: Path, recipe: Recipe) -> Path:
    """A clip with this recipe."""
    clip = folder / "made.png"
    clip.unlink(missing_ok=True)
    write_image(clip, torch.zeros(8, 8, 3, dtype=torch.uint8), {KEY: recipe.text})
    return clip


def again(folder: Path, recipe: Recipe) -> Again:
    """The recipe as it is read from a clip."""
    clip = kept(folder, recipe)
    argv = ["--ltxv2_model", "m", "--recreate", str(clip), "--lora_folder", str(folder), "--input_folder", str(folder)]
    return read_again(parse(GenerateConfig, argv, prog="p", description="d", beneath=lambda given: flags_of(clip)))


def test_what_has_no_effect_on_fixed_steps_is_named_and_makes_no_other_clip():
    config = config_of("--prompt", "a dog --l 4 --n blur", "--sample_steps", "9", "--stg_scale", "2", "--pipeline", "distilled")
    (prompt,) = read_prompts(config)
    assert without_effect("distilled", prompt, config.guidance) == ["--l or --al", "a negative prompt", "--sample_steps", "--stg_scale"]
    assert without_effect("two_stage", prompt, config.guidance) == []
    flags = ("--stg_scale", "2", "--negative_prompt", "blur", "--sample_steps", "9", "--audio_cfg_scale", "3")
    for pipeline, same in (("distilled", True), ("distilled_one_stage", True), ("ic_lora", True), ("hq", False)):
        (plain,) = recipes("--prompt", "a dog", "--pipeline", pipeline)
        (other,) = recipes("--prompt", "a dog --l 4", "--pipeline", pipeline, *flags)
        assert (plain.digest == other.digest) is same


def test_the_second_stage_of_ic_lora_is_shown_no_reference(tmp_path: Path):
    (tmp_path / "a").touch()
    config = config_of("--prompt", f"a dog --w 128 --h 64 --v {tmp_path}/a --ra {tmp_path}/a", "--pipeline", "ic_lora")
    (prompt,) = read_prompts(config)
    first, second = make_stages("ic_lora", prompt, config.guidance, config.pipeline, mode="av", version="2.3", num_layers=2)
    assert first.prompt.inputs == prompt.inputs and first.with_loras and not second.with_loras
    assert (second.prompt.inputs.reference, second.prompt.inputs.reference_audio) == (None, None)


def test_a_multiplier_is_of_one_file(tmp_path: Path):
    files = [str(tmp_path / name) for name in "ab"]
    for file in files:
        Path(file).touch()
    given = ("--prompt", "a dog", "--lora_weight", *files, "--lora_multiplier")
    for numbers, strengths in (((), [1, 1]), (("0.5",), [0.5, 1]), (("0.5", "0"), [0.5, 0])):
        uses = chosen_loras(config_of(*(given if numbers else given[:-1]), *numbers).loras)
        assert [(use.strength.video, use.strength.audio) for use in uses] == [(one, one) for one in strengths]
    with pytest.raises(UserError, match="1 numbers for 0 files"):
        config_of("--prompt", "a dog", "--lora", files[0], "--lora_multiplier", "0.5")


def test_the_base_of_a_run_with_an_ic_lora_is_shown_the_same_reference_and_says_so(tmp_path: Path):
    network, reference = tmp_path / "ic.safetensors", tmp_path / "edges.mp4"
    save_file({"x": torch.zeros(1)}, network, {"reference_downscale_factor": "2"})
    reference.touch()
    config = config_of("--prompt", f"a dog --v {reference}", "--lora", str(network))
    (on,) = make_jobs(config, read_prompts(config), chosen_loras(config.loras))
    off, base = dataclasses.replace(on, loras=(LoraUse(network, Strength(0, 0)),)), dataclasses.replace(on, loras=())
    found = {}
    for name, jobs in {"on": [on], "off": [off], "grid": [base, on], "alone": [base]}.items():
        factors = Setting.factors_of(cast(Setting, SimpleNamespace(reference_factors=None)), jobs)
        found[name] = recipe_of(jobs[0], config, {}, UNKNOWN, factors)
    assert found["off"].digest == found["grid"].digest != found["alone"].digest
    assert found["grid"].facts["reference_factors"] == {"space": 2, "time": 1}
    assert "reference_factors" not in found["on"].facts | found["alone"].facts, "its networks say it, as in recipes made before"
    assert again(tmp_path, found["grid"]).reference_factors == (2, 1) and again(tmp_path, found["on"]).reference_factors is None
    assert Setting.factors_of(cast(Setting, SimpleNamespace(reference_factors=(4, 1))), [base]) == (4, 1), "of --recreate"


def test_clips_of_texts_that_are_cut_or_projected_otherwise_are_other_clips(tmp_path: Path):
    config = config_of("--prompt", "a dog")
    (job,) = make_jobs(config, read_prompts(config), ())

    def recipe(projection: str | None, max_length: int | None = None) -> Recipe:
        return recipe_of(job, config, {}, EncodedBy("e", projection, max_length), (1, 1))

    before, one, other, cut = recipe(None), recipe("one"), recipe("other"), recipe("one", 64)
    assert before.digest == one.digest != cut.digest, "clips that were made before are still known"
    assert (
        parse(
            GenerateConfig,
            ["--ltxv2_model", "m", "--recreate", str(kept(tmp_path, cut))],
            prog="p",
            description="d",
            beneath=lambda given: flags_of(tmp_path / "made.png"),
        ).model.max_length
        == 64
    )
    folder = Unfinished(tmp_path)
    latents = SampledLatents(video=torch.zeros(1, 1, 1, 1, 1), audio=None)
    for made, same in ((before, [before, one, other]), (one, [before, one])):
        kept(tmp_path, made)
        folder.keep("made", made, 0, latents, 1.0, "bf16")
        for wanted in (before, one, other, cut):
            assert (folder.finished("made", wanted) is not None) is (wanted in same)
            assert folder.has("made", wanted, 0) is (wanted in same)
