"""Malformed inputs by hand: python -m tests.malformed --count 5000 --work FOLDER

Results are lines of `results.jsonl` in the folder, so that a run that was ended goes on where it was; `--only FAMILY`, `--seed S` and
`--id ID` (one input alone, whose folder is kept and whose command is shown) choose. Exits with 1 where anything is wrong.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # before torch

import argparse
import sys
from pathlib import Path

import torch

from tests.malformed.report import table
from tests.malformed.session import run_all, run_alone


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.malformed", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="inputs, families mixed by stated shares")
    parser.add_argument("--work", type=Path, required=True, help="folder for the world, the results and what is kept")
    parser.add_argument("--only", nargs="+", default=[], metavar="FAMILY")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="1/1", metavar="K/N", help="of N processes, this is number K")
    parser.add_argument("--id", help="run one input again, and keep its folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = options.work.resolve()
    if options.id is not None:
        return run_alone(options.id, work, options.seed)
    part, parts = map(int, options.part.split("/"))
    results = run_all(work, count=options.count, only=options.only, seed=options.seed, part=part - 1, parts=parts)
    print(table(results))
    return 1 if any(result.wrong for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
