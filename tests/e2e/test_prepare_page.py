"""docs/how-to/prepare_a_dataset.md, from a film to an audited, cached dataset: its commands in their order, on files of the same names.

The lengths and sizes of the film, of its clips and of the model are toys; flags are added for that alone.
"""

import json
import shutil
from pathlib import Path

import pytest

from musubi_tuner import ltxv2_cache_all, ltxv2_dataset
from musubi_tuner.media.probe import probe_video
from tests.film_parts import write_film
from tests.unit.test_docs import DOCS, blocks, commands

PAGE = DOCS / "how-to" / "prepare_a_dataset.md"
COMMANDS = [words[1:] for page, words in commands() if page == PAGE.name]
MAINS = {"tools/dataset.py": ltxv2_dataset.main, "ltxv2_cache_all.py": ltxv2_cache_all.main}
LENGTHS = [72, 100, 20, 90]


@pytest.fixture(scope="module")
def project(tiny_family, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("of the page é")
    write_film(folder / "film.mp4", LENGTHS)
    write_film(folder / "films" / "one.mp4", LENGTHS[:2])
    write_film(folder / "films" / "two.mkv", LENGTHS[1:])
    shutil.copy(tiny_family.ltx23, folder / "ltx-2.3-22b-dev.safetensors")
    shutil.copytree(tiny_family.gemma, folder / "gemma-3-12b-it-qat-q4_0-unquantized")
    (toml,) = blocks(PAGE, "toml")
    (folder / "dataset.toml").write_text(toml.replace("[768, 512]", "[96, 64]"), encoding="utf-8")
    (function,) = blocks(PAGE, "python")
    (folder / "depth.py").write_text(function, encoding="utf-8")
    return folder


def run(words: list[str]) -> int:
    script, *flags = words
    return MAINS[script]([*flags, *(["--device", "cpu"] if "decode" in flags or "cache_all" in script else [])])


def test_the_commands_of_the_page_lead_from_a_film_to_a_cached_dataset(project, monkeypatch):
    monkeypatch.chdir(project)
    seen = []
    for words in COMMANDS:
        name = words[1] if words[0] == "tools/dataset.py" else words[0]
        if name == "trim":
            assert [len(probe_video(path).stamps) for path in sorted(Path("clips").glob("*.mp4"))] == [72, 100, 90]
        if name == "references" and "references" not in seen:  # by then someone has watched the clips, and written captions
            Path("held out").mkdir()
            shutil.move("clips/film_0004.mp4", "held out/film_0004.mp4")
            for number, path in enumerate([*Path("clips").glob("*.mp4"), *Path("held out").glob("*.mp4")]):
                path.with_suffix(".txt").write_text(f"A disc, no. {number}.", encoding="utf-8")
        if "--function" in words:
            shutil.rmtree("edges")
            shutil.rmtree("held out edges")
        assert run(words) == 0, words
        seen.append(name)
    assert seen == [*["split-scenes"] * 3, "trim", *["crop"] * 3, *["references"] * 2, "audit", "ltxv2_cache_all.py", "audit", "decode"]
    assert len(list(Path("clips_of_all").glob("*.mp4"))) >= 4 and list(Path("fast").glob("*.mp4"))
    made = ("trimmed.mp4", "wide/film_0001.mp4", "square/film_0001.mp4", "logo_off/film_0001.mp4")
    trimmed, *cropped = (probe_video(Path(name)) for name in made)
    assert len(trimmed.stamps) == 60 and [(clip.width, clip.height) for clip in cropped] == [(96, 54), (64, 64), (96, 48)]
    result = json.loads(Path("audit.json").read_text(encoding="utf-8"))
    assert [one["clips"] for one in result["datasets"]] == [2, 1]
    assert "<h1>Audit of dataset.toml</h1>" in Path("audit.html").read_text(encoding="utf-8")
    assert {finding["kind"] for finding in result["findings"]} <= {"upscaled"}, result["findings"]
    assert len(list(Path("decoded").rglob("*.mp4"))) == 6, "clips and their references"
