"""Which builds of torch a machine's graphics driver can run. Standard library only."""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

_PYTORCH = "https://download.pytorch.org/whl"
_BUILDS = ((13, 0), (12, 9), (12, 8), (12, 6))
"""CUDA versions of torch's builds, newest first; a build that a torch version does not have is passed over."""


@dataclass(frozen=True)
class Card:
    """What was found."""

    cuda: tuple[int, int] | None
    """The newest CUDA that the driver runs; None = no NVIDIA driver."""
    told: str
    """In words."""


def find_card() -> Card:
    """By nvidia-smi, which every NVIDIA driver brings."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Card(None, "No NVIDIA driver was found (no nvidia-smi): torch for the CPU. Training a released model needs an NVIDIA card.")
    try:
        answer = subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Card(None, f"nvidia-smi does not answer ({error}): torch for the CPU. Install the driver again, then run this again.")
    return read_answer(answer.stdout)


def read_answer(text: str) -> Card:
    """
    Args:
        text: what nvidia-smi has printed.
    """
    found = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+)\.(\d+)", text)
    if found is None:
        return Card(None, "nvidia-smi names no CUDA version: torch for the CPU. Install the driver again, then run this again.")
    cuda = int(found[1]), int(found[2])
    if cuda < _BUILDS[-1]:
        oldest = ".".join(map(str, _BUILDS[-1]))
        return Card(
            None, f"The NVIDIA driver runs CUDA {found[1]}.{found[2]}; torch needs {oldest}. Update the driver, then run this again."
        )
    return Card(cuda, f"NVIDIA driver for CUDA {found[1]}.{found[2]}.")


def torch_indexes(card: Card, platform: str = sys.platform) -> Sequence[str]:
    """Package indexes of torch's builds that the driver runs, best first; the usual index comes after them."""
    if card.cuda is None:
        return [f"{_PYTORCH}/cpu"] if platform != "darwin" else []
    return [f"{_PYTORCH}/cu{major}{minor}" for major, minor in _BUILDS if (major, minor) <= card.cuda]
