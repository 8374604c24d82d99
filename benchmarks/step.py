"""Times one training step side by side: ours, diffusers with peft, ltx-core with peft, on the same random weights, in one run.

    python -m benchmarks.step --sizes real --blocks 4 8 --shapes all          on a GPU
    python -m benchmarks.step --sizes toy                                      anywhere, as a check of correctness
    python -m benchmarks.step --simulated --blocks 48 --shapes 768x512x121     launches, host time and memory without a GPU (step_counts.py)

A gate comes first: loss and LoRA gradients must agree. Times of 48 blocks are extrapolated from two depths, and say so.
"""

import argparse
import json
import platform
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import step_models as models
from benchmarks.block_counts import RANK, SHAPES, TEXT_TOKENS, config_section, real_config
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.memory.card import measure_rates
from musubi_tuner.memory.checkpointing import Recompute
from musubi_tuner.memory.compiling import obstacle_to_compiling
from musubi_tuner.memory.step_model import (
    ATTENTION_BACKWARD,
    CardRates,
    ModelShape,
    Workload,
    adapter_operations,
    attention_operations,
    floor_seconds,
    gradient_operations,
    linear_operations,
)

TOY_SHAPES = {"toy small": (2, 4, 6, 9), "toy large": (4, 6, 8, 25)}
BLOCKS = 48


@dataclass(frozen=True, slots=True)
class Reading:
    """One implementation at one shape and depth, in seconds and bytes; medians."""

    implementation: str
    shape: str
    blocks: int
    forward: float
    backward: float
    optimizer: float
    issue: float
    """Host seconds until the whole step was issued."""
    kernels: int
    saved_bytes: int
    """Allocated more after the forward pass than before it."""
    peak_bytes: int
    """Allocated more at the worst moment of the step than before it."""
    first_step: float
    """With compiling."""

    @property
    def step(self) -> float:
        return self.forward + self.backward + self.optimizer


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    if options.ltx_core:
        sys.path.insert(0, options.ltx_core)
    if options.simulated:
        return _simulated(options, argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    toy = options.sizes == "toy"
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    shapes = TOY_SHAPES if toy else {name: SHAPES[name] for name in (SHAPES if "all" in options.shapes else options.shapes)}
    depths = options.blocks or ([2] if toy else [4, 8])
    compiled = options.compile or obstacle_to_compiling(device) is None
    rates, _ = measure_rates(device)
    readings: list[Reading] = []
    gates: list[str] = []
    for depth in depths:
        section = config_section(toy, depth)
        config = TransformerConfig.from_checkpoint_config(section)
        weights, adapters = models.make_weights(config, device, dtype), models.make_adapters(config, 4 if toy else RANK)
        makers = _makers(options.impl, config, section, weights, adapters, compiled=compiled)
        makers |= {path: _other(path, config, section, weights, adapters) for path in options.other}
        text = 32 if toy else TEXT_TOKENS
        sample = models.make_sample(config, shapes[next(iter(shapes))], text, device, dtype)
        gates += check(makers, sample, tolerance=1e-4 if dtype == torch.float32 else 2e-2)
        for name, shape in shapes.items():
            sample = models.make_sample(config, shape, text, device, dtype)
            profiled = options.profile if depth == depths[-1] else 0
            readings += time_all(makers, sample, name, depth, rounds=options.rounds, profiled=profiled)
    text = report(readings, gates, rates, device, dtype, toy)
    print(text)
    if options.output:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{date.today()}-{_device_name(device).replace(' ', '-').lower()}-step"
        (folder / f"{stem}.md").write_text(text + "\n", encoding="utf-8")
        (folder / f"{stem}.json").write_text(json.dumps([asdict(one) for one in readings], indent=1), encoding="utf-8")
    return 0


def _simulated(options: argparse.Namespace, argv: Sequence[str]) -> int:
    from benchmarks import simulated_card

    if not simulated_card.Card.is_here():
        return simulated_card.run_within("benchmarks.step", argv, gigabytes=256)
    card = simulated_card.Card()
    from benchmarks.step_counts import table
    from musubi_tuner.memory.attention import use_attention

    use_attention(("flash", "efficient"))  # the fastest of those that load here
    device, dtype = torch.device("cuda"), torch.bfloat16
    for depth in options.blocks or [BLOCKS]:
        section = config_section(False, depth)
        config = TransformerConfig.from_checkpoint_config(section)
        weights, adapters = models.make_weights(config, device, dtype), models.make_adapters(config, RANK)
        makers = _makers(options.impl, config, section, weights, adapters, compiled=True)
        for name in SHAPES if "all" in options.shapes else options.shapes:
            sample = models.make_sample(config, SHAPES[name], TEXT_TOKENS, device, dtype)
            print(table(card, makers, sample, depth, name), flush=True)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", choices=("real", "toy"), default="real", help="layer sizes (default: real)")
    parser.add_argument("--blocks", type=int, nargs="+", help="depths that are timed (default: 4 8; toy: 2)")
    parser.add_argument("--compile", action="store_true", help="compile ours on a CPU too, for which a GPU's table says more")
    parser.add_argument("--shapes", nargs="+", default=["all"], choices=["all", *SHAPES], help="clips (default: all)")
    parser.add_argument(
        "--impl",
        nargs="+",
        default=["ours", "ours-levels", "diffusers", "ltx-core"],
        help="ours, ours-levels, ours-eager, ours-fp8, ours-int8, ours-nf4, ours-streamed, ours-fp8-streamed,\n"
        "diffusers, ltx-core "
        "(default: ours ours-levels diffusers ltx-core)",
    )
    parser.add_argument("--ltx_core", help="folder of a checkout whose ltx_core is taken in place of the installed one")
    parser.add_argument("--other", nargs="*", default=[], help="Python files of other trainers, each with\n"
                        "make(config, section, weights, adapters) -> benchmarks.step_models.Implementation; one that is not there\n"
                        "is left out with a note")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; implementations take turns (default: 5)")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="list the N kernels that took longest, at the last depth")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights and clips (default: bfloat16, on a CPU float32)")
    parser.add_argument(
        "--simulated", action="store_true", help="count on a card that runs nothing, at real layer sizes (default: 48 blocks)"
    )
    parser.add_argument("--output", help="folder for the table and the numbers")
    return parser.parse_args(argv)


Maker = Callable[[], models.Implementation]


def _makers(
    names: Sequence[str],
    config: TransformerConfig,
    section: dict[str, Any],
    weights: dict[str, Tensor],
    adapters: dict[str, Tensor],
    *,
    compiled: bool,
) -> dict[str, Maker]:
    """{what it is: how to build it}; what is not installed is left out with a note."""
    word = "compiled" if compiled else "not compiled"

    def ours(name: str, **options: Any) -> tuple[str, Maker]:
        settings = {"level": Recompute.NOTHING, "compiled": compiled, **options}
        return name, lambda: models.ours(name, config, weights, adapters, **settings)

    known: dict[str, list[tuple[str, Maker]]] = {
        "ours": [ours(f"ours, {word}, nothing recomputed")],
        "ours-levels": [ours(f"ours, {word}, {level.replace('_', ' ')} recomputed", level=level) for level in list(Recompute)[1:]],
        "ours-eager": [ours("ours, not compiled, everything recomputed", level=Recompute.EVERYTHING, compiled=False)],
        "ours-streamed": [ours("ours, half of the blocks streamed", streamed=config.num_layers // 2)],
        "ours-fp8-streamed": [ours("ours, fp8, half of the blocks streamed", weight_format="fp8", streamed=config.num_layers // 2)],
        **{f"ours-{name}": [ours(f"ours, {word}, {name}", weight_format=name)] for name in ("fp8", "int8", "nf4")},
        "diffusers": [
            (f"diffusers + peft{word}", lambda on=on: models.diffusers_peft(config, weights, adapters, checkpointed=on))
            for on, word in ((True, ", checkpointed"), (False, ""))
        ],
        "ltx-core": [
            (f"ltx-core + peft{word}", lambda on=on: models.ltx_core_peft(section, weights, adapters, checkpointed=on))
            for on, word in ((True, ", checkpointed"), (False, ""))
        ],
    }
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"--impl {' '.join(unknown)}: unknown; known are {', '.join(known)}")
    return {title: make for name in names for title, make in known[name]}


def _other(path: str, config: TransformerConfig, section: dict[str, Any], weights: dict[str, Tensor], adapters: dict[str, Tensor]) -> Maker:
    """Another trainer, through a file that builds its model from official names and gives its adapters under them."""

    def make() -> models.Implementation:
        if not Path(path).is_file():
            raise ImportError(f"{path} is not there")
        made = runpy.run_path(path)["make"](config, section, weights, adapters)
        assert isinstance(made, models.Implementation)
        return made

    return make


def check(makers: dict[str, Maker], sample: models.Sample, *, tolerance: float) -> list[str]:
    """Everybody's loss and gradients against the first one's; quantized ones are only reported.

    Raises:
        SystemExit: they disagree.
    """
    lines, wanted = [], None
    for title, make in makers.items():
        try:
            implementation = make()
            loss = implementation.forward(sample)
            loss.backward()
        except ImportError as error:
            lines.append(f"{title}: skipped, {error}")
            continue
        except torch.OutOfMemoryError:
            lines.append(f"{title}: out of memory")
            continue
        flat = torch.cat([implementation.adapters[name].grad.float().flatten() for name in sorted(implementation.adapters)])
        if wanted is None:
            wanted = (float(loss.detach()), flat)
        off = abs(float(loss.detach()) - wanted[0]) / wanted[0]
        apart = float((flat - wanted[1]).norm() / wanted[1].norm())
        lines.append(f"{title}: loss off by {off:.1e}, gradients by {apart:.1e}")
        exact = not any(word in title for word in ("fp8", "int8", "nf4"))
        if exact and (off > tolerance or apart > tolerance):
            raise SystemExit(f"the gate is closed: {lines[-1]} (tolerance {tolerance})")
        del implementation, loss
    return lines


def time_all(makers: dict[str, Maker], sample: models.Sample, shape: str, depth: int, *, rounds: int, profiled: int = 0) -> list[Reading]:
    """All are built on the same weights; rounds run through the list forwards and backwards in turn, so that drift falls on all alike."""
    runners: dict[str, _Runner] = {}
    for title, make in makers.items():
        try:
            runners[title] = _Runner(make(), sample)
        except (ImportError, torch.OutOfMemoryError):
            continue  # the gate has said so
    for number in range(rounds):
        for runner in list(runners.values()) if number % 2 == 0 else reversed(runners.values()):
            runner.round()
    if profiled:
        for title, runner in runners.items():
            print(f"\n{title}, {shape}, {depth} blocks:\n{runner.longest_kernels(profiled)}", flush=True)
    return [runner.reading(title, shape, depth) for title, runner in runners.items()]


class _Runner:
    """One implementation with its optimizer, warmed up."""

    def __init__(self, implementation: models.Implementation, sample: models.Sample) -> None:
        self._implementation, self._sample = implementation, sample
        self._device = sample.video.device
        self._update = models.updater(implementation)
        self._first = _clock(self._device, self._step)
        for _ in range(2):
            self._step()
        self._rows: list[tuple[float, ...]] = []
        self._saved = self._peak = 0

    def round(self) -> None:
        """One timed step."""
        cuda = self._device.type == "cuda"
        before = 0
        if cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
        started = time.perf_counter()
        marks = [_mark(self._device)]
        loss = self._implementation.forward(self._sample)
        marks.append(_mark(self._device))
        if cuda:
            self._saved = torch.cuda.memory_allocated(self._device) - before
        loss.backward()
        marks.append(_mark(self._device))
        self._update()
        marks.append(_mark(self._device))
        issued = time.perf_counter() - started
        self._rows.append((*_between(marks), issued))
        if cuda:
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._device) - before)

    def reading(self, title: str, shape: str, depth: int) -> Reading:
        forward, backward, optimizer, issue = (statistics.median(column) for column in zip(*self._rows, strict=True))
        return Reading(title, shape, depth, forward, backward, optimizer, issue, self._kernels(), self._saved, self._peak, self._first)

    def _step(self) -> None:
        self._implementation.forward(self._sample).backward()
        self._update()

    def _kernels(self) -> int:
        """Launched in one step; 0 on the CPU, which has none."""
        return 0 if self._device.type != "cuda" else sum(event.count for event in self._profiled())

    def longest_kernels(self, count: int) -> str:
        """A line for each: milliseconds in all, launches, name."""
        if self._device.type != "cuda":
            return "  the CPU has no kernels"
        events = sorted(self._profiled(), key=lambda event: event.device_time_total, reverse=True)
        lines = [f"  {event.device_time_total / 1000:9.3f} ms {event.count:5d} x  {event.key[:110]}" for event in events[:count]]
        return "\n".join([f"  {sum(event.device_time_total for event in events) / 1000:9.3f} ms in all", *lines])

    def _profiled(self) -> list[Any]:
        """Each kernel of one step."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as found:
            self._step()
            torch.cuda.synchronize()
        return [event for event in found.key_averages() if event.device_time_total > 0]


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(marks: list) -> list[float]:
    if isinstance(marks[0], float):
        return [later - earlier for earlier, later in zip(marks, marks[1:], strict=False)]
    torch.cuda.synchronize()
    return [earlier.elapsed_time(later) / 1000 for earlier, later in zip(marks, marks[1:], strict=False)]


def _clock(device: torch.device, run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def extrapolate(readings: Sequence[Reading], title: str, shape: str) -> float | None:
    """Seconds of 48 blocks from T(n) = a + b n through two depths."""
    points = sorted((one.blocks, one.step) for one in readings if (one.implementation, one.shape) == (title, shape))
    if len(points) < 2:
        return None
    (n, first), (m, second) = points[0], points[-1]
    return first + (second - first) / (m - n) * (BLOCKS - n)


def report(readings: Sequence[Reading], gates: Sequence[str], rates: CardRates, device: torch.device, dtype: torch.dtype, toy: bool) -> str:
    lines = [f"# One training step on {_device_name(device)}", ""]
    lines.append(f"{date.today()}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, {platform.platform()}.")
    lines.append("Measured ceilings: " + ", ".join(f"{name} {value:.3g}" for name, value in asdict(rates).items()) + ".")
    lines += ["", "Gate:", *(f"- {line}" for line in gates), ""]
    lines.append(
        "| shape | blocks | implementation | forward | backward | optimizer | step s | issue s | kernels | saved GB | "
        "peak above weights GB | first s | TFLOP/s |"
    )
    lines.append("|---" * 13 + "|")
    for one in readings:
        lines.append(
            f"| {one.shape} | {one.blocks} | {one.implementation} | {one.forward:.4f} | {one.backward:.4f} | {one.optimizer:.4f} | "
            f"{one.step:.4f} | {one.issue:.4f} | {one.kernels} | {one.saved_bytes / 1e9:.2f} | {one.peak_bytes / 1e9:.2f} | "
            f"{one.first_step:.1f} | {_tflops(one):.3g} |"
        )
    if not toy:
        lines += ["", f"Extrapolated to {BLOCKS} blocks (a + b n through the depths above):", ""]
        lines += ["| shape | implementation | step s | of the floor | against the fastest other |", "|---" * 5 + "|"]
        for shape in dict.fromkeys(one.shape for one in readings):
            lines += _extrapolated(readings, shape, rates)
    if device.type != "cuda":
        lines += ["", "A CPU says nothing of a GPU's times; kernels and memory are not measured here."]
    return "\n".join(lines)


def _extrapolated(readings: Sequence[Reading], shape: str, rates: CardRates) -> list[str]:
    titles = dict.fromkeys(one.implementation for one in readings if one.shape == shape)
    seconds = {title: value for title in titles if (value := extrapolate(readings, title, shape)) is not None}
    others = [value for title, value in seconds.items() if not title.startswith("ours")]
    floor = _floor(shape, rates)
    return [
        f"| {shape} | {title} | {value:.3f} | {floor / value:.0%} | {f'{min(others) / value:.2f}x' if others else '-'} |"
        for title, value in seconds.items()
    ]


def _floor(shape: str, rates: CardRates) -> float:
    return floor_seconds(*model_and_work(shape, BLOCKS), rates)


def _tflops(one: Reading) -> float:
    """Operations of a step without recomputation, the same for all, over its time; 0 at toy sizes, which have no such count."""
    if one.shape not in SHAPES:
        return 0.0
    model, work = model_and_work(one.shape, one.blocks)
    products = linear_operations(model, work) + gradient_operations(model, work) + adapter_operations(model, work)
    return one.blocks * (products + (1 + ATTENTION_BACKWARD) * attention_operations(model, work)) / one.step / 1e12


def model_and_work(shape: str, blocks: int) -> tuple[ModelShape, Workload]:
    frames, rows, columns, steps = SHAPES[shape]
    config = real_config()
    model = ModelShape(
        blocks=blocks, video_dim=config.video_dim, audio_dim=config.audio_dim, block_weights=386_500_000, other_weights=430_000_000
    )
    work = Workload(
        video_tokens=frames * rows * columns,
        audio_tokens=steps,
        text_tokens=TEXT_TOKENS,
        clips=1,
        trainable=214_000_000 * blocks // BLOCKS,
        optimizer_bytes=8,
    )
    return model, work


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {torch.get_num_threads()} threads"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
