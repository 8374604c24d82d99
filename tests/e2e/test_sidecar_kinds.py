"""A new kind of sidecar costs one row of `cache.sidecars.KINDS` and its decoder: a depth track beside each clip, from files to batches."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from musubi_tuner import ltxv2_cache_latents
from musubi_tuner.cache import store
from musubi_tuner.cache.index import index_path
from musubi_tuner.cache.sidecars import KINDS, LATENT_PROGRAM, OwnFiles, SidecarKind, clip_window
from musubi_tuner.cache.store import text_fingerprint
from musubi_tuner.conditioning.recipe import Recipe
from musubi_tuner.config.dataset import DatasetConfig, load_dataset_config
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.items import Draw, Item, list_items
from musubi_tuner.dataset.verify import Wanted, verify_caches
from musubi_tuner.encoding.makers import MAKERS, Maker
from musubi_tuner.encoding.pictures import frames_of, mask_bytes
from musubi_tuner.encoding.plan import PlannedClip
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import numbered_frames, write_clip, write_clips
from tests.e2e.test_conditioning import draw_rules

TOML = """
[[datasets]]
video_jsonl_file = "clips/list.jsonl"
cache_directory = "cache"
target_frames = [9]
resolution = [96, 64]
batch_size = 2
flip_x = true
"""
DEPTH = SidecarKind(
    name="depth",
    title="Depth caching",
    ending="_ltxv2_depth.safetensors",
    beside="latents",
    keys=("depth",),
    pack=lambda depth: {f"depth_{depth.shape[0]}x{depth.shape[1]}x{depth.shape[2]}_float16": depth},
    modes=("video", "av"),
    program=LATENT_PROGRAM,
    recorded=lambda clip: "depth",
    window=clip_window,
    files=OwnFiles(directory=None, path="depth_path", media="pictures", of=("video",), what="depth track"),
)


def decode_depth(planned: PlannedClip) -> Tensor:
    return (frames_of(planned.clip, planned.files["depth"]).float().mean(-1) / 255).half()


@pytest.fixture
def config(tmp_path: Path, tiny_family, monkeypatch: pytest.MonkeyPatch) -> DatasetConfig:
    """Two clips with mirror images and their depth tracks, cached by the real program."""
    monkeypatch.setitem(KINDS, "depth", DEPTH)
    monkeypatch.setitem(MAKERS, "depth", Maker(decode=decode_depth, size=mask_bytes))
    write_clips(tmp_path / "clips", count=2, frames=9)
    (tmp_path / "depth").mkdir()
    lines = []
    for number in (0, 1):
        write_clip(tmp_path / "depth" / f"{number}.mp4", numbered_frames(9 + 40 * number)[40 * number :], fps=24)
        lines.append({"video_path": f"clip_00{number}.mp4", "caption": "a disc", "depth_path": f"../depth/{number}.mp4"})
    (tmp_path / "clips" / "list.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (tmp_path / "dataset.toml").write_text(TOML, encoding="utf-8")
    arguments = ["--dataset_config", str(tmp_path / "dataset.toml"), "--vae", str(tiny_family.ltx23), "--device", "cpu"]
    assert ltxv2_cache_latents.main(arguments) == 0
    return load_dataset_config(tmp_path / "dataset.toml")


def items_of(config: DatasetConfig) -> list[Item]:
    items = list_items(config.datasets, "video", config.path)
    metadata = {"kind": "text", "source_fingerprint": text_fingerprint("a disc")}
    for path in {item.paths["text"] for item in items}:
        store.write(path, KINDS["text"].pack(torch.ones(4, 8), torch.ones(4, dtype=torch.bool)), metadata)
    return list(items)


def test_it_is_cached_beside_the_clip_and_stacked_under_its_stripped_key(config) -> None:
    items = items_of(config)
    assert [item.paths["depth"].name for item in items[:2]] == [
        "clip_000_00000-009_0096x0064_ltxv2_depth.safetensors",
        "clip_000_00000-009_0096x0064_mirrored_ltxv2_depth.safetensors",
    ]
    first, second = items[0], items[2]
    assert list(store.read(first.paths["depth"])) == ["depth_9x64x96_float16"]
    batch = make_batch([Draw(first, 0, 0), Draw(second, 0, 0)], "video", draw_rules(Recipe())).to(torch.device("cpu"))
    assert batch.further.keys() == {"depth"} and batch.further["depth"].shape == (2, 9, 64, 96)
    (single,) = store.read(second.paths["depth"]).values()
    assert torch.equal(batch.further["depth"][1], single) and not torch.equal(batch.further["depth"][0], single)
    (mirrored,) = store.read(items[1].paths["depth"]).values()
    assert torch.equal(mirrored.flip(2), batch.further["depth"][0])
    clip = json.loads(index_path(config.datasets[0]).read_text(encoding="utf-8"))["clips"][0]
    assert clip["depth"] == first.paths["depth"].name and clip["depth_source"].endswith("0.mp4")


def test_what_is_missing_and_what_changed_is_reported_with_the_program_that_makes_it(config, tiny_family) -> None:
    items = items_of(config)
    wanted = Wanted(latents={}, audio={}, text={}, arguments={LATENT_PROGRAM: "--dataset_config dataset.toml"})
    verify_caches(items, wanted)
    items[0].paths["depth"].unlink()
    with pytest.raises(UserError, match=r"1 cache file(.|\n)*_ltxv2_depth.safetensors: missing(.|\n)*ltxv2_cache_latents.py"):
        verify_caches(items, wanted)
    write_clip(config.path.parent / "depth" / "1.mp4", numbered_frames(9), fps=24)
    with pytest.raises(UserError, match=r"its depth track '1.mp4' has changed since it was cached"):
        verify_caches(items, wanted)
    arguments = ["--dataset_config", str(config.path), "--vae", str(tiny_family.ltx23), "--device", "cpu"]
    assert ltxv2_cache_latents.main(arguments) == 0
    verify_caches(items_of(config), wanted)
