"""The environment of the two newcomer's commands: a `.venv` beside them, with pinned versions. Standard library only."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
_FOLDER = ROOT / ".venv"
_STAMP = "musubi_installed.json"
_OLDEST_TORCH = (2, 11)
_VENV_ADVICE = (
    "Python's embeddable package has no venv: install Python with the installer from python.org, then delete .venv and run this again."
    if os.name == "nt"
    else "On Debian and Ubuntu, 'apt install python3-venv' provides what is missing; then delete .venv and run this again."
)
_PIP_ADVICE = "Check the network and the free disk space, then run this again."


def make_environment(extras: tuple[str, ...] = (), without_dependencies: tuple[str, ...] = (), torch_indexes: Sequence[str] = ()) -> Path:
    """Create `.venv` if it is not there, install the project into it, and return its Python.

    Args:
        extras: of the project.
        without_dependencies: packages that are installed alone, as their own demands would pull in what is not needed.
        torch_indexes: where torch is looked for before the usual package index.

    A second call with the same `pyproject.toml` and `constraints.txt` installs nothing. A torch that is already in
    the environment (a CUDA build, say) stays.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console that cannot show a path must not end the run
    python = _python_of(_FOLDER)
    if not python.is_file():
        print(f"creating {_FOLDER}", flush=True)
        _checked([sys.executable, "-m", "venv", str(_FOLDER)], _VENV_ADVICE)
    wanted = {*extras, *without_dependencies, "the project"}
    fingerprint = _fingerprint()
    installed = _installed(fingerprint)
    if not wanted <= installed:
        _install(python, extras, without_dependencies, torch_indexes)
        stamp = {"fingerprint": fingerprint, "installed": sorted(wanted | installed)}
        (_FOLDER / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")
    return python


def run(command: Sequence[object], cwd: Path = ROOT, told: TextIO | None = None, *, aside: bool = False) -> int:
    """Run a command with the environment's own scripts first on the path, and return its exit code.

    Args:
        told: takes what it prints; None = it is shown.
        aside: other programs come first where cores are short.
    """
    scripts = _python_of(_FOLDER).parent
    variables = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
        "VIRTUAL_ENV": str(_FOLDER),
        "PYTHONUTF8": "1",
        "PYTHONUNBUFFERED": "1",
    }
    variables.pop("PYTHONHOME", None)
    words, flags = [str(part) for part in command], 0
    if aside and sys.platform == "win32":
        flags = subprocess.BELOW_NORMAL_PRIORITY_CLASS
    elif aside and shutil.which("nice") is not None:
        words = ["nice", *words]
    errors = None if told is None else subprocess.STDOUT
    try:
        return subprocess.run(words, cwd=cwd, env=variables, stdout=told, stderr=errors, creationflags=flags, check=False).returncode
    except KeyboardInterrupt:
        return 130


def _python_of(folder: Path) -> Path:
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def _install(python: Path, extras: Sequence[str], without_dependencies: Sequence[str], torch_indexes: Sequence[str]) -> None:
    if run([python, "-m", "pip", "--version"]) != 0:  # an environment that another tool made
        _checked([str(python), "-m", "ensurepip"], _VENV_ADVICE)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
    keep = _torch_of(python)
    if keep is None:
        print("installing torch", flush=True)
        there = any(run([*pip, _pinned_torch(), "--index-url", index]) == 0 for index in torch_indexes)
        if not there:
            _checked([*pip, _pinned_torch()], _PIP_ADVICE)
    else:
        print(f"keeping torch {keep}", flush=True)
        pip = [*pip[:-2], "-c", str(_constraints_with_torch(keep))]
    suffix = f"[{','.join(extras)}]" if extras else ""
    print("installing the project", flush=True)
    _checked([*pip, "-e", f"{ROOT}{suffix}"], _PIP_ADVICE)
    for package in without_dependencies:
        _checked([*pip, "--no-deps", package], _PIP_ADVICE)


def _torch_of(python: Path) -> str | None:
    """The version of the environment's torch, where it has one that is new enough."""
    answer = subprocess.run(
        [str(python), "-c", "import importlib.metadata as m; print(m.version('torch'))"], capture_output=True, text=True, check=False
    )
    version = answer.stdout.strip()
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    return version if answer.returncode == 0 and numbers >= _OLDEST_TORCH else None


def _pinned_torch() -> str:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.strip() for line in lines if line.startswith("torch=="))


def _constraints_with_torch(version: str) -> Path:
    """The constraints, with the torch that is there in place of the pinned one."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    path = _FOLDER / "constraints_with_own_torch.txt"
    path.write_text("\n".join([line for line in lines if not line.startswith("torch==")] + [f"torch=={version}"]) + "\n", encoding="utf-8")
    return path


def _fingerprint() -> str:
    content = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    return hashlib.sha256(content + str(ROOT).encode("utf-8")).hexdigest()


def _installed(fingerprint: str) -> set[str]:
    """What earlier calls installed from the same two files."""
    path = _FOLDER / _STAMP
    stamp = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return set(stamp["installed"]) if stamp.get("fingerprint") == fingerprint else set()


def _checked(command: Sequence[str], advice: str) -> None:
    code = run(command)
    if code != 0:
        sys.exit(f"failed (exit code {code}): {' '.join(command)}\n{advice}")
