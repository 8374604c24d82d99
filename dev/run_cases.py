"""Run small inputs that users really have, and events that really happen, and hold what comes of them against a table.

    python dev/run_cases.py FOLDER ... --quickstart DIR      every folder below FOLDER that has a run.sh
    python dev/run_cases.py FOLDER ... --quickstart DIR --only lora_full_prefix S1_resume_torn_state

A run.sh gets PY (a Python), CKPT_DIR (the models of a finished quickstart.py), REPO (this checkout) and BASE (where it may keep what is
made once). `cases.toml` beside this file says what must come of it: the exit codes of our programs in order, what is printed, and what is
not; a traceback never is. Exits with 1 where anything differs; the output of each folder stays in --work.
"""

import argparse
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HOOK = '''\
"""Writes down with which code each of our programs ends, and knows modules by the names that older scripts call them."""
import importlib, importlib.abc, importlib.util, multiprocessing, os, sys

OLDER = {"musubi_tuner.preview.prompts": "musubi_tuner.prompts.sample_prompts"}


class Older(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_loader(name, self) if name in OLDER else None

    def create_module(self, spec):
        return importlib.import_module(OLDER[spec.name])

    def exec_module(self, module):
        pass


plain_exit = sys.exit


def noted_exit(code=None):
    if multiprocessing.parent_process() is None and os.path.basename(sys.argv[0]).startswith("ltxv2_"):
        with open(os.environ["EXIT_CODES"], "a") as file:
            file.write(f"{0 if code is None else code}\\n")
    plain_exit(code)


sys.meta_path.append(Older())
sys.exit = noted_exit
'''
KEYS = {"exit", "or_exit", "says", "lacks"}
TOO_LONG = "took longer than five minutes"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--quickstart", type=Path, required=True, metavar="DIR", help="quickstart_output of a finished quickstart.py")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--work", type=Path, default=Path("cases_output"), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="folders at once; default: %(default)s")
    options = parser.parse_args(arguments)
    table = tomllib.loads((HERE / "cases.toml").read_text(encoding="utf-8"))
    found = {script.parent.name: script for folder in options.folders for script in sorted(folder.glob("*/run.sh"))}
    names = options.only or list(found)
    if unknown := sorted({*names} - {*found}) or sorted({*names} - {*table}):
        print(f"not there, or without a row in cases.toml: {', '.join(unknown)}")
        return 2
    work = options.work.resolve()
    (work / "hook").mkdir(parents=True, exist_ok=True)
    (work / "hook" / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
    started = time.monotonic()
    environment = variables(work, options.quickstart.resolve())
    for shared in sorted({found[name].parent.parent / "common.sh" for name in names}):
        if shared.is_file():  # makes what the folders beside it begin with
            subprocess.run(["bash", "-c", '. "$1"', "bash", str(shared)], env=environment, capture_output=True, check=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda name: run(name, found[name], table[name], work, environment), names))
    failed = [name for name, faults in zip(names, results, strict=True) if faults]
    print(f"\n{len(names) - len(failed)} of {len(names)} as the table says ({time.monotonic() - started:.0f} s); outputs in {work}")
    return 1 if failed else 0


def variables(work: Path, quickstart: Path) -> dict[str, str]:
    """What a run.sh is told."""
    return os.environ | {
        "PY": sys.executable,
        "CKPT_DIR": str(quickstart / "models"),
        "REPO": str(HERE.parent),
        "BASE": str(work / "base"),
        "EXIT_CODES": os.devnull,
        "PYTHONPATH": os.pathsep.join([str(work / "hook"), str(HERE.parent / "src"), str(HERE.parent)]),
    }


def run(name: str, script: Path, row: Mapping[str, Any], work: Path, environment: Mapping[str, str]) -> list[str]:
    """What differs from the row of one folder."""
    assert row.keys() <= KEYS, f"cases.toml: [{name}] has unknown keys"
    codes = work / f"{name}.codes"
    codes.unlink(missing_ok=True)
    begun = time.monotonic()
    told = {**environment, "EXIT_CODES": str(codes)}
    try:
        done = subprocess.run(["bash", str(script)], env=told, capture_output=True, timeout=300, check=False)
        text = (done.stdout + done.stderr).decode("utf-8", "replace")
    except subprocess.TimeoutExpired as error:
        text = ((error.stdout or b"") + (error.stderr or b"")).decode("utf-8", "replace") + f"\n{TOO_LONG}"
    (work / f"{name}.txt").write_text(text, encoding="utf-8")
    exits = [int(code) for code in codes.read_text().split()] if codes.exists() else []
    wanted = row["exit"] if isinstance(row["exit"], list) else [row["exit"]] * max(1, len(exits))
    faults = [f"exit codes {exits} in place of {wanted}"] if exits != wanted and exits not in row.get("or_exit", ()) else []
    faults += [f"lacks /{pattern}/" for pattern in row.get("says", ()) if not re.search(pattern, text, re.DOTALL)]
    faults += [f"has /{pattern}/" for pattern in ("Traceback", TOO_LONG, *row.get("lacks", ())) if re.search(pattern, text)]
    print(f"{'ok' if not faults else 'NO':4}{name:44}{time.monotonic() - begun:5.0f} s  {'; '.join(faults)}", flush=True)
    return faults


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
