"""One command for all caching: the same files as the three programs leave, and a wrong path known before the first of them works."""

import shutil
from pathlib import Path

import pytest

from musubi_tuner import ltxv2_cache_all
from musubi_tuner.cache.contents import RECORD_NAME
from tests import training_parts as parts


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RECORD_NAME)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def data(tiny_family, tmp_path):
    made = parts.Data(tmp_path, tmp_path / "dataset.toml", tiny_family.ltx23, "av", tiny_family.gemma)
    parts.write_clips(tmp_path / "clips", count=2, frames=9)
    toml = '[[datasets]]\nvideo_directory = "clips"\ncache_directory = "cache"\nresolution = [64, 64]\ntarget_frames = [9]\n'
    made.toml.write_text(toml, encoding="utf-8")
    return made


def cache_all(data, *words: object) -> int:
    common = ["--dataset_config", data.toml, "--ltx_mode", "av", "--ltxv2_model", data.model, "--device", "cpu"]
    return ltxv2_cache_all.main([str(word) for word in (*common, *words)])


def test_it_leaves_what_the_three_programs_leave_and_a_clip_that_fails_stops_nothing(data, caplog):
    caplog.set_level("INFO")
    parts.cache(data)
    each = contents(data.folder / "cache")
    (data.folder / "clips" / "broken.mp4").write_bytes(b"no video")
    (data.folder / "clips" / "broken.txt").write_text("a broken clip", encoding="utf-8")
    shutil.rmtree(data.folder / "cache")
    assert cache_all(data, "--text_encoder", data.encoder) == 1
    found = contents(data.folder / "cache")
    assert {name: found.get(name) for name in each if not name.endswith(".json")} == {
        name: value for name, value in each.items() if not name.endswith(".json")
    }
    order = [line.split()[-1] for line in caplog.text.splitlines() if line.startswith("=== ltxv2")]
    assert order == ["cache-latents", "cache-audio", "cache-text"]


def test_the_text_encoder_is_looked_at_before_anything_is_encoded(data, tmp_path, capfd):
    assert cache_all(data, "--text_encoder", tmp_path / "nowhere") == 2
    assert "nowhere" in capfd.readouterr().err
    assert not (data.folder / "cache").exists()
