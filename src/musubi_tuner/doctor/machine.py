"""A look at the machine: Python and packages, the GPU with its driver and compiler, memory, disk."""

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from musubi_tuner.doctor.findings import NO_GPU, Finding, Note, look
from musubi_tuner.memory.card import GIB
from musubi_tuner.memory.compiling import obstacle_to_compiling
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import real_path

_DISTRIBUTION = "musubi-tuner-ltxv2"
_TIGHT_RAM, _TIGHT_DISK = 12 * GIB, 5 * GIB
_SECONDS = 20
"""That nvidia-smi may take."""


def look_at_machine(device: torch.device, folders: Sequence[Path]) -> list[Finding]:
    """
    Args:
        device: that a run would use.
        folders: that a run would write into; they need not exist yet.
    """
    return [
        Finding("system", "right", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"),
        look("packages", _packages),
        look("torch", _torch),
        *_gpus(),
        look("triton", lambda: _triton(device)),
        look("accelerate", _accelerate),
        look("RAM", _ram),
        *(look("disk", lambda folder=folder: _disk(folder)) for folder in folders),
    ]


def _packages() -> str:
    """Of those that every program needs, and those of the extras that are installed."""
    lacking, found = [], []
    for text in importlib.metadata.requires(_DISTRIBUTION) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(f"{requirement.name} is not installed")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version}")
        else:
            lacking.append(f"{requirement.name} {version} is installed, {requirement.specifier} is needed")
    if lacking:
        raise UserError(f"{'; '.join(lacking)}. Install this project again with its dependencies: pip install -e .")
    return ", ".join(found)


def _torch() -> str:
    build = torch.version.cuda and f"CUDA {torch.version.cuda}" or torch.version.hip and f"ROCm {torch.version.hip}" or "CPU build"
    has_driver = shutil.which("nvidia-smi") is not None
    if has_driver and torch.version.cuda is None:
        raise UserError(
            f"{torch.__version__} is a CPU build, but an NVIDIA driver is installed: everything would run on the CPU.\n"
            "  pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
        )
    if torch.version.cuda is not None and not torch.cuda.is_available():
        raise UserError(
            f"{torch.__version__} ({build}) sees no GPU. {'The driver is older than the build: update it' if has_driver else 'No driver'}"
            ", or CUDA_VISIBLE_DEVICES hides the card."
        )
    return f"{torch.__version__}, {build}"


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding(
            NO_GPU,
            "note",
            "none that torch can use: training here would run on the CPU, which is enough for toys alone; a real model needs a GPU of "
            "16 GB or more",
        )
        return
    driver = _driver()
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        says = f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, compute {major}.{minor}, {driver}"
        if (major, minor) < (8, 0):
            yield Finding(f"GPU {index}", "note", f"{says}; bf16 is slow before 8.0")
        elif free < 0.8 * total:
            yield Finding(f"GPU {index}", "note", f"{says}; another program holds {(total - free) / GIB:.1f} GiB")
        else:
            yield Finding(f"GPU {index}", "right", says)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return "driver unknown (nvidia-smi does not answer)"
    return f"driver {done.stdout.splitlines()[0].strip()}" if done.stdout.strip() else "driver unknown"


def _triton(device: torch.device) -> str | Note:
    obstacle = obstacle_to_compiling(device)
    if device.type != "cuda":
        return "not needed: compiling pays on a GPU only"
    if obstacle is not None:
        return Note(f"blocks run uncompiled, about half as long again for a step: {obstacle}")
    return f"{importlib.metadata.version('triton') if importlib.util.find_spec('triton') else ''} compiles here".strip()


def _accelerate() -> str | Note:
    """What `accelerate launch` would add by itself."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    path = Path(default_config_file)
    if not path.is_file():
        return "no default config; accelerate launch takes what its flags say"
    try:
        config = load_config_from_file(None)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{path}: accelerate cannot read its config ({error}). Run 'accelerate config' again, or remove the file."
        ) from error
    found = f"{path}: mixed_precision {config.mixed_precision}, {config.to_dict().get('num_processes', 1)} process(es)"
    if config.mixed_precision not in ("no", "bf16", None):
        return Note(f"{found}; LTX-2 is trained in bf16: launch with --mixed_precision bf16")
    return found


def _ram() -> str | Note:
    memory, name = psutil.virtual_memory(), "page file" if sys.platform == "win32" else "swap"
    try:
        swap = f"{psutil.swap_memory().total / GIB:.1f} GiB of {name}"
    except (OSError, RuntimeError):  # Windows' performance counters may be turned off
        swap = f"{name} unknown"
    says = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free, {swap}"
    return Note(f"{says}; close other programs, as blocks that do not fit the card wait here") if memory.available < _TIGHT_RAM else says


def _disk(folder: Path) -> str | Note:
    existing = next(parent for parent in (folder, *real_path(folder).parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    says = f"{free / GIB:.1f} GiB free for {folder}"
    return Note(f"{says}; a LoRA with its state takes up to 2 GiB each time it is saved") if free < _TIGHT_DISK else says
