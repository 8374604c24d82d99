"""Programs fetch nothing from the Hugging Face Hub; what is asked for by name, such as an upload, goes there all the same."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLE = "HF_HUB_OFFLINE"


class _Switch:
    """Of the hub's client, which reads the variable once, when it is imported."""

    def __init__(self) -> None:
        self.is_ours = False
        """Whether the program has switched it off, and not its user."""
        self.users = 0
        self.lock = threading.Lock()


_switch = _Switch()


def go_offline() -> None:
    """Models are files of the user, and libraries fetch things unasked: bitsandbytes a kernel, as soon as it is imported."""
    _switch.is_ours = _VARIABLE not in os.environ
    os.environ.setdefault(_VARIABLE, "1")


@contextmanager
def online() -> Iterator[None]:
    """While it is entered, the hub is asked; not where the user has set HF_HUB_OFFLINE."""
    if not _switch.is_ours:
        yield
        return
    from huggingface_hub import constants

    with _switch.lock:
        _switch.users += 1
        constants.HF_HUB_OFFLINE = False
    try:
        yield
    finally:
        with _switch.lock:
            _switch.users -= 1
            constants.HF_HUB_OFFLINE = _switch.users == 0
