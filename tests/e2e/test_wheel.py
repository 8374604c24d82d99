"""The built wheel works outside the checkout: nothing that a program needs is left out of it."""

import configparser
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import quickstart

STEPS = 6
RUNNER = """\
import gc, importlib, json, sys

if __name__ == "__main__":
    for name, words in json.loads(sys.argv[1]):
        gc.freeze()  # the libraries of the programs before, which take the garbage collector most of the time
        code = importlib.import_module(f"musubi_tuner.{name}").main(words)
        assert code == 0, (name, code)
"""
"""Processes that read batches import it again, so it does nothing then."""
MODULES = {"make_tiny_checkpoints": "make_tiny"}
"""Scripts whose module in the package has another name."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, unpacked as an installer would (it is pure Python); built offline, from a copy."""
    folder = tmp_path_factory.mktemp("wheel")
    tree, site = folder / "tree", folder / "site"
    shutil.copytree(quickstart.ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(quickstart.ROOT / name, tree / name)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    answer = subprocess.run([sys.executable, "-c", build, str(folder)], cwd=tree, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    return site


def run(installed: Path, folder: Path, *words: object) -> subprocess.CompletedProcess:
    """With the wheel in front of the environment's own copy, and nothing of the checkout on the path."""
    variables = os.environ | {"PYTHONPATH": str(installed), "PYTHONUTF8": "1"}
    return subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=variables, capture_output=True, text=True, check=False)


def test_the_wheel_is_what_is_imported_and_holds_its_license(installed: Path, tmp_path: Path) -> None:
    answer = run(installed, tmp_path, "-c", "import musubi_tuner; print(musubi_tuner.__file__)")
    assert Path(answer.stdout.strip()).is_relative_to(installed), answer.stdout + answer.stderr
    assert list(installed.glob("*.dist-info/licenses/LICENSE"))


def test_installed_commands_show_their_help(installed: Path, tmp_path: Path) -> None:
    entries = configparser.ConfigParser()
    entries.read(next(installed.glob("*.dist-info")) / "entry_points.txt", encoding="utf-8")
    assert list(entries["console_scripts"]) == ["ltxv2"]
    for name, target in entries["console_scripts"].items():
        module, function = target.split(":")
        answer = run(installed, tmp_path, "-c", f"from {module} import {function} as run; run()", "--help")
        assert answer.returncode == 0, answer.stderr
        assert name in answer.stdout


def test_the_wheel_trains_outside_the_checkout(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart's own commands, by the wheel's modules in place of the checkout's scripts, in one process."""
    monkeypatch.setattr(quickstart, "OUTPUT", tmp_path)
    monkeypatch.setattr(quickstart, "STEPS", STEPS)
    quickstart.write_inputs()
    checkpoint, clips, *cached, training = (command for _, command in quickstart.commands(Path(sys.executable)))
    without_previews = training[: training.index("--sample_at_first")] + training[training.index("--output_dir") :]
    made = run(installed, tmp_path, *clips[1:])
    assert made.returncode == 0, made.stderr
    (tmp_path / "run.py").write_text(RUNNER, encoding="utf-8")
    words = json.dumps([of_the_wheel(command) for command in (checkpoint, *cached, without_previews)])
    answer = run(installed, tmp_path, tmp_path / "run.py", words)
    assert answer.returncode == 0, f"{answer.stdout}\n{answer.stderr}"
    assert (tmp_path / "training" / "quickstart.safetensors").is_file()
    assert (tmp_path / "training" / "report.html").is_file(), "its styles and scripts are in the wheel"


def of_the_wheel(command: list[object]) -> tuple[str, list[str]]:
    """Name of the module that a script of the checkout's root runs, and its flags."""
    place = next(place for place, word in enumerate(command) if isinstance(word, Path) and word.parent == quickstart.ROOT)
    stem = Path(str(command[place])).stem
    return MODULES.get(stem, stem), list(map(str, command[place + 1 :]))
