"""Frames of real files: numbers, rates, orientation."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.encoding.windows import video_windows
from musubi_tuner.generation.encode import still_crf
from musubi_tuner.media.picture import as_video_frame, cover_and_crop, picture_size, read_picture
from musubi_tuner.media.probe import probe_video
from musubi_tuner.media.video import choose_frames, read_frames, sampled_length
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import number_of, numbered_frames, write_clip


def numbers(path: Path, fps: float | None = None, start: int = 0, count: int | None = None) -> list[int]:
    info = probe_video(path)
    fps = fps or info.fps
    places = choose_frames(info, fps, start, count or sampled_length(info, fps) - start)
    return [number_of(picture) for picture in read_frames(info, places, 64, 32)]


@pytest.mark.parametrize("fps", [16, 24, 30, 60, 24000 / 1001, 25])
@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".mov", ".avi"])
def test_the_true_rate_is_found_and_frames_are_exact(tmp_path: Path, fps: float, ending: str) -> None:
    path = tmp_path / f"clip é{ending}"
    write_clip(path, numbered_frames(50), fps=fps)
    info = probe_video(path)
    assert info.fps == pytest.approx(fps, rel=1e-9) and not info.is_variable
    assert sampled_length(info, info.fps) == 50
    assert numbers(path, start=27, count=17) == list(range(27, 44))


@pytest.mark.parametrize("fps", [16, 24, 30, 60])
@pytest.mark.parametrize(
    "values",
    [
        {"frame_extraction": "head"},
        {"frame_extraction": "chunk"},
        {"frame_extraction": "slide", "frame_stride": 11},
        {"frame_extraction": "uniform", "frame_sample": 3},
    ],
    ids=lambda values: values["frame_extraction"],
)
def test_every_extraction_mode_picks_the_planned_frames(tmp_path: Path, fps: int, values: dict) -> None:
    path = tmp_path / "clip.mp4"
    write_clip(path, numbered_frames(60), fps=fps)
    spec = DatasetSpec(
        label="d", kind="video", directory=tmp_path, jsonl_file=None, cache_directory=tmp_path, target_frames=(17,), **values
    )
    info = probe_video(path)
    windows = video_windows(spec, sampled_length(info, info.fps), info.fps)
    assert windows
    for window in windows:
        assert numbers(path, start=window.start, count=window.count) == list(range(window.start, window.start + window.count))


@pytest.mark.parametrize(("source", "target"), [(60, 24), (30, 24), (24, 12), (16, 24), (30, 16)])
def test_a_target_rate_takes_the_frame_on_screen_at_each_time(tmp_path: Path, source: int, target: int) -> None:
    path = tmp_path / "clip.mp4"
    write_clip(path, numbered_frames(60), fps=source)
    length = sampled_length(probe_video(path), target)
    assert length == 60 * target // source
    assert numbers(path, target) == [i * source // target for i in range(length)]


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_variable_rates_are_sampled_by_time(tmp_path: Path, ending: str) -> None:
    steps = torch.tensor([1, 1, 3, 1, 2, 1, 1, 4, 1, 1, 2, 1, 1, 1, 3, 1, 1, 1, 1, 2]) / 24
    times = torch.cat([torch.zeros(1), steps.cumsum(0)]).tolist()
    path = tmp_path / f"variable{ending}"
    write_clip(path, numbered_frames(len(times)), times=times)
    info = probe_video(path)
    assert info.is_variable
    assert info.fps == pytest.approx((len(times) - 1) / times[-1], rel=1e-3)
    expected = [max(i for i, time in enumerate(times) if time <= step / 24 + 1e-3) for step in range(round(times[-1] * 24) + 1)]
    assert numbers(path, 24.0, count=len(expected)) == expected


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_metadata_is_applied(tmp_path: Path, rotation: int) -> None:
    picture = torch.zeros(64, 96, 3, dtype=torch.uint8)
    picture[:32, :48] = 255  # bright at the upper left as stored
    path = tmp_path / "turned.mp4"
    write_clip(path, picture.expand(9, -1, -1, -1), rotation=rotation)
    info = probe_video(path)
    assert (info.width, info.height) == ((96, 64) if rotation == 180 else (64, 96))
    shown = read_frames(info, (0,), info.width, info.height)[0].float().mean(dim=2)
    upright = torch.rot90(picture, rotation // 90).float().mean(dim=2)
    assert (shown - upright).abs().mean() < 8


def test_a_phones_portrait_matrix_turns_clockwise(tmp_path: Path) -> None:
    path = tmp_path / "phone.mp4"
    write_clip(path, numbered_frames(9), rotation=-90)
    data = path.read_bytes()
    header = data.index(b"tkhd")
    matrix = np.frombuffer(data[header + 4 + 40 : header + 4 + 76], dtype=">i4")
    assert matrix.tolist()[:5] == [0, 65536, 0, -65536, 0]  # what phones write for clips held upright
    assert probe_video(path).rotation == 270


def test_pixels_that_are_not_square_are_shown_in_their_shape(tmp_path: Path) -> None:
    path = tmp_path / "wide.mp4"
    write_clip(path, numbered_frames(9, 96, 64), pixel_aspect=Fraction(4, 3))
    info = probe_video(path)
    assert (info.width, info.height) == (128, 64)
    assert [number_of(picture) for picture in read_frames(info, (3, 5), 128, 64)] == [3, 5]


def test_odd_sizes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "odd.mkv"
    write_clip(path, numbered_frames(9, 99, 65), pixel_format="yuv444p")
    assert probe_video(path).width == 99
    assert numbers(path) == list(range(9))


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100])
def test_files_that_are_no_video_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.mp4.*damaged"):
        probe_video(path)


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_truncated_files_fail_and_never_give_fewer_frames(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"clip{ending}"
    write_clip(path, numbered_frames(60, 320, 192), fps=24)
    before = probe_video(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"clip.*damaged"):
        read_frames(before, range(60), 64, 32)


def test_pictures_are_upright_flat_and_eight_bit(tmp_path: Path) -> None:
    levels = np.zeros((40, 60, 3), dtype=np.uint8)
    levels[:20] = (200, 100, 50)
    turned = Image.fromarray(levels)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert picture_size(tmp_path / "turned.png") == (40, 60)
    assert tuple(read_picture(tmp_path / "turned.png").shape) == (60, 40, 3)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png").unique().tolist() == [255]
    Image.fromarray(np.full((8, 8), 32896, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png").unique().tolist() == [128]


def test_animations_and_broken_pictures_are_refused(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 255)]
    pictures[0].save(tmp_path / "moving.webp", save_all=True, append_images=pictures[1:])
    with pytest.raises(UserError, match=r"moving\.webp: an animation of 2 frames"):
        picture_size(tmp_path / "moving.webp")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut\.png: cannot be read"):
        read_picture(tmp_path / "cut.png")


def test_of_a_cameras_several_pictures_the_first_is_read(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (96, 64), (200, 0, 0)), Image.new("RGB", (48, 32), (0, 0, 200))
    first.save(tmp_path / "mpo.jpg", format="MPO", save_all=True, append_images=[second])
    assert picture_size(tmp_path / "mpo.jpg") == (96, 64)
    assert read_picture(tmp_path / "mpo.jpg").float().mean(dim=(0, 1))[0] > 190


def test_stills_pass_through_h264_as_the_official_pipelines_do_it() -> None:
    """By a real mp4 of one frame, and by the model's version."""
    picture = torch.rand(9, 13, 3, generator=torch.Generator().manual_seed(0)).repeat_interleave(7, 0).repeat_interleave(7, 1)
    picture = (picture * 255).to(torch.uint8)
    for crf in (33, 18):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=1, options={"crf": str(crf), "preset": "veryfast"})
            stream.width, stream.height = 90, 62
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture[:62, :90].contiguous().numpy(), format="rgb24")))
            container.mux(stream.encode(None))
        buffer.seek(0)
        with av.open(buffer) as container:
            expected = next(container.decode(video=0)).to_ndarray(format="rgb24")
        assert np.array_equal(as_video_frame(picture, crf).numpy(), expected)
        assert not np.array_equal(expected, picture[:62, :90].numpy())
    assert [still_crf(version) for version in ("2.0", "2.3", "2.4", "2.5")] == [33, 33, 18, 18]
    with pytest.raises(ValueError, match="1x40 pixels"):
        as_video_frame(torch.zeros(40, 1, 3, dtype=torch.uint8), 33)


@pytest.mark.parametrize(("size", "target"), [((100, 60), (64, 64)), ((31, 200), (96, 64)), ((640, 480), (96, 64)), ((64, 64), (64, 64))])
def test_cover_and_crop_keeps_shape_and_center(size: tuple[int, int], target: tuple[int, int]) -> None:
    width, height = size
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ramp = torch.stack([columns * 255 / width, rows * 255 / height, torch.zeros(height, width)], dim=-1).to(torch.uint8)
    fitted = cover_and_crop(ramp, *target).float()
    assert tuple(fitted.shape) == (target[1], target[0], 3)
    assert (fitted.mean(dim=(0, 1))[:2] - 127).abs().max() < 6
