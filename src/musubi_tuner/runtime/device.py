"""Choosing the device."""

import logging
import shutil

import torch

from musubi_tuner.runtime.errors import UserError

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the best that is there.

    Raises:
        UserError: `name` is CUDA and this torch cannot use it.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        warn_of_cpu_build()
        return torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: this torch ({torch.__version__}) sees no CUDA device. "
            "Install a CUDA build (README, 'A CUDA build of torch'), or leave --device out."
        )
    return device


def warn_of_cpu_build() -> None:
    """Say so when the machine has an NVIDIA GPU and the installed torch cannot use one."""
    if torch.version.cuda is None and torch.version.hip is None and shutil.which("nvidia-smi"):
        log.warning(
            "WARNING: an NVIDIA driver is installed, but torch %s is a CPU build: everything will run on the CPU. "
            "See 'A CUDA build of torch' in the README.",
            torch.__version__,
        )
