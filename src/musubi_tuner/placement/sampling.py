"""A transformer that samples: planned for the largest sample, proved by one step of it, made leaner where memory does not suffice."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from musubi_tuner.config.model import MemoryOptions
from musubi_tuner.ltxv2.transformer.load import STREAMS, read_config
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.memory.attention import SCORE_BYTES
from musubi_tuner.memory.card import GIB, cap_device_memory
from musubi_tuner.memory.plan import Limits
from musubi_tuner.memory.sampling_plan import SamplingPlan, SamplingWork, choose_sampling_plan, sampling_plans
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.networks.stack import Strength
from musubi_tuner.placement.load import load_for_generation, shape_of
from musubi_tuner.placement.planning import (
    BatchTokens,
    Machine,
    Placement,
    asked_for,
    compiles,
    describe_weights,
    formats_to_choose,
    place_by_hand,
    read_machine,
    size_in_words,
    streamed_blocks,
    unquantized_blocks,
)
from musubi_tuner.placement.prove import AFTER_TOO_LITTLE, KEEPS_SCORES, choose_attention
from musubi_tuner.runtime.device import free_memory
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.tables import format_table

log = logging.getLogger(__name__)

_TRIALS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRequest:
    """A model that is to sample."""

    checkpoint: Checkpoint
    mode: str
    """`video`, `av` or `audio`"""
    timestep_format: str
    device: torch.device
    dtype: torch.dtype
    memory: MemoryOptions
    work: SamplingWork
    """The largest sample's."""
    merged: tuple[tuple[Path, Strength], ...] = ()
    """Networks that become part of the weights."""
    beside: tuple[tuple[str, str], ...] = ()
    """Rows of the plan's table: what has the card before and after."""


def load_for_sampling(request: SamplingRequest, trial: Callable[[OfficialLTXV2Wrapper], object]) -> tuple[OfficialLTXV2Wrapper, str]:
    """Load by the plan and prove it; with the weights' format, as `--weight_format` names it.

    Args:
        trial: runs one step of the largest sample, with the networks it is made with.

    Raises:
        UserError: no plan fits, or none held.
    """
    device, blocks = request.device, read_config(request.checkpoint).num_layers
    tokens = BatchTokens(video=request.work.video_tokens, audio=request.work.audio_tokens, text=request.work.text_tokens, clips=1)
    attention, keeps_scores = choose_attention(request.memory, request.checkpoint, device, request.dtype, [tokens])
    if keeps_scores:
        request = dataclasses.replace(request, work=dataclasses.replace(request.work, scores_bytes=SCORE_BYTES))
    full_format = _full_format(request.dtype)
    machine = read_machine(device, request.memory, processes=1)
    if machine is None:
        by_hand = place_by_hand(request.memory, blocks, device)
        return _load(request, by_hand), by_hand.weight_format or full_format
    cap_device_memory(device, request.memory.vram_gb)
    factor = 1.0
    for _ in range(_TRIALS):
        placement, plan = place_to_sample(request, dataclasses.replace(machine, device_bytes=int(machine.device_bytes / factor)))
        try:
            wrapper = _load(request, placement)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            trial(wrapper)
        except torch.OutOfMemoryError:
            factor *= AFTER_TOO_LITTLE
            log.warning("WARNING: the plan ran out of memory in its trial; planning again as if all took %.0f %% more", 100 * factor - 100)
            wrapper = None
        free_memory(device)
        if wrapper is not None:
            rows = [*describe(placement, plan, request), *_measured(plan, device), *attention, *request.beside]
            log.info("%s", format_table(rows, ("sampling", "")))
            return wrapper, placement.weight_format or full_format
    raise UserError(
        "the largest clip ran out of memory however it was planned. Use a smaller size or fewer frames, or close other programs."
        f"{KEEPS_SCORES if keeps_scores else ''}"
    )


def _full_format(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "float32"


def place_to_sample(request: SamplingRequest, machine: Machine) -> tuple[Placement, SamplingPlan]:
    """The best plan that fits.

    Raises:
        UserError: none does; says what the leanest takes.
    """
    options = request.memory
    with torch.device("meta"):
        shape = shape_of(LTXModel(read_config(request.checkpoint), STREAMS[request.mode]))
    full_format = _full_format(request.dtype)
    formats, rates = formats_to_choose(options, machine, full_format)
    unquantized, compiled = unquantized_blocks(shape.blocks), compiles(options, machine.device)
    limits = Limits(
        device_bytes=machine.device_bytes,
        host_bytes=machine.host_bytes,
        formats=formats,
        compute_bytes=request.dtype.itemsize,
        unquantized=len(unquantized),
        streamed=asked_for(options, shape.blocks, unquantized if formats != (full_format,) else frozenset()),
        compiled=compiled,
    )
    plan = choose_sampling_plan(shape, request.work, rates, limits)
    if plan is None:
        leanest = min(sampling_plans(shape, request.work, rates, limits), key=lambda one: (one.device_bytes, one.host_bytes))
        raise UserError(
            f"no plan fits: the leanest one ({leanest.weight_format}, {leanest.streamed} blocks streamed) takes "
            f"{size_in_words(leanest.device_bytes)} on the device and {size_in_words(leanest.host_bytes)} pinned on the host; "
            f"{size_in_words(machine.device_bytes)} and {size_in_words(machine.host_bytes)} may be used"
            f"{'' if options.vram_gb is None else f' (--vram_gb {options.vram_gb:g})'}. Use a smaller size or fewer frames, or close other "
            f"programs that hold memory.{KEEPS_SCORES if request.work.scores_bytes else ''}"
        )
    full = plan.weight_format == full_format
    placement = Placement(
        weight_format=None if full else plan.weight_format,
        unquantized=frozenset() if full else unquantized,
        streamed=streamed_blocks(shape.blocks, frozenset() if full else unquantized, plan.streamed),
        levels=(None,) * shape.blocks,
        inputs_on_host=False,
        compiled=compiled,
        plan=None,
    )
    return placement, plan


def describe(placement: Placement, plan: SamplingPlan, request: SamplingRequest) -> list[tuple[str, str]]:
    """Rows of a table."""
    rows = [
        ("weights", describe_weights(placement, request.dtype)),
        ("blocks", "compiled" if placement.compiled else "not compiled"),
        ("predicted", f"{plan.device_bytes / GIB:.2f} GiB on the device, {plan.host_bytes / GIB:.2f} GiB pinned on the host"),
        ("", f"{plan.seconds:.2f} s a step of {request.work.passes} pass(es) of the largest sample"),
    ]
    if plan.stalled > 0:
        rows.append(("", f"{plan.stalled / plan.seconds:.0%} of it waits for streamed weights"))
    return rows


def _measured(plan: SamplingPlan, device: torch.device) -> list[tuple[str, str]]:
    if device.type != "cuda":
        return []
    taken = torch.cuda.max_memory_allocated(device)
    return [("measured", f"{taken / GIB:.2f} GiB on the device ({taken / plan.device_bytes - 1:+.0%} of the prediction), one step")]


def _load(request: SamplingRequest, placement: Placement) -> OfficialLTXV2Wrapper:
    return load_for_generation(
        request.checkpoint,
        placement,
        mode=request.mode,
        timestep_format=request.timestep_format,
        device=request.device,
        dtype=request.dtype,
        loras=request.merged,
    )
