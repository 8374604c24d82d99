"""What an audit finds in a dataset of known faults, as the program tells it, and nothing in one without."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from musubi_tuner import ltxv2_cache_latents, ltxv2_dataset
from musubi_tuner.config.dataset_audit import AuditOptions, Kind
from musubi_tuner.curation.auditing.findings import MEANING
from musubi_tuner.media.cut import encode_part
from musubi_tuner.media.probe import probe_video
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import ClipAudio, disc_frames, disc_heights, tone_of, write_clip, write_clips
from tests import training_parts as parts

TOML = """
[general]
resolution = [96, 64]
target_frames = [17]

[[datasets]]
video_directory = "clips"
cache_directory = "cache"
{more}
[[validation_datasets]]
video_directory = "held out"
cache_directory = "held out cache"
"""
NASTY = "A disc </script><script>document.title='taken'</script> & \"more\""


def audit(folder: Path, *words: object, code: int = 0) -> dict:
    file = folder / "audit.json"
    assert ltxv2_dataset.main(["audit", str(folder / "dataset.toml"), "--json", str(file), *map(str, words)]) == code
    return json.loads(file.read_text(encoding="utf-8"))


def found(result: dict) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for finding in result["findings"]:
        names.setdefault(finding["kind"], []).append(finding["name"].partition(":")[0])
    return names


def write_dataset(folder: Path, more: str = "") -> Path:
    write_clips(folder / "clips", count=3, frames=25)
    write_clips(folder / "held out", count=1, frames=25, seed=4)
    (folder / "clips" / "clip_002.txt").write_text("A disc, blue.", encoding="utf-8")
    (folder / "dataset.toml").write_text(TOML.format(more=more), encoding="utf-8")
    return folder


def cached(folder: Path, family) -> Path:
    parts.cache(parts.Data(folder, folder / "dataset.toml", family.ltx23, "av", family.gemma))
    return folder


@pytest.fixture(scope="module")
def good(tiny_family, tmp_path_factory) -> Path:
    return cached(write_dataset(tmp_path_factory.mktemp("good")), tiny_family)


@pytest.fixture(scope="module")
def faulty(tiny_family, tmp_path_factory) -> Path:
    """A clip for each fault."""
    folder = write_dataset(tmp_path_factory.mktemp("faulty é"))
    clips = folder / "clips"

    def add(name: str, number: int, caption: str, *, audio: ClipAudio | None = None, size: tuple[int, int] = (96, 64)) -> None:
        frames = disc_frames(disc_heights(25, 24, number), *size, "white" if number % 2 else "yellow", "violet")
        write_clip(clips / name, frames, audio=audio)
        (clips / name).with_suffix(".txt").write_text(caption, encoding="utf-8")

    tone = tone_of(disc_heights(25, 24, 1), 24)
    add("loud.mkv", 11, "A loud disc.", audio=ClipAudio(samples=(tone * 10).clamp(-1, 1)))
    add("silent.mkv", 12, "A silent disc.", audio=ClipAudio(samples=tone * 0))
    add("late.mkv", 13, "A late disc.", audio=ClipAudio(samples=tone[:, 12000:], start=0.25))
    add("early.mkv", 14, "An early disc.", audio=ClipAudio(samples=tone[:, :20000]))
    add("small.mp4", 15, "A small disc.", size=(48, 32))
    add("nasty.mp4", 16, NASTY)
    add("plain.mp4", 17, "A ball.")
    add("wordless.mp4", 18, "  ")
    write_clip(clips / "still.mp4", disc_frames([0.5], 96, 64, "red", "gray").expand(25, -1, -1, -1))
    (clips / "still.txt").write_text("A disc at rest.", encoding="utf-8")
    write_clip(clips / "short.mp4", disc_frames(disc_heights(9, 24, 3), 96, 64, "blue", "gray"))
    (clips / "short.txt").write_text("A short disc.", encoding="utf-8")
    encode_part(probe_video(clips / "clip_001.mp4"), 0, 25, clips / "again.mp4")
    shutil.copy(clips / "clip_001.txt", clips / "again.txt")
    shutil.copy(clips / "clip_000.mp4", folder / "held out" / "copy.mp4")
    encode_part(probe_video(clips / "clip_002.mp4"), 0, 25, folder / "held out" / "encoded anew.mp4")
    for name in ("copy", "encoded anew"):
        (folder / "held out" / f"{name}.txt").write_text(f"A disc, {name}.", encoding="utf-8")
    (clips / "of nothing.txt").write_text("A disc that is gone.", encoding="utf-8")
    (clips / "wordless.txt").write_text("A disc.", encoding="utf-8")
    cached(folder, tiny_family)
    (clips / "wordless.txt").write_text("  ", encoding="utf-8")
    (folder / "cache" / "old_00000-017_0096x0064_ltxv2.safetensors").write_bytes(b"")
    next((folder / "cache").glob("plain_*_ltxv2.safetensors")).unlink()
    next((folder / "cache").glob("loud_*_ltxv2_audio.safetensors")).write_bytes(b"damaged")
    (clips / "nasty.txt").write_text(f"{NASTY} edited", encoding="utf-8")
    add("new.mp4", 19, "A new disc.")
    return folder


def test_every_kind_of_finding_is_found_where_it_is(faulty, capsys):
    result = audit(faulty, "--trigger", "DISC")
    names = found(result)
    assert {kind: sorted(set(own)) for kind, own in names.items()} == {
        "hole": ["loud.mkv", "plain.mp4"],
        "changed": ["nasty.mp4"],
        "new": ["new.mp4"],
        "dropped": ["short.mp4"],
        "orphan": ["of nothing.txt", "old_00000-017_0096x0064_ltxv2.safetensors"],
        "late_sound": ["early.mkv", "late.mkv"],
        "clipped_sound": ["loud.mkv"],
        "silent_sound": ["silent.mkv"],
        "static": ["still.mp4"],
        "upscaled": ["small.mp4"],
        "duplicate": ["again.mp4"],
        "leak": ["copy.mp4", "encoded anew.mp4"],
        "caption": ["wordless.mp4"],
        "same_caption": ["again.mp4, clip_001.mp4"],
        "no_trigger": ["plain.mp4"],
    }
    by_name = {(one["kind"], one["name"].partition(":")[0]): one for one in result["findings"]}
    assert by_name["late_sound", "late.mkv"]["value"] == pytest.approx(0.25, abs=0.02)
    assert by_name["late_sound", "early.mkv"]["value"] == pytest.approx(17 / 24 - 20000 / 48000, abs=0.03)
    assert "clip_001.mp4" in by_name["duplicate", "again.mp4"]["text"] and by_name["duplicate", "again.mp4"]["value"] < 0.05
    assert "datasets[0]/clip_000.mp4" in by_name["leak", "copy.mp4"]["text"]
    text = capsys.readouterr().out
    assert all(kind in text for kind in names)
    facts = result["datasets"]
    assert (facts[0]["clips"], facts[0]["lengths"], facts[1]["is_validation"]) == (13, {"17 frames": 13}, True)
    assert facts[0]["source_sizes"] == {"96x64": 12, "48x32": 1} and facts[0]["seconds"] == pytest.approx(13 * 17 / 24, abs=0.01)
    assert facts[0]["cached_bytes"] == sum(
        path.stat().st_size for path in (faulty / "cache").glob("*.safetensors") if not path.name.startswith(("old", "short"))
    )


def test_nothing_is_found_where_nothing_is_wrong(good, capsys):
    result = audit(good, "--fail_on", "any", "--trigger", "disc")
    assert result["findings"] == [] and result["not_checked"] == [] and "nothing found" in capsys.readouterr().out
    assert len(result["nearest"]) > 0 and all(pair["distance"] > 0.1 for pair in result["nearest"])


@pytest.mark.parametrize(("kinds", "code"), [(["leak"], 1), (["static", "unreadable"], 1), (["unreadable", "companion"], 0), (["any"], 1)])
def test_the_exit_code_is_that_of_the_kinds_that_are_asked_for(faulty, kinds, code):
    audit(faulty, "--no-media" if kinds == ["leak"] else "--media", "--fail_on", *kinds, code=code)


def test_a_dataset_is_audited_before_it_is_cached(tmp_path):
    result = audit(write_dataset(tmp_path))
    assert found(result) == {"hole": ["all clips", "all clips"]} and [one["clips"] for one in result["datasets"]] == [3, 1]
    write_clip(tmp_path / "clips" / "still.mp4", torch.full((25, 64, 96, 3), 90, dtype=torch.uint8))
    (tmp_path / "clips" / "noise.mkv").write_bytes(b"noise")
    (tmp_path / "clips" / "noise.txt").write_text("Noise.")
    names = found(audit(tmp_path))
    assert names["static"] == ["still.mp4"] and names["caption"] == ["still.mp4"] and names["unreadable"] == ["noise.mkv"]
    assert not (tmp_path / "cache").exists(), "nothing is written"


def test_caches_are_audited_without_their_media(faulty, tmp_path):
    for name in ("cache", "held out cache"):
        shutil.copytree(faulty / name, tmp_path / name)
    shutil.copy(faulty / "dataset.toml", tmp_path)
    result = audit(tmp_path, "--trigger", "disc")
    names = found(result)
    assert set(names["hole"]) == {"loud.mkv", "plain.mp4"} and set(names["leak"]) == {"copy.mp4", "encoded anew.mp4"}
    assert names["no_trigger"] == ["plain.mp4"] and "static" not in names, "captions are those that were cached"
    assert any("the media, which are not at" in one for one in result["not_checked"])


def test_companions_that_are_lacking_are_told_one_by_one(tmp_path, tiny_family):
    folder = write_dataset(tmp_path, 'reference_directory = "edges"\n')
    (folder / "edges").mkdir()
    for name in ("clip_000.mp4", "clip_002.mp4"):
        shutil.copy(folder / "clips" / name, folder / "edges" / name)
    shutil.copy(folder / "clips" / "clip_000.mp4", folder / "edges" / "of nothing.mp4")
    names = found(audit(folder, "--fail_on", "companion", code=1))
    assert names["companion"] == ["clip_001.mp4"] and names["orphan"] == ["of nothing.mp4"]
    shutil.copy(folder / "clips" / "clip_001.mp4", folder / "edges" / "clip_001.mp4")
    common = ["--dataset_config", str(folder / "dataset.toml"), "--ltx_mode", "video", "--device", "cpu"]
    assert ltxv2_cache_latents.main([*common, "--vae", str(tiny_family.ltx23)]) == 0
    next((folder / "cache").glob("clip_002*_ltxv2_ref.safetensors")).unlink()
    (folder / "edges" / "clip_001.mp4").unlink()
    result = audit(folder)
    assert "companion" in found(result)
    assert [one["name"] for one in result["findings"] if one["text"].startswith("reference:")] == ["clip_002.mp4:00000-017"]


class Elements(HTMLParser):
    """What a page is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_is_one_file_that_shows_what_was_found(faulty, tmp_path):
    page = tmp_path / "audit page.html"
    audit(faulty, "--page", page, "--trigger", "no such word")
    text = page.read_text(encoding="utf-8")
    elements = Elements()
    elements.feed(text)
    tags = [tag for tag, _ in elements.tags]
    assert "script" not in tags and "iframe" not in tags, "what users wrote stays text"
    assert NASTY[:40] in elements.text
    assert all(value.startswith("data:image/jpeg") for tag, own in elements.tags if tag == "img" and (value := own["src"]))
    assert sum(tag == "img" for tag in tags) > 10 and all(own.get("alt") for tag, own in elements.tags if tag == "img")
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", text), "nothing is fetched"
    assert "prefers-color-scheme: dark" in text and ("html", {"lang": "en", "data-ltxv2-audit": "1"}) in elements.tags
    targets = {own["href"][1:] for tag, own in elements.tags if tag == "a"}
    assert targets and targets <= {own.get("id") for _, own in elements.tags}
    assert all(own.get("scope") for tag, own in elements.tags if tag == "th")
    audit(faulty, "--page", page)  # an audit's page may be written over
    page.write_text("my notes", encoding="utf-8")
    with pytest.raises(UserError, match="is there already, and is of no audit"):
        audit(faulty, "--page", page)
    (faulty / "mine.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="is there already, and is of no audit"):
        audit(faulty, "--json", faulty / "mine.json")


def test_the_table_of_kinds_is_whole():
    from typing import get_args

    assert tuple(MEANING) == get_args(Kind)
    fail_on = AuditOptions.__dataclass_fields__["fail_on"].type
    assert get_args(get_args(get_args(fail_on)[0])[0]) == ("any", *MEANING)


def test_a_dataset_in_which_nobody_has_written_a_caption(tmp_path):
    """Not one of them, before anything is cached."""
    folder = write_dataset(tmp_path)
    for path in (folder / "clips").glob("*.txt"):
        path.unlink()
    names = found(audit(folder, "--trigger", "disc", "--no-media", "--fail_on", "caption", code=1))["caption"]
    assert sorted(names) == [f"clip_00{number}.mp4" for number in range(3)]
