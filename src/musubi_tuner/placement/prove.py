"""A model loaded for training, its plan verified by two steps of the largest batch, and made leaner where they run out of memory."""

import dataclasses
import gc
import logging
import math
from collections.abc import Callable
from typing import TypeVar

import torch

from musubi_tuner.ltxv2.text.connectors import connector_names
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.memory.attention import KERNELS, choose_kernels, describe_choice, try_kernels, use_attention
from musubi_tuner.memory.compiling import compiler_message
from musubi_tuner.memory.regions import can_share, processes_here
from musubi_tuner.memory.step_model import ModelShape, Workload
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, OfficialLTXV2Wrapper
from musubi_tuner.placement.load import LOW_BIT, LoadedModel, ModelRequest, assemble, load_request, model_on_meta
from musubi_tuner.placement.planning import Placement, place_by_hand, place_by_plan, read_machine
from musubi_tuner.runtime.device import is_out_of_host_memory
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.processes import Processes

log = logging.getLogger(__name__)

Trial = Callable[[OfficialLTXV2Wrapper, LoRANetwork], float]
"""One forward and backward pass of the largest batch; returns its seconds."""

Result = TypeVar("Result")

_TRIALS = 4
_AFTER_TOO_LITTLE = 1.15
"""The budget of the next plan is smaller by this factor after each trial that ran out of memory."""


class PlanFailed(Exception):
    """A plan did not hold: out of memory, or torch's compiler failed."""

    def __init__(self, compiler: str | None) -> None:
        super().__init__(compiler or "out of memory")
        self.compiler = compiler
        """The compiler's message; None where the device ran out of memory."""


def load_model(request: ModelRequest, trial: Trial) -> LoadedModel:
    """Load by the plan and prove it by `trial`; where the device runs out of memory, plan again with less.

    On a CPU whose memory is not capped there is nothing to plan, and nothing is tried.

    Raises:
        UserError: no plan fits, none held after a few trials, or `--compile` where the compiler fails.
        TemporaryFailure: the host has no memory left.
    """
    group, device, options = request.processes, request.device, request.memory
    attention = _choose_attention(request)
    here = processes_here(group.gather)
    sharers = here if can_share(group.gather) else 1
    machine = read_machine(device, options, processes=here, sharers=sharers)
    if machine is None:
        loaded = _load(request, place_by_hand(options, read_config(request.checkpoint).num_layers, device, sharers=sharers))
        return _with_notes(loaded, attention)
    shape, work, outside = _step_to_plan(request)
    full_format = "bf16" if request.dtype == torch.bfloat16 else "float32"
    factor = 1.0
    for _ in range(_TRIALS):
        smaller = dataclasses.replace(machine, device_bytes=int(machine.device_bytes / factor))
        found = place_by_plan(options, smaller, shape, work, full_format=full_format, trains_outside_blocks=outside)
        placement = group.gather(found)[0]
        try:
            return _with_notes(_load_and_prove(request, placement, trial, reserve=int(work.trainable * work.optimizer_bytes)), attention)
        except PlanFailed as failure:
            compiler = failure.compiler
        if compiler is None:
            factor *= _AFTER_TOO_LITTLE
            log.warning("WARNING: the plan ran out of memory in its trial; planning again as if all took %.0f %% more", 100 * factor - 100)
        elif options.compile:
            raise UserError(f"--compile: torch's compiler fails here: {compiler}. Leave the flag out, or fix the compiler.")
        else:
            options = dataclasses.replace(options, compile=False)
            log.warning("WARNING: blocks run uncompiled, at less than half the speed: torch's compiler fails here: %s", compiler)
        gc.collect()  # modules and their compiled forms hold each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
    raise UserError(
        "the largest batch ran out of memory however it was planned. Use a smaller resolution, fewer frames or batch_size 1, or close "
        "other programs that use the card."
    )


def _load_and_prove(request: ModelRequest, placement: Placement, trial: Trial, *, reserve: int) -> LoadedModel:
    """
    Args:
        reserve: bytes on the device that the optimizer will take after the first step.

    Raises:
        PlanFailed: in any of the processes.
    """
    loaded = _load(request, placement)
    measured = _in_all(request.processes, lambda: _run_trial(loaded, trial, request.device, reserve))
    return _with_notes(loaded, (measured,))


def _load(request: ModelRequest, placement: Placement) -> LoadedModel:
    """Weights, then all around them; all processes together, as a step may read what another process has written in the one before."""
    weights = _in_all(request.processes, lambda: load_request(request, placement))
    return _in_all(request.processes, lambda: assemble(request, placement, weights))


def _in_all(group: Processes, run: Callable[[], Result]) -> Result:
    """What `run` returns in this process, once it has returned in all of them.

    Raises:
        PlanFailed: the plan did not hold in one of the processes; a failure of the compiler goes before one of memory.
        TemporaryFailure: the host has no memory left.
    """
    results: list[Result] = []
    compiler = None
    try:
        results.append(run())
    except (MemoryError, RuntimeError) as error:
        if is_out_of_host_memory(error):
            raise TemporaryFailure(
                "the machine ran out of memory while the model was loaded. Close other programs, or hold less of the model in it: "
                "--weight_format nf4, a smaller --blocks_to_swap, a smaller --ram_gb."
            ) from error
        out_of_memory = isinstance(getattr(error, "inner_exception", error), torch.OutOfMemoryError)
        compiler = None if out_of_memory else compiler_message(error)
        if compiler is None and not out_of_memory:
            raise
    failures = [message for succeeded, message in group.gather((bool(results), compiler)) if not succeeded]
    if failures:
        raise PlanFailed(next((message for message in failures if message is not None), None))
    return results[0]


def _run_trial(loaded: LoadedModel, trial: Trial, device: torch.device, reserve: int) -> tuple[str, str]:
    """Two passes of the largest batch; a row for the banner."""
    cuda, plan = device.type == "cuda", loaded.placement.plan
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.empty(reserve if cuda else 0, dtype=torch.uint8, device=device)
    trial(loaded.wrapper, loaded.network)  # compiles, and finds attention plans
    seconds = trial(loaded.wrapper, loaded.network)
    del held
    text = f"{seconds:.3f} s"
    if cuda and plan is not None:
        peak = torch.cuda.max_memory_allocated(device)
        text += f", {peak / 2**30:.2f} GiB on the device ({peak / plan.device_bytes - 1:+.0%} of the prediction)"
    return "measured", f"{text}, forward and backward of the largest batch"


def _step_to_plan(request: ModelRequest) -> tuple[ModelShape, Workload, bool]:
    """The model's sizes and the largest batch's, with all weights counted on a model without memory; whether anything outside the blocks
    is trained."""
    config, tokens = read_config(request.checkpoint), request.tokens
    model, adapt = model_on_meta(request)
    low_bit = sum(p.numel() for name, p in model.named_parameters() if LOW_BIT.fullmatch(name))
    total = sum(p.numel() for p in model.parameters())
    if request.network.train_connectors:
        total += sum(math.prod(request.checkpoint.shape(name)) for name in connector_names(request.checkpoint).values())
    network = adapt()
    shape = ModelShape(
        blocks=config.num_layers,
        video_dim=config.video_dim,
        audio_dim=config.audio_dim,
        block_weights=low_bit // config.num_layers,
        other_weights=total - low_bit // config.num_layers * config.num_layers,
    )
    work = Workload(
        video_tokens=tokens.video,
        audio_tokens=tokens.audio,
        text_tokens=tokens.text,
        clips=tokens.clips,
        trainable=sum(parameter.numel() for parameter in network.parameters()),
        optimizer_bytes=request.state_bytes,
    )
    outside = request.network.train_connectors or not all(name.startswith("transformer_blocks.") for name in network.names)
    return shape, work, outside


def _with_notes(loaded: LoadedModel, notes: tuple[tuple[str, str], ...]) -> LoadedModel:
    return dataclasses.replace(loaded, notes=(*loaded.notes, *notes))


def _choose_attention(request: ModelRequest) -> tuple[tuple[str, str], ...]:
    """Set the fastest kernels for the largest clip, tried while the card is still empty; a row for the banner."""
    mode, device, tokens = request.memory.attn_mode, request.device, request.tokens
    if device.type != "cuda" or mode == "math":  # which takes everything
        if mode == "auto":
            return ()
        use_attention((mode, *(other for other in KERNELS if other != mode)) if mode != "math" else (mode,))
        return (("attention", f"{mode}, as asked"),)
    config = read_config(request.checkpoint)
    times = try_kernels(
        device,
        request.dtype,
        tokens=max(1, (tokens.video or tokens.audio) // tokens.clips),
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim if tokens.video else config.audio_attention_head_dim,
    )
    for name, reason in times.failed.items():
        log.warning("WARNING: the attention kernel %s failed in its trial and is not used: %s", name, reason)
    asked = None if mode == "auto" else mode
    choice = choose_kernels(times, asked=asked, masks_are_rare=tokens.clips == 1)
    use_attention(choice.order)
    return (("attention", describe_choice(times, choice, asked=asked)),)
