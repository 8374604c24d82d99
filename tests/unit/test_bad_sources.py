"""Whatever lies in a dataset's folder: a bad source is named with the reason, and the others go on."""

import os
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from musubi_tuner.cache.index import read_index, write_index
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.encoding.audio import decode_audio
from musubi_tuner.encoding.pictures import decode_frames
from musubi_tuner.encoding.plan import DatasetPlan, plan_datasets
from musubi_tuner.encoding.report import describe_sources, describe_warnings
from musubi_tuner.media.audio import read_audio
from musubi_tuner.media.probe import probe_audio, probe_video
from musubi_tuner.media.video import read_frames
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import Processes
from musubi_tuner.tiny.clips import ClipAudio, beep, number_of, numbered_frames, write_clip
from musubi_tuner.tiny.clips import write_stills as write_pictures

VIDEOS = '[[datasets]]\nvideo_directory = "clips"\ncache_directory = "cache"\nresolution = [96, 64]\ntarget_frames = [9]\n'
STILLS = '[[datasets]]\nimage_directory = "clips"\ncache_directory = "cache"\nresolution = [96, 64]\n'


def planned(folder: Path, text: str = VIDEOS) -> DatasetPlan:
    """The plan of the one dataset; it must go into an index and a report too."""
    path = folder / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    (plan,) = plan_datasets(load_dataset_config(path), Processes(index=0, count=1), workers=2)
    write_index(plan.spec, plan.index)
    assert len(read_index(plan.spec, path).clips) == len(plan.clips)
    describe_sources([plan]).encode("utf-8")
    return plan


def failures(plan: DatasetPlan) -> dict[str, str]:
    return {row.source: row.note for row in plan.rows if row.outcome == "failed"}


def put(folder: Path, name: str = "good.mp4", frames: int = 9, **values) -> Path:
    folder.mkdir(exist_ok=True)
    write_clip(folder / name, numbered_frames(frames), **values)
    return folder / name


def png(path: Path, width: int, height: int) -> None:
    """A black picture of one bit a pixel, however large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 + width // 8) * height, 1)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def test_tags_of_any_encoding_do_not_matter(tmp_path: Path) -> None:
    path = put(tmp_path, "a.mkv", audio=ClipAudio(samples=beep(0.375, 0.1)))
    with av.open(str(path)) as source, av.open(str(tmp_path / "tagged.mkv"), "w") as target:
        target.metadata["title"] = "CAFEXX"
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.size:
                packet.stream = streams[packet.stream_index]
                target.mux(packet)
    path = tmp_path / "tagged.mkv"
    path.write_bytes(path.read_bytes().replace(b"CAFEXX", b"Caf\xe9\xe9\xe9"))
    info = probe_video(path)
    assert [number_of(picture) for picture in read_frames(info, range(9), 96, 64)] == list(range(9))
    assert read_audio(path, info.audio, info.start, info.start + 0.3).samples.abs().max() > 0.5
    assert probe_audio(path).rate == 48000


def test_pictures_that_are_too_large_or_have_long_texts_fail_by_name(tmp_path: Path) -> None:
    write_pictures(tmp_path / "clips", count=1)
    png(tmp_path / "clips" / "huge.png", 16000, 16000)
    png(tmp_path / "clips" / "sliver.png", 16000, 16)
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    Image.new("RGB", (96, 64)).save(tmp_path / "clips" / "text.png", pnginfo=text)
    plan = planned(tmp_path, STILLS)
    assert [one.clip.stem for one in plan.clips] == ["still_000"]
    found = failures(plan)
    assert "more than 178 million pixels" in found["huge.png"] and "a text in it is too long" in found["text.png"]
    assert found["sliver.png"] == "16000x16: one side is over 64 times the other"


def test_names_that_no_cache_can_have_fail_by_name(tmp_path: Path) -> None:
    put(tmp_path / "clips")
    data = (tmp_path / "clips" / "good.mp4").read_bytes()
    (tmp_path / "clips" / ("n" * 225 + ".mp4")).write_bytes(data)
    (tmp_path / "clips" / ("ü" * 125 + ".mp4")).write_bytes(data)
    expected = {"n" * 225 + ".mp4": "make it 14 bytes shorter", "ü" * 125 + ".mp4": "make it 39 bytes shorter"}
    if os.name == "posix":
        Path(os.fsdecode(os.fsencode(tmp_path / "clips") + b"/a\xff.mp4")).write_bytes(data)
        expected["a\\udcff.mp4"] = "its name is not UTF-8. Rename it."
    plan = planned(tmp_path)
    assert [one.clip.stem for one in plan.clips] == ["good"]
    found = failures(plan)
    assert found.keys() == expected.keys() and all(found[name].endswith(words) for name, words in expected.items())


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
def test_links_that_lead_nowhere_fail_by_name(tmp_path: Path) -> None:
    put(tmp_path / "clips")
    (tmp_path / "clips" / "circle.mp4").symlink_to("circle.mp4")
    (tmp_path / "clips" / "gone.mp4").symlink_to("elsewhere.mp4")
    os.mkfifo(tmp_path / "clips" / "pipe.mp4")
    plan = planned(tmp_path)
    assert [one.clip.stem for one in plan.clips] == ["good"]
    words = {"circle.mp4": "a link that leads nowhere", "gone.mp4": "a link that leads nowhere", "pipe.mp4": "not a file"}
    assert {name: note.split(": ")[-1] for name, note in failures(plan).items()} == {name: f"{text}." for name, text in words.items()}


def test_a_file_that_vanishes_after_planning_fails_alone(tmp_path: Path) -> None:
    path = put(tmp_path / "clips", audio=ClipAudio(samples=beep(0.375, 0.1)))
    (clip,) = planned(tmp_path).clips
    path.unlink()
    for decode in (decode_frames, decode_audio):
        with pytest.raises(UserError, match=r"good\.mp4: no such file"):
            decode(clip)


def test_reasons_are_words(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    put(tmp_path / "clips")
    (tmp_path / "clips" / "bad.mp4").write_bytes(b"\0" * 1000)
    assert failures(planned(tmp_path))["bad.mp4"].endswith(
        "bad.mp4: cannot be read (invalid data). The file is damaged, cut off or of an unknown kind; replace or remove it."
    )


def cut_between_key_frames(source: Path, target: Path, seconds: float) -> None:
    """As a lossless cutter does that looks at no key frames."""
    with av.open(str(source)) as before, av.open(str(target), "w") as after:
        streams = {stream.index: after.add_stream_from_template(stream) for stream in before.streams}
        for packet in before.demux():
            if packet.dts is not None and float(packet.dts * packet.time_base) >= seconds:
                packet.stream = streams[packet.stream_index]
                after.mux(packet)


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_a_clip_that_begins_between_key_frames_begins_at_the_first_one(tmp_path: Path, ending: str) -> None:
    whole = put(tmp_path, f"whole{ending}", frames=40, fps=25, audio=ClipAudio(samples=beep(1.6, 0.5)))
    (tmp_path / "clips").mkdir()
    cut_between_key_frames(whole, tmp_path / "clips" / f"cut{ending}", 0.2)
    plan = planned(tmp_path, VIDEOS + 'frame_extraction = "chunk"\n')
    info = plan.clips[0].media.video
    assert (info.fps, info.is_variable) == (25.0, False) and 18 <= len(info.stamps) < 35
    numbers = [number_of(picture) for one in plan.clips for picture in decode_frames(one)]
    assert numbers == list(range(40 - len(info.stamps), 40))[: 9 * len(plan.clips)]
    (warning,) = plan.rows[0].warnings
    assert warning == f"begins between key frames: its first {info.lost_frames} frames cannot be decoded and are left out"


def test_where_seeking_is_refused_decoding_begins_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = probe_video(put(tmp_path, frames=40))
    monkeypatch.setattr("musubi_tuner.media.video._seek", lambda container, origin: False)
    assert [number_of(picture) for picture in read_frames(info, range(20, 29), 96, 64)] == list(range(20, 29))


def test_what_is_there_of_a_half_downloaded_clip_is_read_and_warned_of(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    path = tmp_path / "clips" / "half.mp4"
    noise = torch.randint(0, 256, (64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=24, options={"g": "24", "bf": "3"})
        stream.width, stream.height = 96, 64
        for number in range(60):  # a movement, which is coded with B-frames
            picture = noise.roll(2 * number, 1).contiguous()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        container.mux(stream.encode(None))
    whole = path.read_bytes()
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    for end in [*ends[20:30], ends[25] - 3]:  # behind frames of all kinds, and within one
        path.write_bytes(whole[:end])
        info = probe_video(path)
        assert (info.fps, info.is_variable, info.stored_frames) == (24.0, False, 60)
        step = info.stamps[1] - info.stamps[0]
        assert info.stamps == tuple(range(0, step * len(info.stamps), step)), "without holes"
        assert len(read_frames(info, range(len(info.stamps)), 96, 64)) == len(info.stamps), "all that counts can be decoded"
    (row,) = planned(tmp_path).rows
    assert row.warnings == (f"cut off: {row.frames} of the 60 frames that it lists are in it; copy or download it again",)


def test_fast_clips_are_warned_of_in_seconds(tmp_path: Path) -> None:
    put(tmp_path / "clips", frames=25, fps=240)
    plan = planned(tmp_path)
    assert describe_warnings([plan])[0] == "datasets[0]/good.mp4: 240 fps: 9 frames are 0.037 s; set target_fps"
    assert not planned(tmp_path, VIDEOS + "target_fps = 24\n".replace("24", "120")).rows[0].warnings


def test_sound_of_a_window_that_no_encoder_takes_fails_by_name(tmp_path: Path) -> None:
    put(tmp_path / "clips", fps=60, audio=ClipAudio(samples=beep(0.15, 0.1)))
    (clip,) = planned(tmp_path, VIDEOS.replace("[9]", "[1]")).clips
    with pytest.raises(UserError, match=r"good\.mp4: clips of 16\.7 ms; the sound of less than 32 ms cannot be encoded"):
        decode_audio(clip)


def test_a_gap_of_hours_in_a_sound_file_is_no_silence(tmp_path: Path) -> None:
    path = tmp_path / "gap.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=48000, layout="stereo")
        for place in (0, 1024, 20 * 3600 * 48000):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), dtype=np.int16), format="s16", layout="stereo")
            frame.sample_rate, frame.time_base, frame.pts = 48000, Fraction(1, 48000), place
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match=r"gap\.mkv: its sound stops for 72000 s"):
        probe_audio(path)


def test_sound_takes_the_memory_of_what_is_there(tmp_path: Path) -> None:
    path = put(tmp_path, audio=ClipAudio(samples=beep(0.3, 0.1)))
    info = probe_video(path)
    assert read_audio(path, info.audio, 0.0, 1e9).samples.shape[1] < 48000


def test_hidden_files_of_macos_are_no_sources(tmp_path: Path) -> None:
    put(tmp_path / "clips")
    (tmp_path / "clips" / "._good.mp4").write_bytes(b"\0\5\x16\7" + bytes(400))
    plan = planned(tmp_path)
    assert [row.source for row in plan.rows] == ["good.mp4"]
    assert not any("._good" in line for line in describe_warnings([plan]))


def test_what_is_not_used_is_listed_by_kind_and_captions_by_name(tmp_path: Path) -> None:
    put(tmp_path / "clips").with_suffix(".txt").write_text("a caption", encoding="utf-8")
    put(tmp_path / "clips", "bare.mp4")
    for name in (
        "caption_review.html",
        "caption_review.jsonl",
        "a.gif",
        "b.GIF",
        "song.mp3",
        "lonely.txt",
        "good.json",
        ".hidden",
        "Thumbs.db",
        "good_ltxv2.safetensors",
    ):
        (tmp_path / "clips" / name).write_bytes(b"x")
    (tmp_path / "clips" / "more").mkdir()
    (tmp_path / "clips" / "masks").mkdir()
    put(tmp_path / "clips" / "masks")
    put(tmp_path / "clips" / "masks", "bare.mp4")
    plan = planned(tmp_path, VIDEOS + 'mask_directory = "clips/masks"\n')
    assert describe_warnings([plan]) == [
        "datasets[0]: not used, .gif files: a.gif, b.GIF (2)",
        "datasets[0]: not used, .json files: good.json",
        "datasets[0]: not used, .mp3 files: song.mp3",
        "datasets[0]: not used, .txt files without a source: lonely.txt",
        "datasets[0]: not used, folders: more",
        "datasets[0]: no caption yet for 1 source(s), and training needs one for each: bare.mp4",
    ]


def test_rates_lengths_and_reasons_are_shown_within_a_hundred_columns(tmp_path: Path) -> None:
    put(tmp_path / "clips", frames=49, fps=30)
    put(tmp_path / "clips", "桜" * 30 + ".mp4", frames=5)
    text = describe_sources([planned(tmp_path)])
    assert "good.mp4" in text and "30   49      1.63     1      trimmed  9 of 49 frames" in text
    assert "failed" not in text and "kept" not in text, "columns without a single source"
    from musubi_tuner.runtime.tables import shown_width

    assert max(map(shown_width, text.split("\n"))) <= 100


def test_of_many_sources_those_with_a_reason_are_shown_and_the_rest_by_rate(tmp_path: Path) -> None:
    data = put(tmp_path / "clips", "00.mp4").read_bytes()
    for number in range(1, 45):
        (tmp_path / "clips" / f"{number:02d}.mp4").write_bytes(data)
    (tmp_path / "clips" / "44.mp4").write_bytes(b"no video")
    text = describe_sources([planned(tmp_path)])
    assert "44.mp4" in text and text.endswith("... and 5 more:\n  5 at 24 fps, 0.38 to 0.38 s")
