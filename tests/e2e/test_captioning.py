"""Captions written by real models of toy size and by a server of the chat protocol: where they land, what stays, what is told."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from musubi_tuner import ltxv2_dataset
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.page.fill import data_of
from musubi_tuner.runtime import servers
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.sources.listing import list_sources
from musubi_tuner.tiny.clips import write_audio_files, write_clips, write_stills
from tests import captioning_parts as parts
from tests.captioning_parts import Reply
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return parts.write_seeing_model(tmp_path_factory.mktemp("a model") / "toy vlm")


@pytest.fixture(scope="module")
def hearing(tmp_path_factory):
    return parts.write_hearing_model(tmp_path_factory.mktemp("an ear") / "toy ear")


@pytest.fixture
def clips(tmp_path):
    """Three clips with sound and a still, without captions."""
    folder = tmp_path / "clips ü"
    write_clips(folder, count=3, frames=17)
    write_stills(folder, count=1)
    for path in folder.glob("*.txt"):
        path.unlink()
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """There is no waiting between tries."""
    monkeypatch.setattr(servers, "sleep", waits.append)
    waits.clear()


waits: list[float] = []
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def caption(*words, code=0):
    assert ltxv2_dataset.main(["caption", *map(str, words)]) == code


def texts(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}


def review(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "caption_review.jsonl").read_text(encoding="utf-8").splitlines()]


LOCAL = ("--device", "cpu", "--max_tokens", "20")


def test_a_vision_language_model_captions_clips_and_stills(clips, seeing, capsys):
    before = torch.random.get_rng_state()
    caption(clips, "--model", seeing, "--frames", "3", *LOCAL)
    assert torch.equal(torch.random.get_rng_state(), before)
    found = texts(clips)
    assert set(found) == {"clip_000", "clip_001", "clip_002", "still_000"} and all(text.strip() for text in found.values())
    assert len(set(found.values())) > 1, "it looks at the pictures"
    rows = {row["file"]: row for row in review(clips)}
    assert {row["model"] for row in rows.values()} == {"toy vlm"} and not any(row["heard"] for row in rows.values())
    assert all(found[Path(name).stem].strip() == row["caption"] for name, row in rows.items())
    assert "Captions: 4 written" in capsys.readouterr().out
    caption(clips, "--model", seeing, "--frames", "3", *LOCAL)
    assert texts(clips) == found and "0 written, 4 kept" in capsys.readouterr().out
    caption(clips, "--model", seeing, "--frames", "3", *LOCAL, "--overwrite", "--temperature", "2", "--seed", "5")
    drawn = texts(clips)
    assert drawn != found
    caption(clips, "--model", seeing, "--frames", "3", *LOCAL, "--overwrite", "--temperature", "2", "--seed", "5")
    assert texts(clips) == drawn, "the same seed"


def test_an_audio_model_captions_sound_and_sees_nothing(hearing, clips, tmp_path, capsys):
    write_audio_files(tmp_path / "sounds", count=2)
    for path in (tmp_path / "sounds").glob("*.txt"):
        path.unlink()
    caption(tmp_path / "sounds", "--model", hearing, *LOCAL)
    assert len(set(texts(tmp_path / "sounds").values())) == 2 and all(row["heard"] for row in review(tmp_path / "sounds"))
    caption(clips, "--model", hearing, *LOCAL, code=1)
    assert "sees nothing" in capsys.readouterr().out and not texts(clips)


def test_an_omni_model_sees_and_hears(clips, tmp_path):
    pytest.importorskip("torchvision")
    model = parts.write_omni_model(tmp_path / "toy omni")
    caption(clips, "--model", model, "--frames", "2", *LOCAL)
    rows = {row["file"]: row for row in review(clips)}
    assert len(rows) == 4 and {name: row["heard"] for name, row in rows.items() if name.startswith("still")} == {"still_000.png": False}
    assert all(row["heard"] for name, row in rows.items() if name.startswith("clip"))
    silent = [row["caption"] for row in review(clips)]
    caption(clips, "--model", model, "--frames", "2", *LOCAL, "--sound", "off", "--overwrite")
    assert not any(row["heard"] for row in review(clips)[4:]) and [row["caption"] for row in review(clips)[4:]] != silent


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is here")
def test_a_processor_that_needs_torchvision_says_so(seeing, clips, tmp_path):
    broken = tmp_path / "toy qwen"
    shutil.copytree(seeing, broken)
    (broken / "processor_config.json").unlink()
    config = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (broken / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="its processor needs torchvision.*--endpoint"):
        caption(clips, "--model", broken, *LOCAL)


def test_a_vision_model_does_not_hear(seeing, clips, capsys):
    caption(clips, "--model", seeing, *LOCAL, "--sound", "on", "--most", "1", code=1)
    assert "hears nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "its weights are pickles"),
        (lambda folder: (folder / "model.safetensors").unlink(), "it holds no weights"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "holds no chat template"),
        (lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100]), "damaged"),
        (lambda folder: (folder / "processor_config.json").unlink(), "processor"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoModel": "evil.Model"}}'),
            "code of its own, which is not run",
        ),
        (lambda folder: (folder / "config.json").write_text("[]"), "names no model_type"),
    ],
)
def test_folders_that_are_no_such_model_are_refused(seeing, clips, tmp_path, change, says):
    broken = tmp_path / "broken"
    shutil.copytree(seeing, broken)
    change(broken)
    with pytest.raises(UserError, match=says):
        caption(clips, "--model", broken, *LOCAL)
    assert not texts(clips)


def test_weights_that_are_missing_are_told_of(seeing, clips, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(seeing, broken)
    tensors = load_file(seeing / "model.safetensors")
    gone = next(key for key in tensors if "layers.1" in key)
    save_file({key: value for key, value in tensors.items() if key != gone}, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lack 1 weights"):
        caption(clips, "--model", broken, *LOCAL)


def test_a_server_gets_pictures_and_sound_several_requests_at_once(clips, capsys):
    together = threading.Barrier(3)

    def reply(body, number):
        if number < 3:
            together.wait(60)
        return Reply(200, "The video shows a disc. It moves.")

    with parts.serving(reply) as server:
        caption(clips, "--endpoint", server.url, "--sound", "on", "--frames", "4", "--longest_side", "48", "--requests", "3",
                "--trigger_word", "MILA", "--sound_seconds", "0.5")  # fmt: skip
    assert server.faults == [] and server.most_at_once == 3 and len(server.requests) == 4
    assert {len(parts.pictures(body)) for body in server.requests} == {4, 1}
    assert {picture.size for body in server.requests for picture in parts.pictures(body)} == {(48, 32)}
    heard = [parts.sounds(body) for body in server.requests]
    assert sorted(heard)[0] == [] and all(sound == [(1, 16000, 8000)] for sound in heard if sound)
    assert all("MILA" not in parts.said(body) and "200 words" in parts.said(body) for body in server.requests)
    assert {body["model"] for body in server.requests} == {"toy-vlm"} and {body["temperature"] for body in server.requests} == {0.0}
    assert set(texts(clips).values()) == {"MILA, A disc. It moves.\n"}
    notes = {row["file"]: row.get("note", "") for row in review(clips)}
    assert notes["clip_000.mp4"] == "only the first 0.5 s were heard" and notes["still_000.png"] == ""
    assert review(clips)[0]["answer"] == "The video shows a disc. It moves."
    out = capsys.readouterr().out
    names = [line.split()[0] for line in out.splitlines() if line.startswith(("clip_", "still_"))]
    assert "4 written (3 of them cut)" in out and names == sorted(names) and len(names) == 4


def test_captions_of_people_are_never_replaced(clips, capsys):
    (clips / "clip_000.txt").write_text("written by hand", encoding="utf-8")
    (clips / "clip_001.txt").write_text(" \n", encoding="utf-8")
    (clips / "still_000.txt").write_bytes(b"\xff\xfe broken")
    with parts.serving() as server:
        caption(clips, "--endpoint", server.url, code=1)
        assert "its caption cannot be read, and is left as it is" in capsys.readouterr().out.replace("\n               ", " ")
        assert texts_of(clips, "clip_001", "clip_002") == {"A disc moves over a ground. A tone rises.\n"}
        (clips / "clip_002.txt").write_text("A disc moves over a ground. A high tone rises.\n", encoding="utf-8")
        (clips / "clip_001.txt").write_bytes(b"A disc moves over a ground. A tone rises.\r\n\r\n")
        caption(clips, "--endpoint", server.url, "--overwrite", "--trigger_word", "NEW", code=1)
    assert (clips / "clip_000.txt").read_text(encoding="utf-8") == "written by hand"
    assert (clips / "clip_001.txt").read_text(encoding="utf-8").startswith("NEW, "), "blank lines at its end are no edit"
    assert "high tone" in (clips / "clip_002.txt").read_text(encoding="utf-8")
    assert (clips / "still_000.txt").read_bytes() == b"\xff\xfe broken"
    assert "2 kept (2 of them a person has written or edited), 1 failed" in capsys.readouterr().out


def texts_of(folder, *stems):
    return {(folder / f"{stem}.txt").read_text(encoding="utf-8") for stem in stems}


def test_a_caption_that_is_written_meanwhile_stays(clips, capsys):
    def reply(body, number):
        for path in clips.glob("clip_*.mp4"):
            path.with_suffix(".txt").write_text("meanwhile", encoding="utf-8")
        return Reply()

    with parts.serving(reply) as server:
        caption(clips, "--endpoint", server.url, "--requests", "1", code=1)
    assert texts_of(clips, "clip_000", "clip_001", "clip_002") == {"meanwhile"}
    assert capsys.readouterr().out.count("somebody has written its caption") == 3


def test_one_failure_does_not_stop_the_others(clips, capsys):
    (clips / "clip_001.mp4").write_bytes(b"no video")
    answers = {0: Reply(text="I'm sorry, but I can't help with that.")}
    with parts.serving(lambda body, number: answers.get(number, Reply())) as server:
        caption(clips, "--endpoint", server.url, "--requests", "1", code=1)
        out = capsys.readouterr().out
        assert "clip_001.mp4" in out and "refuses" in out and "2 written, 0 kept, 2 failed, 0 not tried" in out
        write_clips(clips.parent / "again", count=2, frames=9)
        (clips.parent / "again" / "clip_001.mp4").replace(clips / "clip_001.mp4")
        caption(clips, "--endpoint", server.url)
    assert "2 written, 2 kept" in capsys.readouterr().out and len(server.requests) == 5


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(clips, capsys):
    def busy(body, number):
        return [Reply(status=503, text="loading"), Reply(status=429, text="slow", headers={"Retry-After": "7"}), Reply()][min(number, 2)]

    with parts.serving(busy) as server:
        caption(clips, "--endpoint", server.url, "--requests", "1", "--most", "1")
    assert waits == [1.0, 7.0] and len(server.requests) == 3
    capsys.readouterr()
    with parts.serving(lambda body, number: Reply(status=400, text="image input is not supported")) as server:
        caption(clips, "--endpoint", server.url, "--requests", "1", "--most", "1", code=1)
    out = " ".join(capsys.readouterr().out.split())
    assert len(server.requests) == 1 and "image input is not supported" in out and "--sound off" in out
    with parts.serving(lambda body, number: Reply(status=500, text="broken")) as server:
        caption(clips, "--endpoint", server.url, "--requests", "1", "--most", "2", "--retries", "2", code=1)
    assert (
        len(server.requests) == 6
        and waits[2:] == [1.0, 2.0, 1.0, 2.0]
        and "error 500 (broken)" in " ".join(capsys.readouterr().out.split())
    )


def test_a_server_that_is_too_slow_or_talks_nonsense_is_told_of(clips, capsys):
    with parts.serving(lambda body, number: Reply(hold=2)) as server:
        caption(clips, "--endpoint", server.url, "--timeout", "0.3", "--retries", "0", "--most", "1", code=1)
    assert "no answer within 0.3 s" in capsys.readouterr().out
    nonsense = {
        b"<html>": "is no JSON",
        b"[" * 100_000: "is no JSON",
        b'{"choices": []}': "holds no choices",
        b'{"choices": [1]}': "holds no choices",
        b"null": "holds no choices",
        b'{"choices": [{"message": {"content": ["x", {"text": 0}]}}]}': "answered nothing",
        b'{"choices": [{"message": {"content": 5}}]}': "is no text",
        b'{"choices": [{"message": {"content": null}}]}': "answered nothing",
    }
    for raw, says in nonsense.items():
        with parts.serving(lambda body, number, raw=raw: Reply(raw=raw)) as server:
            caption(clips, "--endpoint", server.url, "--most", "1", code=1)
        assert says in " ".join(capsys.readouterr().out.split())
    raw = json.dumps({"choices": [{"message": {"content": [{"type": "text", "text": "A \ud800 dog."}]}}]}).encode()
    with parts.serving(lambda body, number: Reply(raw=raw)) as server:
        caption(clips, "--endpoint", server.url, "--most", "1")
    assert list(texts(clips).values()) == ["A ? dog.\n"]


def test_a_server_that_has_gone_ends_the_run_and_what_was_written_stays(clips, tmp_path, capsys):
    write_clips(tmp_path / "many", count=9, frames=1)
    for path in (tmp_path / "many").glob("*.txt"):
        path.unlink()
    with pytest.raises(TemporaryFailure, match="nothing answers .*Start the server"):
        caption(clips, "--endpoint", "http://127.0.0.1:9/v1", "--retries", "0")

    with parts.serving(lambda body, number: server.gone.set() or Reply()) as server:
        caption(tmp_path / "many", "--endpoint", server.url, "--retries", "1", "--requests", "1", code=1)
    out = capsys.readouterr().out
    assert "1 written" in out and "nothing answers" in out and "not tried" in out and " 0 not tried" not in out
    assert len(texts(tmp_path / "many")) == 1


def test_redirects_are_not_followed_and_the_key_goes_to_the_server_alone(clips, tmp_path, capsys):
    (tmp_path / "key").write_text("sk-123\n", encoding="utf-8")
    with (
        parts.serving() as other,
        parts.serving(lambda body, number: Reply(status=307, headers={"Location": f"{other.url}/chat/completions"})) as server,
    ):
        caption(clips, "--endpoint", server.url + "/chat/completions/", "--most", "1", "--api_key_file", tmp_path / "key", code=1)
    assert other.requests == [] and server.headers[0]["Authorization"] == "Bearer sk-123" and "error 307" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://8.8.8.8/v1", "neither this machine nor in a private network.*--allow_remote"),
        ("https://8.8.8.8:4000/v1", "--allow_remote"),
        ("http://[2001:4860:4860::8888]/v1", "--allow_remote"),
        ("http://user:secret@127.0.0.1/v1", "--api_key_file"),
        ("ftp://127.0.0.1/v1", "must be an address"),
        ("127.0.0.1:8000", "must be an address"),
        ("http://127.0.0.1:99999/v1", "is no address"),
        ("http://127.0.0.1/v1?key=1", "without"),
        ("http://no.such.host.invalid/v1", "is not found"),
        ("file:///etc/passwd", "must be an address"),
    ],
)
def test_addresses_that_media_must_not_go_to(clips, url, says):
    with pytest.raises(UserError, match=says) as told:
        caption(clips, "--endpoint", url)
    assert "secret" not in str(told.value)


def test_a_server_with_several_models_asks_for_a_name(clips):
    with parts.serving() as server:
        server.models = ["one", "two"]
        with pytest.raises(UserError, match="lists one, two.*--model_name"):
            caption(clips, "--endpoint", server.url)
        caption(clips, "--endpoint", server.url, "--model_name", "two")
    assert {body["model"] for body in server.requests} == {"two"}


TOML = '[general]\nresolution = [64, 64]\ncaption_extension = ".cap"\n[[datasets]]\nvideo_directory = "clips ü"\ntarget_frames = [9]\n'


def test_captions_land_where_the_dataset_reads_them(clips, tmp_path, capsys):
    path = tmp_path / "dataset.toml"
    path.write_text(TOML + '[[datasets]]\nimage_directory = "clips ü"\n', encoding="utf-8")
    datasets = load_dataset_config(path)
    with parts.serving() as server:
        caption(path, "--endpoint", server.url)
        assert [source.caption for spec in datasets.all for source in list_sources(spec)] == [Reply().text] * 4
        caption(clips, "--endpoint", server.url, "--caption_extension", ".cap", "--overwrite", "--trigger_word", "T")
        assert {source.caption for spec in datasets.all for source in list_sources(spec)} == {f"T, {Reply().text}"}, "one memory"
    assert not list(clips.glob("*.txt"))


@pytest.mark.parametrize("ending", [" ", "txt", ".", "./up", "." + "x" * 80])
def test_an_ending_that_is_none_is_refused(clips, ending):
    with pytest.raises(UserError, match="must be an ending that begins with a dot, such as '.txt'"):
        caption(clips, "--endpoint", "http://127.0.0.1:9", "--caption_extension", ending)


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems take no such names")
def test_files_of_any_name_and_state(tmp_path, capsys):
    folder = tmp_path / "odd"
    (clip,) = write_clips(folder, count=1, frames=1)
    clip.with_suffix(".txt").unlink()
    for name in (b"a b'c\"d.mp4", ("\u65e5" * 80 + ".mp4").encode(), b"bad\xff.mp4", b"n" * 251 + b".mp4"):
        (folder / os.fsdecode(name)).write_bytes(clip.read_bytes())
    for name in ("zero.mp4", "no.png", "none.wav"):
        (folder / name).write_bytes(b"")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.mp4").write_bytes(clip.read_bytes())
    (folder / "folder.txt").mkdir()
    (folder / "link.mp4").symlink_to(folder / "nowhere")
    with parts.serving() as server:
        caption(folder, "--endpoint", server.url, "--sound", "on", "--frames", "256", code=1)
        assert "5 written, 0 kept, 6 failed, 0 not tried" in capsys.readouterr().out
        caption(folder, "--endpoint", server.url, "--overwrite", "--trigger_word", "T", code=1)
    (folder / "folder.txt").rmdir()
    assert len(texts(folder)) == 5 and all(text.startswith("T, ") for text in texts(folder).values())


def test_real_clips(shared_media, tmp_path):
    for path in shared_media.glob("*.mp4"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with parts.serving() as server:
        caption(tmp_path, "--endpoint", server.url, "--sound", "on")
    assert len(texts(tmp_path)) == 3 and server.faults == []
    for body in server.requests:
        assert {picture.size for picture in parts.pictures(body)} == {(768, 443)} and len(parts.pictures(body)) == 8
        ((channels, rate, samples),) = parts.sounds(body)
        assert (channels, rate) == (1, 16000) and samples > 16000


NASTY = '</script><img src=x onerror="alert(1)"> & {{data}}'


def test_the_page_shows_every_caption_and_runs_nothing_of_them(clips, capsys):
    (clips / "clip_000.txt").write_text(NASTY, encoding="utf-8")
    (clips / "still_000.txt").write_bytes(b"\xff")
    (clips / "clip_001.mp4").rename(clips / "a #%& b.mp4")
    with parts.serving(lambda body, number: Reply(text=f"The video shows {NASTY}")) as server:
        caption(clips, "--endpoint", server.url, "--page", code=1)
        (clips / "clip_002.txt").write_text("edited", encoding="utf-8")
        caption(clips, "--endpoint", server.url, "--page", code=1)
    page = clips / "caption_review.html"
    assert f"to look at: {page}" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert "<img" not in text and text.count("</script>") == 2
    rows = {row["file"]: row for row in data_of(page)["rows"]}
    assert {name: (row["caption"], row["by"], row["ours"]) for name, row in rows.items()} == {
        "a #%& b.mp4": (NASTY, "by toy-vlm", True),
        "clip_000.mp4": (NASTY, "by a person", False),
        "clip_002.mp4": ("edited", "edited by a person", False),
        "still_000.png": ("", "", False),
    }
    assert "not UTF-8" in rows["still_000.png"]["note"] and rows["a #%& b.mp4"]["answer"].startswith("The video shows")


@pytest.mark.skipif(not any(map(shutil.which, CHROMIUM)), reason="no browser")
def test_the_page_in_a_browser(clips):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra 'browser')")
    (clips / "clip_001.mp4").rename(clips / "a #%& b.mp4")
    (clips / "clip_000.txt").write_text(NASTY, encoding="utf-8")
    with parts.serving() as server:
        caption(clips, "--endpoint", server.url, "--page")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=next(filter(None, map(shutil.which, CHROMIUM))), args=["--no-sandbox"])
        page = browser.new_page()
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("requestfailed", lambda request: faults.append(request.url))
        page.goto((clips / "caption_review.html").as_uri())
        page.wait_for_function("[...document.querySelectorAll('video')].every((one) => one.readyState > 0)")
        assert page.locator("article").count() == 4 and page.locator("#count").text_content() == "4 of 4"
        assert page.locator("article p").all_text_contents().count(NASTY) == 1
        assert page.evaluate("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")
        page.select_option("#which", "person")
        assert page.locator("article:visible").count() == 1
        page.select_option("#which", "all")
        page.fill("#words", "STILL_")
        assert page.locator("article:visible strong").all_text_contents() == ["still_000.png"]
        assert faults == []
        browser.close()


def test_one_caption_file_of_two_media_is_of_the_video(clips, tmp_path, capsys):
    write_audio_files(tmp_path / "s", count=1)
    (tmp_path / "s" / "sound_000.wav").rename(clips / "clip_000.wav")
    with parts.serving() as server:
        caption(clips, "--endpoint", server.url)
    assert "clip_000.wav: not captioned by itself, as its caption is that of clip_000.mp4" in capsys.readouterr().out
    assert len(server.requests) == 4


def test_a_jsonl_gets_a_new_one_beside_it_and_stays(clips, tmp_path, capsys):
    listing = tmp_path / "list.jsonl"
    lines = [
        {"video_path": "clips ü/clip_000.mp4", "caption": "by hand", "mask_path": None},
        {"video_path": str(clips / "clip_001.mp4")},
        {"video_path": "clips ü/clip_002.mp4", "caption": ""},
    ]
    listing.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    before = listing.read_bytes()
    toml = tmp_path / "dataset.toml"
    toml.write_text(
        '[general]\nresolution = [64, 64]\n[[datasets]]\nvideo_jsonl_file = "list.jsonl"\ntarget_frames = [9]\n', encoding="utf-8"
    )
    new = tmp_path / "list.captioned.jsonl"
    with parts.serving() as server:
        caption(toml, "--endpoint", server.url, "--most", "1")
        first = [json.loads(line) for line in new.read_text(encoding="utf-8").splitlines()]
        assert [line.get("caption") for line in first] == ["by hand", Reply().text, ""] and "mask_path" in first[0]
        caption(toml, "--endpoint", server.url)
        assert len(server.requests) == 2 and listing.read_bytes() == before
        edited = [{**json.loads(line)} for line in new.read_text(encoding="utf-8").splitlines()]
        edited[1]["caption"] = "edited"
        new.write_text("".join(json.dumps(line) + "\n" for line in edited), encoding="utf-8")
        caption(toml, "--endpoint", server.url, "--overwrite", "--trigger_word", "T")
        assert len(server.requests) == 3
        assert [json.loads(line)["caption"] for line in new.read_text(encoding="utf-8").splitlines()] == [
            "by hand",
            "edited",
            f"T, {Reply().text}",
        ]
        assert f"captions are in {new}" in capsys.readouterr().out
        toml.write_text(toml.read_text(encoding="utf-8").replace("list.jsonl", "list.captioned.jsonl"), encoding="utf-8")
        assert len(list_sources(load_dataset_config(toml).datasets[0])) == 3
        for output, says in ((listing, "own jsonl"), (clips / "x.jsonl", "must lie beside")):
            toml.write_text(toml.read_text(encoding="utf-8").replace("list.captioned.jsonl", "list.jsonl"), encoding="utf-8")
            with pytest.raises(UserError, match=says):
                caption(toml, "--endpoint", server.url, "--output", output)


def test_what_a_person_edits_in_the_new_jsonl_during_a_run_stays(clips, tmp_path):
    listing, new = tmp_path / "list.jsonl", tmp_path / "list.captioned.jsonl"
    listing.write_text("".join(json.dumps({"video_path": f"clips ü/clip_00{n}.mp4"}) + "\n" for n in range(3)), encoding="utf-8")
    toml = tmp_path / "dataset.toml"
    toml.write_text(
        '[general]\nresolution = [64, 64]\n[[datasets]]\nvideo_jsonl_file = "list.jsonl"\ntarget_frames = [9]\n', encoding="utf-8"
    )

    def reply(body, number):
        if number == 2:
            new.write_text(listing.read_text(encoding="utf-8").replace('000.mp4"', '000.mp4", "caption": "by hand"'), encoding="utf-8")
        return Reply()

    with parts.serving(reply) as server:
        caption(toml, "--endpoint", server.url, "--requests", "1")
    assert [json.loads(line)["caption"] for line in new.read_text(encoding="utf-8").splitlines()] == ["by hand", Reply().text, Reply().text]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "neither was given"),
        (("--model", "m", "--endpoint", "http://127.0.0.1/v1"), "both were given"),
        (("--model", "m", "--model_name", "x"), "--model_name is for --endpoint"),
        (("--model", "nowhere"), "no such folder"),
        (("--endpoint", "http://127.0.0.1:9/v1", "--frames", "0"), "at least 1"),
        (("--endpoint", "http://127.0.0.1:9/v1", "--output", "x.jsonl"), "no dataset has a jsonl"),
    ],
)
def test_wrong_flags(clips, words, says):
    with pytest.raises(UserError, match=says):
        caption(clips, *words)


def test_folders_without_media_and_other_files(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.mp4").write_bytes(b"")
    for path, says in (("empty", "holds no media"), ("none", "no such folder"), ("x.mp4", "is a file. Give a dataset TOML")):
        with pytest.raises(UserError, match=says):
            caption(tmp_path / path, "--endpoint", "http://127.0.0.1:9/v1")


def test_ctrl_c_ends_without_waiting_for_the_server(clips):
    import signal

    with parts.serving(lambda body, number: Reply(hold=50 if number else 0)) as server:
        process = subprocess.Popen(
            [sys.executable, "tools/dataset.py", "caption", str(clips), "--endpoint", server.url, "--requests", "1"],
            cwd=REPOSITORY, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while len(server.requests) < 2 and process.poll() is None:
            time.sleep(0.02)
        start = time.monotonic()
        if os.name == "nt":
            process.terminate()
        else:
            process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
        assert time.monotonic() - start < 25
    assert os.name == "nt" or (process.returncode == 130 and "interrupted" in told)
    assert len(texts(clips)) == 1 and len(review(clips)) == 1 and not list(clips.glob(".*"))
