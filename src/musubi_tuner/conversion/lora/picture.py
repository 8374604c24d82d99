"""A picture for a model's page, as model sites read it: a JPEG within the metadata."""

import base64
import io
from pathlib import Path

from musubi_tuner.media.picture import read_picture

_LONGEST_SIDE, _QUALITY = 256, 85


def as_data_uri(path: Path) -> str:
    """
    Raises:
        UserError: no picture that can be read.
    """
    from PIL import Image

    picture = Image.fromarray(read_picture(path).numpy())
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"
