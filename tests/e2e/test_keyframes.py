"""Keyframes beside the clip: cached from chosen frames, drawn by a recipe, padded in batches, and refused where they are lacking."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner import ltxv2_cache_latents, ltxv2_train_network
from musubi_tuner.cache.index import index_path
from musubi_tuner.cache.store import read_metadata
from musubi_tuner.conditioning import recipe as rules
from musubi_tuner.conditioning.recipe import Recipe
from musubi_tuner.config.dataset import DatasetSpec, load_dataset_config
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.items import Draw, Item, largest_items, list_items, token_counts
from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.media.probe import probe_video
from musubi_tuner.media.video import read_frames
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import write_clips
from tests import preview_parts, training_parts
from tests.e2e.test_conditioning import RECIPES, draw_rules

TOML = """
[general]
resolution = [96, 64]
target_frames = [17]
frame_extraction = "slide"
frame_stride = 8
batch_size = 2

[[datasets]]
video_directory = "clips"
cache_directory = "cache"
flip_x = true
keyframes = ["first", "last", 3, "every 8"]
"""
KEYFRAMES = [0, 3, 8, 16]


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory) -> training_parts.Data:
    """Two windows of one clip, with mirror images."""
    folder = tmp_path_factory.mktemp("stützbilder ü")
    write_clips(folder / "clips", count=1, frames=25)
    (folder / "dataset.toml").write_text(TOML, encoding="utf-8")
    made = training_parts.Data(folder, folder / "dataset.toml", tiny_family.ltx23, "video", tiny_family.gemma)
    training_parts.cache(made)
    return made


def changed(data: training_parts.Data, folder: Path, *change: str) -> training_parts.Data:
    """A copy with another TOML."""
    shutil.copytree(data.folder, folder)
    (folder / "dataset.toml").write_text(TOML.replace(*change), encoding="utf-8")
    return replace(data, folder=folder, toml=folder / "dataset.toml")


def items_of(data: training_parts.Data) -> list[Item]:
    return list(list_items(load_dataset_config(data.toml).datasets, "video", data.toml))


def cache_latents(data: training_parts.Data, *flags: str) -> int:
    return ltxv2_cache_latents.main(["--dataset_config", str(data.toml), "--vae", str(data.model), "--device", "cpu", *flags])


def train(data: training_parts.Data, output: Path, recipe: str, *flags: str) -> int:
    path = output / "recipe.toml"
    output.mkdir(exist_ok=True)
    path.write_text(recipe, encoding="utf-8")
    arguments = data.arguments("--output_dir", str(output), "--conditioning_config", str(path), "--max_train_steps", "2", *flags)
    return ltxv2_train_network.main(arguments)


def test_each_chosen_frame_is_encoded_alone_and_mirrored_with_its_clip(data) -> None:
    plain, later, mirrored, _ = items_of(data)
    assert plain.paths["keyframes"].name == "clip_000_00000-017_0096x0064_ltxv2_keyframes.safetensors"
    assert mirrored.paths["keyframes"].name == "clip_000_00000-017_0096x0064_mirrored_ltxv2_keyframes.safetensors"
    metadata = read_metadata(plain.paths["keyframes"])
    assert metadata["kind"] == "keyframe_latents" and json.loads(metadata["window"])["keyframes"] == KEYFRAMES
    vae = VideoVAE.load(open_checkpoint(data.model), device=torch.device("cpu"), dtype=torch.float32, parts=("encoder",))
    info = probe_video(data.folder / "clips" / "clip_000.mp4")
    for item, start in ((plain, 0), (mirrored, 0), (later, 8)):
        tensors = load_file(item.paths["keyframes"])
        assert tensors.keys() == {"keyframe_latents_4x2x3_bfloat16", "keyframe_frames_int32"}
        assert tensors["keyframe_frames_int32"].tolist() == KEYFRAMES
        frames = read_frames(info, [start + frame for frame in KEYFRAMES], 96, 64)
        frames = frames.flip(2) if item.clip.mirrored else frames
        expected = torch.cat([vae.encode_frames(frame[None, None]) for frame in frames], dim=2)[0].bfloat16()
        assert torch.equal(tensors["keyframe_latents_4x2x3_bfloat16"], expected)
        clip = next(iter(load_file(item.paths["latents"]).values()))
        assert torch.allclose(expected[:, 0].float(), clip[:, 0].float(), atol=1e-2), "the first latent frame is the first frame alone"


def test_asking_for_other_keyframes_encodes_keyframes_alone_and_nothing_else_when_repeated(data, tmp_path, caplog) -> None:
    copy = changed(data, tmp_path / "copy", '["first", "last", 3, "every 8"]', '["last"]')
    latents = {path.name: path.stat().st_mtime_ns for path in (copy.folder / "cache").glob("*[0-9d]_ltxv2.safetensors")}
    with pytest.raises(UserError, match=r"keyframes is \['last'\], cached with \['first', 'last', 3, 'every 8'\]"):
        items_of(copy)
    with caplog.at_level(logging.INFO):
        assert cache_latents(copy, "--dry_run") == 0
    assert "Keyframe caching" in caplog.text
    assert cache_latents(copy) == 0
    made = {path: path.stat().st_mtime_ns for path in (copy.folder / "cache").glob("*_ltxv2*.safetensors")}
    assert {path.name: time for path, time in made.items() if path.name in latents} == latents and len(latents) == 4
    assert load_file(items_of(copy)[0].paths["keyframes"])["keyframe_frames_int32"].tolist() == [16]
    assert cache_latents(copy) == 0
    assert made == {path: path.stat().st_mtime_ns for path in made}


def test_a_dataset_without_keyframes_is_planned_as_ever(data, tmp_path) -> None:
    def index_of(spec: DatasetSpec) -> dict:
        return json.loads(index_path(spec).read_text(encoding="utf-8"))

    assert index_of(load_dataset_config(data.toml).datasets[0])["clips"][0]["keyframes_at"] == KEYFRAMES
    plain = changed(data, tmp_path / "plain", 'keyframes = ["first", "last", 3, "every 8"]\n', "")
    assert cache_latents(plain) == 0
    spec = load_dataset_config(plain.toml).datasets[0]
    assert "keyframes" not in json.dumps(index_of(spec))


def test_an_index_or_a_file_that_was_tampered_with_is_refused(data, tmp_path) -> None:
    copy = changed(data, tmp_path / "copy", "nothing", "nothing")
    path = index_path(load_dataset_config(copy.toml).datasets[0])
    index, item = json.loads(path.read_text(encoding="utf-8")), items_of(copy)[0]
    for wrong in ("first", [0, "last"], [-1]):
        index["clips"][0]["keyframes_at"] = wrong
        path.write_text(json.dumps(index), encoding="utf-8")
        with pytest.raises(UserError, match=r"clips\[0\]: keyframes_at = .* must be a list of frames"):
            items_of(copy)
    index["clips"][0]["keyframes_at"] = KEYFRAMES[:3]
    path.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=f"{item.paths['keyframes'].name}: the dataset asks for another window"):
        train(copy, tmp_path / "out", "[[video]]\nrule = 'keyframes'\nat = 'first'\n")


def test_a_frame_that_clips_lack_fails_their_source_by_name(data, tmp_path) -> None:
    copy = changed(data, tmp_path / "copy", '"every 8"', "17")
    with pytest.raises(UserError, match=r"clip_000.mp4: keyframes asks for frame 17, and the frames of its clips of 17 are 0 to 16"):
        cache_latents(copy)


def test_items_of_a_batch_see_their_own_keyframes_and_padding_changes_nothing(data, tiny_family) -> None:
    wrapper = preview_parts.load_wrapper(tiny_family.ltx23, mode="video")
    recipe = Recipe(video=(rules.KeyframesBeside(at=("random",), count=(1, 3)),))
    draws = [Draw(item, 1, 0) for item in items_of(data)]
    together = make_batch(draws, "video", draw_rules(recipe))
    keyframes = together.conditions.video.keyframes
    counts = keyframes.real.sum(1).tolist()
    assert len(set(counts)) > 1 and keyframes.latents.shape == (4, 128, max(counts), 2, 3)
    text = preview_parts.context(wrapper).text
    for row, draw in enumerate(draws):
        alone = make_batch([draw], "video", draw_rules(recipe))
        own, cached = alone.conditions.video.keyframes, load_file(draw.item.paths["keyframes"])
        assert own.real is None and own.frames.shape == (1, counts[row])
        assert keyframes.frames[row, : counts[row]].tolist() == own.frames[0].tolist()
        for place, frame in enumerate(own.frames[0].tolist()):
            assert torch.equal(own.latents[0, :, place], cached["keyframe_latents_4x2x3_bfloat16"][:, KEYFRAMES.index(frame)].float())
        with torch.no_grad():
            losses = [
                training_parts.item_losses(wrapper, replace(batch, text=text.expand(batch.size, -1, -1), text_mask=None)).video
                for batch in (together, alone, replace(alone, conditions=replace(alone.conditions, video=rules_off(alone))))
            ]
        assert torch.allclose(losses[0][row], losses[1][0], atol=1e-5)
        assert abs(float(losses[1][0] - losses[2][0])) > 1e-4, "the model sees them"


def rules_off(batch):
    return replace(batch.conditions.video, keyframes=None)


def test_the_ready_recipe_trains_and_says_what_it_was(data, tmp_path) -> None:
    text = (RECIPES / "keyframes.toml").read_text(encoding="utf-8")
    assert train(data, tmp_path, text) == 0
    rows = [row for row in training_parts.losses(tmp_path) if "grad_norm" in row]
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)
    described = json.loads(open_checkpoint(tmp_path / "ltxv2_lora.safetensors").metadata["ltxv2_conditioning"])
    assert described["video"] == [{"rule": "KeyframesBeside", "probability": 0.8, "at": ["first", "random"], "count": [1, 2]}]


def test_the_plan_counts_as_many_keyframes_as_may_be_drawn(data) -> None:
    item = items_of(data)[0]
    own = 2 * 3 * 2 * 3
    assert token_counts(item, "video") == (own, 0), "of two clips of 3 x 2 x 3 cells"
    assert token_counts(item, "video", rules.KeyframesBeside(at=("random",), count=(1, 3)))[0] == own + 2 * 3 * 6
    assert token_counts(item, "video", rules.KeyframesBeside(at=("last", "interior"), count=(9, 9)))[0] == own + 2 * 3 * 6
    without = replace(item, clip=replace(item.clip, frames=25, sidecars={}))
    rule = rules.KeyframesBeside(at=("random",), count=(4, 4))
    assert largest_items([item, without], "video") == (without,) and largest_items([item, without], "video", rule) == (item,)


@pytest.mark.parametrize(
    ("change", "at", "message"),
    [
        (('keyframes = ["first", "last", 3, "every 8"]\n', ""), '["last", "interior"]',
         r'datasets\[0\].*Add keyframes = \["last", "every 8"\](.|\n)*keyframes_in_place'),
        (('["first", "last", 3, "every 8"]', '["first", 3]'), '["first", "last"]', r"clips of 17 frames no last one is cached, but 0, 3"),
    ],
)  # fmt: skip
def test_a_recipe_is_refused_where_what_it_shows_is_not_cached(data, tmp_path, change, at, message) -> None:
    copy = changed(data, tmp_path / "copy", *change)
    assert cache_latents(copy) == 0
    with pytest.raises(UserError, match=message):
        train(copy, tmp_path / "out", f"[[video]]\nrule = 'keyframes'\nat = {at}\n")


def test_keyframes_that_no_rule_shows_are_not_read(data, tmp_path, caplog) -> None:
    copy = changed(data, tmp_path / "copy", "nothing", "nothing")
    for path in (copy.folder / "cache").glob("*_keyframes.safetensors"):
        path.unlink()
    assert train(copy, tmp_path / "out", "[[video]]\nrule = 'keyframes_in_place'\n") == 0
    assert "datasets[0] has keyframes, which no rule shows" in caplog.text
    with pytest.raises(UserError, match=r"4 cache file(.|\n)*_ltxv2_keyframes.safetensors: missing(.|\n)*ltxv2_cache_latents.py"):
        train(copy, tmp_path / "again", "[[video]]\nrule = 'keyframes'\n")
