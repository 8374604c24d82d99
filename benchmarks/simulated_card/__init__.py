"""A card that runs nothing, for a CUDA build of torch on a machine without one: what is launched, what waits, what is held.

`runtime.c` and `driver.c` take the place of the CUDA runtime, cuBLAS and libcuda. They must be loaded before torch, so a program that
counts starts itself again within the environment that `environment` gives. Linux, with a C compiler.
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_SOURCES = Path(__file__).parent
_WITHIN = "SIMULATED_CARD"
_WAIT = "synchronizing CUDA operation"
# Of CUDA's own headers one includes these words from a folder that the wheel does not bring.
_HOST_DEFINES = """#pragma once
#define __host__
#define __device__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define CUDARTAPI
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __no_return__ __attribute__((noreturn))
"""


def obstacle() -> str | None:
    """Why nothing can be simulated here; None where it can."""
    import torch

    if torch.version.cuda is None:
        return "this build of torch is without CUDA; install torch's CUDA wheel in an environment of its own (5 GB)"
    return None if headers() is not None else "the headers of CUDA's runtime are missing (package nvidia-cuda-runtime)"


def headers() -> Path | None:
    """Folder of the CUDA headers that torch's wheels bring."""
    found = importlib.util.find_spec("nvidia")
    places = [] if found is None else [Path(place) for place in found.submodule_search_locations or ()]
    return next((path.parent for place in places for path in place.glob("*/include/driver_types.h")), None)


def environment(folder: Path, *, capability: int = 90, gigabytes: float = 80) -> dict[str, str]:
    """Build the libraries in `folder`; the environment in which torch finds them.

    Args:
        capability: 90 is sm_90, a Hopper.

    Raises:
        CalledProcessError: there is no C compiler, or it fails.
    """
    include = headers()
    assert include is not None, "ask `obstacle` first"
    (folder / "crt").mkdir(parents=True, exist_ok=True)
    (folder / "crt" / "host_defines.h").write_text(_HOST_DEFINES, encoding="utf-8")
    compiler = ["gcc", "-O1", "-shared", "-fPIC", "-w", f"-I{folder}", f"-I{include}"]
    runtime, driver = folder / "libsimulated.so", folder / "libcuda.so.1"
    for source, library in (("runtime.c", runtime), ("driver.c", driver)):
        subprocess.run([*compiler, str(_SOURCES / source), "-o", str(library), "-ldl", "-lpthread"], check=True)
    (folder / "libcuda.so").unlink(missing_ok=True)
    (folder / "libcuda.so").symlink_to(driver.name)
    own = {"LD_PRELOAD": str(runtime), "LD_LIBRARY_PATH": str(folder), "TRITON_LIBCUDA_PATH": str(folder), _WITHIN: str(runtime)}
    return {**os.environ, **own, "SIMULATED_SM": str(capability), "SIMULATED_GB": str(gigabytes), "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def run_within(module: str, arguments: Sequence[str], *, gigabytes: float = 80, settings: Mapping[str, str] | None = None) -> int:
    """Run `python -m MODULE ARGUMENTS` on a simulated card, or say why that cannot be; its exit code, or 2.

    Args:
        settings: variables of the environment, where it has none of these names.
    """
    if (problem := obstacle()) is not None:
        print(f"nothing is counted: {problem}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        own = {**(settings or {}), **environment(Path(folder), gigabytes=gigabytes)}
        return subprocess.run([sys.executable, "-m", module, *arguments], env=own).returncode


@contextmanager
def waits() -> Iterator[list[str]]:
    """Where the host waits for the card, as torch says (FILE:LINE each); in the list when the context ends."""
    import torch

    found: list[str] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [f"{one.filename}:{one.lineno}" for one in told if _WAIT in str(one.message)]


class Card:
    """The simulated card of this process."""

    def __init__(self) -> None:
        import torch

        from musubi_tuner.memory import compiling

        self._library = ctypes.CDLL(os.environ[_WITHIN])
        self._library.simulated_line.restype = ctypes.c_char_p
        self._library.simulated_line.argtypes = [ctypes.c_long]
        self._library.simulated_line_count.restype = ctypes.c_long
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN does not load here
        compiling.compiler_failure = lambda device: None  # a small kernel that is compiled to try it gives zeros here

    @staticmethod
    def is_here() -> bool:
        return _WITHIN in os.environ

    @contextmanager
    def watched(self) -> Iterator[list[str]]:
        """A line for each launch, copy and product in between; they are in the list when the context ends."""
        lines: list[str] = []
        self._library.simulated_start_log()
        try:
            yield lines
        finally:
            lines += [self._library.simulated_line(place).decode() for place in range(self._library.simulated_line_count())]
            self._library.simulated_stop_log()
