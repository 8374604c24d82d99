"""Listing sources and captions."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.sources.listing import list_all_sources, list_sources


def spec(
    folder: Path, *, kind: str = "image", jsonl: Path | None = None, label: str = "datasets[0]", cache: Path | None = None
) -> DatasetSpec:
    return DatasetSpec(
        label=label, kind=kind, directory=None if jsonl else folder, jsonl_file=jsonl, cache_directory=cache or folder, target_frames=(9,)
    )


def put(folder: Path, name: str, caption: str | None = "a caption") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(b"picture")
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def test_sources_come_in_order_with_their_captions(tmp_path: Path) -> None:
    for name in ("b.png", "Ä ö.JPG", "a.b.webp"):
        put(tmp_path, name, f"caption of {name}\n")
    put(tmp_path, "notes.md", None)
    sources = list_sources(spec(tmp_path))
    assert [source.name for source in sources] == sorted(["b.png", "Ä ö.JPG", "a.b.webp"])
    assert {source.stem: source.caption for source in sources} == {
        "a.b": "caption of a.b.webp",
        "b": "caption of b.png",
        "Ä ö": "caption of Ä ö.JPG",
    }


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa red disc")
    assert list_sources(spec(tmp_path))[0].caption == "a red disc"


def test_missing_and_empty_captions_are_listed_together(tmp_path: Path) -> None:
    put(tmp_path, "good.png")
    put(tmp_path, "none.png", None)
    put(tmp_path, "empty.png", " \n")
    with pytest.raises(UserError, match=r"2 of 3 .* empty\.png, none\.png.*'\.txt'"):
        list_sources(spec(tmp_path))
    assert len(list_sources(spec(tmp_path), require_captions=False)) == 3


def test_no_usable_file_names_the_extensions(tmp_path: Path) -> None:
    put(tmp_path, "clip.mp4")
    with pytest.raises(UserError, match=r"no image file \(\.png, .*clip\.mp4"):
        list_sources(spec(tmp_path))


def test_two_sources_with_one_stem_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    put(tmp_path, "A.jpg")
    with pytest.raises(UserError, match="same stem"):
        list_sources(spec(tmp_path))


def test_datasets_that_share_a_cache_may_not_share_a_stem(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    put(first, "a.png")
    put(second, "a.png")
    cache = tmp_path / "cache"
    specs = [spec(first, cache=cache), spec(second, cache=cache, label="datasets[1]")]
    with pytest.raises(UserError, match=r"datasets\[0\].*datasets\[1\].*same stem.*cache_directory"):
        list_all_sources(specs)
    list_all_sources([spec(first, cache=cache), spec(first, cache=cache, label="validation_datasets[0]")])
    list_all_sources([spec(first), spec(second)])


def test_jsonl_gives_paths_and_captions(tmp_path: Path) -> None:
    put(tmp_path / "pictures", "a.png", None)
    lines = [{"image_path": "pictures/a.png", "caption": "eine Scheibe, grün"}]
    jsonl = tmp_path / "list.jsonl"
    jsonl.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8")
    (source,) = list_sources(spec(tmp_path, jsonl=jsonl))
    assert (source.name, source.caption) == ("pictures/a.png", "eine Scheibe, grün")


def test_a_clip_beside_its_companions_is_none_of_them_and_two_of_a_kind_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.mp4")
    for name in ("a.jpg", "a.aac"):
        put(tmp_path, name, None)
    beside = {"mask_directory": tmp_path, "reference_directory": tmp_path, "separate_audio_directory": tmp_path}
    dataset = dataclasses.replace(spec(tmp_path, kind="video"), **beside)
    (source,) = list_sources(dataset)
    assert {name: path.name for name, path in source.files.items()} == {"mask": "a.jpg", "reference": "a.jpg", "audio": "a.aac"}
    put(tmp_path, "A.wav", None)
    with pytest.raises(UserError, match=r"separate_audio_directory\) holds more than one sound file of a\.mp4: A\.wav, a\.aac\. Keep one"):
        list_sources(dataset)
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 1 sources have no (mask|reference): a\.mp4"):
        list_sources(dataclasses.replace(dataset, separate_audio_directory=None))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "line 3: not valid JSON"),
        ('{"caption": "a"}', "line 3: 'image_path' is missing"),
        ("[]", "line 3: must hold keys and values"),
        ('{"image_path": ""}', "line 3: image_path = '': must be a path"),
        ('{"image_path": "b.png", "audio_path": "a.wav"}', "line 3: unknown key 'audio_path'"),
        ('{"image_path": "b.png", "caption": "a", "caption": "b"}', "line 3: not valid JSON: the key 'caption' appears twice"),
        ('{"image_path": "a.png", "captoin": "a"}', "line 3: unknown key 'captoin'. Did you mean 'caption'"),
        ('{"image_path": "gone.png", "caption": "a"}', "line 3: .*gone.png"),
        ('{"image_path": "a.gif", "caption": "a"}', "line 3: .*a.gif"),
        ('{"image_path": "a.png", "caption": 3}', "line 3: .*caption"),
    ],
)
def test_bad_jsonl_lines_are_named_by_number(tmp_path: Path, line: str, words: str) -> None:
    put(tmp_path, "b.png", None)
    put(tmp_path, "a.gif", None)
    jsonl = tmp_path / "list.jsonl"
    jsonl.write_text('\n{"image_path": "b.png", "caption": "b\u2028b"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=words):
        list_sources(spec(tmp_path, jsonl=jsonl))


def test_texts_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None)
    (tmp_path / "a.txt").write_bytes("grün".encode("latin-1"))
    put(tmp_path, "b.png", "a dog")
    first, second = list_sources(spec(tmp_path))
    assert re.search(r"a\.txt: not UTF-8.*Save the file as UTF-8", first.caption_problem) and first.caption == ""
    assert (second.caption, second.caption_problem) == ("a dog", "")
    (tmp_path / "list.jsonl").write_bytes('{"image_path": "a.png", "caption": "grün"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"list\.jsonl: not UTF-8"):
        list_sources(spec(tmp_path, jsonl=tmp_path / "list.jsonl"))
