"""The size that a source's pictures get: about the dataset's area, at the aspect nearest to their own."""

import math
from functools import lru_cache

from musubi_tuner.config.dataset import DatasetSpec

STEP = 32


def bucket_for(spec: DatasetSpec, width: int, height: int) -> tuple[int, int] | None:
    """(width, height), multiples of 32 (times `reference_downscale`), for a picture of the given displayed size.

    None where `bucket_no_upscale` leaves a picture of less than that on a side no size.
    """
    if not spec.enable_bucket:
        return spec.resolution
    aspect = math.log(width / height)
    step = STEP * spec.reference_downscale
    target = min(
        _sizes(*spec.resolution, step), key=lambda size: (round(abs(math.log(size[0] / size[1]) - aspect), 9), -size[0] * size[1], size)
    )
    if spec.bucket_no_upscale and (target[0] > width or target[1] > height):
        target = (min(target[0], width // step * step), min(target[1], height // step * step))
    return target if min(target) >= step else None


@lru_cache
def _sizes(width: int, height: int, step: int) -> tuple[tuple[int, int], ...]:
    """For each width the largest height that stays within the area, and the other way round."""
    area = width * height
    longest = max(width, height, int(math.sqrt(area) * 2) // step * step)
    sizes = {(width, height)}
    for side in range(step, longest + 1, step):
        other = area // side // step * step
        if step <= other <= longest:
            sizes |= {(side, other), (other, side)}
    return tuple(sorted(sizes))
