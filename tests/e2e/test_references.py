"""References (IC-LoRA): planned, cached, shown in training and in previews, and recorded in the LoRA's metadata."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from musubi_tuner import ltxv2_cache_latents, ltxv2_train_network
from musubi_tuner.conditioning import recipe as rules
from musubi_tuner.conditioning.recipe import Recipe
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.config.flags import parse
from musubi_tuner.config.generation import GenerateConfig
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.items import Draw, Item, list_items
from musubi_tuner.generation.denoise import SampleInputs, generate
from musubi_tuner.generation.encode import ConditioningEncoders, encode_conditioning
from musubi_tuner.generation.sampling import make_plan
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.prompts.sample_prompts import load_prompts
from musubi_tuner.publishing.card import CardFacts, card_text
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import write_clips, write_stills
from tests import preview_parts, training_parts
from tests.e2e.test_conditioning import RECIPES, draw_rules, spy

TOML = """
[general]
resolution = [128, 64]
reference_downscale = 2

[[datasets]]
video_directory = "clips"
cache_directory = "cache"
reference_directory = "references"
target_frames = [17]
"""
RECIPE = str(RECIPES / "reference_video.toml")


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory) -> training_parts.Data:
    folder = tmp_path_factory.mktemp("gezeigt ü")
    write_clips(folder / "clips", count=2, frames=25, width=128, height=64)
    write_clips(folder / "references", count=2, frames=25, width=128, height=64, seed=7)
    for caption in (folder / "references").glob("*.txt"):
        caption.unlink()
    (folder / "dataset.toml").write_text(TOML, encoding="utf-8")
    made = training_parts.Data(folder, folder / "dataset.toml", tiny_family.ltx23, "video", tiny_family.gemma)
    training_parts.cache(made)
    return made


def items_of(data: training_parts.Data) -> list[Item]:
    return list(list_items(load_dataset_config(data.toml).datasets, "video", data.toml))


def cache_latents(toml: Path, model: Path) -> int:
    return ltxv2_cache_latents.main(["--dataset_config", str(toml), "--vae", str(model), "--device", "cpu"])


def test_references_are_cached_beside_the_latents_for_the_same_seconds(data):
    item = items_of(data)[0]
    assert item.paths["reference"].name == "clip_000_00000-017_0128x0064_ltxv2_ref.safetensors"
    assert set(load_file(item.paths["reference"])) == {"ref_latents_3x1x2_bfloat16"}
    with safe_open(item.paths["reference"], framework="pt") as file:
        metadata = file.metadata()
    assert metadata["kind"] == "reference_latents" and metadata["source_fingerprint"] != item.clip.source_fingerprint
    assert item.clip.start_seconds == 0 and item.clip.fps == 24
    assert json.loads(metadata["window"]) == {"start": 0, "fps": 24, "frames": 17, "width": 64, "height": 32}


def test_caching_again_encodes_nothing_and_a_changed_reference_is_noticed(data, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(data.folder, folder)
    toml, cache = folder / "dataset.toml", folder / "cache"
    before = {path.name: path.read_bytes() for path in cache.glob("*_ltxv2*.safetensors")}
    times = {path.name: path.stat().st_mtime_ns for path in cache.glob("*_ltxv2*.safetensors")}
    assert cache_latents(toml, data.model) == 0
    assert times == {path.name: path.stat().st_mtime_ns for path in cache.glob("*_ltxv2*.safetensors")}
    write_clips(folder / "references", count=2, frames=25, width=128, height=64, seed=8)
    copied = replace(data, folder=folder, toml=toml)
    with pytest.raises(UserError, match="its reference 'clip_000.mp4' has changed"):
        ltxv2_train_network.main(copied.arguments("--output_dir", str(tmp_path), "--conditioning_config", RECIPE))
    assert cache_latents(toml, data.model) == 0
    after = {path.name: path.read_bytes() for path in cache.glob("*_ltxv2*.safetensors")}
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {name for name in after if name.endswith("_ltxv2_ref.safetensors")}


def test_training_on_references_and_its_metadata(data, tmp_path):
    flags = data.arguments("--output_dir", str(tmp_path), "--conditioning_config", RECIPE, "--max_train_steps", "2")
    assert ltxv2_train_network.main(flags) == 0
    metadata = open_checkpoint(tmp_path / "ltxv2_lora.safetensors").metadata
    assert metadata["reference_downscale_factor"] == metadata["reference_spatial_scale_factor"] == "2"
    assert metadata["reference_temporal_scale_factor"] == "1"
    card = card_text(tmp_path / "ltxv2_lora.safetensors", CardFacts())
    (command,) = re.findall(r"```bash\nltxv2 generate (.*?)\n```", card, re.DOTALL)
    read = parse(GenerateConfig, shlex.split(command.replace("\\\n", " ")), prog="", description="")
    assert (read.pipeline.pipeline, read.loras.lora) == ("ic_lora", ("ltxv2_lora.safetensors",)) and read.clips.reference_video is not None
    assert "2 times smaller" in card and "LTX2InContextPipeline" in card and "reference_downscale_factor=2)" in card
    toml = data.folder / "other.toml"
    toml.write_text(TOML.replace("reference_downscale = 2", "reference_downscale = 1").replace('"cache"', '"other"'), encoding="utf-8")
    other = replace(data, toml=toml)
    training_parts.cache(other)
    flags = other.arguments("--output_dir", str(tmp_path / "b"), "--conditioning_config", RECIPE, "--max_train_steps", "2")
    with pytest.raises(UserError, match="reference_downscale_factor is 2, the dataset's reference_downscale is 1"):
        ltxv2_train_network.main([*flags, "--network_weights", str(tmp_path / "ltxv2_lora.safetensors")])


def test_references_and_the_recipe_need_each_other(data, tmp_path):
    with pytest.raises(UserError, match="has references .*but nothing shows them.* run ltxv2_cache_latents.py again, .* and pack again"):
        ltxv2_train_network.main(data.arguments("--output_dir", str(tmp_path / "refused")))
    assert not (tmp_path / "refused").exists(), "a refused training leaves nothing"
    plain = data.folder / "plain.toml"
    plain.write_text(TOML.replace('reference_directory = "references"\n', ""), encoding="utf-8")
    with pytest.raises(UserError, match="reference.* cached with .*Set it as it was cached. Or, where the media are, run: python"):
        ltxv2_train_network.main(replace(data, toml=plain).arguments("--output_dir", str(tmp_path)))
    training_parts.cache(replace(data, toml=plain))
    with pytest.raises(UserError, match="no dataset has references"):
        ltxv2_train_network.main(replace(data, toml=plain).arguments("--output_dir", str(tmp_path), "--conditioning_config", RECIPE))


def test_a_preview_shows_the_reference_as_training_does(data, tiny_family, tmp_path):
    """All inputs of the real transformer, at noise level 1 and with the same noise."""
    wrapper = preview_parts.load_wrapper(tiny_family.ltx23, mode="video")
    item = items_of(data)[0]
    batch = make_batch([Draw(item, 0, 0)], "video", draw_rules(Recipe(video=(rules.Reference(),))))
    clip = data.folder / "references" / item.clip.source
    text = f"a disc --w 128 --h 64 --f 17 --fr {item.clip.fps} --v {clip.as_posix()}\n"
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    prompt = load_prompts(tmp_path / "prompts.txt")[0]
    plan = make_plan(preview_parts.options(), prompt, mode="video", version="2.3", num_layers=wrapper.config.num_layers)
    checkpoint = open_checkpoint(tiny_family.ltx23)
    encoders = ConditioningEncoders(
        checkpoint, checkpoint, torch.device("cpu"), still_crf=None, reference_factors=load_dataset_config(data.toml).reference_factors
    )
    conditioning, context = encode_conditioning(prompt, plan.streams, encoders), preview_parts.context(wrapper)
    made = SampleInputs(prompt=prompt, plan=plan, positive=context, negative=context, conditioning=conditioning)
    ours, _ = spy(wrapper, lambda: generate(wrapper, made))
    noised = replace(batch, text=context.text, text_mask=None, video_noise=ours.latent[:, :24], video_sigma=torch.ones(1))
    theirs, _ = spy(wrapper, lambda: training_parts.item_losses(wrapper, noised))
    assert ours.latent.shape == (1, 24 + 6, 128) and torch.equal(ours.latent[:, :24], theirs.latent[:, :24])
    assert torch.allclose(ours.latent, theirs.latent, rtol=2**-7, atol=2e-2)
    for name in ("timesteps", "positions", "sigma", "keyframe_marker"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.timesteps[0].tolist() == [1.0] * 24 + [0.0] * 6 and ours.token_mask is None
    assert generate(wrapper, made).video.shape == (1, 128, 3, 2, 4), "the reference is no part of the result"


def test_an_item_without_its_reference_is_trained_as_if_there_were_none(data, tiny_family):
    """One batch with the reference seen by one item alone: its neighbor's loss is that of a batch without references."""
    wrapper = preview_parts.load_wrapper(tiny_family.ltx23, mode="video")
    draws = [Draw(item, 0, 0) for item in items_of(data)]
    shown = make_batch(draws, "video", draw_rules(Recipe(video=(rules.Reference(),))))
    reference = replace(shown.conditions.video.reference, chosen=torch.tensor([True, False]))
    mixed = replace(shown, conditions=replace(shown.conditions, video=replace(shown.conditions.video, reference=reference)))
    plain = make_batch(draws, "video", draw_rules(Recipe()))
    text = preview_parts.context(wrapper).text.expand(2, -1, -1)
    with torch.no_grad():
        all_shown, half, none = (
            training_parts.item_losses(wrapper, replace(one, text=text, text_mask=None, video_sigma=plain.video_sigma)).video
            for one in (shown, mixed, plain)
        )
    assert torch.allclose(half[0], all_shown[0], atol=1e-5) and torch.allclose(half[1], none[1], atol=1e-5)
    assert abs(float(half[0] - none[0])) > 1e-4


def test_stills_pictures_and_coarse_time(tiny_family, tmp_path):
    """A picture may be shown beside clips and stills; a reference of every second frame is half as long."""
    write_clips(tmp_path / "clips", count=1, frames=17, width=64, height=64)
    write_clips(tmp_path / "slow", count=1, frames=17, width=64, height=64)
    write_stills(tmp_path / "stills", count=1, width=64, height=64)
    still = next((tmp_path / "stills").glob("*.png"))
    (tmp_path / "shown").mkdir()
    for stem in ("clip_000", still.stem):
        (tmp_path / "shown" / f"{stem}.png").write_bytes(still.read_bytes())
    toml = tmp_path / "dataset.toml"
    toml.write_text(
        '[general]\nresolution = [64, 64]\nreference_temporal_scale = 2\ntarget_frames = [17]\n'
        '[[datasets]]\nvideo_directory = "clips"\ncache_directory = "a"\nreference_directory = "shown"\n'
        '[[datasets]]\nvideo_directory = "clips"\ncache_directory = "b"\nreference_directory = "slow"\n'
        '[[datasets]]\nimage_directory = "stills"\ncache_directory = "c"\nreference_directory = "shown"\n',
        encoding="utf-8",
    )  # fmt: skip
    assert cache_latents(toml, tiny_family.ltx23) == 0
    keys = [next(iter(load_file(next((tmp_path / folder).glob("*_ltxv2_ref.safetensors"))))) for folder in "abc"]
    assert keys == ["ref_latents_1x2x2_bfloat16", "ref_latents_2x2x2_bfloat16", "ref_latents_1x2x2_bfloat16"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"references"', '"clips/nowhere"'), "no such folder"),
        (("resolution = [128, 64]", "resolution = [96, 64]"), "both are multiples of 64"),
        (("[[datasets]]", "[[datasets]]\nvideo_directory='clips'\ntarget_frames=9\nreference_downscale=1\n[[datasets]]"), "differ from"),
    ],
)
def test_mistakes_are_named(data, change, message):
    toml = data.folder / "wrong.toml"
    toml.write_text(TOML.replace(*change), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        cache_latents(toml, data.model)


def test_missing_and_short_references_are_named(data, tmp_path):
    write_clips(tmp_path / "clips", count=2, frames=25, width=128, height=64)
    write_clips(tmp_path / "references", count=1, frames=9, width=128, height=64)
    toml = tmp_path / "dataset.toml"
    toml.write_text(TOML, encoding="utf-8")
    with pytest.raises(UserError, match=r"1 of 2 sources have no reference: clip_001.mp4"):
        cache_latents(toml, data.model)
    write_clips(tmp_path / "references", count=2, frames=9, width=128, height=64)
    with pytest.raises(UserError, match="has 9 frames at 24 fps, its clips reach 17"):
        cache_latents(toml, data.model)


def test_references_by_jsonl(data, tmp_path):
    lines = [{"video_path": f"clip_{n:03d}.mp4", "caption": "x", "reference_path": f"../references/clip_{n:03d}.mp4"} for n in (0, 1)]
    jsonl = data.folder / "clips" / "list.jsonl"
    jsonl.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    toml = data.folder / "jsonl.toml"
    text = TOML.replace('video_directory = "clips"', 'video_jsonl_file = "clips/list.jsonl"').replace(
        'reference_directory = "references"\n', ""
    )
    toml.write_text(text.replace('"cache"', '"jsonl cache"'), encoding="utf-8")
    assert cache_latents(toml, data.model) == 0
    made, named = (load_file(data.folder / folder / items_of(data)[0].paths["reference"].name) for folder in ("cache", "jsonl cache"))
    assert made.keys() == named.keys() and all(torch.equal(made[key], named[key]) for key in made)
