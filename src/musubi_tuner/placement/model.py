"""The transformer of a run: planned, loaded, adapted, proved by one step."""

import dataclasses
import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from musubi_tuner.config.memory import MemoryOptions
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.dataset.items import Item
from musubi_tuner.ltxv2.text.connectors import Connectors, connector_names
from musubi_tuner.ltxv2.transformer.block import sequence_axes
from musubi_tuner.ltxv2.transformer.load import STREAMS, read_config
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.memory.attention import fastest_attention, use_attention
from musubi_tuner.memory.compiling import said_by_compiler
from musubi_tuner.memory.engine import BlockEngine
from musubi_tuner.memory.regions import can_share, processes_here
from musubi_tuner.memory.streaming import BlockStreamer
from musubi_tuner.networks.lora import group_projections
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, OfficialLTXV2Wrapper
from musubi_tuner.placement.adapters import adapted_connectors, make_network, read_start, with_base_networks
from musubi_tuner.placement.planning import (
    AVERAGE_BYTES,
    Machine,
    Placement,
    largest_workload,
    model_shape,
    optimizer_bytes,
    place_by_hand,
    place_by_plan,
    read_machine,
)
from musubi_tuner.placement.weights import LOW_BIT, Weights, load_weights
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import Processes

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_TRIALS = 4
_AFTER_TOO_LITTLE = 1.15
"""How much more memory than predicted is reckoned with after each trial that ran out of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRequest:
    """What a model is loaded for."""

    config: TrainingConfig
    shows_references: bool = False
    """Whether the recipe shows reference videos, which only an adapter learns to follow."""
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    items: tuple[Item, ...]
    text_tokens: int
    processes: Processes


Notes = Sequence[tuple[str, str]]
"""Rows for the banner."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model that is ready for its first step."""

    wrapper: OfficialLTXV2Wrapper
    network: LoRANetwork
    placement: Placement
    notes: Notes
    """What was measured."""


Trial = Callable[[OfficialLTXV2Wrapper, LoRANetwork], float]
"""One forward and backward pass of the largest batch; returns its seconds."""


def load_model(request: ModelRequest, trial: Trial) -> LoadedModel:
    """Load by the plan and prove it by `trial`; where the card runs out of memory, plan again with less.

    Raises:
        UserError: no plan fits, or none held after a few trials.
    """
    device, options = request.device, request.config.memory
    notes = _choose_attention(request)
    here = processes_here(request.processes.gather)
    sharers = here if can_share(request.processes.gather) else 1
    machine = read_machine(device, options, processes=here, sharers=sharers)
    if machine is None:
        placement = place_by_hand(options, read_config(request.checkpoint).num_layers, device, sharers=sharers)
        loaded = _load_and_prove(request, placement, notes)
        assert isinstance(loaded, LoadedModel), "nothing that can fail was tried"
        return loaded
    sizes = _sizes(request)
    factor = 1.0
    for _ in range(_TRIALS):
        placement = request.processes.gather(_plan(request, options, machine, sizes, factor))[0]
        proved = _load_and_prove(request, placement, notes, trial, reserve=int(sizes[2] * _state_bytes(request.config)))
        if isinstance(proved, LoadedModel):
            return proved
        if proved.compiler is None:
            factor *= _AFTER_TOO_LITTLE
            log.warning("WARNING: the plan ran out of memory in its trial; planning again as if all took %.0f %% more", 100 * factor - 100)
        elif options.compile:
            raise UserError(f"--compile: torch's compiler fails here: {proved.compiler}. Leave the flag out, or mend the compiler.")
        else:
            options = dataclasses.replace(options, compile=False)
            log.warning("WARNING: blocks run uncompiled, at less than half the speed: torch's compiler fails here: %s", proved.compiler)
        gc.collect()  # modules and their compiled forms hold each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
    raise UserError(
        "the largest batch ran out of memory however it was planned. Use a smaller resolution, fewer frames or batch_size 1, or close "
        "other programs that use the card."
    )


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a plan did not hold."""

    compiler: str | None
    """What torch's compiler said; None where the device ran out of memory."""


def _load_and_prove(
    request: ModelRequest, placement: Placement, notes: Notes, trial: Trial | None = None, *, reserve: int = 0
) -> LoadedModel | _Failure:
    """Step by step, all processes together: each step may read what another process has written in the one before.

    Args:
        reserve: bytes on the device that the optimizer will take after the first step.
    """
    weights = _together(request.processes, lambda: _load_weights(request, placement))
    if isinstance(weights, _Failure):
        return weights
    loaded = _together(request.processes, lambda: _assemble(request, placement, weights, notes))
    if isinstance(loaded, _Failure) or trial is None:
        return loaded
    return _together(request.processes, lambda: _proved(loaded, trial, request.device, reserve))


def _together(group: Processes, run: Callable[[], Result]) -> Result | _Failure:
    """What `run` returns in this process once it has returned in all of them; a failure of one is the failure of all."""
    mine = _attempt(run)
    failures = [one for one in group.gather(mine if isinstance(mine, _Failure) else None) if one is not None]
    return max(failures, key=lambda one: one.compiler is not None) if failures else mine


def _attempt(run: Callable[[], Result]) -> Result | _Failure:
    try:
        return run()
    except torch.OutOfMemoryError:
        return _Failure(None)
    except RuntimeError as error:
        if isinstance(getattr(error, "inner_exception", None), torch.OutOfMemoryError):
            return _Failure(None)
        if (said := said_by_compiler(error)) is None:
            raise
        return _Failure(said)


def _proved(loaded: LoadedModel, trial: Trial, device: torch.device, reserve: int) -> LoadedModel:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.empty(reserve if cuda else 0, dtype=torch.uint8, device=device)
    trial(loaded.wrapper, loaded.network)  # compiles, and finds attention plans
    seconds = trial(loaded.wrapper, loaded.network)
    del held
    plan = loaded.placement.plan
    text = f"{seconds:.3f} s"
    if cuda and plan is not None:
        peak = torch.cuda.max_memory_allocated(device)
        text += f", {peak / 2**30:.2f} GiB on the device ({peak / plan.device_bytes - 1:+.0%} of the prediction)"
    return LoadedModel(
        wrapper=loaded.wrapper,
        network=loaded.network,
        placement=loaded.placement,
        notes=(*loaded.notes, ("measured", f"{text}, forward and backward of the largest batch")),
    )


def _sizes(request: ModelRequest) -> tuple[int, int, int]:
    """Weights of quantizable linears, of the whole model, and of the network, counted without memory."""
    config = request.config
    with torch.device("meta"):
        model = LTXModel(read_config(request.checkpoint), STREAMS[config.ltx_mode]).requires_grad_(False)
    low_bit = sum(p.numel() for name, p in model.named_parameters() if LOW_BIT.fullmatch(name))
    total = sum(p.numel() for p in model.parameters())
    if config.network.train_connectors:
        total += sum(math.prod(request.checkpoint.shape(name)) for name in connector_names(request.checkpoint).values())
    network = make_network(config, model, read_start(config, request.checkpoint, model), shows_references=request.shows_references)
    return low_bit, total, sum(parameter.numel() for parameter in network.parameters())


def _state_bytes(config: TrainingConfig) -> float:
    """For each trained weight, beside its gradient: the optimizer's states and the average."""
    return optimizer_bytes(config.optimization.optimizer_type) + (AVERAGE_BYTES if config.optimization.ema_decay else 0)


def _trained_whole(request: ModelRequest) -> frozenset[str]:
    """Linears that train as they are, which no quantization may touch."""
    config = request.config
    if "type=full" not in config.network.network_args and not config.network.dim_from_weights:
        return frozenset()
    with torch.device("meta"):
        model = LTXModel(read_config(request.checkpoint), STREAMS[config.ltx_mode])
    network = make_network(config, model, read_start(config, request.checkpoint, model), shows_references=request.shows_references)
    return frozenset(network.names) if network.trains_base_weights else frozenset()


def _plan(request: ModelRequest, options: MemoryOptions, machine: Machine, sizes: tuple[int, int, int], factor: float) -> Placement:
    config = request.config
    low_bit, total, trainable = sizes
    work = largest_workload(
        request.items,
        config.ltx_mode,
        text_tokens=request.text_tokens,
        trainable=trainable,
        state_bytes=_state_bytes(config),
    )
    shape = model_shape(read_config(request.checkpoint), low_bit, total)
    full = "bf16" if request.dtype == torch.bfloat16 else "float32"
    return place_by_plan(
        options,
        machine,
        shape,
        work,
        full_format=full,
        factor=factor,
    )


def _load_weights(request: ModelRequest, placement: Placement) -> Weights:
    config = request.config
    return load_weights(
        request.checkpoint,
        placement,
        mode=config.ltx_mode,
        device=request.device,
        dtype=request.dtype,
        timestep_rule=config.losses.av_timestep_rule,
        whole=_trained_whole(request),
        gather=request.processes.gather,
        before=lambda place: with_base_networks(config, request.checkpoint, place),
    )


def _assemble(request: ModelRequest, placement: Placement, weights: Weights, notes: Notes) -> LoadedModel:
    """Network, connectors and engine around the frozen model."""
    transformer = weights.transformer
    network, connectors = _adapt(request, transformer)
    group_projections(transformer)
    blocks = transformer.transformer_blocks
    streamed = [blocks[index] for index in placement.streamed]
    transformer.run_block = BlockEngine(
        blocks,
        placement.rungs,
        max_rank=network.max_rank,
        compiled=placement.compiled,
        sequence_axes=sequence_axes,
        streamer=BlockStreamer(streamed, request.device, regions=weights.regions) if streamed else None,
        inputs_on_host=placement.inputs_on_host,
    )
    errors = (("quantization", _describe_errors(weights.errors)),) if weights.errors else ()
    return LoadedModel(
        wrapper=OfficialLTXV2Wrapper(transformer, request.config.mode.ltxv2_timestep_format, connectors).train(),
        network=network,
        placement=placement,
        notes=(*errors, *notes),
    )


def _adapt(request: ModelRequest, transformer: LTXModel) -> tuple[LoRANetwork, Connectors | None]:
    """The network on the device, started where a start was given, and the connectors where they are trained."""
    config, device, connectors = request.config, request.device, None
    start = read_start(config, request.checkpoint, transformer)
    network = make_network(config, transformer, start, shows_references=request.shows_references)
    if start is not None:
        network.load(start)
        log.info("starting from %s: %s", start.path, network.describe())
    for parameter in network.parameters():  # blocks that are streamed still lie on the host
        parameter.data = parameter.data.to(device)
    if config.network.train_connectors:
        connectors, part = adapted_connectors(config, request.checkpoint, transformer, network.kind, device=device, dtype=request.dtype)
        network = network.joined_with(part)
    return network, connectors


def _describe_errors(errors: dict[str, float]) -> str:
    worst = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    return f"relative error of {len(errors)} weights: {mean:.2%} in the mean, {errors[worst]:.2%} at worst ({worst})"


def _choose_attention(request: ModelRequest) -> Notes:
    """The fastest kernel on the largest clip, while the card is still empty."""
    mode, device = request.config.memory.attn_mode, request.device
    if mode != "auto":
        use_attention(mode)
        return [("attention", f"{mode}, as asked")]
    if device.type != "cuda":
        return []
    config = read_config(request.checkpoint)
    work = largest_workload(request.items, request.config.ltx_mode, text_tokens=0, trainable=0, state_bytes=0)
    tokens = max(1, work.video_tokens or work.audio_tokens) // work.clips
    head = config.attention_head_dim if work.video_tokens else config.audio_attention_head_dim
    times = fastest_attention(device, request.dtype, tokens=tokens, heads=config.num_attention_heads, head_dim=head)
    best = next(iter(times))
    use_attention(best)
    return [("attention", ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in times.items()) + f" -> {best}")]
