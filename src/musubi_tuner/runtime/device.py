"""Choosing the device, the dtype that it computes in, and giving memory back to it."""

import gc
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


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, as the models are released; float32 on the CPU, where bfloat16 is slow."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def free_memory(device: torch.device) -> None:
    """Give what was let go of back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
