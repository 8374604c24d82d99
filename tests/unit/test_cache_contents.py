"""What caches hold: shapes and values against the index, checksums, and the record of what was checked."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from musubi_tuner.cache import contents, forms, store
from musubi_tuner.cache.audit import cut_alike, reason_to_rebuild
from musubi_tuner.cache.clip import Clip
from musubi_tuner.cache.contents import content_faults
from musubi_tuner.cache.record import RECORD_NAME, read_record
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.ltxv2 import geometry
from musubi_tuner.runtime.errors import UserError
from tests.unit.test_cache_files import clip

CELLS = torch.linspace(-3, 3, 128 * 2 * 2 * 2).view(128, 2, 2, 2).bfloat16()
"""Latents of `clip()`: 64x64 pixels, 9 frames."""


def write(path: Path, kind: str, tensors: dict[str, Tensor], **metadata: str) -> Path:
    store.write(path, tensors, metadata, KINDS[kind].forms(clip()) if kind == "latents" else None)
    return path


def fault(path: Path, kind: str, of: Clip | None = None) -> str | None:
    return reason_to_rebuild(path, {}, (), KINDS[kind].forms(of or clip()))


def test_geometry_of_files_is_that_of_the_model() -> None:
    ours = (forms._LATENT_CHANNELS, forms._AUDIO_CHANNELS, forms._MEL_BINS, forms._FRAMES_A_CELL, forms._PIXELS_A_CELL)
    theirs = (geometry.LATENT_CHANNELS, geometry.AUDIO_CHANNELS, geometry.AUDIO_MEL_BINS, geometry.TEMPORAL_SCALE, geometry.SPATIAL_SCALE)
    assert (*ours, forms._STEPS_A_SECOND) == (*theirs, geometry.AUDIO_LATENTS_PER_SECOND)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda cells: cells, None),
        (lambda cells: cells.float(), None),
        (lambda cells: cells[..., :1], r"'latents' has the shape \(128, 2, 2, 1\), and must have \(128, 2, 2, 2\)"),
        (lambda cells: cells.flatten(), r"'latents' has the shape \(1024,\)"),
        (lambda cells: cells[None], r"the shape \(1, 128"),
        (lambda cells: cells.int(), "of the dtype I32"),
        (lambda cells: cells.bool(), "of the dtype BOOL"),
    ],
)
def test_latents_are_of_the_shape_of_their_window_and_floating(
    tmp_path: Path, change: Callable[[Tensor], Tensor], words: str | None
) -> None:
    path = write(tmp_path / "x", "latents", {"latents_2x2x2_bfloat16": change(CELLS).contiguous()})
    found = fault(path, "latents")
    assert found is None if words is None else found is not None and re.search(words, found)


@pytest.mark.parametrize(
    ("latents", "lengths", "words"),
    [
        (torch.zeros(8, 10, 16), torch.tensor(10), None),
        (torch.zeros(8, 0, 16), torch.tensor(0), None),
        (torch.zeros(8, 10, 16), torch.tensor([10]), None),
        (torch.zeros(8, 16, 10), torch.tensor(10), "has the shape"),
        (torch.zeros(8, 400, 16), torch.tensor(400), "0 to 35"),
        (torch.zeros(8, 10, 16), torch.tensor([5, 5]), "must be one number"),
        (torch.zeros(8, 10, 16), torch.tensor(10.0), "of the dtype F32"),
        (torch.zeros(8, 10, 16), torch.tensor(11), "must stay within 0 and 10"),
        (torch.zeros(8, 10, 16), torch.tensor(-1), "must stay within 0 and 10"),
    ],
)
@pytest.mark.parametrize("key", ["audio_latents_10x1x1_float32", "audio_latents_10x16x8_float32"])
def test_sound_is_as_long_as_its_clip_at_most(tmp_path: Path, key: str, latents: Tensor, lengths: Tensor, words: str | None) -> None:
    path = write(tmp_path / "x", "audio", {key: latents, "audio_lengths_int32": lengths})
    found = fault(path, "audio") or content_faults({path: KINDS["audio"].forms(clip())}).get(path)
    assert found is None if words is None else found is not None and words in found


@pytest.mark.parametrize(
    ("shape", "metadata", "fits"),
    [
        ((1024, 12), {"stage": "context", "backend": "gemma", "widths": "8+4"}, True),
        ((1024, 8), {"stage": "context", "backend": "gemma", "widths": "8+4"}, False),
        ((512, 12), {"stage": "context", "backend": "gemma", "widths": "8+4"}, False),
        ((7, 12), {"stage": "features", "backend": "gemma", "widths": "8+4"}, True),
        ((0, 12), {"stage": "features", "backend": "gemma", "widths": "8+4"}, False),
        ((256, 8), {"stage": "context", "backend": "t5", "widths": "8"}, True),
        ((7, 8), {}, True),
        ((7, 8, 1), {}, False),
    ],
)
def test_texts_are_of_the_shape_that_their_metadata_tell(
    tmp_path: Path, shape: tuple[int, ...], metadata: dict[str, str], fits: bool
) -> None:
    path = write(tmp_path / "x", "text", {"text_float32": torch.zeros(shape), "text_mask": torch.ones(shape[0])}, **metadata)
    assert (fault(path, "text") is None) == fits
    legacy = write(tmp_path / "y", "text", {"t5_float32": torch.zeros(shape), "t5_mask": torch.ones(shape[0])}, **metadata)
    assert (fault(legacy, "text") is None) == fits


def faults(*paths: Path) -> dict[Path, str]:
    return content_faults({path: KINDS["latents"].forms(clip()) for path in paths})


def latents(folder: Path, name: str = "a") -> Path:
    return write(folder / f"{name}_ltxv2.safetensors", "latents", {"latents_2x2x2_bfloat16": CELLS})


def damage(path: Path) -> None:
    """Another bit in the last number, the same size."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    os.utime(path, (2, 2))


def test_a_bit_that_turned_is_found_and_what_is_written_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = latents(tmp_path), latents(tmp_path, "b")
    read: list[Path] = []
    real = contents.read_parts
    monkeypatch.setattr(contents, "read_parts", lambda path: read.append(path) or real(path))
    assert faults(first, second) == {} and read == []
    damage(second)
    assert "not those that were written" in faults(first, second)[second]
    assert read == [second]
    latents(tmp_path, "b")
    assert faults(first, second) == {} and read == [second]


def test_a_record_that_is_gone_or_torn_costs_one_more_reading(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = latents(tmp_path)
    record = tmp_path / RECORD_NAME
    for content in (None, b'["a_ltxv2.safe', b"[[[[\n5\n{}\n\xff\n", b"[" * 10_000):
        record.unlink()
        if content is not None:
            record.write_bytes(content)
        assert faults(path) == {}
        assert path.name in read_record(record)[0]
    assert not caplog.text


def test_files_of_before_get_a_checksum_once_that_is_kept_in_the_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a_ltxv2.safetensors"
    save_file({"latents_2x2x2_bfloat16": CELLS}, path, metadata={"ltxv2_cache": "1"})
    caplog.set_level(logging.INFO)
    assert faults(path) == {} and faults(path) == {}
    assert caplog.text.count("1 cache file(s) were checked for the first time") == 1
    damage(path)
    assert "not those that were written or first checked" in faults(path)[path]


def test_copies_are_read_once_and_their_checksum_goes_with_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = latents(tmp_path / "one")
    (tmp_path / "two").mkdir()
    copied = Path(path.replace(tmp_path / "two" / path.name))
    (tmp_path / "one" / RECORD_NAME).replace(tmp_path / "two" / RECORD_NAME)
    os.utime(copied, (1, 1))
    caplog.set_level(logging.INFO)
    assert faults(copied) == {} and not caplog.text
    damage(copied)
    assert "checksum" in faults(copied)[copied]


@pytest.mark.parametrize(
    ("value", "words"),
    [(float("nan"), "NaN or infinity"), (float("-inf"), "NaN or infinity"), (2000.0, "to 2000, and must stay within -1000 and 1000")],
)
def test_values_that_no_encoder_makes_are_named(tmp_path: Path, value: float, words: str) -> None:
    path = tmp_path / "a_ltxv2.safetensors"
    cells = CELLS.clone()
    cells[5, 1, 0, 1] = value
    save_file({"latents_2x2x2_bfloat16": cells}, path, metadata={"ltxv2_cache": "1"})
    assert words in faults(path)[path]
    assert words in faults(path)[path], "what is wrong is not remembered as right"


def test_such_values_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a_ltxv2.safetensors: its 'latents' holds values from .* so it was not written. The encoder"):
        store.write(tmp_path / "a_ltxv2.safetensors", {"latents_2x2x2_bfloat16": CELLS * 1000}, {}, KINDS["latents"].forms(clip()))
    assert list(tmp_path.iterdir()) == []


def test_a_record_is_written_anew_where_it_holds_the_past_alone(tmp_path: Path) -> None:
    path = latents(tmp_path)
    record = tmp_path / RECORD_NAME
    record.write_bytes(record.read_bytes() * 1100)
    assert faults(path) == {}
    assert len(record.read_bytes().splitlines()) == 1


def test_a_text_cut_at_the_same_place_serves_other_lengths(tmp_path: Path) -> None:
    for metadata, wanted, same in (
        ({"max_length": "1024", "tokens": "40"}, "256", True),
        ({"max_length": "1024", "tokens": "300"}, "256", False),
        ({"max_length": "256", "tokens": "256"}, "1024", False),
        ({"max_length": "256", "tokens": "255"}, "1024", True),
        ({"max_length": "256", "tokens": "256"}, "256", True),
        ({"max_length": "1024", "caption": "short"}, "256", True),
        ({"max_length": "1024", "caption": "long " * 100}, "256", None),
    ):
        assert cut_alike(metadata, wanted) is same
        path = write(tmp_path / "x", "text", {"text_float32": torch.zeros(1)}, **metadata)
        assert (reason_to_rebuild(path, {"max_length": wanted}, (), to_read=True) is None) == (same is not False)
        assert (reason_to_rebuild(path, {"max_length": wanted}, ()) is None) == (metadata["max_length"] == wanted)


def test_texts_of_both_streams_serve_the_video_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "x", "text", {"text_float32": torch.zeros(1)}, widths="8+4")
    assert reason_to_rebuild(path, {"widths": "8"}, (), to_read=True) is None
    assert "widths" in str(reason_to_rebuild(path, {"widths": "8"}, ())), "caching makes what was asked for"
    assert "widths: 8+4, wanted 8+8" in str(reason_to_rebuild(path, {"widths": "8+8"}, (), to_read=True))
    path = write(tmp_path / "y", "text", {"text_float32": torch.zeros(1)}, widths="8")
    assert "cached with --ltx_mode video" in str(reason_to_rebuild(path, {"widths": "8+4"}, (), to_read=True))
