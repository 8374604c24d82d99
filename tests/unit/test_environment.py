"""The part of the newcomer's commands that can be tried without installing anything."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tools import environment

REPOSITORY = Path(__file__).resolve().parent.parent.parent
NEWCOMERS_FILES = ("quickstart.py", "run_tests.py", "tools/environment.py")


@pytest.mark.parametrize("name", NEWCOMERS_FILES)
def test_newcomers_files_import_the_standard_library_alone(name: str) -> None:
    tree = ast.parse((REPOSITORY / name).read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} <= {*sys.stdlib_module_names, "tools"}


@pytest.mark.parametrize("name", ("quickstart.py", "run_tests.py"))
def test_an_older_python_is_told_so(name: str) -> None:
    """The check stands before anything that an older Python could not import."""
    tree = ast.parse((REPOSITORY / name).read_text(encoding="utf-8"))
    kinds = [type(node).__name__ for node in tree.body]
    assert kinds[:3] == ["Expr", "Import", "If"]
    code = f"import sys; sys.version_info = (3, 10, 1); sys.argv = [{name!r}]; exec(compile(open({name!r}).read(), {name!r}, 'exec'))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert answer.returncode == 1 and "Python 3.11 or newer is needed; this is Python 3.10." in answer.stderr


def test_a_second_call_installs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installs = []
    monkeypatch.setattr(environment, "_FOLDER", tmp_path / ".venv")
    monkeypatch.setattr(environment, "_install", lambda python, extras, alone: installs.append((tuple(extras), tuple(alone))))
    python = environment._python_of(tmp_path / ".venv")
    python.parent.mkdir(parents=True)
    python.write_bytes(b"")
    environment.make_environment()
    environment.make_environment()
    environment.make_environment(extras=("test",), without_dependencies=("oracle==1",))
    environment.make_environment(extras=("test",), without_dependencies=("oracle==1",))
    environment.make_environment()
    assert installs == [((), ()), (("test",), ("oracle==1",))]
    stamp = tmp_path / ".venv" / "musubi_installed.json"
    stamp.write_text(json.dumps({"fingerprint": "of older files", "installed": ["the project", "test"]}), encoding="utf-8")
    environment.make_environment()
    assert len(installs) == 3


def test_uv_and_pip_have_the_same_pins() -> None:
    pins = [line for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["uv"]["constraint-dependencies"] == pins


def test_torch_is_pinned() -> None:
    assert environment._pinned_torch() == "torch==2.13.0"


def test_an_own_torch_replaces_the_pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_FOLDER", tmp_path)
    lines = environment._constraints_with_torch("2.12.0+cu130").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("torch=")] == ["torch==2.12.0+cu130"]
    assert any(line.startswith("diffusers==") for line in lines)
