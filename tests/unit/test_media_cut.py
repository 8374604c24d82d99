"""Parts of videos: the same frames at the same times, with the sound of the same seconds, as the decoder tells."""

from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch

from musubi_tuner.media.audio import read_audio
from musubi_tuner.media.colors import Colors
from musubi_tuner.media.cut import Rectangle, copy_part, encode_part, key_frames, seconds_at
from musubi_tuner.media.probe import VideoInfo, probe_video
from musubi_tuner.media.video import frames_between, place_at, read_frames
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import ClipAudio, beep, number_of, numbered_frames, write_clip

FRAMES = 60
UNEVEN = tuple(i / 24 + (i % 3) * 0.01 for i in range(FRAMES))


def numbers(info: VideoInfo) -> list[int]:
    return [number_of(picture) for picture in read_frames(info, range(len(info.stamps)), 96, 64)]


def pictures(info: VideoInfo, places: range) -> torch.Tensor:
    return read_frames(info, places, info.width, info.height).float()


def beep_at(info: VideoInfo) -> float:
    """Seconds after the first frame at which the sound of a clip becomes loud."""
    assert info.audio is not None
    heard = read_audio(info.path, info.audio, info.start, info.audio.end)
    loud = (heard.samples.abs().amax(0) > 0.2).nonzero()
    return float(loud[0]) / heard.rate


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".mov", ".avi"])
@pytest.mark.parametrize("fps", [24, 24000 / 1001, 30])
def test_a_part_has_exactly_its_frames_and_its_seconds_of_sound(tmp_path: Path, ending: str, fps: float) -> None:
    source = tmp_path / f"film é 1{ending}"
    write_clip(source, numbered_frames(FRAMES), fps=fps, audio=ClipAudio(samples=beep(FRAMES / fps, 30 / fps)))
    info = probe_video(source)
    assert encode_part(info, 20, 41, tmp_path / "part.mp4")
    part = probe_video(tmp_path / "part.mp4")
    assert numbers(part) == list(range(20, 41))
    assert part.fps == pytest.approx(fps, rel=1e-9) and not part.is_variable and part.start == 0
    assert part.audio is not None and abs(part.audio.end - 21 / fps) < 1024 / 48000 + 1e-3, "as long as its pictures, to a packet"
    assert beep_at(part) == pytest.approx(beep_at(info) - 20 / fps, abs=0.003)
    assert beep_at(part) == pytest.approx(10 / fps, abs=0.03), "in step with frame 30"


def test_a_variable_rate_stays_as_it_is(tmp_path: Path) -> None:
    write_clip(tmp_path / "vfr.mkv", numbered_frames(FRAMES), times=UNEVEN, audio=ClipAudio(samples=beep(2.5, UNEVEN[30])))
    info = probe_video(tmp_path / "vfr.mkv")
    encode_part(info, 13, 50, tmp_path / "part.mp4")
    part = probe_video(tmp_path / "part.mp4")
    assert info.is_variable and part.is_variable and numbers(part) == list(range(13, 50))
    assert part.times == pytest.approx([time - info.times[13] for time in info.times[13:50]], abs=1e-3)
    assert beep_at(part) == pytest.approx(part.times[17], abs=0.003)


@pytest.mark.parametrize(("dropped", "constant"), [(range(8, 20), False), (range(1, 30, 2), True)])
def test_where_frames_of_avi_were_dropped_the_one_before_stands_still(tmp_path: Path, dropped: range, constant: bool) -> None:
    source, frames = tmp_path / "capture.avi", numbered_frames(30)
    kept = [number for number in range(30) if number not in dropped]
    with av.open(str(source), "w") as container:
        video = container.add_stream("mjpeg", rate=24)
        video.width, video.height, video.pix_fmt = 96, 64, "yuvj420p"
        for number in kept:
            frame = av.VideoFrame.from_ndarray(frames[number].numpy(), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 24)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    info = probe_video(source)
    assert info.times == pytest.approx([number / 24 for number in kept]) and numbers(info) == kept
    assert info.is_variable != constant and bool(info.rule) != constant, "cached with pictures too early: made again"
    encode_part(info, 4, 12, tmp_path / "part.mp4")
    part = probe_video(tmp_path / "part.mp4")
    assert part.times == pytest.approx([(number - kept[4]) / 24 for number in kept[4:12]], abs=1e-3) and numbers(part) == kept[4:12]


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("pixel_aspect", [None, Fraction(4, 3)])
def test_pictures_are_upright_and_of_square_pixels(tmp_path: Path, rotation: int, pixel_aspect: Fraction | None) -> None:
    write_clip(tmp_path / "a.mp4", numbered_frames(20), rotation=rotation, pixel_aspect=pixel_aspect)
    info = probe_video(tmp_path / "a.mp4")
    encode_part(info, 3, 12, tmp_path / "part.mp4")
    part = probe_video(tmp_path / "part.mp4")
    assert (part.width, part.height, part.rotation) == (info.width, info.height, 0)
    assert float((pictures(part, range(9)) - pictures(info, range(3, 12))).abs().mean()) < 3


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv444p10le"])
def test_the_pixel_format_is_kept(tmp_path: Path, pixel_format: str) -> None:
    write_clip(tmp_path / "a.mkv", numbered_frames(12), pixel_format=pixel_format)
    encode_part(probe_video(tmp_path / "a.mkv"), 2, 9, tmp_path / "part.mp4")
    with av.open(str(tmp_path / "part.mp4")) as container:
        assert container.streams.video[0].codec_context.pix_fmt == pixel_format


def test_odd_sizes_and_rgb_are_taken(tmp_path: Path) -> None:
    write_clip(tmp_path / "odd.mkv", numbered_frames(12, 95, 63), pixel_format="yuv444p")
    odd = probe_video(tmp_path / "odd.mkv")
    encode_part(odd, 2, 9, tmp_path / "part.mp4")
    assert (part := probe_video(tmp_path / "part.mp4")).width == 95 and part.height == 63
    with av.open(str(tmp_path / "rgb.mkv"), mode="w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "bgr0"
        for picture in numbered_frames(12) // 2 + torch.tensor([0, 60, 20], dtype=torch.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        container.mux(stream.encode(None))
    rgb = probe_video(tmp_path / "rgb.mkv")
    encode_part(rgb, 2, 9, tmp_path / "rgb.mp4")
    part = probe_video(tmp_path / "rgb.mp4")
    difference = (pictures(part, range(7)) - pictures(rgb, range(2, 9))).abs()
    assert float(difference.mean()) < 3, "the colors are those of the source"


def test_a_crop_of_untagged_hd_keeps_its_colors(tmp_path: Path) -> None:
    """Frames of 1280 columns without a tag are BT.709; those of the crop would be BT.601, were they not tagged."""
    frames = torch.zeros(6, 128, 1280, 3, dtype=torch.uint8)
    frames[..., 0], frames[..., 1] = 200, 40
    write_clip(tmp_path / "wide.mp4", frames)
    info = probe_video(tmp_path / "wide.mp4")
    assert info.colors == Colors(matrix="ITU709")
    encode_part(info, 0, 6, tmp_path / "part.mp4", Rectangle(left=100, top=20, width=320, height=64))
    part = probe_video(tmp_path / "part.mp4")
    assert (part.width, part.height, part.colors) == (320, 64, Colors())
    before = pictures(info, range(6))[:, 20:84, 100:420].mean(dim=(0, 1, 2))
    assert torch.allclose(pictures(part, range(6)).mean(dim=(0, 1, 2)), before, atol=2)


def test_sound_that_ends_or_begins_elsewhere_stays_in_step(tmp_path: Path) -> None:
    write_clip(tmp_path / "late.mkv", numbered_frames(FRAMES), audio=ClipAudio(samples=beep(1.0, 0.5), start=0.5))
    info = probe_video(tmp_path / "late.mkv")
    encode_part(info, 0, 30, tmp_path / "part.mp4")
    assert beep_at(probe_video(tmp_path / "part.mp4")) == pytest.approx(1.0, abs=0.003)
    assert not encode_part(info, 48, 60, tmp_path / "behind.mp4"), "its sound has ended"
    assert probe_video(tmp_path / "behind.mp4").audio is None
    write_clip(tmp_path / "odd rate.mkv", numbered_frames(24), audio=ClipAudio(samples=beep(1.0, 0.5, rate=37000), rate=37000))
    encode_part(probe_video(tmp_path / "odd rate.mkv"), 6, 24, tmp_path / "odd.mp4")
    assert beep_at(probe_video(tmp_path / "odd.mp4")) == pytest.approx(0.25, abs=0.003)


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".mov"])
def test_copied_packets_are_the_sources(tmp_path: Path, ending: str) -> None:
    source = tmp_path / f"a{ending}"
    write_clip(source, numbered_frames(FRAMES), audio=ClipAudio(samples=beep(2.5, 25 / 24)))
    info = probe_video(source)
    keys = key_frames(info)
    assert keys[0] == 0 and len(keys) >= 4
    first, end = keys[1], keys[-2]
    taken = copy_part(info, first, end, tmp_path / f"part{ending}")
    part = probe_video(tmp_path / f"part{ending}")
    assert (taken.first, taken.end) == (first, end) and numbers(part) == list(range(first, end))
    assert torch.equal(pictures(part, range(end - first)), pictures(info, range(first, end))), "to the bit"
    assert part.audio is not None
    assert beep_at(part) == pytest.approx((25 - first) / 24, abs=1024 / 48000), "to a packet"
    assert abs(part.audio.end - part.start - (seconds_at(info, end) - seconds_at(info, first))) <= 2 * 1024 / 48000


def test_a_film_whose_clock_begins_later_is_cut_alike(tmp_path: Path) -> None:
    """Both streams begin at 1 s of the container's clock, as after a cut by other tools."""
    times = [1 + time for time in UNEVEN]
    write_clip(tmp_path / "late.mkv", numbered_frames(FRAMES), times=times, audio=ClipAudio(samples=beep(2.5, UNEVEN[30]), start=1.0))
    info = probe_video(tmp_path / "late.mkv")
    assert info.start == pytest.approx(1.0, abs=2e-3)
    encode_part(info, 13, 50, tmp_path / "part.mp4")
    part = probe_video(tmp_path / "part.mp4")
    assert numbers(part) == list(range(13, 50)) and beep_at(part) == pytest.approx(UNEVEN[30] - UNEVEN[13], abs=0.004)
    key = next(place for place in key_frames(info) if place)
    copy_part(info, key, FRAMES, tmp_path / "copy.mkv")
    assert beep_at(probe_video(tmp_path / "copy.mkv")) == pytest.approx(UNEVEN[30] - UNEVEN[key], abs=1024 / 48000)


def test_sound_in_several_parts_is_the_sound_in_one(tmp_path: Path) -> None:
    """Of a clip that is longer than what is decoded at once, with a gap in its sound."""
    chirp = torch.sin(torch.arange(48000 * 26) ** 1.5 / 9e4).expand(2, -1) * 0.4
    write_clip(tmp_path / "long.mkv", numbered_frames(24 * 26), audio=ClipAudio(samples=chirp))
    info = probe_video(tmp_path / "long.mkv")
    assert encode_part(info, 12, 24 * 25, tmp_path / "part.mp4")
    part = probe_video(tmp_path / "part.mp4")
    assert part.audio is not None and part.audio.end == pytest.approx(24.5, abs=1024 / 48000)
    heard = read_audio(part.path, part.audio, 0, 24.5).samples
    difference = (heard - chirp[:, 24000 : 24000 + heard.shape[1]]).abs()
    assert float(difference[:, 5000:-5000].mean()) < 0.01, "no sample is shifted or lost"
    around = [difference[:, 48000 * second - 2000 : 48000 * second + 2000].mean() for second in (10, 20)]
    assert max(map(float, around)) < 0.02


def test_nothing_is_copied_without_time_stamps(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.avi", numbered_frames(20))
    with pytest.raises(UserError, match="keeps no time stamps"):
        key_frames(probe_video(tmp_path / "a.avi"))


def test_a_damaged_frame_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mkv", numbered_frames(FRAMES))
    info = probe_video(tmp_path / "a.mkv")
    with av.open(str(info.path)) as container:
        packets = [(packet.pos, packet.size, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    place, size, _ = next(packet for packet in packets[20:] if packet[2])
    data = bytearray(info.path.read_bytes())
    data[place : place + size] = bytes(size)
    info.path.write_bytes(data)
    holes: list[int] = []
    seen = [place for place, _ in frames_between(info, 0, FRAMES, holes)]
    assert holes and sorted([*seen, *holes]) == list(range(FRAMES))
    with pytest.raises(UserError, match=rf"frame {holes[0]} of 60 does not decode"):
        encode_part(info, holes[0] - 5, holes[0] + 5, tmp_path / "part.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]
    encode_part(info, 0, 10, tmp_path / "part.mp4")
    assert numbers(probe_video(tmp_path / "part.mp4")) == list(range(10)), "what is whole can be had"


def test_times_name_frames(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", numbered_frames(24), fps=24)
    info = probe_video(tmp_path / "a.mp4")
    assert [place_at(info, time) for time in (0, 0.04, 0.5, 0.51, 1.0, 9.0)] == [0, 1, 12, 13, 24, 24]
    assert seconds_at(info, 24) == pytest.approx(1.0)
