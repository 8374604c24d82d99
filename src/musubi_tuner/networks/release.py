"""Whether a network and a model are of releases that go together, as far as the network's file says of which it is."""

import logging
from collections.abc import Mapping
from pathlib import Path

from musubi_tuner.runtime.errors import UserError

log = logging.getLogger(__name__)

_KEY = "ss_base_model_version"
_MOSTLY_FITS = {("2.3", "2.5")}
"""(trained on, used on)."""


def check_release(path: Path, metadata: Mapping[str, str], version: str, *, named: str = "--ltxv2_model") -> None:
    """Warn of a network of 2.3 on a model of 2.5; nothing is said where the file names no release, or one that is not known.

    Args:
        metadata: the network's own.
        version: the model's, `ltxv2.versions.detect_version`.
        named: the flag or the file of the model.

    Raises:
        UserError: two releases that do not go together.
    """
    family, _, trained_on = metadata.get(_KEY, "").partition("-")
    if family != "ltx" or trained_on not in ("2.0", "2.3", "2.5") or trained_on == version:
        return
    if (trained_on, version) not in _MOSTLY_FITS:
        raise UserError(
            f"{path}: was trained on ltx-{trained_on}, and {named} is ltx-{version}. "
            f"Give a LoRA of ltx-{version}, or the model that it belongs to."
        )
    log.warning(
        "WARNING: %s: was trained on ltx-%s, and %s is ltx-%s. Such LoRAs mostly work there, but may be weaker than on their own model.",
        path, trained_on, named, version,
    )  # fmt: skip
