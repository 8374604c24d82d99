"""A model loaded for training, its plan verified by two steps of the largest batch, and made leaner where memory does not suffice."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from musubi_tuner.config.model import MemoryOptions
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.memory.attention import (
    KERNELS_OF_A_CPU,
    SCORE_BYTES,
    choose_kernels,
    describe_choice,
    try_kernels,
    use_attention,
    use_default_attention,
)
from musubi_tuner.memory.card import GIB, cap_device_memory
from musubi_tuner.memory.compiling import compiler_message, first_line
from musubi_tuner.memory.pinning import PinningFailed, pinned_memory, refusal
from musubi_tuner.memory.plan import state_bytes_of
from musubi_tuner.memory.regions import can_share, processes_here
from musubi_tuner.memory.step_model import ModelShape, Workload
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.networks.whole import TrainedNetwork, WholeTransformer
from musubi_tuner.placement.adapters import bytes_in_flight
from musubi_tuner.placement.full_finetuning import REMEDY, Needs, bytes_of_an_update, check_host, in_words, needs_of, trained_in_blocks
from musubi_tuner.placement.load import LoadedModel, ModelRequest, assemble, load_request, model_on_meta, shape_of, trained_connectors
from musubi_tuner.placement.planning import BatchTokens, Machine, Placement, place_by_hand, place_by_plan, read_machine
from musubi_tuner.runtime.device import free_memory, is_out_of_host_memory
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.processes import Processes

log = logging.getLogger(__name__)

Trial = Callable[[OfficialLTXV2Wrapper, TrainedNetwork], float]
"""One forward and backward pass of the largest batch, which leaves its gradients; returns its seconds."""

Result = TypeVar("Result")

_TRIALS = 4
AFTER_TOO_LITTLE = 1.15
"""The budget of the next plan is smaller by this factor after each trial that found too little memory."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a plan did not hold, in a form that processes can tell each other."""

    kind: Literal["compiler", "pinning", "memory"]
    """torch's compiler failed, the host did not let so much memory be pinned, or the device ran out of it."""
    message: str
    pinned: int = 0
    """Bytes that the host had let this process pin by then."""


KEEPS_SCORES = (
    " Attention runs by products and a softmax (math), which keeps the scores of all pairs of tokens: it was asked for by --attn_mode, or "
    "the card has no other kernel for this dtype."
)
_GRAVEST_FIRST = ("compiler", "pinning", "memory")


class PlanFailed(Exception):
    """A plan did not hold."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def load_model(request: ModelRequest, trial: Trial) -> LoadedModel:
    """Load by the plan and prove it by `trial`; where memory does not suffice, plan again with less.

    On a CPU whose memory is not capped there is nothing to plan, and nothing is tried.

    Raises:
        UserError: no plan fits, none held after a few trials, or `--compile` where the compiler fails.
        TemporaryFailure: the host has no memory left.
    """
    group, device, options = request.processes, request.device, request.memory
    needs = None
    if request.network.full_finetune:
        options = dataclasses.replace(options, weight_format="bf16")  # or the compute dtype
        if not request.streams_trained:
            options = dataclasses.replace(options, blocks_to_swap=0)
        if request.shards > 1:
            options = dataclasses.replace(options, compile=False)  # weights are gathered by code that no graph takes in
        needs = _whole_needs(request)
    notes, keeps_scores = _choose_attention(request)
    if needs is not None:
        notes = (*notes, ("takes", in_words(needs)))
    here = processes_here(group.gather)
    sharers = here if can_share(group.gather) else 1
    machine = read_machine(device, options, processes=here, sharers=sharers)
    if machine is None:
        if needs is not None:
            check_host(needs)
        loaded = _load(request, place_by_hand(options, read_config(request.checkpoint).num_layers, device, sharers=sharers))
        return _with_notes(loaded, notes)
    cap_device_memory(device, options.vram_gb)
    shape, work, outside = _step_to_plan(request, needs, scores_bytes=SCORE_BYTES if keeps_scores else 0)
    full_format = "bf16" if request.dtype == torch.bfloat16 else "float32"
    factor, refused = 1.0, None
    for _ in range(_TRIALS):
        smaller = dataclasses.replace(machine, device_bytes=int(machine.device_bytes / factor))
        try:
            found = place_by_plan(options, smaller, shape, work, full_format=full_format, trains_outside_blocks=outside)
        except UserError as error:
            told = f"{error}{KEEPS_SCORES if keeps_scores else ''}"
            if needs is not None:
                told = f"--full_finetune: {in_words(needs)}; {told} {REMEDY}"
            raise UserError(told if refused is None else f"{refused} With less, {told}") from None
        placement = group.gather(found)[0]
        try:
            reserve = state_bytes_of(shape, work, len(placement.streamed))
            return _with_notes(_load_and_prove(request, placement, trial, reserve=reserve), notes)
        except PlanFailed as failed:
            failure = failed.failure
        if failure.kind == "compiler":
            options = _uncompiled(options, failure.message)
        elif failure.kind == "pinning":
            refused, machine = failure.message, _with_less_to_pin(machine, placement, failure)
        else:
            factor *= AFTER_TOO_LITTLE
            log.warning("WARNING: the plan ran out of memory in its trial; planning again as if all took %.0f %% more", 100 * factor - 100)
        _let_go(device)
    raise UserError(
        refused
        or "the largest batch ran out of memory however it was planned. Use a smaller resolution, fewer frames or batch_size 1, or close "
        f"other programs that use the card.{KEEPS_SCORES if keeps_scores else ''}"
    )


def _uncompiled(options: MemoryOptions, message: str) -> MemoryOptions:
    """
    Raises:
        UserError: compiling was asked for.
    """
    if options.compile:
        raise UserError(f"--compile: torch's compiler fails here: {message}. Leave the flag out, or fix the compiler.")
    log.warning("WARNING: blocks run uncompiled, and a step takes about half as long again: torch's compiler fails here: %s", message)
    return dataclasses.replace(options, compile=False)


def _with_less_to_pin(machine: Machine, placement: Placement, failure: Failure) -> Machine:
    """The machine with as much host memory as was granted, in a plan's count: each process's part of what they share."""
    assert placement.plan is not None, "plans alone are proved"
    budget = pinning_budget(placement.plan.host_bytes, failure.pinned // placement.sharers)
    log.warning(
        "WARNING: the host let %.1f GiB be pinned of the %.1f GiB that were planned; planning again with %.1f GiB",
        failure.pinned / placement.sharers / GIB,
        placement.plan.host_bytes / GIB,
        budget / GIB,
    )
    return dataclasses.replace(machine, host_bytes=budget)


def pinning_budget(planned: int, granted: int) -> int:
    """Bytes that the next plan may pin, where one of `planned` bytes was granted so many: fewer, as steps and loaders pin a little too."""
    return int(min(granted, planned) / AFTER_TOO_LITTLE)


def _let_go(device: torch.device) -> None:
    """Of what a failed plan holds, once the device is done with it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    free_memory(device)


def _load_and_prove(request: ModelRequest, placement: Placement, trial: Trial, *, reserve: tuple[float, float]) -> LoadedModel:
    """
    Args:
        reserve: bytes on the device, and pinned on the host, that the optimizer will take after the first step.

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
    failure = None
    try:
        results.append(run())
    except (MemoryError, RuntimeError, PinningFailed) as error:
        if is_out_of_host_memory(error):
            raise TemporaryFailure(
                "the machine ran out of memory while the model was loaded. Close other programs, or hold less of the model in it: "
                "--weight_format nf4, a smaller --blocks_to_swap, a smaller --ram_gb."
            ) from error
        failure = _failure_of(error)
        if failure is None:
            raise
    failures = [one for one in group.gather(failure) if one is not None]
    if failures:
        raise PlanFailed(min(failures, key=lambda one: (_GRAVEST_FIRST.index(one.kind), one.pinned)))
    return results[0]


def _failure_of(error: Exception) -> Failure | None:
    """None for what is no failure of the plan."""
    if isinstance(error, PinningFailed):
        return Failure("pinning", str(error), error.granted)
    inner = getattr(error, "inner_exception", error)
    if isinstance(inner, torch.OutOfMemoryError):
        return Failure("memory", first_line(error))
    if (refused := refusal(inner)) is not None:  # of what the steps pin, or of what CUDA keeps for itself
        pins = isinstance(inner, PinningFailed) or refused.granted > 0
        return Failure("pinning", str(refused), refused.granted) if pins else Failure("memory", first_line(inner))
    message = compiler_message(error)
    return None if message is None else Failure("compiler", message)


def _run_trial(loaded: LoadedModel, trial: Trial, device: torch.device, reserve: tuple[float, float]) -> tuple[str, str]:
    """Two passes of the largest batch; a row for the banner.

    Args:
        reserve: as `_load_and_prove`.
    """
    cuda, plan = device.type == "cuda", loaded.placement.plan
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.empty(int(reserve[0]) if cuda else 0, dtype=torch.uint8, device=device)
    pinned = pinned_memory(int(reserve[1])) if cuda and reserve[1] else None
    trial(loaded.wrapper, loaded.network)  # compiles, and finds attention plans
    seconds = trial(loaded.wrapper, loaded.network)
    del held, pinned
    for parameter in loaded.network.parameters():
        parameter.grad = None
    text = f"{seconds:.3f} s"
    if cuda and plan is not None:
        peak = torch.cuda.max_memory_allocated(device)
        text += f", {peak / 2**30:.2f} GiB on the device ({peak / plan.device_bytes - 1:+.0%} of the prediction)"
    return "measured", f"{text}, forward and backward of the largest batch"


def _step_to_plan(request: ModelRequest, needs: Needs | None, *, scores_bytes: int) -> tuple[ModelShape, Workload, bool]:
    """The model's sizes and the largest batch's, with all weights counted on a model without memory; whether anything outside the blocks
    is trained."""
    model, adapt = model_on_meta(request)
    shape = shape_of(model, beside=_weights_of_connectors(request, model))
    network = adapt()
    works = [
        Workload(
            video_tokens=tokens.video,
            audio_tokens=tokens.audio,
            text_tokens=tokens.text,
            clips=tokens.clips,
            trainable=sum(parameter.numel() for parameter in network.parameters()),
            optimizer_bytes=request.state_bytes,
            copy_bytes=request.copy_bytes,
            accumulates=request.accumulates,
            adapters_in_flight=bytes_in_flight(
                network, video_tokens=tokens.video, audio_tokens=tokens.audio, compute_bytes=request.dtype.itemsize
            ),
            scores_bytes=scores_bytes,
        )
        for tokens in (request.tokens, *request.other_tokens)
    ]
    if needs is not None:
        works = [_of_whole(one, request, network, needs) for one in works]
    work = dataclasses.replace(works[0], others=tuple(works[1:]))
    inside = all(name.startswith("transformer_blocks.") for name in network.names)
    outside = needs is not None or request.network.train_connectors or not inside
    return shape, work, outside


def _of_whole(work: Workload, request: ModelRequest, network: TrainedNetwork, needs: Needs) -> Workload:
    """Of `--full_finetune`: what is trained is the model, and has no masters beside it."""
    in_blocks = trained_in_blocks(network)
    largest = max(map(max, in_blocks), default=0)
    return dataclasses.replace(
        work,
        master_bytes=0.0,
        gradient_bytes=float(request.dtype.itemsize),
        trains_model=True,
        trained_in_blocks=sum(map(sum, in_blocks)),
        trained_in_largest=max(map(sum, in_blocks), default=0),
        updates_within_backward=request.updates_within_backward,
        update_bytes=float(needs.update),
        update_in_block_bytes=largest * bytes_of_an_update(request.dtype),
        shards=request.shards,
    )


def _whole_needs(request: ModelRequest) -> Needs:
    """Of `--full_finetune`, counted on a model without memory."""
    model, adapt = model_on_meta(request)
    network = adapt()
    assert isinstance(network, WholeTransformer)
    return needs_of(
        network,
        weights=sum(parameter.numel() for parameter in model.parameters()) + _weights_of_connectors(request, model),
        blocks=len(model.transformer_blocks),
        dtype=request.dtype,
        state_bytes=request.state_bytes,
        within_backward=request.updates_within_backward,
        shards=request.shards,
    )


def _weights_of_connectors(request: ModelRequest, model: LTXModel) -> int:
    """0 where they are not trained."""
    connectors = trained_connectors(request, model)
    return 0 if connectors is None else sum(parameter.numel() for parameter in connectors.parameters())


def _with_notes(loaded: LoadedModel, notes: tuple[tuple[str, str], ...]) -> LoadedModel:
    return dataclasses.replace(loaded, notes=(*loaded.notes, *notes))


def _choose_attention(request: ModelRequest) -> tuple[tuple[tuple[str, str], ...], bool]:
    batches = (request.tokens, *request.other_tokens)
    return choose_attention(request.memory, request.checkpoint, request.device, request.dtype, batches)


def choose_attention(
    options: MemoryOptions, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, batches: Sequence[BatchTokens]
) -> tuple[tuple[tuple[str, str], ...], bool]:
    """Set the fastest kernels for the largest clip, tried while the card is still empty; a row for the banner, and whether what runs keeps
    its scores.

    Args:
        batches: of the run; the first is the one that the kernels are tried at.

    Raises:
        UserError: a kernel that is asked for and not to be had.
    """
    mode, tokens = options.attn_mode, batches[0]
    if device.type != "cuda" or mode == "math":  # which takes everything
        if mode == "auto":
            use_default_attention()  # not what an earlier model in this process was asked for
            return (), False
        if mode not in KERNELS_OF_A_CPU and device.type != "cuda":
            raise UserError(
                f"--attn_mode {mode}: the {device.type} does not have it. Leave the flag out, or give one of {', '.join(KERNELS_OF_A_CPU)}."
            )
        use_attention((mode, *(other for other in KERNELS_OF_A_CPU if other != mode)) if mode != "math" else (mode,))
        return (("attention", f"{mode}, as asked"),), mode == "math"
    config = read_config(checkpoint)
    times = try_kernels(
        device,
        dtype,
        tokens=max(1, (tokens.video or tokens.audio) // tokens.clips),
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim if tokens.video else config.audio_attention_head_dim,
    )
    for name, reason in times.failed.items():
        log.warning("WARNING: the attention kernel %s failed in its trial and is not used: %s", name, reason)
    asked = None if mode == "auto" else mode
    choice = choose_kernels(times, asked=asked, masks_are_rare=all(one.clips == 1 for one in batches))
    use_attention(choice.order)
    return (("attention", describe_choice(times, choice, asked=asked)),), choice.keeps_scores
