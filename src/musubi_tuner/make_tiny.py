"""Writes the tiny checkpoints: `python make_tiny_checkpoints.py --output_dir FOLDER`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.config.flags import flag, parse
from musubi_tuner.tiny.checkpoint import write_tiny_family


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyOptions:
    """Tiny checkpoints."""

    output_dir: Path = flag("folder to write into")


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyConfig:
    """All sections."""

    tiny: TinyOptions


def main(argv: Sequence[str]) -> int:
    config = parse(
        TinyConfig, argv, prog="make_tiny_checkpoints.py", description="Write complete checkpoints of toy size, for trying and testing."
    )
    family = write_tiny_family(config.tiny.output_dir)
    for path in (family.ltx20, family.ltx23, family.ltx25_transformer, family.gemma, family.t5):
        logging.getLogger(__name__).info("%s", path)
    return 0
