"""Folders of models that transformers reads: what can be told of one without loading it, and loading without its remarks."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json

_WEIGHTS = ("*.safetensors",)
_UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def model_type(folder: Path, *, named: str, remedy: str) -> str:
    """The `model_type` of a folder with safetensors.

    Args:
        named: the flag that the folder comes from.
        remedy: what to give in its place.

    Raises:
        UserError: no folder of a model, or its weights are no safetensors.
    """
    where = f"{named}{'' if named.endswith('=') else ' '}{folder}"
    if not folder.is_dir():
        raise UserError(f"{where}: {'is a file' if folder.exists() else 'no such folder'}. {remedy}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{where}: holds no config.json. {remedy}")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{where}: its config.json names no model_type. {remedy}")
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        pickled = any(any(folder.glob(pattern)) for pattern in _UNSAFE)
        why = "its weights are pickles, which can run code and are not loaded" if pickled else "it holds no weights"
        raise UserError(f"{where}: {why}. {remedy}")
    return config["model_type"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and remarks."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Of what a library says."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:300] if lines else type(error).__name__
