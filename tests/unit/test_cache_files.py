"""The on-disk contract: names, keys, atomic files, fingerprints, audit, index."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from musubi_tuner.cache import store
from musubi_tuner.cache.audit import reason_to_rebuild
from musubi_tuner.cache.clip import Clip, Sidecar
from musubi_tuner.cache.index import DatasetIndex, index_path, read_index, write_index
from musubi_tuner.cache.names import (
    audio_latents_key,
    audio_only_name,
    image_latent_name,
    latents_key,
    prompt_path,
    strip_key,
    text_key,
    text_name,
    video_latent_name,
)
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.cache.store import canonical, file_fingerprint
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.runtime.errors import UserError


def test_names_are_those_of_the_contract() -> None:
    assert video_latent_name("a.b c", 24, 49, 832, 480) == "a.b c_00024-049_0832x0480_ltxv2.safetensors"
    assert image_latent_name("bild_é", 64, 96) == "bild_é_0064x0096_ltxv2.safetensors"
    assert (
        KINDS["audio"].name_beside("a_ltxv2_00000-009_0064x0064_ltxv2.safetensors") == "a_ltxv2_00000-009_0064x0064_ltxv2_audio.safetensors"
    )
    assert audio_only_name("a", 1500, 2000) == "a_00001500-002000_ltxv2_audio.safetensors"
    assert text_name("a") == "a_ltxv2_te.safetensors"
    assert prompt_path(Path("c"), "") == Path("c/ltxv2_prompts/e3b0c44298fc1c14_ltxv2_te.safetensors")


@pytest.mark.parametrize(
    ("key", "stripped"),
    [
        (latents_key(7, 2, 3, torch.bfloat16), "latents"),
        (audio_latents_key(51, torch.float16), "audio_latents"),
        ("audio_latents_51x16x8_bfloat16", "audio_latents"),
        ("audio_lengths_int32", "audio_lengths"),
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
    metadata, headers = store.read_header(path)
    assert metadata == {"ltxv2_cache": "1", **METADATA}
    assert {key: header.shape for key, header in headers.items()} == {key: tuple(tensor.shape) for key, tensor in tensors().items()}
    assert {key: header.dtype for key, header in headers.items()} == {"b_float32": "F32", "a_int32": "I32", "empty_bfloat16": "BF16"}


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
    assert store.clean_temporaries(tmp_path / "none", (".json",)) == 0


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


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    store.write(path, {"latents_1x1x1_bfloat16": torch.zeros(128, 1, 1, 1).bfloat16()}, {})
    monkeypatch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert reason_to_rebuild(path, {}, ["latents"]) == "it cannot be read (Permission denied)"


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


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "circle.mp4").symlink_to("circle.mp4")
    for name in ("circle.mp4", "gone.mp4", "."):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            file_fingerprint(tmp_path / name)


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
        has_audio=True,
        sidecars={"latents": Sidecar(file="l"), "audio": Sidecar(file="s"), "text": Sidecar(file="t")},
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
    arguments = {"ltxv2_cache_latents.py": "--dataset_config d.toml --ltx_mode av --vae m.safetensors"}
    with pytest.raises(
        UserError, match=r"Run: python ltxv2_cache_latents\.py --dataset_config d\.toml --ltx_mode av --vae m\.safetensors$"
    ):
        read_index(dataset, Path("d.toml"), arguments)
    write_index(dataset, DatasetIndex(settings=dataset.settings(), clips=(clip(),)))
    with pytest.raises(UserError, match=r"target_fps is 12\.0, cached with None.*ltxv2_cache_latents\.py"):
        read_index(spec(tmp_path, target_fps=12), Path("d.toml"))
    index_path(dataset).write_text('{"clips": [{"key"', encoding="utf-8")
    with pytest.raises(UserError, match=r"damaged.*ltxv2_cache_latents\.py"):
        read_index(dataset, Path("d.toml"))


def test_names_that_are_not_utf8_are_written_out(tmp_path: Path) -> None:
    dataset = spec(tmp_path)
    write_index(dataset, DatasetIndex(settings=dataset.settings(), clips=(clip(),), dropped=(("a\udcff.mp4", "its name is not UTF-8"),)))
    assert read_index(dataset, Path("d.toml")).dropped == (("a\\udcff.mp4", "its name is not UTF-8"),)


def change(value: object, path: tuple[object, ...], new: object) -> object:
    """A copy of plain JSON values with one of them changed, or taken out where `new` is `...`."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if new is ... and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = change(copy.get(path[0]) if isinstance(copy, dict) else copy[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize(
    ("place", "new", "words"),
    [
        ((), [], "'settings' must hold keys and values"),
        (("settings",), 5, "'settings' must hold keys and values"),
        (("settings",), ..., "'settings' must hold keys and values"),
        (("clips",), None, "'clips' must hold a list"),
        (("clips", 0), "a", r"clips\[0\]: must hold keys and values"),
        (("dropped", 0), ["b.mp4"], r"dropped: \['b.mp4'\]: must be \[source, reason\]"),
        (("dropped", 0), ["b.mp4", 5], r"must be \[source, reason\]"),
        (("clips", 0, "latents"), 5, r"clips\[0\]: latents = 5: must be text"),
        (("clips", 0, "latents"), "../l", r"clips\[0\]: latents = '../l': must be the name of a file"),
        (("clips", 0, "audio"), "/etc/passwd", "must be the name of a file"),
        (("clips", 0, "text"), "", "must be the name of a file"),
        (("clips", 0, "text"), "..", "must be the name of a file"),
        (("clips", 0, "text"), "a\0b", "must be the name of a file"),
        (("clips", 0, "stem"), "a/b", "must be the name of a file"),
        (("clips", 0, "sound_fingerprint"), -1, "sound_fingerprint = -1: must be text"),
        (("clips", 0, "source"), [], r"source = \[\]: must be text"),
        (("clips", 0, "has_audio"), None, "has_audio = None: must be true or false"),
        (("clips", 0, "has_audio"), 1, "has_audio = 1: must be true or false"),
        (("clips", 0, "frames"), 9.0, "frames = 9.0: must be a whole number"),
        (("clips", 0, "frames"), True, "frames = True: must be a whole number"),
        (("clips", 0, "frames"), -9, "frames = -9: must be at least 0"),
        (("clips", 0, "fps"), "24", "fps = '24': must be a number"),
        (("clips", 0, "fps"), 0, "fps = 0: must be a frame rate"),
        (("clips", 0, "end_seconds"), 0, "must be above start_seconds"),
        (("clips", 0, "kind"), "film", "must be video, image or audio"),
        (("clips", 0, "frames"), ..., "'frames' is missing"),
        (("clips", 0, "colour"), 1, "unknown key 'colour'"),
    ],
)
def test_what_is_wrong_with_an_index_is_named_with_the_remedy(tmp_path: Path, place: tuple[object, ...], new: object, words: str) -> None:
    dataset = spec(tmp_path)
    path = write_index(dataset, DatasetIndex(settings=dataset.settings(), clips=(clip(),), dropped=(("b.mp4", "too short"),)))
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")), place, new)), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{path.name}: .*{words}.*Run: python ltxv2_cache_latents.py --dataset_config d.toml"):
        read_index(dataset, Path("d.toml"))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", '{"clips": NaN}', '"\\ud800"', "\xff"])
def test_an_index_that_is_no_json_is_named_too(tmp_path: Path, text: str) -> None:
    dataset = spec(tmp_path)
    index_path(dataset).parent.mkdir()
    index_path(dataset).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{index_path(dataset).name}: not .*Run: python ltxv2_cache_latents.py"):
        read_index(dataset, Path("d.toml"))
    with pytest.raises(UserError, match="the index there cannot be read"):
        read_index(spec(tmp_path, target_fps=12), Path("d.toml"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes")
def test_a_pipe_in_the_place_of_a_source_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="a.mp4: is not a file"):
        file_fingerprint(tmp_path / "a.mp4")
