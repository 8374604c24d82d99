"""Stills, and fitting pictures to a size."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from musubi_tuner.runtime.errors import UserError

_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)


def cover_and_crop(picture: Tensor, width: int, height: int, aspect: float | None = None) -> Tensor:
    """Resize (bicubic, antialiased) until the size is covered, then crop the center.

    Args:
        picture: (H, W, 3) uint8
        aspect: width / height as displayed, where pixels are not square.

    Returns:
        (height, width, 3) uint8
    """
    rows, columns, _ = picture.shape
    aspect = aspect or columns / rows
    shown_width = rows * aspect
    scale = max(width / shown_width, height / rows)
    new_width, new_height = max(width, round(shown_width * scale)), max(height, round(rows * scale))
    if (new_width, new_height) != (columns, rows):
        batch = picture.permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(batch, size=(new_height, new_width), mode="bicubic", antialias=True, align_corners=False)
        picture = resized[0].permute(1, 2, 0)
    top, left = (new_height - height) // 2, (new_width - width) // 2
    return picture[top : top + height, left : left + width].contiguous()


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of a still as displayed, from its header.

    Raises:
        UserError: no picture, or an animated one.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)  # of formats that can be animated alone
            if frames > 1:
                raise UserError(
                    f"{path}: an animation of {frames} frames. Save it as mp4 into a video dataset, or one frame of it as a still."
                )
            turned = image.getexif().get(_ORIENTATION, 1) in _TURNED
            return (image.height, image.width) if turned else image.size
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error}). Make it anew or take it out.") from error


def read_picture(path: Path) -> Tensor:
    """(H, W, 3) uint8, upright by its EXIF tag; transparency lies on white.

    Raises:
        UserError: damaged or truncated.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16") or image.mode == "I":
                levels = np.asarray(image, dtype=np.float64) / 257
                image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                ground = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(ground, image)
            return torch.from_numpy(np.array(image.convert("RGB")))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error}). Make it anew or take it out.") from error
