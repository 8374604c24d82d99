"""Writes the tiny checkpoints: `python make_tiny_checkpoints.py --output_dir FOLDER`."""

import logging
from collections.abc import Sequence
from dataclasses import fields

from musubi_tuner.config.flags import flag, parse
from musubi_tuner.config.validation import AnyPath, options

PROG = "make_tiny_checkpoints.py"
DESCRIPTION = "Write complete checkpoints of toy size, for trying and testing."


@options
class TinyOptions:
    """Tiny checkpoints."""

    output_dir: AnyPath = flag("folder to write into")


@options
class TinyConfig:
    """All sections."""

    tiny: TinyOptions


def main(argv: Sequence[str], prog: str = PROG) -> int:
    config = parse(TinyConfig, argv, prog=prog, description=DESCRIPTION)
    from musubi_tuner.tiny.checkpoint import write_tiny_family

    family = write_tiny_family(config.tiny.output_dir)
    for field in fields(family):
        if (path := getattr(family, field.name)) != family.folder:
            logging.getLogger(__name__).info("%s", path)
    return 0
