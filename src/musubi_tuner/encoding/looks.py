"""What people see of a clip on the page of a run: its middle frame, small, and the outline of its sound."""

import torch
from torch import Tensor

from musubi_tuner.cache.looks import MOST_PEAKS, outline_bytes
from musubi_tuner.media.picture import small_jpeg

_LONGEST_SIDE = 160
"""Of the picture, in pixels."""
_QUALITY = 80


def picture_of(frames: Tensor) -> bytes:
    """(F, H, W, 3) uint8 -> the middle frame as a JPEG file."""
    return small_jpeg(frames[len(frames) // 2], longest=_LONGEST_SIDE, quality=_QUALITY)


def outline_of(samples: Tensor) -> bytes:
    """(2, n) samples of -1 to 1 -> the greatest of each of up to 100 equal parts, in percent, as a JSON list; nothing of no samples."""
    loudest = samples.abs().amax(0).clamp(max=1)
    parts = torch.tensor_split(loudest, min(MOST_PEAKS, max(1, len(loudest))))
    return outline_bytes([round(100 * float(part.max())) for part in parts if len(part)])
