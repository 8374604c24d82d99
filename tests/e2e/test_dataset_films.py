"""Films split by their scenes, clips trimmed and cropped, by the real program on real files."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from musubi_tuner import ltxv2_dataset
from musubi_tuner.media.audio import read_audio
from musubi_tuner.media.probe import VideoInfo, probe_video
from musubi_tuner.media.video import read_frames
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import ClipAudio, beep, number_of, numbered_frames, write_clip
from tests.film_parts import FPS, HEIGHT, WIDTH, bars, fade_out, pitch, tones, write_film

LENGTHS = [60, 72, 10, 200, 49]
"""Frames: two of ordinary length, one too short, one to be divided."""
BOUNDS = [(0, 60), (60, 132), (132, 142), (142, 342), (342, 391)]
REPOSITORY = Path(__file__).resolve().parents[2]


def dataset(*words: object, code: int = 0) -> None:
    assert ltxv2_dataset.main([str(word) for word in words]) == code


def scenes(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][1:]


def pictures(info: VideoInfo, first: int = 0, end: int | None = None) -> torch.Tensor:
    return read_frames(info, range(first, len(info.stamps) if end is None else end), info.width, info.height).float()


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("films of mine") / "ein Film, ä.mp4"
    write_film(path, LENGTHS)
    return path


@pytest.mark.parametrize("detector", ["adaptive", "content"])
def test_cuts_are_exact_to_the_frame_and_sound_is_cut_with_them(film, tmp_path, capsys, detector):
    dataset("split-scenes", film, "--output_dir", tmp_path / "clips", "--max_seconds", "5", "--detector", detector)
    found = scenes(tmp_path / "clips" / f"{film.stem}_scenes.jsonl")
    wanted = [(0, 60), (60, 132), (132, 142), (142, 242), (242, 342), (342, 391)]
    assert [(one["first_frame"], one["end_frame"]) for one in found] == wanted
    assert [one["scene"] for one in found if "left_out" in one] == [3] and "below --min_seconds 2" in found[2]["left_out"]
    source = probe_video(film)
    for one in found:
        if "clip" not in one:
            continue
        clip = probe_video(tmp_path / "clips" / one["clip"])
        first, end = one["first_frame"], one["end_frame"]
        assert len(clip.stamps) == end - first and clip.fps == FPS
        assert float((pictures(clip) - pictures(source, first, end)).abs().mean()) < 3
        seconds = (end - first) / FPS
        assert clip.audio is not None and abs(clip.audio.end - seconds) <= 1024 / 48000
        heard = read_audio(clip.path, clip.audio, 0, seconds)
        scene = next(number for number, (begin, stop) in enumerate(BOUNDS) if begin <= first < stop)
        for part in (heard.samples[:, 2000:26000], heard.samples[:, -26000:-2000]):
            assert pitch(part, heard.rate) == pytest.approx(300 + 200 * scene, abs=4), "no sound of the neighbors"
    assert not (tmp_path / "clips" / f"{film.stem}_0003.mp4").exists()
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ein Film"))
    assert row.split()[-6:] == ["6", "5", "0", "1", "0", "15.9"]


def test_a_fade_is_cut_in_its_black(tmp_path):
    frames = torch.cat([fade_out(72, 1), torch.zeros(24, HEIGHT, WIDTH, 3, dtype=torch.uint8), fade_out(72, 2).flip(0)])
    write_clip(tmp_path / "fade.mkv", frames, fps=FPS)
    dataset("split-scenes", tmp_path / "fade.mkv", "--output_dir", tmp_path / "clips")
    (cut,) = [one["first_frame"] for one in scenes(tmp_path / "clips" / "fade_scenes.jsonl")][1:]
    assert 72 <= cut <= 96
    dataset("split-scenes", tmp_path / "fade.mkv", "--output_dir", tmp_path / "whole", "--no-fades")
    assert len(scenes(tmp_path / "whole" / "fade_scenes.jsonl")) == 1
    dataset("split-scenes", tmp_path / "fade.mkv", "--output_dir", tmp_path / "fades alone", "--detector", "none")
    assert len(scenes(tmp_path / "fades alone" / "fade_scenes.jsonl")) == 2


def test_variable_rates_keep_their_times_and_films_without_sound_are_taken(tmp_path):
    times = [i / FPS + (i % 3) * 0.01 for i in range(132)]
    write_film(tmp_path / "films" / "vfr.mkv", [60, 72], sound=False, times=times)
    write_film(tmp_path / "films" / "plain.mp4", [50, 50], sound=False)
    (tmp_path / "films" / "notes.txt").write_text("no film")
    dataset("split-scenes", tmp_path / "films", "--output_dir", tmp_path / "clips")
    found = scenes(tmp_path / "clips" / "vfr_scenes.jsonl")
    assert [one["first_frame"] for one in found] == [0, 60] and found[1]["start_seconds"] == pytest.approx(times[60], abs=2e-3)
    clip = probe_video(tmp_path / "clips" / "vfr_0002.mp4")
    assert clip.audio is None and clip.is_variable
    assert clip.times == pytest.approx([time - times[60] for time in times[60:]], abs=2e-3)
    assert len(list((tmp_path / "clips").glob("plain_*.mp4"))) == 2


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".mov"])
def test_copied_clips_lie_within_their_scenes(tmp_path, ending, capsys):
    film = tmp_path / f"film{ending}"
    write_film(film, LENGTHS)
    words = ["split-scenes", film, "--output_dir", tmp_path / "clips", "--keyframes_only", "--min_seconds", "1"]
    dataset(*words)
    source = probe_video(film)
    found = scenes(tmp_path / "clips" / "film_scenes.jsonl")
    assert [one["scene"] for one in found if "left_out" in one] == [3]
    for one, (begin, stop) in zip(found, BOUNDS, strict=True):
        if "clip" not in one:
            continue
        assert begin <= one["first_frame"] < one["end_frame"] <= stop
        assert one["start_moved_by"] == pytest.approx((one["first_frame"] - begin) / FPS, abs=1e-5)
        assert one["end_moved_by"] == pytest.approx((one["end_frame"] - stop) / FPS, abs=1e-5)
        clip = probe_video(tmp_path / "clips" / one["clip"])
        taken = pictures(clip)
        assert torch.equal(taken, pictures(source, one["first_frame"], one["first_frame"] + len(taken)))
        assert clip.audio is not None and abs(clip.audio.end - clip.start - len(taken) / FPS) <= 2 * 1024 / 48000 + 0.01
    capsys.readouterr()
    dataset(*words)
    assert capsys.readouterr().out.splitlines()[-1].split()[-6:-1] == ["5", "0", "4", "1", "0"], "a second run keeps what is there"


def test_a_second_run_makes_what_is_missing_and_refuses_other_settings(film, tmp_path, monkeypatch):
    from musubi_tuner.curation import splitting

    clips = tmp_path / "clips"
    dataset("split-scenes", film, "--output_dir", clips)
    before = {path.name: path.stat().st_mtime_ns for path in clips.iterdir()}
    (clips / f"{film.stem}_0002.mp4").unlink()
    monkeypatch.setattr(splitting, "find_cuts", lambda *_: pytest.fail("it was searched already"))
    dataset("split-scenes", film, "--output_dir", clips)
    after = {path.name: path.stat().st_mtime_ns for path in clips.iterdir()}
    assert set(before) == set(after)
    assert [name for name in before if before[name] != after[name]] == [f"{film.stem}_0002.mp4"]
    monkeypatch.undo()
    with pytest.raises(UserError, match="was made with max_seconds 20.0, not 7.0"):
        dataset("split-scenes", film, "--output_dir", clips, "--max_seconds", "7")
    (clips / f"{film.stem}_scenes.jsonl").unlink()
    with pytest.raises(UserError, match="is there already, and .*_scenes.jsonl is not"):
        dataset("split-scenes", film, "--output_dir", clips)


def test_a_killed_run_leaves_whole_clips_alone(tmp_path):
    write_film(tmp_path / "long.mp4", [100] * 12)
    words = ["split-scenes", str(tmp_path / "long.mp4"), "--output_dir", str(tmp_path / "clips")]
    code = "import sys; from musubi_tuner.ltxv2_dataset import main; main(sys.argv[1:])"
    child = subprocess.Popen([sys.executable, "-c", code, *words], cwd=REPOSITORY, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "clips").glob("long_0*.mp4"))) < 2:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    whole = list((tmp_path / "clips").glob("long_0*.mp4"))
    assert all(len(probe_video(path).stamps) == 100 for path in whole)
    dataset(*words)
    assert [len(probe_video(path).stamps) for path in sorted((tmp_path / "clips").glob("long_0*.mp4"))] == [100] * 12


def test_damaged_films_are_named_and_do_not_stop_the_others(tmp_path, caplog):
    folder = tmp_path / "films"
    write_film(folder / "good.mp4", [60])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "noise.mkv").write_bytes(bytes(range(256)) * 40)
    data = (folder / "good.mp4").read_bytes()
    (folder / "cut off.mp4").write_bytes(data[: len(data) // 2])
    write_film(folder / "part.mkv", [60, 60])
    data = (folder / "part.mkv").read_bytes()
    (folder / "part.mkv").write_bytes(data[: len(data) * 3 // 4])
    dataset("split-scenes", folder, "--output_dir", tmp_path / "clips", code=1)
    made = {path.name for path in (tmp_path / "clips").glob("*.mp4")}
    assert "good_0001.mp4" in made and "part_0001.mp4" in made
    assert all(name in caplog.text for name in ("empty.mp4", "noise.mkv", "cut off.mp4"))
    with pytest.raises(UserError, match="cannot be read"):
        dataset("split-scenes", folder / "empty.mp4", "--output_dir", tmp_path / "one")


def test_what_is_asked_is_checked_before_anything_is_made(film, tmp_path, monkeypatch):
    out = tmp_path / "clips"
    for words, says in (
        ([film.parent, "--output_dir", film.parent], "is the folder of the films"),
        ([tmp_path, "--output_dir", out], "holds no film"),
        ([tmp_path / "none.mp4", "--output_dir", out], "no such file"),
        ([film, "--output_dir", film], "is a file, not a folder"),
        ([film, "--output_dir", out, "--min_seconds", "4", "--max_seconds", "5"], "must be at most half"),
        ([film, "--output_dir", out, "--detector", "none", "--no-fades"], "looks for fades alone"),
    ):
        with pytest.raises(UserError, match=says):
            dataset("split-scenes", *words)
    monkeypatch.setitem(sys.modules, "scenedetect.detectors", None)
    with pytest.raises(UserError, match=r"PySceneDetect, which is not installed.*\[scenes\]"):
        dataset("split-scenes", film, "--output_dir", out)
    assert not out.exists()


def test_a_trimmed_clip_has_the_frames_and_the_sound_of_its_seconds(tmp_path, capsys):
    write_clip(tmp_path / "a clip.mp4", numbered_frames(96), fps=24, audio=ClipAudio(samples=beep(4.0, 2.0)))
    dataset("trim", tmp_path / "a clip.mp4", "--start", "0:01.5", "--end", "3", "--output", tmp_path / "new" / "b.mp4")
    part = probe_video(tmp_path / "new" / "b.mp4")
    assert [number_of(picture) for picture in pictures(part)] == list(range(36, 72))
    heard = read_audio(part.path, part.audio, 0, 1.5)
    assert float((heard.samples.abs().amax(0) > 0.2).nonzero()[0]) / heard.rate == pytest.approx(0.5, abs=0.003)
    assert "1.500  3.000  36" in capsys.readouterr().out
    for words, says in (
        (["--start", "3", "--output", tmp_path / "new" / "b.mp4"], "is there already"),
        (["--start", "5", "--output", tmp_path / "c.mp4"], r"--start 5 --end 4.00: the clip has 4.00 s"),
        (["--start", "2", "--end", "2", "--output", tmp_path / "c.mp4"], "no frame begins between them"),
        (["--end", "9", "--output", tmp_path / "c.mp4"], "the clip has 4.00 s. Leave --end out"),
        (["--start", "1:99", "--output", tmp_path / "c.mp4"], "must be a time in seconds"),
        (["--output", tmp_path / "c.avi"], "must end in .mp4"),
    ):
        with pytest.raises(UserError, match=says):
            dataset("trim", tmp_path / "a clip.mp4", *words)
    assert not (tmp_path / "c.mp4").exists()


def test_a_folder_is_cropped_with_its_captions(tmp_path, capsys, caplog):
    source, out = tmp_path / "clips", tmp_path / "square"
    source.mkdir()
    write_clip(source / "a.mp4", bars(12, 1), audio=ClipAudio(samples=tones([12])))
    write_clip(source / "turned.mp4", bars(12, 2), rotation=90)
    Image.fromarray(bars(1, 3)[0].numpy()).save(source / "still.png")
    (source / "a.txt").write_text("bars")
    (source / "bad.mp4").write_bytes(b"nothing")
    dataset("crop", source, "--output_dir", out, "--aspect", "1:1", "--at", "1", "0.5", code=1)
    whole, part = probe_video(source / "a.mp4"), probe_video(out / "a.mp4")
    assert (part.width, part.height) == (64, 64) and part.audio is not None
    assert float((pictures(part) - pictures(whole)[:, :, 32:]).abs().mean()) < 3, "the right side"
    turned = probe_video(out / "turned.mp4")
    assert (turned.width, turned.height) == (64, 64)
    assert float((pictures(turned) - pictures(probe_video(source / "turned.mp4"))[:, 16:80]).abs().mean()) < 3
    assert Image.open(out / "still.png").size == (64, 64) and (out / "a.txt").read_text() == "bars"
    capsys.readouterr()
    (source / "bad.mp4").unlink()
    dataset("crop", source, "--output_dir", out, "--aspect", "1:1")
    assert capsys.readouterr().out.count("there already") == 3
    caplog.clear()
    dataset("crop", source, "--output_dir", out, "--aspect", "2:1", code=1)
    assert "a.mp4: is there already with 64x64, and 96x48 is asked for. Give another --output_dir" in caplog.text
    dataset("crop", source / "a.mp4", "--output_dir", tmp_path / "box", "--rectangle", "10", "4", "50", "40")
    box = probe_video(tmp_path / "box" / "a.mp4")
    assert float((pictures(box) - pictures(whole)[:, 4:44, 10:60]).abs().mean()) < 3
    for words, says in (
        (["--output_dir", source, "--aspect", "1:1"], "lie in it"),
        (["--output_dir", tmp_path / "x"], "exactly one of them"),
        (["--output_dir", tmp_path / "x", "--aspect", "16"], "must be width:height"),
        (["--output_dir", tmp_path / "x", "--rectangle", "1", "2", "3"], "must be left, top, width and height"),
    ):
        with pytest.raises(UserError, match=says):
            dataset("crop", source, *words)
    capsys.readouterr()
    with pytest.raises(UserError, match="^" + re.escape(f"{source / 'nothing.mp4'}: no such file or folder")):
        dataset("crop", source / "nothing.mp4", "--output_dir", tmp_path / "x", "--aspect", "1:1")
    assert "cropping" not in "".join(capsys.readouterr()), "no progress of nothing"
    dataset("crop", source / "a.mp4", "--output_dir", tmp_path / "x", "--rectangle", "90", "0", "50", "40", code=1)


def test_cuts_between_real_clips_are_found_and_none_within_them(shared_media, tmp_path):
    """Three clips, two of one film, one that a model made, as one film: the cuts are where they were joined."""
    infos = [probe_video(shared_media / f"{name}.mp4") for name in ("crush_scene_027", "ltx2_backyard", "crush_scene_034")]
    frames = [read_frames(info, range(len(info.stamps)), 416, 240) for info in infos]
    write_clip(tmp_path / "joined.mp4", torch.cat(frames), fps=24)
    ends = torch.tensor([len(part) for part in frames]).cumsum(0).tolist()
    for detector in ("adaptive", "content"):
        dataset("split-scenes", tmp_path / "joined.mp4", "--output_dir", tmp_path / detector, "--detector", detector)
        assert [one["end_frame"] for one in scenes(tmp_path / detector / "joined_scenes.jsonl")] == ends
    source = probe_video(shared_media / "ltx2_backyard.mp4")
    dataset("trim", source.path, "--start", "1", "--end", "3", "--output", tmp_path / "part.mp4")
    part = probe_video(tmp_path / "part.mp4")
    assert part.audio is not None and float((pictures(part) - pictures(source, 24, 72)).abs().mean()) < 2
