"""What people see of a clip on the page of a run: its middle frame, small, and the outline of its sound."""

import io

import torch
from torch import Tensor

from musubi_tuner.cache.looks import MOST_PEAKS, outline_bytes

_LONGEST_SIDE = 160
"""Of the picture, in pixels."""
_QUALITY = 80


def picture_of(frames: Tensor) -> bytes:
    """(F, H, W, 3) uint8 -> the middle frame as a JPEG file."""
    from PIL import Image

    picture = Image.fromarray(frames[len(frames) // 2].numpy())
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=_QUALITY)
    return held.getvalue()


def outline_of(samples: Tensor) -> bytes:
    """(2, n) samples of -1 to 1 -> the greatest of each of up to 100 equal parts, in percent, as a JSON list; nothing of no samples."""
    loudest = samples.abs().amax(0).clamp(max=1)
    parts = torch.tensor_split(loudest, min(MOST_PEAKS, max(1, len(loudest))))
    return outline_bytes([round(100 * float(part.max())) for part in parts if len(part)])
