"""The part of the newcomer's commands that can be tried without installing anything."""

import ast
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import quickstart
from musubi_tuner.runtime.allocator import setting_fault
from tools import environment

REPOSITORY = Path(__file__).resolve().parent.parent.parent
NEWCOMERS_FILES = ("quickstart.py", "run_tests.py", "start.py", "tools/environment.py", "tools/graphics_driver.py")


@pytest.mark.parametrize("name", NEWCOMERS_FILES)
def test_newcomers_files_import_the_standard_library_alone(name: str) -> None:
    tree = ast.parse((REPOSITORY / name).read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} <= {*sys.stdlib_module_names, "tools"}


@pytest.mark.parametrize("name", ("quickstart.py", "run_tests.py", "start.py"))
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
    monkeypatch.setattr(environment, "_install", lambda python, extras, alone, indexes: installs.append((tuple(extras), tuple(alone))))
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


def imported(path: Path) -> set[str]:
    """Modules from outside the standard library that a file names in an import, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found - {*sys.stdlib_module_names, "musubi_tuner"}


def required(requirements: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def test_what_is_imported_is_what_is_declared() -> None:
    """Both ways. sentencepiece is for transformers, which reads tokenizers of its form with it; of two declared packages the code uses what
    they are built on too."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared, optional = required(project["dependencies"]), required(extras["bitsandbytes"] + extras["scenes"])
    beneath = {"transformers": "huggingface-hub", "pydantic": "pydantic-core"}
    for package, part in beneath.items():
        assert part in required(metadata.requires(package) or ())
    packages = metadata.packages_distributions()
    modules = set().union(*(imported(path) for path in (REPOSITORY / "src").rglob("*.py")))
    used = {canonicalize_name(packages[module][0]) for module in modules}
    assert used == (declared - {"sentencepiece"}) | optional | set(beneath.values())
    assert not declared & {"torchaudio", "torchcodec", "peft"}


def test_torch_is_pinned() -> None:
    assert environment._pinned_torch() == "torch==2.13.0"


def test_an_own_torch_replaces_the_pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_FOLDER", tmp_path)
    lines = environment._constraints_with_torch("2.12.0+cu130").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("torch=")] == ["torch==2.12.0+cu130"]
    assert any(line.startswith("diffusers==") for line in lines)


SPLIT = "max_split_size_mb:64"


@pytest.mark.parametrize("program", ["ltxv2_train_network", "ltxv2_cache_latents", "ltxv2_cache_text_encoder_outputs", "command"])
def test_the_allocator_is_chosen_before_torch_reads_it(program: str) -> None:
    """And not where the user has chosen one, by either of its names. What torch would not take is refused in words: it would abort."""
    code = (
        f"import os, sys, musubi_tuner.{program}\n"
        "from musubi_tuner.runtime.program import run_program\n"
        "assert 'torch' not in sys.modules\n"
        "run_program(lambda argv: print(os.environ.get('PYTORCH_ALLOC_CONF')) or 0)"
    )
    own = {name: value for name, value in os.environ.items() if name not in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
    usual = "None" if sys.platform == "win32" else "expandable_segments:True"
    for further, wanted in (({}, usual), ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "None"), ({"PYTORCH_ALLOC_CONF": SPLIT}, SPLIT)):
        answer = subprocess.run([sys.executable, "-c", code], env=own | further, capture_output=True, text=True, check=True)
        assert answer.stdout.split() == [wanted]
    answer = subprocess.run([sys.executable, "-c", code], env=own | {"PYTORCH_CUDA_ALLOC_CONF": "oops"}, capture_output=True, text=True)
    assert answer.returncode == 2 and not answer.stdout
    assert answer.stderr.startswith("error: PYTORCH_CUDA_ALLOC_CONF=oops (") and "expandable_segments:True" in answer.stderr


def test_programs_fetch_nothing_from_a_hub(tmp_path) -> None:
    """Not even the kernel that bitsandbytes asks the package `kernels` for as soon as it is imported, nor does it warn."""
    pytest.importorskip("bitsandbytes")
    (tmp_path / "kernels.py").write_text(
        "import huggingface_hub.constants as hub\n"
        "def get_kernel(*names, **more):\n"
        "    raise OSError('offline') if hub.HF_HUB_OFFLINE else SystemExit('it would have been fetched')\n"
    )
    code = "from musubi_tuner.runtime.program import run_program\ndef main(argv):\n    import bitsandbytes\n    return 0\nrun_program(main)"
    own = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    paths = os.pathsep.join([str(tmp_path), *filter(None, [own.get("PYTHONPATH")])])
    answer = subprocess.run([sys.executable, "-c", code], env=own | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("", None),
        (" expandable_segments:False , max_split_size_mb:128", None),
        ("roundup_power2_divisions:[256:1,512:2,>:4],garbage_collection_threshold:0.8", None),
        ("backend:cudaMallocAsync", None),
        ("what_is_new:7", None),
        ("garbage", "'garbage' has no value"),
        ("expandable_segment:True", "'expandable_segment' is no setting, 'expandable_segments' is"),
        ("expandable_segments:true", "expandable_segments cannot be 'true'"),
        ("expandable_segments", "'expandable_segments' has no value"),
        ("expandable_segments:True,max_split_size_mb:oops", "max_split_size_mb cannot be 'oops'"),
        ("max_split_size_mb:1", "max_split_size_mb cannot be '1'"),
        ("garbage_collection_threshold:2", "garbage_collection_threshold cannot be '2'"),
        ("roundup_power2_divisions:[256:1", "'roundup_power2_divisions:[256:1' is no setting with a value"),
    ],
)
def test_what_torch_does_not_take_as_a_setting_of_its_allocator_is_found(value: str, fault: str | None) -> None:
    assert setting_fault(value) == fault


def test_the_quickstarts_toy_tells_a_file_and_stops_at_what_fails(tmp_path):
    """It goes beside the small world, whose lines it must not mix with."""
    script = "import sys; print('step', {0}); print('why', {0}, file=sys.stderr); sys.exit({0})"
    words: list[list[object]] = [[sys.executable, "-c", script.format(code)] for code in (0, 3, 0)]
    path = tmp_path / "toy.log"
    with path.open("w", encoding="utf-8") as told:
        assert quickstart.run_all([(f"stage {number}", command) for number, command in enumerate(words)], told) == 3
    text = path.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith(("===", "step", "why"))] == [
        "=== stage 0", "step 0", "why 0", "=== stage 1", "step 3", "why 3",
    ]  # fmt: skip
    assert "failed with exit code 3" in text


@pytest.mark.parametrize(("world", "toy", "code"), ((0, 0, 0), (0, 3, 3), (4, 0, 4)))
def test_the_quickstart_fails_where_either_of_its_ways_does(tmp_path, monkeypatch, capfd, world: int, toy: int, code: int) -> None:
    for name, value in (("ROOT", tmp_path), ("OUTPUT", tmp_path / "out"), ("make_environment", lambda: Path(sys.executable))):
        monkeypatch.setattr(quickstart, name, value)

    def stage(word: str, ends: int) -> list[tuple[str, list[object]]]:
        return [(word, [sys.executable, "-c", f"print('{word} was here'); raise SystemExit({ends})"])]

    monkeypatch.setattr(quickstart, "world_commands", lambda python: stage("world", world))
    monkeypatch.setattr(quickstart, "world_results", lambda python: stage("results", 0))
    monkeypatch.setattr(quickstart, "commands", lambda python: stage("toy", toy))
    assert quickstart.main() == code
    told = capfd.readouterr()
    assert "world was here" in told.out and "toy was here" not in told.out
    assert ("results was here" in told.out) == (world == 0) and ("Done in" in told.out) == (code == 0)
    assert ("toy was here" in told.err) == (toy == 3)
    assert "toy was here" in (tmp_path / "out" / "toy.log").read_text(encoding="utf-8")
