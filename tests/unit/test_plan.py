"""From sources to planned clips."""

import json
from pathlib import Path

import av
import pytest
from PIL import Image

from musubi_tuner.cache.index import index_bytes, read_index, write_index
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.encoding.makers import Encoder, sidecar_jobs
from musubi_tuner.encoding.pictures import decode_frames, decode_reference, frames_of
from musubi_tuner.encoding.plan import DatasetPlan, plan_datasets
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import Processes
from musubi_tuner.tiny.clips import ClipAudio, beep, number_of, numbered_frames, write_audio_files, write_clip, write_stills

ALONE = Processes(index=0, count=1)


def plan(folder: Path, text: str) -> tuple[DatasetPlan, ...]:
    path = folder / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    return plan_datasets(load_dataset_config(path), ALONE, workers=2)


def put(folder: Path, name: str, frames: int, fps: float = 24, sound: ClipAudio | None = None) -> None:
    folder.mkdir(exist_ok=True)
    write_clip(folder / name, numbered_frames(frames), fps=fps, audio=sound)


VIDEOS = '[[datasets]]\nvideo_directory = "clips"\nresolution = [96, 64]\n'


def test_windows_are_the_same_seconds_for_picture_and_sound(tmp_path: Path) -> None:
    put(tmp_path / "clips", "a.mp4", 40, 16, ClipAudio(samples=beep(2.5, 1.0)))
    (dataset,) = plan(tmp_path, VIDEOS + 'target_frames = [17]\nframe_extraction = "chunk"\n')
    first, second = (planned.clip for planned in dataset.clips)
    assert (first.start_seconds, first.end_seconds, first.fps) == (0.0, 17 / 16, 16.0)
    assert (second.start_seconds, second.end_seconds, second.start_frame) == (17 / 16, 34 / 16, 17)
    assert second.sidecars["latents"].file == "a_00017-017_0096x0064_ltxv2.safetensors"
    assert second.sidecars["audio"].file == "a_00017-017_0096x0064_ltxv2_audio.safetensors"
    assert second.sidecars["text"].file == "a_ltxv2_te.safetensors" and second.has_audio
    assert len({planned.clip.key for planned in dataset.clips}) == 2
    (row,) = dataset.rows
    assert (row.outcome, row.clips, row.note) == ("trimmed", 2, "34 of 40 frames")


def test_short_clips_are_dropped_with_the_reason(tmp_path: Path) -> None:
    put(tmp_path / "clips", "long.mp4", 25)
    put(tmp_path / "clips", "short.mp4", 24)
    (dataset,) = plan(tmp_path, VIDEOS + "target_frames = [25]\n")
    rows = {row.source: row for row in dataset.rows}
    assert rows["long.mp4"].outcome == "kept"
    assert rows["short.mp4"].outcome == "dropped"
    assert rows["short.mp4"].note == "24 frames at 24 fps; the shortest clip asked for has 25"
    assert dataset.index.dropped == (("short.mp4", rows["short.mp4"].note),)


def test_no_usable_clip_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    put(tmp_path / "clips", "short.mp4", 9)
    with pytest.raises(UserError, match=r"datasets\[0\].*none of the 1 sources.*short\.mp4: 9 frames.*target_frames"):
        plan(tmp_path, VIDEOS + "target_frames = [25]\n")


def test_longer_clips_are_asked_for_only_where_clips_are_too_short(tmp_path: Path) -> None:
    put(tmp_path / "clips", "a.mp4", 25)
    with pytest.raises(UserError, match=r"keyframes asks for frame 40, .* are 0 to 8; leave it out\)\.$"):
        plan(tmp_path, VIDEOS + "target_frames = [9]\nkeyframes = [40]\n")
    (tmp_path / "clips" / "a.mp4").write_bytes(b"no clip")
    with pytest.raises(UserError, match=r"replace or remove it\.\)\.$"):
        plan(tmp_path, VIDEOS + "target_frames = [9]\n")


def test_an_unreadable_source_fails_and_the_others_go_on(tmp_path: Path) -> None:
    put(tmp_path / "clips", "good.mp4", 9)
    (tmp_path / "clips" / "bad.mp4").write_bytes(b"\0" * 1000)
    (dataset,) = plan(tmp_path, VIDEOS + "target_frames = [9]\n")
    assert [planned.clip.stem for planned in dataset.clips] == ["good"]
    bad = next(row for row in dataset.rows if row.outcome == "failed")
    assert "bad.mp4" in bad.note and "damaged" in bad.note


def test_stills_sit_at_the_rate_of_most_clips(tmp_path: Path) -> None:
    for number, fps in enumerate((16, 24, 16)):
        put(tmp_path / "clips", f"{number}.mp4", 33, fps)
    write_stills(tmp_path / "stills", count=1)
    stills = '[[datasets]]\nimage_directory = "stills"\nresolution = [96, 64]\n'
    assert plan(tmp_path, VIDEOS + "target_frames = [9]\n" + stills)[1].clips[0].clip.fps == 16.0
    assert plan(tmp_path, VIDEOS + "target_frames = [9]\ntarget_fps = 12\n" + stills)[1].clips[0].clip.fps == 12.0
    (alone,) = plan(tmp_path, stills)
    clip = alone.clips[0].clip
    assert (clip.fps, clip.frames, clip.start_frame, "audio" in clip.sidecars) == (24.0, 1, 0, False)
    assert plan(tmp_path, stills + "target_fps = 30\n")[0].clips[0].clip.fps == 30.0


def test_sound_files_are_cut_by_seconds(tmp_path: Path) -> None:
    write_audio_files(tmp_path / "sounds", count=1, seconds=1.5)
    (dataset,) = plan(tmp_path, '[[datasets]]\naudio_directory = "sounds"\ntarget_seconds = 0.6\nframe_extraction = "chunk"\n')
    assert [planned.clip.sidecars["audio"].file for planned in dataset.clips] == [
        "sound_000_00000000-000600_ltxv2_audio.safetensors",
        "sound_000_00000600-000600_ltxv2_audio.safetensors",
    ]
    assert all("latents" not in planned.clip.sidecars for planned in dataset.clips)
    (whole,) = plan(tmp_path, '[[datasets]]\naudio_directory = "sounds"\n')
    assert whole.clips[0].clip.end_seconds == pytest.approx(1.48)


def test_a_source_rate_overrides_the_files(tmp_path: Path) -> None:
    put(tmp_path / "clips", "a.mp4", 25, 25)
    (dataset,) = plan(tmp_path, VIDEOS + "target_frames = [25]\nsource_fps = 50\n")
    assert (dataset.clips[0].clip.fps, dataset.clips[0].clip.end_seconds) == (50.0, 0.5)


def test_references_and_masks_move_along_with_a_source_rate(tmp_path: Path) -> None:
    put(tmp_path / "clips", "a.mp4", 52)
    put(tmp_path / "frame by frame", "a.mp4", 52)
    (tmp_path / "half").mkdir()
    write_clip(tmp_path / "half" / "a.mp4", numbered_frames(52)[::2], fps=12)
    folders = 'reference_directory = "frame by frame"\nmask_directory = "half"\n'
    (dataset,) = plan(tmp_path, VIDEOS + folders + 'target_frames = [25]\nframe_extraction = "chunk"\nsource_fps = 30\n')
    for planned in dataset.clips:
        own = [number_of(frame) for frame in decode_frames(planned)]
        assert own[0] == planned.clip.start_frame and [number_of(frame) for frame in decode_reference(planned)] == own
        mask = [number_of(frame) for frame in frames_of(planned.clip, planned.files["mask"])]
        assert mask == [number // 2 * 2 for number in own]
    assert len(dataset.clips) == 2 and "source_fps" in KINDS["reference"].expected(dataset.clips[0].clip)["window"]


def test_datasets_that_share_files_take_silence_alike(tmp_path: Path) -> None:
    put(tmp_path / "clips", "a.mp4", 25)
    dataset, encoder = (
        VIDEOS + "target_frames = [25]\n",
        Encoder(model_version="", metadata=lambda clip, kind: {}, load=lambda jobs, kind: list),
    )
    apart = plan(tmp_path, f"{dataset}{dataset}supervise_silence = true\n")
    assert len(sidecar_jobs(apart, KINDS["latents"], encoder)) == 1
    with pytest.raises(UserError, match=r"they differ \(supervise_silence: false and true\).*cache_directory of its own"):
        sidecar_jobs(apart, KINDS["audio"], encoder)
    alike = plan(tmp_path, f"{dataset}supervise_silence = true\n{dataset}supervise_silence = true\n")
    assert len(sidecar_jobs(alike, KINDS["audio"], encoder)) == 1


def test_files_say_the_rate_that_a_dataset_gives_the_source_and_only_then(tmp_path: Path) -> None:
    put(tmp_path / "clips", "a.mp4", 60)
    windows = []
    for rates in ("target_fps = 12\n", "source_fps = 12\n", "target_fps = 12\nsource_fps = 30\n"):
        (dataset,) = plan(tmp_path, VIDEOS + "target_frames = [17]\n" + rates)
        write_index(dataset.spec, dataset.index)
        assert read_index(dataset.spec, tmp_path / "dataset.toml") == dataset.index
        assert ("source_fps" in index_bytes(dataset.index).decode().partition('"settings"')[0]) == ("source_fps" in rates)
        windows.append(json.loads(KINDS["latents"].expected(dataset.clips[0].clip)["window"]))
    assert [window.pop("source_fps", None) for window in windows] == [None, 12, 30]
    assert windows[0] == windows[1] == windows[2]


def test_sound_that_ends_early_is_noted(tmp_path: Path) -> None:
    put(tmp_path / "clips", "a.mp4", 49, 24, ClipAudio(samples=beep(1.0, 0.5)))
    (dataset,) = plan(tmp_path, VIDEOS + "target_frames = [49]\n")
    assert "its sound ends 1.04 s early" in dataset.rows[0].note


def test_interlaced_video_is_noted(tmp_path: Path) -> None:
    put(tmp_path / "clips", "a.mp4", 9)
    with av.open(tmp_path / "clips" / "b.mp4", mode="w") as container:
        video = container.add_stream("libx264", rate=24, options={"flags": "+ildct+ilme", "x264-params": "tff=1"})
        video.height, video.width = 64, 96
        for picture in numbered_frames(9):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        container.mux(video.encode(None))
    (dataset,) = plan(tmp_path, VIDEOS + "target_frames = [9]\n")
    progressive, interlaced = dataset.rows
    assert progressive.note == "" and "interlaced: what moves is combed" in interlaced.note and len(dataset.clips) == 2


def test_pictures_too_small_for_no_upscale_are_dropped(tmp_path: Path) -> None:
    write_stills(tmp_path / "stills", count=1)
    Image.new("RGB", (20, 200)).save(tmp_path / "stills" / "sliver.png")
    (dataset,) = plan(tmp_path, '[[datasets]]\nimage_directory = "stills"\nresolution = [96, 64]\nbucket_no_upscale = true\n')
    row = next(row for row in dataset.rows if row.source == "sliver.png")
    assert row.outcome == "dropped" and "too small" in row.note
    assert dataset.without_caption == ("sliver.png",)


def test_no_upscale_without_buckets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stills").mkdir()
    with pytest.raises(UserError, match=r"datasets\[0\]: bucket_no_upscale = true and enable_bucket = false.*96x64.*Leave one"):
        plan(tmp_path, '[[datasets]]\nimage_directory = "stills"\nresolution = [96, 64]\nbucket_no_upscale = true\nenable_bucket = false\n')
