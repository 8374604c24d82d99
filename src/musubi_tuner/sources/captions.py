"""Which clips `flip_x` adds a mirror image of: those whose captions would still be true of it."""

import re

from musubi_tuner.config.dataset import DatasetSpec

_SIDES = re.compile(r"\b(?:left|right)(?:most|wards?|hand(?:ed)?)?\b", re.IGNORECASE)


def side_named(caption: str) -> str | None:
    """The first word of a caption that tells left from right, such as `left` or `Rightmost`; None where there is none."""
    found = _SIDES.search(caption)
    return found.group() if found else None


def is_mirrored(spec: DatasetSpec, caption: str) -> bool:
    """Whether the clips of a source with this caption have mirror images; one without a caption yet counts as naming no side."""
    return spec.flip_x == "force" or bool(spec.flip_x) and side_named(caption) is None
