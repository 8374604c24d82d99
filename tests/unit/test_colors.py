"""Colors of real files: matrix, range and high dynamic range, read from sources and written into previews."""

import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from musubi_tuner.cache.index import read_index, write_index
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.encoding.plan import plan_datasets
from musubi_tuner.media.colors import sdr_of
from musubi_tuner.media.probe import probe_video
from musubi_tuner.media.video import read_frames
from musubi_tuner.media.write import write_video
from musubi_tuner.runtime.processes import Processes

COLOR = (200, 60, 30)
LUMA = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593)}
"""Weights of red and blue."""
UNTAGGED = {"colorspace": 2}


def yuv_of(color: tuple[float, ...], matrix: str, *, full: bool = False, depth: int = 8) -> list[int]:
    """Y'CbCr of R'G'B' from 0 to 255, by the definitions of BT.601, BT.709 and BT.2020."""
    kr, kb = LUMA[matrix]
    red, green, blue = (value / 255 for value in color)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = [(blue - luma) / (2 * (1 - kb)), (red - luma) / (2 * (1 - kr))]
    scale = 2 ** (depth - 8)
    if full:
        return [round(value * (2**depth - 1) + offset * scale) for value, offset in zip((luma, *chroma), (0, 128, 128), strict=True)]
    return [round((16 + 219 * luma) * scale), *(round((128 + 224 * value) * scale) for value in chroma)]


def write_flat(path: Path, values: list[int], size: tuple[int, int], tags: dict[str, int], *, deep: bool = False) -> None:
    """Nine frames of one color, given as Y'CbCr, with the tags that are given and no others."""
    form, item = ("yuv420p10le", 2) if deep else ("yuv420p", 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = *size, form
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for number in range(9):
            frame = av.VideoFrame(*size, form)
            for plane, value in zip(frame.planes, values, strict=True):
                plane.update(value.to_bytes(item, "little") * (plane.buffer_size // item))
            for name in ("colorspace", "color_range"):
                if name in tags:
                    setattr(frame, name, tags[name])
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def color_of(path: Path) -> list[int]:
    info = probe_video(path)
    return read_frames(info, (4,), info.width, info.height)[0, 20, 20].tolist()


def near(color: list[int], expected: tuple[int, ...], most: int = 3) -> bool:
    return max(abs(one - other) for one, other in zip(color, expected, strict=True)) <= most


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize(("matrix", "tag"), [("601", 5), ("601", 6), ("709", 1), ("2020", 9)])
def test_tagged_matrix_and_range_are_honored(tmp_path: Path, matrix: str, tag: int, full: bool) -> None:
    path = tmp_path / "a.mp4"
    for size in ((96, 64), (1280, 64)):
        write_flat(path, yuv_of(COLOR, matrix, full=full), size, {"colorspace": tag, "color_range": 2 if full else 1})
        assert near(color_of(path), COLOR) and not probe_video(path).colors.rule


@pytest.mark.parametrize(("size", "matrix"), [((720, 576), "601"), ((96, 64), "601"), ((1280, 544), "709"), ((64, 720), "709")])
def test_untagged_frames_are_bt601_or_bt709_by_their_size(tmp_path: Path, size: tuple[int, int], matrix: str) -> None:
    write_flat(tmp_path / "a.mp4", yuv_of(COLOR, matrix), size, UNTAGGED)
    assert near(color_of(tmp_path / "a.mp4"), COLOR)
    assert bool(probe_video(tmp_path / "a.mp4").colors.rule) == (matrix == "709")


def test_previews_are_bt709_and_say_so(tmp_path: Path) -> None:
    frames = torch.tensor(COLOR, dtype=torch.uint8).expand(9, 64, 96, 3).contiguous()
    write_video(tmp_path / "preview.mp4", frames, 24.0)
    with av.open(str(tmp_path / "preview.mp4")) as container:
        frame = next(container.decode(video=0))
        tags = (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range)
        assert tuple(map(int, tags)) == (1, 1, 1, 1)
        planes = [plane for plane in (frame.to_ndarray()[:64], frame.to_ndarray()[64:80], frame.to_ndarray()[80:])]
    assert near([round(float(plane.mean())) for plane in planes], tuple(yuv_of(COLOR, "709")), 2)
    assert near(color_of(tmp_path / "preview.mp4"), COLOR)


def hdr_signal(color: tuple[float, ...], transfer: str, white: float = 203.0) -> list[float]:
    """R'G'B' from 0 to 255 in BT.2020 of a color that a display with gamma 2.4 and this white shows as BT.709 `color`, by BT.2100."""
    red, green, blue = (white * (value / 255) ** 2.4 for value in color)
    light = (
        0.6274 * red + 0.3293 * green + 0.0433 * blue,
        0.0691 * red + 0.9195 * green + 0.0114 * blue,
        0.0164 * red + 0.0880 * green + 0.8956 * blue,
    )
    if transfer == "PQ":
        powers = [(value / 10000) ** 0.1593017578125 for value in light]
        return [255 * ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375 for power in powers]
    luminance = 0.2627 * light[0] + 0.6780 * light[1] + 0.0593 * light[2]
    scene = [value / 1000 * (luminance / 1000) ** (1 / 1.2 - 1) for value in light]
    return [255 * (math.sqrt(3 * e) if e <= 1 / 12 else 0.17883277 * math.log(12 * e - 0.28466892) + 0.55991073) for e in scene]


@pytest.mark.parametrize(("transfer", "tag"), [("HLG", 18), ("PQ", 16)])
@pytest.mark.parametrize("matrix_tag", [9, 2], ids=["tagged matrix", "untagged matrix"])
def test_colors_below_the_knee_of_the_tone_curve_come_back(tmp_path: Path, transfer: str, tag: int, matrix_tag: int) -> None:
    color, path = (150, 60, 40), tmp_path / "hdr.mp4"
    values = yuv_of(tuple(hdr_signal(color, transfer)), "2020", depth=10)
    write_flat(path, values, (96, 64), {"colorspace": matrix_tag, "color_primaries": 9, "color_trc": tag, "color_range": 1}, deep=True)
    assert near(color_of(path), color)
    assert probe_video(path).colors.hdr == transfer


@pytest.mark.parametrize("transfer", ["HLG", "PQ"])
def test_tone_mapping_has_the_known_values(transfer: str) -> None:
    def gray(light: float) -> int:
        signal = hdr_signal((255.0,) * 3, transfer, light)
        return int(sdr_of(torch.tensor([round(value / 255 * 65535) for value in signal]), transfer)[0])

    assert not sdr_of(torch.zeros(3, dtype=torch.int32), transfer).any() and gray(1000.0) == 255
    assert abs(gray(26.0) - round(255 * (26 / 203) ** (1 / 2.4))) <= 1, "middle gray stays as it is"
    assert 225 <= gray(203.0) <= 236, "diffuse white stays nearly white, and leaves room for highlights"
    levels = [gray(light) for light in (50.0, 100.0, 150.0, 203.0, 400.0, 1000.0)]
    assert levels == sorted(set(levels))


def test_transparent_videos_are_reported(tmp_path: Path) -> None:
    for name, seen in (("opaque", 255), ("see-through", 0)):
        picture = np.full((64, 96, 4), 255, dtype=np.uint8)
        picture[:, 48:] = (*COLOR, seen)
        with av.open(str(tmp_path / f"{name}.mov"), "w") as container:
            stream = container.add_stream("png", rate=24)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "rgba"
            for number in range(9):
                frame = av.VideoFrame.from_ndarray(picture, format="rgba")
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    toml = tmp_path / "dataset.toml"
    toml.write_text('[[datasets]]\nvideo_directory = "."\nresolution = [96, 64]\ntarget_frames = [9]\n', encoding="utf-8")
    (plan,) = plan_datasets(load_dataset_config(toml), Processes(index=0, count=1), workers=1)
    opaque, transparent = (row.note for row in plan.rows)
    assert not opaque and transparent.startswith("transparent: the colors beneath")
    assert [clip.clip.colors for clip in plan.clips] == ["", ""], "pictures as ever: their caches stay valid"


def test_hdr_is_reported_and_the_rule_is_part_of_the_caches_identity(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    values = yuv_of(tuple(hdr_signal((150, 60, 40), "HLG")), "2020", depth=10)
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": 18, "color_range": 1}
    write_flat(tmp_path / "clips" / "hdr.mp4", values, (96, 64), tags, deep=True)
    write_flat(tmp_path / "clips" / "sdr.mp4", yuv_of(COLOR, "601"), (96, 64), UNTAGGED)
    toml = tmp_path / "dataset.toml"
    toml.write_text('[[datasets]]\nvideo_directory = "clips"\nresolution = [96, 64]\ntarget_frames = [9]\n', encoding="utf-8")
    (plan,) = plan_datasets(load_dataset_config(toml), Processes(index=0, count=1), workers=1)
    assert [row.note for row in plan.rows] == ["HDR (HLG), tone-mapped", ""]
    hdr, sdr = (planned.clip for planned in plan.clips)
    assert "HLG" in hdr.colors and sdr.colors == ""
    latents, audio = KINDS["latents"], KINDS["audio"]
    assert latents.expected(hdr)["colors"] == hdr.colors and "colors" not in {**latents.expected(sdr), **audio.expected(hdr)}
    path = write_index(plan.spec, plan.index)
    assert read_index(plan.spec, toml).clips == (hdr, sdr) and path.read_text("utf-8").count('"colors"') == 1
