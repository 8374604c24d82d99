"""How torch takes a card's memory: in pieces that grow, where it has them.

Of pieces of fixed sizes more lies unused between tensors (docs/explanation/memory.md). The variable is read when torch is imported, so it
is set before; nothing here imports torch.
"""

import os
import sys

VARIABLE, GROWING = "PYTORCH_ALLOC_CONF", "expandable_segments:True"
_OLDER_NAME = "PYTORCH_CUDA_ALLOC_CONF"


def choose_allocator() -> None:
    """Pieces that grow, unless the user has said how. On Windows torch has none."""
    if sys.platform != "win32" and not {VARIABLE, _OLDER_NAME} & os.environ.keys():
        os.environ[VARIABLE] = GROWING


def pieces_grow() -> bool:
    """Whether this process's do."""
    return sys.platform != "win32" and GROWING in (os.environ.get(VARIABLE) or os.environ.get(_OLDER_NAME) or "")
