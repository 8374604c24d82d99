"""Which stretches of a clip become windows."""

from pathlib import Path

import pytest

from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.encoding.windows import Window, audio_windows, round_down, video_windows


def spec(**values) -> DatasetSpec:
    folder = Path("clips")
    return DatasetSpec(label="datasets[0]", kind="video", directory=folder, jsonl_file=None, cache_directory=folder, **values)


def pairs(windows: tuple[Window, ...]) -> list[tuple[int, int]]:
    return [(window.start, window.count) for window in windows]


@pytest.mark.parametrize(
    ("values", "total", "expected"),
    [
        ({"target_frames": (25,)}, 60, [(0, 25)]),
        ({"target_frames": (9, 25)}, 60, [(0, 9), (0, 25)]),
        ({"target_frames": (9, 25)}, 20, [(0, 9)]),
        ({"target_frames": (25,)}, 24, []),
        ({"target_frames": (25,), "frame_extraction": "chunk"}, 60, [(0, 25), (25, 25)]),
        ({"target_frames": (25,), "frame_extraction": "slide", "frame_stride": 10}, 49, [(0, 25), (10, 25), (20, 25)]),
        ({"target_frames": (25,), "frame_extraction": "uniform", "frame_sample": 3}, 65, [(0, 25), (20, 25), (40, 25)]),
        ({"target_frames": (25,), "frame_extraction": "uniform", "frame_sample": 3}, 25, [(0, 25)]),
        ({"frame_extraction": "full", "max_frames": 129}, 60, [(0, 57)]),
        ({"frame_extraction": "full", "max_frames": 40}, 60, [(0, 33)]),
        ({"frame_extraction": "full"}, 3, [(0, 1)]),
    ],
)
def test_windows(values: dict, total: int, expected: list[tuple[int, int]]) -> None:
    assert pairs(video_windows(spec(**values), total, 24.0)) == expected


@pytest.mark.parametrize(
    ("seconds", "fps", "total", "count"),
    [(2.0, 24.0, 200, 49), (2.0, 16.0, 200, 33), (2.0, 30.0, 200, 57), (2.0, 24.0, 48, 41), (2.0, 24.0, 47, None), (0.01, 24.0, 5, 1)],
)
def test_seconds_become_the_nearest_count(seconds: float, fps: float, total: int, count: int | None) -> None:
    expected = [] if count is None else [(0, count)]
    assert pairs(video_windows(spec(target_seconds=seconds), total, fps)) == expected


def test_every_window_lies_within_the_clip_and_is_8n_plus_1() -> None:
    for mode in ("head", "chunk", "slide", "uniform"):
        for total in range(1, 130, 7):
            for window in video_windows(spec(target_frames=(1, 9, 33), frame_extraction=mode, frame_sample=4, frame_stride=5), total, 24.0):
                assert window.start >= 0 and window.start + window.count <= total and window.count % 8 == 1


def test_sound_alone_is_cut_by_seconds() -> None:
    assert pairs(audio_windows(spec(target_seconds=2.0, frame_extraction="chunk"), 5.5)) == [(0, 50), (50, 50)]
    assert pairs(audio_windows(spec(), 5.5)) == [(0, 137)]
    assert audio_windows(spec(target_seconds=2.0), 1.9) == ()


def test_round_down() -> None:
    assert [round_down(n) for n in (1, 8, 9, 10, 48, 49)] == [1, 1, 9, 9, 41, 49]
