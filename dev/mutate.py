"""Break the maths on purpose and count the breaks that no test notices: python dev/mutate.py [--each N] [--only FILE ...]

A mutant is a copy of the package with one change in one file: + for -, * for /, < for <=, another number, a condition turned round, a
reassignment left out. It dies where a test of its file fails. What is the same in effect (a bound that no value meets) survives rightly:
such mutants are listed to be read, not to be silenced.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("src/musubi_tuner")
TESTS: dict[str, tuple[str, ...]] = {
    "flow/sigma.py": ("unit/test_flow.py", "unit/test_sound_and_losses.py"),
    "flow/path.py": ("unit/test_flow.py", "unit/test_model_interface.py"),
    "flow/schedule.py": ("unit/test_schedule.py", "unit/test_steps.py", "parity/test_sampling.py"),
    "flow/guidance.py": ("unit/test_guidance.py", "parity/test_sampling.py"),
    "training/objective.py": ("unit/test_lora_files.py", "unit/test_sound_and_losses.py", "e2e/test_sound_and_losses.py"),
    "training/balance.py": ("unit/test_sound_and_losses.py", "e2e/test_sound_and_losses.py"),
    "conditioning/tokens.py": ("unit/test_model_interface.py", "unit/test_conditioning_rules.py"),
    "conditioning/apply.py": ("unit/test_conditioning_rules.py", "unit/test_model_interface.py"),
    "networks/lora.py": ("unit/test_network_layers.py", "unit/test_lora_files.py", "parity/test_lora.py"),
    "ltxv2/geometry.py": ("unit/test_model_interface.py", "unit/test_conditioning_rules.py"),
    "dataset/draws.py": ("unit/test_dataset_batches.py", "unit/test_sound_and_losses.py"),
}
"""{file of the maths: its tests, the quick ones first}"""
_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change."""

    file: str
    line: int
    change: str
    source: str


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=12, help="mutants of each file, drawn with a fixed seed; default: %(default)s")
    parser.add_argument("--only", nargs="+", metavar="FILE", choices=TESTS, help="default: all")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    chosen = [mutant for file in options.only or TESTS for mutant in draw(file, options.each)]
    started, survivors = time.monotonic(), []
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, killer in zip(chosen, pool.map(dies, chosen), strict=True):
            print(f"{'died' if killer else 'LIVES':6}{mutant.file}:{mutant.line:<5}{mutant.change:60}{killer or ''}", flush=True)
            survivors += [] if killer else [mutant]
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} died ({time.monotonic() - started:.0f} s)")
    return 0


def draw(file: str, count: int) -> list[Mutant]:
    """Some of the mutants of a file, in the order of its lines."""
    found = list(mutants_of(file, (ROOT / PACKAGE / file).read_text(encoding="utf-8")))
    return sorted(random.Random(file).sample(found, min(count, len(found))), key=lambda mutant: mutant.line)


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    """Every single change of a file's functions; docstrings and annotations are left alone."""
    tree = ast.parse(source)
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for statement in function.body:
            for node in ast.walk(statement):
                for change, replace in changes(node):
                    before = copy.deepcopy(node.__dict__)
                    replace()
                    yield Mutant(file, getattr(node, "lineno", function.lineno), change, ast.unparse(tree))
                    node.__dict__.clear()
                    node.__dict__.update(before)


def changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    """(what it is called, function that makes the change in place)"""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in _SWAPS:
        other = _SWAPS[type(node.op)]
        yield f"{type(node.op).__name__} -> {other.__name__}", lambda: setattr(node, "op", other())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
        swapped = _SWAPS[type(node.ops[0])]
        yield f"{type(node.ops[0]).__name__} -> {swapped.__name__}", lambda: setattr(node, "ops", [swapped(), *node.ops[1:]])
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        value = node.value + 1
        yield f"{node.value} -> {value}", lambda: setattr(node, "value", value)
    if isinstance(node, ast.If | ast.IfExp):
        turned = ast.UnaryOp(ast.Not(), node.test)
        yield f"if not ({ast.unparse(node.test)[:40]})", lambda: setattr(node, "test", turned)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "- left out", lambda: setattr(node, "op", ast.UAdd())


def dies(mutant: Mutant) -> str | None:
    """The first test that fails; None where the mutant lives."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / PACKAGE, Path(folder) / "musubi_tuner", ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / "musubi_tuner" / mutant.file).write_text(mutant.source, encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, str(ROOT)]), "PYTHONDONTWRITEBYTECODE": "1"}
        for test in TESTS[mutant.file]:
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", f"tests/{test}"]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                return failed[0].split(" - ")[0] if failed else f"{test} (exit code {done.returncode})"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
