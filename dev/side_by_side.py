"""Several processes on one folder: python dev/side_by_side.py [--rounds N] --models MODELS

Three of each caching program at once on one empty cache, and on one whose files are half gone: each ends with 0, and the cache is that of
one process, byte by byte. Two trainings of one name in one folder: one is refused with 2 and names the other; the LoRA is that of one.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import kill_rounds

CACHING = ("latents", "audio", "text")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=kill_rounds.ROOT / "quickstart_output" / "models", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--clips", type=int, default=24, help="of the dataset; default: %(default)s")
    parser.add_argument("--steps", type=int, default=60, help="of training; default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "ltxv2_side_by_side", help="default: %(default)s")
    options = parser.parse_args(arguments)
    problems = []
    for program in CACHING:
        problems += caching(options, program)
    problems += training(options)
    print("\n".join(problems) or "all as one process alone")
    return 1 if problems else 0


def caching(options: argparse.Namespace, program: str) -> list[str]:
    options.program = program
    work = options.work / program
    whole, _ = kill_rounds.undisturbed(options, work)
    cache, problems = kill_rounds.result_folder(program, work), []
    for number in range(options.rounds):
        shutil.rmtree(cache, ignore_errors=True)
        for start in ("empty", "half"):
            if start == "half":
                for path in sorted(cache.glob("*.safetensors"))[::2]:
                    path.unlink()
            ended = at_once(options, program, work, 3)
            codes = [code for code, _ in ended]
            found = kill_rounds.contents(cache)
            wrong = sorted(name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name))
            print(f"{program} round {number + 1}, {start} cache: exit codes {codes}, {len(found)} files, {len(wrong)} wrong", flush=True)
            if codes != [0, 0, 0] or wrong:
                problems.append(f"{program}: {codes} {wrong}\n" + "\n".join(text[-1500:] for code, text in ended if code))
    return problems


def training(options: argparse.Namespace) -> list[str]:
    options.program = "training"
    work = options.work / "training"
    whole, _ = kill_rounds.undisturbed(options, work)
    folder, problems = kill_rounds.result_folder("training", work), []
    for number in range(options.rounds):
        shutil.rmtree(folder, ignore_errors=True)
        ended = at_once(options, "training", work, 2)
        codes = sorted(code for code, _ in ended)
        told = [text for code, text in ended if code == 2]
        wrong = sorted(name for name in whole if whole[name] != kill_rounds.contents(folder).get(name))
        print(f"training round {number + 1}: exit codes {codes}, {len(wrong)} files wrong", flush=True)
        if codes != [0, 2] or wrong or "is at work on" not in told[0]:
            problems.append(f"training: {codes} {wrong}\n" + "\n".join(text[-1500:] for text in told))
    return problems


def at_once(options: argparse.Namespace, program: str, work: Path, count: int) -> list[tuple[int, str]]:
    words, how = kill_rounds.command(options, program, work), {"env": kill_rounds.variables(), "text": True, "encoding": "utf-8"}
    started = [subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **how) for _ in range(count)]
    errors = [process.communicate()[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, errors, strict=True)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
