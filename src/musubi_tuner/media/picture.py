"""Stills, and fitting pictures to a size."""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musubi_tuner.media.container import check_is_file
from musubi_tuner.runtime.errors import UserError

_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
_LARGEST_SIDE = 16384
"""That x264 takes."""
_SEVERAL_STILLS = "MPO"
"""Cameras' files of a picture with smaller or stereo ones behind it."""
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error)
"""What PIL's readers raise for damaged files."""


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


def small_jpeg(picture: Tensor, *, longest: int, quality: int) -> bytes:
    """A (H, W, 3) uint8 picture as a JPEG file whose longer side has `longest` pixels at most."""
    from PIL import Image

    image = Image.fromarray(picture.numpy())
    image.thumbnail((longest, longest))
    held = io.BytesIO()
    image.save(held, "JPEG", quality=quality)
    return held.getvalue()


def as_video_frame(picture: Tensor, crf: int) -> Tensor:
    """What H.264 makes of a picture: encoded as the one frame of a video (yuv420p, x264's preset veryfast) and decoded again.

    LTX-2 was trained on frames of videos; a still without their compression is animated less (official ltx-pipelines, which do the
    same to every image that conditions a sample, before it is resized).

    Args:
        picture: (H, W, 3) uint8
        crf: constant rate factor, the larger the stronger.

    Returns:
        (H, W, 3) uint8, an odd last row or column cut off.

    Raises:
        ValueError: a side is below 2 or above 16384 pixels, which H.264 cannot hold.
    """
    import av

    height, width = (size // 2 * 2 for size in picture.shape[:2])
    if not 2 <= min(height, width) <= max(height, width) <= _LARGEST_SIDE:
        raise ValueError(f"{picture.shape[1]}x{picture.shape[0]} pixels; each side must have 2 to {_LARGEST_SIDE}")
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    encoder.time_base, encoder.options = Fraction(1), {"crf": str(crf), "preset": "veryfast"}
    frame = av.VideoFrame.from_ndarray(picture[:height, :width].contiguous().numpy(), format="rgb24").reformat(format="yuv420p")
    decoder = av.CodecContext.create("h264", "r")
    packets = [*encoder.encode(frame), *encoder.encode(None)]
    (decoded,) = [frame for packet in (*packets, None) for frame in decoder.decode(packet)]
    return torch.from_numpy(decoded.to_ndarray(format="rgb24"))


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of a still as displayed, from its header.

    Raises:
        UserError: no picture, an animated one, or one of too many pixels.
    """
    with _open_picture(path) as image:
        frames = 1 if image.format == _SEVERAL_STILLS else getattr(image, "n_frames", 1)  # of formats that can be animated alone
        if frames > 1:
            raise UserError(f"{path}: an animation of {frames} frames. Save it as mp4 into a video dataset, or one frame of it as a still.")
        turned = image.getexif().get(_ORIENTATION, 1) in _TURNED
        return (image.height, image.width) if turned else image.size


def read_picture(path: Path) -> Tensor:
    """(H, W, 3) uint8, upright by its EXIF tag; transparency lies on white; of a camera's several pictures (MPO) the first.

    Raises:
        UserError: damaged or truncated, or of too many pixels.
    """
    from PIL import Image, ImageOps

    with _open_picture(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16") or image.mode == "I":
            levels = np.asarray(image, dtype=np.float64) / 257
            image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            ground = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(ground, image)
        return torch.from_numpy(np.array(image.convert("RGB")))


def picture_texts(path: Path) -> dict[str, str]:
    """What a picture's file says beside its pixels (the text chunks of a png).

    Raises:
        UserError: as `read_picture`.
    """
    with _open_picture(path) as image:
        return {key: str(value) for key, value in image.info.items() if isinstance(value, str)}


@contextmanager
def _open_picture(path: Path) -> Iterator[Any]:
    """An image of PIL; whatever a file does to PIL's readers becomes a message for the user."""
    from PIL import Image, UnidentifiedImageError

    check_is_file(path)
    try:
        with Image.open(path) as image:
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise UserError(f"{path}: has more than {most} million pixels. Make it smaller; it is scaled down in caching anyway.") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: cannot be read as a picture (its kind is not known). Replace or remove the file.") from error
    except _BROKEN as error:
        if "MAX_TEXT" in str(error):
            raise UserError(f"{path}: cannot be read: a text in it is too long. Save it again without metadata.") from error
        reason = getattr(error, "strerror", None) or str(error).removesuffix(".") or "damaged"
        raise UserError(f"{path}: cannot be read as a picture ({reason}). Replace or remove the file.") from error
