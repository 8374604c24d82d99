"""The on-disk contract: names, keys, atomic files, fingerprints, audit, index."""

import errno
import os
from pathlib import Path

import pytest
import torch

from musubi_tuner.cache import store
from musubi_tuner.cache.audit import reason_to_rebuild
from musubi_tuner.cache.fingerprint import canonical, file_fingerprint
from musubi_tuner.cache.index import Clip, DatasetIndex, index_path, read_index, write_index
from musubi_tuner.cache.keys import AUDIO_LENGTHS_KEY, audio_latents_key, latents_key, strip_key, text_key
from musubi_tuner.cache.names import audio_only_name, audio_sidecar_name, image_latent_name, prompt_path, text_name, video_latent_name
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.runtime.errors import UserError


def test_names_are_those_of_the_contract() -> None:
    assert video_latent_name("a.b c", 24, 49, 832, 480) == "a.b c_00024-049_0832x0480_ltxv2.safetensors"
    assert image_latent_name("bild_é", 64, 96) == "bild_é_0064x0096_ltxv2.safetensors"
    assert audio_sidecar_name("a_ltxv2_00000-009_0064x0064_ltxv2.safetensors") == "a_ltxv2_00000-009_0064x0064_ltxv2_audio.safetensors"
    assert audio_only_name("a", 1500, 2000) == "a_00001500-002000_ltxv2_audio.safetensors"
    assert text_name("a") == "a_ltxv2_te.safetensors"
    assert prompt_path(Path("c"), "") == Path("c/ltxv2_prompts/e3b0c44298fc1c14_ltxv2_te.safetensors")


@pytest.mark.parametrize(
    ("key", "stripped"),
    [
        (latents_key(7, 2, 3, torch.bfloat16), "latents"),
        (audio_latents_key(51, torch.float16), "audio_latents"),
        ("audio_latents_51x16x8_bfloat16", "audio_latents"),
        (AUDIO_LENGTHS_KEY, "audio_lengths"),
        (text_key(torch.float8_e4m3fn), "text"),
        ("text_mask", "text_mask"),
        ("t5_mask", "t5_mask"),
        ("video_loss_mask", "video_loss_mask"),
        ("latents_7x2x3_float32", "latents"),
    ],
)
def test_keys_strip_to_what_training_sees(key: str, stripped: str) -> None:
    assert strip_key(key) == stripped


def test_keys_are_those_of_the_contract() -> None:
    assert latents_key(7, 2, 3, torch.bfloat16) == "latents_7x2x3_bfloat16"
    assert audio_latents_key(0, torch.bfloat16) == "audio_latents_0x1x1_bfloat16"


def tensors() -> dict[str, torch.Tensor]:
    return {
        "b_float32": torch.arange(6.0).view(2, 3),
        "a_int32": torch.tensor(3, dtype=torch.int32),
        "empty_bfloat16": torch.zeros(8, 0, 16).bfloat16(),
    }


METADATA = {"source": "größe.mp4", "caption": 'a "red" disc', "kind": "video_latents"}


def test_files_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "neu er" / "x_ltxv2.safetensors"
    store.write(path, tensors(), METADATA)
    read = store.read(path)
    assert read.keys() == tensors().keys()
    for key, tensor in tensors().items():
        assert read[key].dtype == tensor.dtype and torch.equal(read[key], tensor)
    metadata, shapes = store.read_header(path)
    assert metadata == {"ltxv2_cache": "1", **METADATA}
    assert shapes == {key: tuple(tensor.shape) for key, tensor in tensors().items()}


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, order in (("a", 1), ("b", -1)):
        many = dict(list({**METADATA, **{f"key{i}": str(i) for i in range(20)}}.items())[::order])
        store.write(tmp_path / name, dict(list(tensors().items())[::order]), many)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_never_written(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "x_ltxv2.safetensors"
    with pytest.raises(UserError, match=r"x_ltxv2.*'latents_1x1x1_float32'.*NaN or infinity"):
        store.write(path, {"latents_1x1x1_float32": torch.tensor([0.0, bad])}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x_ltxv2.safetensors"
    store.write(path, tensors(), {"kind": "old"})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(store.DiskFullError, match=r"the disk is full \([\d,]+ bytes.*run the same command again"):
        store.write(path, tensors(), {"kind": "new"})
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    assert store.read_metadata(path)["kind"] == "old"


def test_only_the_callers_temporaries_are_cleaned(tmp_path: Path) -> None:
    mine, other = tmp_path / ".aa.1_ltxv2.safetensors.tmp", tmp_path / ".bb.1_ltxv2_te.safetensors.tmp"
    kept = [tmp_path / "x_ltxv2.safetensors", tmp_path / "note.tmp", tmp_path / ".hidden.tmp"]
    for path in (mine, other, *kept):
        path.write_bytes(b"")
    assert store.clean_temporaries(tmp_path, ("_ltxv2.safetensors",)) == 1
    assert sorted(tmp_path.iterdir()) == sorted([other, *kept])
    assert store.clean_temporaries(tmp_path / "none") == 0


def test_temporaries_are_named_so_that_cleaning_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Path, "replace", lambda old, new: seen.append(old.name))
    long_stem = "ü" * 100
    store.write(tmp_path / f"{long_stem}_ltxv2_audio.safetensors", tensors(), {})
    assert seen[0].startswith(".") and seen[0].endswith("_ltxv2_audio.safetensors.tmp")
    assert list(tmp_path.iterdir()) == []


def test_audit_says_why(tmp_path: Path) -> None:
    path = tmp_path / "x"
    expected = {"kind": "video_latents", "source_fingerprint": "ab", "encoder_fingerprint": "cd", "window": "{}"}
    assert reason_to_rebuild(path, expected, ["latents"]) == "missing"
    store.write(path, {"latents_1x1x1_bfloat16": torch.zeros(128, 1, 1, 1).bfloat16()}, expected)
    assert reason_to_rebuild(path, expected, ["latents"]) is None
    assert reason_to_rebuild(path, expected, ["audio_latents"]) == "it lacks audio_latents"
    for key, words in (
        ("source_fingerprint", "source file has changed"),
        ("encoder_fingerprint", "another encoder"),
        ("window", "another window"),
    ):
        assert words in reason_to_rebuild(path, expected | {key: "other"}, ["latents"])
    data = path.read_bytes()
    for length in (0, 5, 40, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert reason_to_rebuild(path, expected, ["latents"]) == "damaged or truncated"
        with pytest.raises(UserError, match="Run the caching program again"):
            store.read(path)


def test_audit_compares_releases_of_models_where_both_are_known(tmp_path: Path) -> None:
    path = tmp_path / "x"
    store.write(path, {"text_float32": torch.zeros(1)}, {"model_version": "2.3.0"})
    assert reason_to_rebuild(path, {"model_version": "2.3-rc1"}, ["text"]) is None
    assert "another model" in reason_to_rebuild(path, {"model_version": "2.5.1"}, ["text"])
    store.write(path, {"text_float32": torch.zeros(1)}, {"model_version": ""})
    assert reason_to_rebuild(path, {"model_version": "2.5.1"}, ["text"]) is None


def test_fingerprints_follow_content_and_not_names(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"content")
    with large.open("wb") as file:
        file.truncate(40 * 2**20)
    first = [file_fingerprint(path) for path in (small, large)]
    assert [file_fingerprint(path.rename(tmp_path / f"{path.name} renamed")) for path in (small, large)] == first
    with (tmp_path / "large renamed").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    (tmp_path / "small renamed").write_bytes(b"Content")
    assert file_fingerprint(tmp_path / "small renamed") != first[0]
    assert file_fingerprint(tmp_path / "large renamed") != first[1]


def test_canonical_json_is_one_text_for_equal_values() -> None:
    assert canonical({"b": [1, 2.5, None], "a": "é"}) == canonical({"a": "é", "b": [1, 2.5, None]}) == '{"a":"é","b":[1,2.5,null]}'


def spec(folder: Path, **values) -> DatasetSpec:
    return DatasetSpec(
        label="datasets[0]", kind="video", directory=folder, jsonl_file=None, cache_directory=folder / "cache", target_frames=(9,), **values
    )


def clip() -> Clip:
    return Clip(
        key="a.mp4:00000-009",
        kind="video",
        source="a.mp4",
        stem="a",
        source_fingerprint="ab",
        start_seconds=0.0,
        end_seconds=9 / 24,
        fps=24.0,
        start_frame=0,
        frames=9,
        width=64,
        height=64,
        original_width=100,
        original_height=100,
        latents="l",
        audio="s",
        text="t",
        has_audio=True,
    )


def test_index_round_trip_is_deterministic(tmp_path: Path) -> None:
    dataset = spec(tmp_path)
    index = DatasetIndex(settings=dataset.settings(), clips=(clip(),), dropped=(("b.mp4", "too short"),))
    path = write_index(dataset, index)
    assert path.name.startswith("ltxv2_index_") and path == index_path(dataset)
    before = path.read_bytes(), path.stat().st_mtime_ns
    write_index(dataset, index)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert read_index(dataset, Path("d.toml")) == index


def test_a_missing_index_names_what_differs_and_the_command(tmp_path: Path) -> None:
    dataset = spec(tmp_path)
    with pytest.raises(UserError, match=r"nothing was cached.*ltxv2_cache_latents\.py --dataset_config d\.toml"):
        read_index(dataset, Path("d.toml"))
    write_index(dataset, DatasetIndex(settings=dataset.settings(), clips=(clip(),)))
    with pytest.raises(UserError, match=r"target_fps is 12\.0, cached with None.*ltxv2_cache_latents\.py"):
        read_index(spec(tmp_path, target_fps=12), Path("d.toml"))
    index_path(dataset).write_text('{"clips": [{"key"', encoding="utf-8")
    with pytest.raises(UserError, match=r"damaged.*ltxv2_cache_latents\.py"):
        read_index(dataset, Path("d.toml"))
