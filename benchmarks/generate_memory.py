"""Memory of the whole of `ltxv2_generate_video.py` against what it plans, part by part, on a simulated card (benchmarks/simulated_card).

    python -m benchmarks.generate_memory                    768x512x121 guided in 16 GB; 1536x1024x121 in two stages in 24 GB; 32 GB of RAM
    python -m benchmarks.generate_memory --cases one_stage

The program runs from its command line to the files that it writes: text encoder, transformer of 48 blocks, upsampler, decoders, vocoder.
The model files are empty ones of the released sizes (benchmarks/empty_files.py), so what is made is gray and silent. torch's allocator is
real. In place of a card's rates there are those of a data sheet, as in benchmarks/plans.py, and the machine says that it has 32 GB of RAM.
Memory that the program pins is counted and not written to; convolutions give their outputs and take no workspace, as there is no cuDNN.
"""

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.simulated_card import Card, run_within
from musubi_tuner.runtime.allocator import GROWING, VARIABLE

_GIB = 2**30
_RAM = 32
_SYSTEM = 2
"""GiB of the machine's memory that other programs have."""
CASES: dict[str, tuple[str, float, list[str]]] = {
    "one_stage": ("RTX 4080", 16, ["--width", "768", "--height", "512", "--frame_count", "121"]),
    "two_stage": ("RTX 4090", 24, ["--width", "1536", "--height", "1024", "--frame_count", "121", "--pipeline", "two_stage"]),
}
"""Card of benchmarks/plans.py, its GB, the clip's flags."""
_PARTS = (
    ("generation.clips", "load_contexts", "text encoder"),
    ("generation.stages", "load_for_sampling", "transformer, loading and trial"),
    ("generation.stages", "generate", "transformer, sampling"),
    ("generation.stages", "_upsampled", "upsampler"),
    ("generation.decode", "decode_audio", "sound decoder"),
    ("generation.decode", "to_frames", "video decoder"),
)


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    if not Card.is_here():
        codes = [_run_case(case, options) for case in options.cases]
        return max(codes)
    Card()
    _let_nothing_be_computed()
    _be_the_machine(CASES[options.cases[0]][0])
    print("| part | GiB allocated | reserved | pinned after it | process |\n|---|---|---|---|---|", flush=True)
    for module, name, title in _PARTS:
        _tell_of(module, name, title)
    from musubi_tuner.ltxv2_generate_video import main as generate
    from musubi_tuner.runtime.program import run_program

    sys.argv = ["ltxv2_generate_video.py", *options.flags.split("\n")]
    run_program(generate)
    return 0


def _run_case(case: str, options: argparse.Namespace) -> int:
    from benchmarks.empty_files import write_empty_files

    _, gigabytes, clip = CASES[case]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        files = write_empty_files(Path(folder), blocks=options.blocks)
        flags = [
            "--ltxv2_model",
            files.model,
            "--text_encoder",
            files.gemma,
            "--prompt",
            "a dog barks",
            "--output_dir",
            Path(folder) / "out",
        ]
        flags += ["--sample_steps", "2", "--no-compile", "--vram_gb", gigabytes - 0.5, *clip]
        if case == "two_stage":
            flags += ["--spatial_upsampler_path", files.upsampler, "--distilled_lora", files.distilled_lora]
        print(f"\n{case}: {' '.join(clip)}, {gigabytes} GB", flush=True)
        within = ["--cases", case, "--flags", "\n".join(map(str, flags))]
        return run_within("benchmarks.generate_memory", within, gigabytes=gigabytes, settings={VARIABLE: GROWING})


def _let_nothing_be_computed() -> None:
    """Weights of blocks and layers are not read, streamed ones not written, networks neither drawn nor checked, convolutions give empty
    outputs, and zeros are no fault."""
    import torch
    import torch.nn.functional as F

    from musubi_tuner.generation import denoise
    from musubi_tuner.ltxv2 import reading
    from musubi_tuner.memory.regions import SPARE, Region
    from musubi_tuner.networks import reading as networks

    read = reading._read_into
    large = (".layers.", "transformer_blocks")
    reading._read_into = lambda data, name, entry: None if any(part in name for part in large) else read(data, name, entry)
    Region.of_own = staticmethod(  # type: ignore[method-assign]
        lambda sizes: [Region(torch.empty(size + SPARE, dtype=torch.uint8), writes=False) for size in sizes]
    )
    torch.Tensor.uniform_ = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    networks._checked_values = lambda path, key, tensor, *, may_be_whole: tensor
    denoise._Denoiser._require_finite = lambda *_: None  # type: ignore[method-assign]
    for name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d"):
        setattr(F, name, _without_numbers(getattr(F, name)))


def _without_numbers(convolution: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def on_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    @functools.wraps(convolution)
    def run(x: Any, *arguments: Any, **named: Any) -> Any:
        if not x.is_cuda:
            return convolution(x, *arguments, **named)
        shape = convolution(*map(on_meta, (x, *arguments)), **{name: on_meta(value) for name, value in named.items()}).shape
        return x.new_empty(shape)

    return run


def _be_the_machine(card: str) -> None:
    import psutil

    from benchmarks.plans import rates
    from musubi_tuner.placement import planning

    planning.measure_rates = lambda device, pins=True: (rates(card), {"fp8": rates(card).low_bit})
    process = psutil.Process()
    psutil.virtual_memory = lambda: SimpleNamespace(  # type: ignore[assignment]
        total=_RAM * _GIB, available=(_RAM - _SYSTEM) * _GIB - process.memory_info().rss
    )


def _tell_of(module: str, name: str, title: str) -> None:
    """Print what a function took at most: of the card, pinned, and of the process besides."""
    import importlib

    import psutil
    import torch

    from musubi_tuner.memory.pinning import pinned_bytes

    place = importlib.import_module(f"musubi_tuner.{module}")
    real, process = getattr(place, name), psutil.Process()

    @functools.wraps(real)
    def run(*arguments: Any, **named: Any) -> Any:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = real(*arguments, **named)
        if torch.cuda.max_memory_allocated() > before or name == "generate":
            taken = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), pinned_bytes(), process.memory_info().rss)
            print(f"| {title} | " + " | ".join(f"{value / _GIB:.2f}" for value in taken) + " |", flush=True)
        return result

    print(
        "| part | GiB allocated | reserved | pinned after it | process |\n|---|---|---|---|---|" if name == "load_contexts" else "",
        end="\n",
    )
    setattr(place, name, run)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generate_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="default: both")
    parser.add_argument("--blocks", type=int, default=48, help="of the transformer (default: %(default)s)")
    parser.add_argument("--folder", help="where the empty files lie meanwhile")
    parser.add_argument("--flags", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
