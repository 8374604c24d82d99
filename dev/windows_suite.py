"""Run the tests on Windows' Python under Wine: python dev/windows_suite.py FOLDER [unit e2e parity | tests/unit/test_flow.py ...]

FOLDER is an environment as `docs/development/windows.md` makes it: ROOT, py, prefix and proj. Each test file runs in a process of its own
and leaves its result and its log in FOLDER/results; a file that has a result there is not run again without `--again`. The table is printed
and written to FOLDER/results/table.md.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
GROUPS = ("unit", "e2e", "parity")
WINE = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "XDG_RUNTIME_DIR": "/tmp",
    "WINEARCH": "win64",
    "WINEDEBUG": "-all",
    "OMP_NUM_THREADS": "1",
    "PYTHON_CPU_COUNT": "2",  # which Wine reads from /sys, with NUMA nodes that OpenMP then asks for in vain
}
WHOLE_FILE = "the whole file"
_LOCKS = "Wine: `_locking` of its C runtime fails without an error number, where Windows gives EACCES"
REASONS = {
    "tests/unit/test_states.py::test_a_lock_is_held_by_one_and_taken_over_from_the_dead": _LOCKS,
    "tests/e2e/test_rescue.py::test_two_runs_of_one_name_are_one_too_many": _LOCKS,
    "tests/unit/test_bad_sources.py::test_names_that_no_cache_can_have_fail_by_name": (
        "Wine: `realpath` of a path of over 260 characters fails with error 234, where Windows tells the size to ask with"
    ),
    "tests/unit/test_bad_sources.py::test_rates_lengths_and_reasons_are_shown_within_a_hundred_columns": (
        "the heading of a dataset holds its path, and that of the temporary folder is longer there than on Linux"
    ),
}
"""Tests that cannot pass under Wine although the program is right, and why."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tests", nargs="*", default=list(GROUPS), help="groups or files; every group without")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one file may take")
    parser.add_argument("--prefix", default="prefix", help="Wine's folder in FOLDER; runs beside each other need one each")
    parser.add_argument("--again", action="store_true", help="run files that have a result too")
    options = parser.parse_intermixed_args(arguments)
    folder = options.folder.resolve()
    results = folder / "results"
    results.mkdir(exist_ok=True)
    for file in test_files(options.tests):
        path = results / f"{file.parent.name}-{file.stem}.json"
        if options.again or not is_done(path):
            result = run_file(folder, options.prefix, file, results, options.timeout)
            path.write_text(json.dumps(result, indent=1), encoding="utf-8")
            print(row(result), flush=True)
    table = make_table([json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))])
    (results / "table.md").write_text(table, encoding="utf-8")
    print(table)
    return 0


def test_files(names: list[str]) -> list[Path]:
    """Test files of groups and of paths, relative to the repository."""
    found = []
    for name in names:
        paths = sorted((REPOSITORY / "tests" / name).glob("test_*.py")) if name in GROUPS else [REPOSITORY / name]
        found += [path.relative_to(REPOSITORY) for path in paths]
    return found


def is_done(path: Path) -> bool:
    """Whether there is a result of a process that came to its end."""
    return path.is_file() and WHOLE_FILE not in json.loads(path.read_text(encoding="utf-8"))["failed"]


def run_file(folder: Path, prefix: str, file: Path, results: Path, timeout: float) -> dict[str, object]:
    """Counts, seconds, and what failed and was skipped, with the first line of its message."""
    report = results / f"{file.parent.name}-{file.stem}.xml"
    report.unlink(missing_ok=True)
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", file.as_posix(), f"--junitxml=Z:{report}"]
    started = time.monotonic()
    ended = python(folder, prefix, words, report.with_suffix(".log"), timeout)
    result: dict[str, object] = {
        "file": file.as_posix(),
        "seconds": round(time.monotonic() - started),
        "failed": {},
        "skipped": {},
        "passed": 0,
    }
    if not report.is_file():
        result["failed"] = {WHOLE_FILE: "no report: " + ("the process ended early" if ended else f"stopped after {timeout:g} s")}
        return result
    passed, failed, skipped = 0, {}, {}
    for case in ElementTree.parse(report).iter("testcase"):
        faults = [*case.findall("failure"), *case.findall("error")]
        skip = case.find("skipped")
        if faults:
            failed[case.get("name")] = (faults[0].get("message") or "").split("\n")[0][:200]
        elif skip is not None:
            skipped[case.get("name")] = skip_reason(skip)
        else:
            passed += 1
    return result | {"passed": passed, "failed": failed, "skipped": skipped}


def skip_reason(skip: ElementTree.Element) -> str:
    """Of a whole file that is skipped as it is imported, the text has the reason and the message has not."""
    message = skip.get("message") or ""
    return ast.literal_eval(skip.text or "")[2].removeprefix("Skipped: ") if message == "collection skipped" else message


def python(folder: Path, prefix: str, words: list[str], log: Path, timeout: float) -> bool:
    """Run Windows' Python in the project's folder; false where it took too long.

    Its input and output are pipes, which Wine gives a process as they are; a file would be a handle that it cannot duplicate.
    """
    variables = [f"{name}={value}" for name, value in WINE.items()] + [f"WINEPREFIX={folder / prefix}"]
    inside = ["chroot", str(folder / "ROOT"), "/usr/bin/env", "-i", *variables]
    line = 'cd "$1" && shift && echo | wine "$@" 2>&1 | cat'
    command = [*inside, "sh", "-c", line, "sh", str(folder / "proj"), str(folder / "py" / "python.exe"), *words]
    with log.open("wb") as file, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            file.write(process.communicate(timeout=timeout)[0])
            return True
        except subprocess.TimeoutExpired:
            subprocess.run([*inside, "wineserver", "-k"], check=False)  # every process of this prefix, and none besides
            file.write(process.communicate()[0])
            return False


def row(result: dict[str, object]) -> str:
    return f"| {result['file']} | {result['passed']} | {len(result['failed'])} | {len(result['skipped'])} | {result['seconds']} |"


def make_table(results: list[dict[str, object]]) -> str:
    """The table, and below it every test that failed or was skipped, with its reason."""
    lines = ["| file | passed | failed | skipped | seconds |", "|---|---|---|---|---|", *map(row, results)]
    totals = [sum(result["passed"] for result in results), *(sum(len(result[key]) for result in results) for key in ("failed", "skipped"))]
    lines += [f"| all | {totals[0]} | {totals[1]} | {totals[2]} | {sum(result['seconds'] for result in results)} |", ""]
    for key in ("failed", "skipped"):
        for result in results:
            for name, message in result[key].items():
                test = f"{result['file']}::{name}"
                lines.append(f"- {key}: `{test}`: {REASONS.get(test, message)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if os.name == "nt":
        sys.exit("On Windows itself, run pytest.")
    sys.exit(main(sys.argv[1:]))
