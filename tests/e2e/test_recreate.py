"""A clip made again from the recipe in it: files by their hashes, the same bytes, and words for whatever differs."""

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from musubi_tuner import ltxv2_generate_video
from musubi_tuner.flow import guidance
from musubi_tuner.generation import recreate
from musubi_tuner.generation.recipe import KEY, Recipe, read_recipe, recipe_path
from musubi_tuner.media.audio import Waveform
from musubi_tuner.media.write import write_image, write_video
from musubi_tuner.runtime.errors import UserError
from tests.e2e.test_generate import run, second_stage


def again(family, texts: Path, clip: Path, folder: Path, *flags: str) -> Path:
    """With nothing but the model, the texts and what is asked."""
    base = ["--ltxv2_model", str(family.ltx23), "--text_cache", str(texts), "--device", "cpu", "--output_dir", str(folder)]
    assert ltxv2_generate_video.main([*base, "--recreate", str(clip), *flags]) == 0
    return next(path for ending in (".mp4", ".wav", ".png") for path in folder.glob(f"*{ending}"))


@pytest.fixture(scope="module")
def library(tiny_family, tmp_path_factory):
    """LoRAs and media, beside files of the same size and a link into nowhere."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "a" / "b").mkdir(parents=True)
    tensors = load_file(tiny_family.distilled_lora)
    save_file(tensors, folder / "used.safetensors")
    save_file({key: value + 1 for key, value in tensors.items()}, folder / "a" / "another.safetensors")
    Image.new("RGB", (128, 64), (200, 40, 90)).save(folder / "start.png")
    frames = torch.arange(17)[:, None, None, None].expand(17, 64, 128, 3).to(torch.uint8) * 12
    sound = Waveform(samples=torch.sin(torch.arange(16000 * 2) / 9).expand(2, -1) * 0.3, rate=16000)
    write_video(folder / "clip.mp4", frames, 24.0, sound)
    (folder / "a" / "nowhere").symlink_to(folder / "a" / "gone")
    return folder


def moved(library: Path, *names: str) -> dict[str, Path]:
    """The files in a subfolder, as another machine may have them."""
    return {name: Path(shutil.move(library / name, library / "a" / "b" / name)) for name in names}


@pytest.mark.parametrize(
    ("prompt", "flags"),
    [
        (
            "a dog --d 18446744073709551615 --s 1 --fr 23.976 --l 0 --n rain",
            ("--stg_scale", "2", "--stg_blocks", "0", "--rescale_scale", "0"),
        ),
        ("a dog --f 1", ("--sample_scheduler", "ltx2_by_size")),
        ("rain", ("--ltx_mode", "audio")),
        ("a dog --f 49 --s 1", ("--window_frames", "33", "--window_overlap", "9", "--pipeline", "distilled_one_stage")),
        ("a dog", ("--ltx_mode", "video", "--ltxv2_timestep_format", "flowmatch_1_1000")),
    ],
)
def test_every_setting_comes_from_the_recipe(tiny_family, texts, tmp_path, prompt, flags):
    (clip,) = run(tiny_family, texts, tmp_path / "first", "--prompt", prompt, *flags)
    made = again(tiny_family, texts, clip, tmp_path / "again")
    assert made.read_bytes() == clip.read_bytes() and made.stem == f"{clip.stem}_again"
    if clip.suffix == ".wav":
        assert recipe_path(made).read_bytes() == recipe_path(clip).read_bytes()


def test_files_are_found_by_their_hashes(tiny_family, texts, library, tmp_path, caplog):
    """Two stages, networks, a first picture, a clip that is gone on with: each by what is in it, wherever it lies."""
    folder = Path(shutil.copytree(library, tmp_path / "files", symlinks=True))
    two = ("--pipeline", "two_stage", *second_stage(tiny_family))
    lora = ("--lora", f"{folder}/used.safetensors:0.5:1:0.3")
    prompt = f"a dog --i {folder}/start.png --is 0.7 --k 8={folder}/start.png@0.5 --v {folder}/start.png --va 0.5 --vm {folder}/start.png"
    (stages,) = run(tiny_family, texts, tmp_path / "1", "--prompt", prompt, *two, *lora)
    (longer,) = run(tiny_family, texts, tmp_path / "2", "--prompt", f"a dog --iv {folder}/clip.mp4 --vt 0.2-", *lora)
    assert read_recipe(longer).facts["inputs"]["video_span"] == {"start": 0.2, "end": None}
    there = moved(folder, "used.safetensors", "start.png", "clip.mp4")
    folders = ("--lora_folder", str(folder), "--input_folder", str(folder))
    hashed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recreate, "file_hash", lambda path, real=recreate.file_hash: hashed.append(path) or real(path))
        assert again(tiny_family, texts, stages, tmp_path / "3", *folders, *second_stage(tiny_family)).read_bytes() == stages.read_bytes()
    assert {path.suffix for path in hashed if path.is_relative_to(folder)} == {".safetensors", ".png"}, "of other sizes, none"
    given = ("--lora", str(there["used.safetensors"]), "--audio", str(there["clip.mp4"]))
    caplog.set_level(logging.INFO)
    assert again(tiny_family, texts, longer, tmp_path / "4", *given).read_bytes() == longer.read_bytes(), "its own strengths"
    assert "WARNING" not in caplog.text and "in place of" not in caplog.text


def test_what_is_lacking_is_named_with_its_hash_and_a_remedy(tiny_family, texts, library, tmp_path):
    flags = ("--prompt", f"a dog --i {library}/start.png", "--lora", f"{library}/used.safetensors")
    (clip,) = run(tiny_family, texts, tmp_path / "first", *flags)
    digest = {name: read_recipe(clip).facts[kind][place]["sha256"] for name, kind, place in (("l", "loras", 0), ("i", "inputs", "image"))}
    with pytest.raises(UserError) as caught:
        again(tiny_family, texts, clip, tmp_path / "again", "--lora_folder", str(tmp_path / "first"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and all(str(clip) in line for line in lines)
    assert "'used.safetensors'" in lines[0] and digest["l"] in lines[0] and "--lora_folder" in lines[0]
    assert "'start.png'" in lines[1] and digest["i"] in lines[1] and "--input_folder" in lines[1]


def test_what_is_given_besides_wins_and_is_told(tiny_family, texts, library, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    lora = library / "used.safetensors"
    (clip,) = run(tiny_family, texts, tmp_path / "first", "--prompt", "a dog --d 4", "--lora", f"{lora}:0.5")
    made = again(tiny_family, texts, clip, tmp_path / "again", "--seed", "5", "--width", "64", "--lora", f"{lora}:1", "--output_name", "x")
    (wanted,) = run(tiny_family, texts, tmp_path / "wanted", "--prompt", "a dog --d 5 --w 64", "--lora", str(lora))
    assert made.read_bytes() == wanted.read_bytes() and made.name == "x.mp4"
    for line in ("--seed 5: in place of 4", "--sample_width 64: in place of 128", "in place of 0.5, which"):
        assert line in caplog.text
    more = again(
        tiny_family, texts, clip, tmp_path / "more", "--lora", str(library / "a" / "another.safetensors"), "--lora_folder", str(library)
    )
    assert [one["name"] for one in read_recipe(more).facts["loras"]] == ["used.safetensors", "another.safetensors"]
    assert "is added; the recipe has no such LoRA" in caplog.text
    assert (
        again(tiny_family, texts, clip, tmp_path / "g", "--grid", "strength=0", "--lora_folder", str(library)).name
        == "clip_00_4_again_00_4.mp4"
    )


def test_another_model_is_told(tiny_family, texts, tmp_path, caplog):
    (clip,) = run(tiny_family, texts, tmp_path / "first", "--prompt", "a dog")
    tensors = load_file(tiny_family.ltx23)
    name = next(name for name in tensors if name.endswith("transformer_blocks.0.attn1.to_q.weight"))
    from musubi_tuner.cache.store import serialize, write_bytes
    from musubi_tuner.ltxv2.weights import open_checkpoint

    other = tmp_path / "other.safetensors"
    write_bytes(other, serialize(tensors | {name: tensors[name] * 2}, open_checkpoint(tiny_family.ltx23).metadata))
    made = again(tiny_family, texts, clip, tmp_path / "again", "--ltxv2_model", str(other))
    assert made.read_bytes() != clip.read_bytes()
    assert "--ltxv2_model: another model than the clip was made with" in caplog.text and "--vae" not in caplog.text


def test_another_text_encoder_is_told(tiny_family, texts, tmp_path, caplog):
    """Whether its texts come from a cache or are encoded now; the same one is the same from either."""
    (clip,) = run(tiny_family, texts, tmp_path / "first", "--prompt", "a dog")
    here = ("--text_cache", str(tmp_path / "nothing"), "--text_encoder")
    again(tiny_family, texts, clip, tmp_path / "same", *here, str(tiny_family.gemma))
    assert "text encoder" not in caplog.text
    other = Path(shutil.copytree(tiny_family.gemma, tmp_path / "other gemma"))
    (weights,) = other.glob("*.safetensors")
    tensors = load_file(weights)
    save_file({key: value * 1.5 if key.endswith("q_proj.weight") else value for key, value in tensors.items()}, weights, {"format": "pt"})
    again(tiny_family, texts, clip, tmp_path / "again", *here, str(other))
    assert re.search(r"another text encoder than the clip was made with \(fingerprint .*--text_cache", caplog.text)
    assert read_recipe(clip).facts["text_encoder"] in caplog.text
    both = run(tiny_family, tmp_path / "nothing", tmp_path / "first", "--prompt", "a dog", "--text_encoder", str(other))
    assert len(both) == 2, "another encoder's clip is another clip"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda facts: facts.pop("prompt"), "has no 'prompt'"),
        (lambda facts: facts["prompt"].update(width=100), "prompt: width = 100: must be a multiple of 32"),
        (lambda facts: facts["prompt"].update(prompt=5), "prompt: prompt = 5"),
        (lambda facts: facts["guidance"].update(stg_scale=-1), "its recipe: stg_scale = -1: must be at least 0"),
        (lambda facts: facts["guidance"].update(output_dir="/"), "holds 'output_dir'"),
        (lambda facts: facts.update(stepz=3), "its recipe: holds 'stepz', which this version does not know"),
        (lambda facts: facts.update(pipeline="none"), "its recipe: pipeline = 'none'"),
        (lambda facts: facts.update(loras={}), "has no 'loras'"),
        (lambda facts: facts.update(loras=[{"name": "/etc/passwd", "size": 1, "sha256": "x", "video": 1, "audio": 1}]), "loras: sha256"),
        (lambda facts: facts["inputs"].update(image="/etc/passwd"), "inputs, image: must hold keys"),
        (lambda facts: facts["inputs"].update(elsewhere={}), "inputs, elsewhere"),
        (lambda facts: facts["inputs"].update(crop={"left": 0, "top": 0, "width": 4096, "height": 64}), "not within"),
    ],
)
def test_a_recipe_is_not_trusted(tiny_family, texts, tmp_path, change, says):
    (clip,) = run(tiny_family, texts, tmp_path / "first", "--prompt", "a dog --f 1")
    facts = json.loads(json.dumps(read_recipe(clip).facts))
    change(facts)
    write_image(tmp_path / "changed.png", torch.zeros(8, 8, 3, dtype=torch.uint8), {KEY: json.dumps({KEY: 1, **facts})})
    with pytest.raises(UserError, match=re.escape(says)):
        again(tiny_family, texts, tmp_path / "changed.png", tmp_path / "again")


def test_files_without_a_recipe_are_refused(tiny_family, texts, library, tmp_path):
    for path, says in (
        (library / "clip.mp4", "holds no recipe"),
        (library / "start.png", "holds no recipe"),
        (tmp_path / "a.mp4", "a.mp4"),
    ):
        with pytest.raises(UserError, match=says):
            again(tiny_family, texts, path, tmp_path / "again")
    with pytest.raises(UserError, match="--input_folder: is where --recreate looks"):
        run(tiny_family, texts, tmp_path / "again", "--prompt", "a dog", "--input_folder", str(tmp_path))


def test_defaults_that_change_later_do_not_change_a_clip_that_is_made_again(tiny_family, texts, tmp_path, monkeypatch):
    """Guidance, steps and blocks that were left to the release's defaults, of the pictures alone and of both."""
    (clip,) = run(tiny_family, texts, tmp_path / "first", "--prompt", "a dog --f 1", "--audio_stg_scale", "2")
    recipe = read_recipe(clip)
    used = recipe.facts["used"]
    assert used["guidance"]["video_cfg_scale"] == 3 and used["stages"][0]["sigmas"][0] == 1 and used["dtype"] == "float32"
    assert recipe.digest == Recipe({name: value for name, value in recipe.facts.items() if name != "used"}).digest
    before = guidance.defaults_for("2.3")
    other = dataclasses.replace(before.video, cfg=9.0, stg=0.0)
    monkeypatch.setitem(guidance._DEFAULTS, "2.3", dataclasses.replace(before, video=other, audio=other, stg_blocks=(0,)))
    made = again(tiny_family, texts, clip, tmp_path / "again")
    assert np.array_equal(*(np.asarray(Image.open(path)) for path in (made, clip)))
    assert read_recipe(made).facts["used"] == used


def test_a_clip_of_weights_that_a_plan_made_smaller_is_made_again_with_them(tiny_family, texts, tmp_path):
    """Where there is room for all of them, a plan takes them as they are."""
    flags = ("--prompt", "a dog --f 1", "--vram_gb", "0.0085", "--blocks_to_swap", "0", "--no-compile")
    (clip,) = run(tiny_family, texts, tmp_path / "small", *flags)
    (whole,) = run(tiny_family, texts, tmp_path / "large", *flags[:2])
    formats = {path: read_recipe(path).facts["used"]["weight_formats"] for path in (clip, whole)}
    assert formats == {clip: ["nf4"], whole: ["float32"]}
    made = again(tiny_family, texts, clip, tmp_path / "again")
    pixels = [np.asarray(Image.open(path)) for path in (made, clip, whole)]
    assert np.array_equal(*pixels[:2]) and not np.array_equal(*pixels[1:])
