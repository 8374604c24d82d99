"""Mirror images (`flip_x`): planned, cached from flipped frames, trained on, and kept from captions that tell left from right."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from musubi_tuner import ltxv2_cache_audio_latents, ltxv2_cache_latents, ltxv2_cache_text_encoder_outputs, ltxv2_train_network
from musubi_tuner.cache.index import index_path
from musubi_tuner.cache.store import read_metadata
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.dataset.items import Item, list_items
from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.media.picture import cover_and_crop, read_picture
from musubi_tuner.media.probe import probe_video
from musubi_tuner.media.video import read_frames
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.sources.listing import side_named
from musubi_tuner.tiny.clips import write_clips, write_stills
from tests import training_parts
from tests.e2e.test_conditioning import RECIPES

TOML = """
[general]
resolution = [96, 64]
target_frames = [9]
flip_x = true

[[datasets]]
video_directory = "clips"
cache_directory = "cache"
reference_directory = "references"
mask_directory = "masks"
"""
PLAIN = '[[datasets]]\nvideo_directory = "clips"\ncache_directory = "cache"\nresolution = [96, 64]\ntarget_frames = [9]\n'


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory) -> training_parts.Data:
    """Two clips with references and masks; the caption of the second says `left`."""
    folder = tmp_path_factory.mktemp("gespiegelt ü")
    write_clips(folder / "clips", count=2, frames=9)
    write_clips(folder / "references", count=2, frames=9, seed=7)
    (folder / "clips" / "clip_001.txt").write_text("A disc, LEFT of a chair.", encoding="utf-8")
    (folder / "masks").mkdir()
    for number in (0, 1):
        mask = Image.new("L", (96, 64))
        mask.paste(255, (0, 0, 32, 64))
        mask.save(folder / "masks" / f"clip_{number:03d}.png")
    (folder / "dataset.toml").write_text(TOML, encoding="utf-8")
    made = training_parts.Data(folder, folder / "dataset.toml", tiny_family.ltx23, "av", tiny_family.gemma)
    training_parts.cache(made)
    return made


def copy_of(data: training_parts.Data, folder: Path) -> training_parts.Data:
    shutil.copytree(data.folder, folder)
    return replace(data, folder=folder, toml=folder / "dataset.toml")


def items_of(data: training_parts.Data, mode: str = "av") -> list[Item]:
    return list(list_items(load_dataset_config(data.toml).datasets, mode, data.toml))


def cache_latents(data: training_parts.Data, *flags: str) -> int:
    return ltxv2_cache_latents.main(["--dataset_config", str(data.toml), "--vae", str(data.model), "--device", "cpu", *flags])


def cache_captions(data: training_parts.Data) -> int:
    argv = ["--dataset_config", str(data.toml), "--ltx_mode", "av", "--device", "cpu"]
    return ltxv2_cache_text_encoder_outputs.main([*argv, "--ltxv2_model", str(data.model), "--text_encoder", str(data.encoder)])


def train(data: training_parts.Data, output: Path, *extra: str) -> int:
    recipe = str(RECIPES / "reference_video.toml")
    return ltxv2_train_network.main(
        data.arguments("--output_dir", str(output), "--conditioning_config", recipe, "--max_train_steps", "2", *extra)
    )


def encoded(data: training_parts.Data, frames: torch.Tensor) -> torch.Tensor:
    """Frames (F, H, W, 3) uint8 through the VAE as caching does it."""
    vae = VideoVAE.load(open_checkpoint(data.model), device="cpu", dtype=torch.float32, parts=("encoder",))
    pixels = frames[None].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    return vae.encode(pixels)[0].to(torch.bfloat16)


@pytest.mark.parametrize(
    ("caption", "word"),
    [
        ("a man turns Left.", "Left"),
        ("the right-hand side", "right"),
        ("the LEFTMOST door, walking rightward", "LEFTMOST"),
        ("a bright copyright notice, a cleft rock, leftovers", None),
        ("", None),
    ],
)
def test_whole_words_alone_name_a_side(caption: str, word: str | None) -> None:
    assert side_named(caption) == word


def test_mirror_images_are_cached_from_flipped_frames(data) -> None:
    """Clip, reference and mask are those of the frames flipped left to right; sound and caption are the same files."""
    plain, other, mirrored = sorted(items_of(data), key=lambda item: (item.clip.mirrored, item.key))
    assert other.clip.source == "clip_001.mp4"
    assert mirrored.key == f"{plain.key}:mirrored"
    assert mirrored.paths["latents"].name == "clip_000_00000-009_0096x0064_mirrored_ltxv2.safetensors"
    assert mirrored.paths["reference"].name == "clip_000_00000-009_0096x0064_mirrored_ltxv2_ref.safetensors"
    assert mirrored.paths["mask"].name == "clip_000_00000-009_0096x0064_mirrored_ltxv2_mask.safetensors"
    assert mirrored.paths["audio"] == plain.paths["audio"]
    assert mirrored.paths["text"] == plain.paths["text"]
    for folder, key, kind in (("clips", "latents", "latents"), ("references", "ref_latents", "reference")):
        frames = read_frames(probe_video(data.folder / folder / "clip_000.mp4"), range(9), 96, 64)
        assert not torch.equal(frames, frames.flip(2))
        for item, seen in ((plain, frames), (mirrored, frames.flip(2))):
            assert torch.equal(load_file(item.paths[kind])[f"{key}_2x2x3_bfloat16"], encoded(data, seen)), (folder, item.key)
        windows = [json.loads(read_metadata(item.paths[kind])["window"]) for item in (plain, mirrored)]
        assert windows[1] == windows[0] | {"mirrored": True}, "or one would pass for the other"
    masks = [load_file(item.paths["mask"])["video_mask"] for item in (plain, mirrored)]
    assert masks[0][0].tolist() == [[1, 0, 0]] * 2 and masks[1][0].tolist() == [[0, 0, 1]] * 2


def test_mirror_images_train_and_sound_alone_leaves_them_out(data, tmp_path) -> None:
    assert len(items_of(data)) == 3
    assert train(data, tmp_path) == 0
    assert len(training_parts.losses(tmp_path)) >= 2
    assert [item.clip.mirrored for item in items_of(data, "audio")] == [False, False]


def test_the_programs_count_what_is_mirrored_and_what_is_not(data, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    copied = copy_of(data, tmp_path / "copy")
    shutil.rmtree(copied.folder / "cache")
    assert cache_latents(copied, "--dry_run") == 0
    assert "1 of the clips are mirror images (flip_x); 1 have none, as their captions say left or right" in caplog.text
    assert "not mirrored, as its caption says 'LEFT'" in caplog.text and "3 file(s) would be encoded" in caplog.text
    caplog.clear()
    assert cache_latents(copied) == 0
    assert "Video latent caching: 3 encoded, 0 failed" in caplog.text
    line = next(line for line in caplog.text.splitlines() if line.startswith("clips not mirrored"))
    assert line.split("  ")[0] == "clips not mirrored, as their captions say left or right" and line.split()[-1] == "1"
    caplog.clear()
    argv = ["--dataset_config", str(copied.toml), "--vae", str(copied.model), "--device", "cpu"]
    assert ltxv2_cache_audio_latents.main(argv) == 0
    assert "Audio latent caching: 2 encoded, 0 failed" in caplog.text, "a mirror image has the sound of its clip"
    copied.toml.write_text(TOML.replace("flip_x = true", 'flip_x = "force"'), encoding="utf-8")
    caplog.clear()
    assert cache_latents(copied) == 0
    assert "Video latent caching: 1 encoded, 0 failed" in caplog.text and "not mirrored" not in caplog.text


def test_asking_for_mirror_images_encodes_them_alone(data, tmp_path, caplog) -> None:
    """Caches and indices of before stay valid, with and without it; a second run touches nothing."""
    caplog.set_level(logging.INFO)
    write_clips(tmp_path / "clips", count=2, frames=9)
    write_stills(tmp_path / "stills", count=1)
    stills = '[[datasets]]\nimage_directory = "stills"\ncache_directory = "cache"\nresolution = [96, 64]\n'
    toml = tmp_path / "dataset.toml"
    toml.write_text(PLAIN + stills, encoding="utf-8")
    plain = replace(data, folder=tmp_path, toml=toml)
    assert cache_latents(plain) == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    spec = load_dataset_config(toml).datasets[0]
    assert "flip_x" not in spec.settings()
    index = json.loads(index_path(spec).read_text(encoding="utf-8"))
    for clip in index["clips"]:
        del clip["mirrored"]
    index_path(spec).write_text(json.dumps(index), encoding="utf-8")
    assert len(items_of(plain, "video")) == 3, "an index of before is read"
    toml.write_text(f"{PLAIN}flip_x = true\n{stills}flip_x = true\n", encoding="utf-8")
    for encoded_now in (3, 0):
        caplog.clear()
        assert cache_latents(plain) == 0
        assert f"Video latent caching: {encoded_now} encoded, 0 failed" in caplog.text
    assert all(path.stat().st_mtime_ns == when for path, when in files.items())
    still = tmp_path / "stills" / "still_000.png"
    mirrored = load_file(tmp_path / "cache" / "still_000_0096x0064_mirrored_ltxv2.safetensors")["latents_1x2x3_bfloat16"]
    assert torch.equal(mirrored, encoded(data, cover_and_crop(read_picture(still), 96, 64)[None].flip(2)))
    toml.write_text(PLAIN + stills, encoding="utf-8")
    caplog.clear()
    assert cache_latents(plain) == 0
    assert "Video latent caching: 0 encoded, 0 failed" in caplog.text and "3 file(s) belong to no planned clip" in caplog.text


def test_training_notices_captions_that_came_to_name_a_side(data, tmp_path) -> None:
    copied = copy_of(data, tmp_path / "copy")
    (copied.folder / "clips" / "clip_000.txt").write_text("A disc rolls to the right.", encoding="utf-8")
    (copied.folder / "clips" / "clip_001.txt").write_text("A disc, before a chair.", encoding="utf-8")
    assert cache_captions(copied) == 0
    (copied.folder / "clips").rename(copied.folder / "elsewhere")
    for _ in range(2):  # without the media the captions that were cached tell it
        with pytest.raises(UserError, match=r"2 cache file(.|\n)*says 'right', so it must not be mirrored(.|\n)*is not cached") as raised:
            train(copied, tmp_path)
        assert "ltxv2_cache_latents.py" in str(raised.value)
        if not (copied.folder / "clips").is_dir():
            (copied.folder / "elsewhere").rename(copied.folder / "clips")
    assert cache_latents(copied) == 0
    assert sorted(item.clip.source for item in items_of(copied) if item.clip.mirrored) == ["clip_001.mp4"]
    assert train(copied, tmp_path) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("flip_x = true", 'flip_x = "sometimes"'), 'must be true, false, or "force"'),
        (("flip_x = true", "flip_x = 1"), "must be true, false, or .force."),
        (('video_directory = "clips"', 'audio_directory = "clips"\nflip_x = true'), "flip_x is for videos and images"),
    ],
)
def test_mistakes_are_named(data, change, message) -> None:
    toml = data.folder / "wrong.toml"
    text = TOML.replace(*change).replace('reference_directory = "references"\nmask_directory = "masks"\n', "")
    toml.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_dataset_config(toml)
