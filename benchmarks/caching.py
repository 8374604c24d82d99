"""Times the video VAE's encoder as the caching program runs it, in each memory layout and compiled, on random weights of the released size.

    python -m benchmarks.caching --output benchmarks/results         on a GPU
    python -m benchmarks.caching --whole                              without tiles and parts
    python -m benchmarks.caching --count                              anywhere: operations and memory, counted on tensors without storage
    python -m benchmarks.caching --sizes toy                          anywhere, as a check of correctness

Every variant must agree with the plain one before times are shown.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.encoder_counts import EncoderCounts, count_encoder, make_encoder
from musubi_tuner.ltxv2.autoencoders.video_vae import ENCODER_TILES, TileSizes, VideoVAE

SHAPES = {"512x768x49": (49, 768, 512), "768x512x121": (121, 512, 768), "960x544x89": (89, 544, 960), "1280x704x121": (121, 704, 1280)}
"""Frames, height, width."""
TOY_SHAPES = {"toy": (9, 64, 96), "toy in tiles": (17, 64, 96)}
TOY_TILES = TileSizes(pixels=64, pixel_overlap=32, frames=16, frame_overlap=8)
WHOLE = TileSizes(pixels=1 << 20, frames=1 << 20)
VARIANTS = {
    "plain": ("contiguous", False),
    "channels_last_3d": ("channels_last_3d", False),
    "compiled": ("contiguous", True),
    "compiled, channels_last_3d": ("channels_last_3d", True),
}
"""{title: (layout, compiled)}"""


@dataclass(frozen=True, slots=True)
class Reading:
    """One variant at one shape; medians."""

    variant: str
    shape: str
    seconds: float
    """One clip, frames on the device to latents on the device."""
    tflops: float
    """A second, by the operations of all calls."""
    peak_bytes: int
    """Allocated more at the worst moment than before; 0 on the CPU, where it is not measured."""
    first_seconds: float
    """Of the first call, with compiling and choosing kernels."""
    largest_difference: float
    """From plain, in latents whose spread is about 1."""
    mean_difference: float


class _Runner:
    """One variant, its first call made."""

    def __init__(self, vae: VideoVAE, frames: Tensor) -> None:
        self._vae, self._frames = vae, frames
        self._times: list[float] = []
        self._peak = 0
        self.first = self._timed()
        self.latents = vae.encode_frames(frames).float().cpu()
        self._peak = 0

    def round(self) -> None:
        self._times.append(self._timed())

    def reading(self, title: str, shape: str, flops: float, plain: Tensor) -> Reading:
        seconds = statistics.median(self._times)
        apart = (self.latents - plain).abs()
        return Reading(title, shape, seconds, flops / seconds / 1e12, self._peak, self.first, float(apart.max()), float(apart.mean()))

    def _timed(self) -> float:
        device = self._frames.device
        before = 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        started = time.perf_counter()
        self._vae.encode_frames(self._frames)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(device) - before)
        return time.perf_counter() - started


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    toy = options.sizes == "toy"
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shapes = TOY_SHAPES if toy else {name: SHAPES[name] for name in (SHAPES if "all" in options.shapes else options.shapes)}
    tiles = WHOLE if options.whole else TOY_TILES if toy else ENCODER_TILES
    counts = {name: [count_encoder(shape, sizes, toy=toy) for sizes in (tiles, WHOLE)] for name, shape in shapes.items()}
    readings: list[Reading] = []
    if not options.count:
        for name, shape in shapes.items():
            readings += measure(name, shape, counts[name][0].flops, options, tiles, device, dtype)
    text = report(counts, readings, device, dtype)
    print(text)
    if options.output:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        machine = _device_name(device).replace(" ", "-").lower() if readings else "counted"
        stem = f"{date.today()}-{machine}-caching"
        (folder / f"{stem}.md").write_text(text + "\n", encoding="utf-8")
        if readings:
            (folder / f"{stem}.json").write_text(json.dumps([asdict(one) for one in readings], indent=1), encoding="utf-8")
    return 0


def measure(
    name: str,
    shape: tuple[int, int, int],
    flops: float,
    options: argparse.Namespace,
    tiles: TileSizes,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Reading]:
    """All variants have the same weights; rounds run through them forwards and backwards in turn, so that drift falls on all alike.

    Raises:
        SystemExit: a variant's latents are not those of the plain one.
    """
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (1, *shape, 3), dtype=torch.uint8, generator=generator).to(device)
    runners: dict[str, _Runner] = {}
    for title in ("plain", *(title for title in options.variants if title != "plain")):
        layout, compiled = VARIANTS[title]
        network = make_encoder(device, dtype, toy=options.sizes == "toy")
        vae = VideoVAE(network, tiles, dtype)
        vae.use_layout(layout)
        if compiled:
            network.encoder = torch.compile(network.encoder, backend=options.backend, dynamic=False)
        try:
            runners[title] = _Runner(vae, frames)
        except torch.OutOfMemoryError:
            print(f"{name}, {title}: out of memory")
    if "plain" not in runners:
        return []
    for number in range(options.rounds):
        for runner in list(runners.values()) if number % 2 == 0 else reversed(runners.values()):
            runner.round()
    readings = [runner.reading(title, name, flops, runners["plain"].latents) for title, runner in runners.items()]
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for one in readings:
        if not one.mean_difference <= tolerance:
            raise SystemExit(f"{name}, {one.variant}: off by {one.mean_difference:.1e} in the mean (tolerance {tolerance})")
    return readings


def report(counts: dict[str, list[EncoderCounts]], readings: Sequence[Reading], device: torch.device, dtype: torch.dtype) -> str:
    lines = [f"# Encoding clips on {_device_name(device)}" if readings else "# Encoding clips, counted", ""]
    lines += [f"{date.today()}, torch {torch.__version__}, {platform.platform()}. Random weights, random frames.", ""]
    lines += ["Counted in bfloat16: operations of convolutions, bytes moved by everything else before fusion, memory above the weights"]
    lines += ["(the convolutions' own workspace not in it); in the tiles and parts of this run, and of the whole clip at once:", ""]
    lines += ["| shape | calls | TFLOP | GB moved | GB at most | whole: TFLOP | GB moved | GB at most |", "|---" * 8 + "|"]
    for shape, (tiled, whole) in counts.items():
        lines.append(
            f"| {shape} | {tiled.calls} | "
            + " | ".join(f"{one.flops / 1e12:.4g} | {one.moved_bytes / 1e9:.1f} | {one.peak_bytes / 1e9:.2f}" for one in (tiled, whole))
            + " |"
        )
    if readings:
        lines += ["", f"Measured in {str(dtype).removeprefix('torch.')}:", ""]
        lines.append("| shape | variant | s a clip | TFLOP/s | peak GB | first call s | off from plain at most | in the mean |")
        lines.append("|---" * 8 + "|")
    for one in readings:
        lines.append(
            f"| {one.shape} | {one.variant} | {one.seconds:.4f} | {one.tflops:.3g} | {one.peak_bytes / 1e9:.2f} | "
            f"{one.first_seconds:.1f} | {one.largest_difference:.1e} | {one.mean_difference:.1e} |"
        )
    if readings and device.type != "cuda":
        lines += ["", "A CPU says nothing of a GPU's times; memory is not measured here."]
    return "\n".join(lines)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.caching", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", choices=("real", "toy"), default="real", help="layer sizes (default: real)")
    parser.add_argument("--shapes", nargs="+", default=["all"], choices=["all", *SHAPES], help="clips (default: all)")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="besides plain (default: all)")
    parser.add_argument("--whole", action="store_true", help="no tiles and no parts")
    parser.add_argument("--count", action="store_true", help="count, and measure nothing")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: inductor)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; variants take turns (default: 5)")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--output", help="folder for the table and the numbers")
    return parser.parse_args(argv)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {torch.get_num_threads()} threads"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
