"""Times the loading of a transformer, by the path that training takes, from a checkpoint of random weights at real layer sizes.

    python -m benchmarks.loading --blocks 4 --output benchmarks/results        anywhere; on a GPU where there is one
    python -m benchmarks.loading --sizes toy                                   as a check that it runs

Each load has a process of its own. With a cold cache the file's pages were dropped before, without root (Linux only); "from disk" tells how
much was really fetched. Seconds of 48 blocks are extrapolated by the size of the file, and say so.
"""

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch

from benchmarks.block_counts import config_section
from benchmarks.loading_case import STAND_IN, Case, Reading, can_drop_cache, load_once, write_checkpoint
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.model import LTXModel

BLOCKS = 48
FORMATS = (STAND_IN, "bf16", "fp8", "int8", "nf4")


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    toy = options.sizes == "toy"
    blocks = 2 if toy else options.blocks
    streamed = sorted({0, blocks // 2}) if options.streamed is None else options.streamed
    caches = [name for name in options.cache if name == "warm" or can_drop_cache()]
    readings: list[Reading] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "synthetic.safetensors"
        write_checkpoint(path, toy=toy, blocks=blocks)
        for name in options.weight_format:
            for count in streamed if name != STAND_IN else (0,):
                for cache in caches:
                    case = Case(checkpoint=path, weight_format=name, streamed=count, cold=cache == "cold", device=device)
                    readings += [_in_fresh_process(case) for _ in range(options.rounds)]
                    print(_row(readings[-1], toy), file=sys.stderr, flush=True)
    text = report(readings, device, blocks, toy)
    print(text)
    if options.output:
        output = Path(options.output)
        output.mkdir(parents=True, exist_ok=True)
        stem = f"{date.today()}-{_device_name(device).replace(' ', '-').lower()}-loading"
        (output / f"{stem}.md").write_text(text + "\n", encoding="utf-8")
        (output / f"{stem}.json").write_text(json.dumps([asdict(one) for one in readings], indent=1), encoding="utf-8")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    prog = "python -m benchmarks.loading"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", choices=("real", "toy"), default="real", help="layer sizes; toy has 2 blocks (default: real)")
    parser.add_argument("--blocks", type=int, default=4, help="depth of the file, 0.8 GB each (default: 4)")
    parser.add_argument(
        "--weight_format",
        nargs="+",
        choices=FORMATS,
        default=FORMATS,
        help=f"how the blocks' linears are stored; {STAND_IN}: not at all,\nbut copied into one buffer as to a card (default: all)",
    )
    parser.add_argument("--streamed", type=int, nargs="+", help="blocks that go to the host (default: none, and half of them)")
    parser.add_argument("--cache", nargs="+", choices=("cold", "warm"), default=["cold", "warm"], help="page cache (default: cold warm)")
    parser.add_argument("--rounds", type=int, default=1, help="readings of each (default: 1)")
    parser.add_argument("--folder", help="where the file is written, and removed again; it should lie on the disk that models lie on")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--output", help="folder for the table and the numbers")
    return parser.parse_args(argv)


def _in_fresh_process(case: Case) -> Reading:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(load_once, case).result()


def extrapolate(one: Reading, whole_bytes: int) -> float:
    """Seconds of `whole_bytes` at this reading's rate."""
    return one.seconds * whole_bytes / one.file_bytes


def whole_bytes() -> int:
    """Of the transformer with all of its blocks, in bf16."""
    with torch.device("meta"):
        model = LTXModel(TransformerConfig.from_checkpoint_config(config_section(False, BLOCKS)))
    return sum(2 * value.numel() for value in model.state_dict().values())


def report(readings: Sequence[Reading], device: str, blocks: int, toy: bool) -> str:
    size = readings[0].file_bytes / 1e9
    lines = [f"# Loading a transformer on {_device_name(device)}", ""]
    lines.append(
        f"{date.today()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s) of torch, {platform.platform()}. "
        f"{blocks} blocks{' of toy width' if toy else ''}, {size:.2f} GB in bf16, with sound."
    )
    lines += ["", "| weights | streamed | cache | seconds | GB/s | from disk GB | peak on the host GB | of it not mapped files GB | "
              f"peak on the device GB | {BLOCKS} blocks at this rate, extrapolated, s |", "|---" * 10 + "|"]  # fmt: skip
    lines += [_row(one, toy) for one in readings]
    lines += ["", "Peaks are over what the process held before; a device that is the CPU has its weights in the host's."]
    if not can_drop_cache():
        lines.append("The cache cannot be dropped here: cold readings were not taken.")
    return "\n".join(lines)


def _row(one: Reading, toy: bool) -> str:
    whole = "-" if toy else f"{extrapolate(one, whole_bytes()):.0f}"
    return (
        f"| {one.weight_format} | {one.streamed} | {one.cache} | {one.seconds:.2f} | {one.file_bytes / one.seconds / 1e9:.2f} | "
        f"{one.storage_bytes / 1e9:.2f} | {one.host_bytes / 1e9:.2f} | {one.own_bytes / 1e9:.2f} | {one.device_bytes / 1e9:.2f} | {whole} |"
    )


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else f"CPU {torch.get_num_threads()} threads"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
