"""The first half hour on a card, in three parts that each end within ten minutes: what is right comes first, then what docs/ says.

    python3 -m benchmarks.on_a_card 1 --output DIR      tests/gpu to its end
    python3 -m benchmarks.on_a_card 2 --output DIR      steps of 8 blocks beside diffusers, a run of 48
    python3 -m benchmarks.on_a_card 3 --output DIR      the trainer as on a 16 GB card, and in fp8

Each command is shown with its time and exit code; what it prints lies in DIR too. A command that runs out of its time is ended, and the
next one starts. docs/development/benchmarks.md, "On a card for the first time", lists what a machine without a network needs.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PARTS: dict[str, tuple[tuple[str, int, str], ...]] = {
    "1": (("tests", 400, "-m pytest tests/gpu -v -n 6 -p no:cacheprovider --durations=10"),),
    "2": (
        ("8_blocks", 300, "-m benchmarks.step --blocks 4 8 --shapes 768x512x121 --impl ours ours-fp8 diffusers --rounds 3"),
        ("48_blocks", 200, "-m benchmarks.training --shape 768x512x121 --steps 8"),
    ),
    "3": (
        ("16_gb", 280, "-m benchmarks.training --shape 768x512x49 --steps 8 -- --vram_gb 15.5 --ram_gb 24"),
        ("fp8", 220, "-m benchmarks.training --shape 768x512x121 --steps 8 -- --weight_format fp8"),
    ),
}
"""{part: (name, seconds at most, what Python runs)}."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.on_a_card", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--output", type=Path, default=Path("on_a_card"), help="folder for what is printed; default: %(default)s")
    options = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print(f"this torch ({torch.__version__}) sees no GPU: nothing is run", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    results = [run(name, seconds, words.split(), options.output) for name, seconds, words in PARTS[options.part]]
    print("\n" + "\n".join(f"{name:12} {taken:5.0f} s  {ending}" for name, taken, ending in results))
    return int(any(ending != "done" for _, _, ending in results))


def run(name: str, seconds: int, words: Sequence[str], folder: Path) -> tuple[str, float, str]:
    """Run Python on `words`, its output shown and kept; (name, seconds that it took, how it ended)."""
    print(f"\n== {name}: python3 {' '.join(words)}", flush=True)
    started = time.monotonic()
    with (folder / f"{name}.txt").open("w", encoding="utf-8") as kept:
        process = subprocess.Popen([sys.executable, "-u", *words], stdout=kept, stderr=subprocess.STDOUT)
        try:
            code = process.wait(seconds)
            ending = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ending = f"ended after {seconds} s"
    print((folder / f"{name}.txt").read_text(encoding="utf-8", errors="replace")[-6000:], flush=True)
    return name, time.monotonic() - started, ending


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
