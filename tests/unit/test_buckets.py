"""Sizes of pictures."""

import random
from pathlib import Path

import pytest

from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.encoding.windows import bucket_for


def spec(resolution: tuple[int, int] = (768, 512), **values) -> DatasetSpec:
    folder = Path("x")
    return DatasetSpec(label="d", kind="image", directory=folder, jsonl_file=None, cache_directory=folder, resolution=resolution, **values)


@pytest.mark.parametrize("resolution", [(768, 512), (832, 480), (1024, 1024), (512, 768), (96, 64), (1280, 704)])
def test_the_resolutions_own_shape_gets_the_resolution(resolution: tuple[int, int]) -> None:
    assert bucket_for(spec(resolution), resolution[0] * 2, resolution[1] * 2) == resolution


def test_random_sizes_get_multiples_of_32_of_about_the_area() -> None:
    draw = random.Random(0)
    for _ in range(500):
        width, height = draw.randint(200, 4000), draw.randint(200, 4000)
        bucket = bucket_for(spec(), width, height)
        assert bucket[0] % 32 == bucket[1] % 32 == 0
        assert bucket[0] * bucket[1] <= 768 * 512
        if 0.5 < width / height < 2:
            assert bucket[0] * bucket[1] > 0.85 * 768 * 512
            assert 0.85 < bucket[0] / bucket[1] / (width / height) < 1.18


def test_portrait_clips_get_portrait_buckets() -> None:
    width, height = bucket_for(spec(), 1080, 1920)
    assert height > width


def test_without_buckets_the_resolution_is_taken_as_it_is() -> None:
    assert bucket_for(spec(enable_bucket=False), 1080, 1920) == (768, 512)


def test_no_upscale_keeps_small_pictures_small() -> None:
    small = spec(bucket_no_upscale=True)
    assert bucket_for(small, 300, 200) == (288, 192)
    assert bucket_for(small, 3000, 2000) == (768, 512)
    assert bucket_for(small, 31, 200) is None
