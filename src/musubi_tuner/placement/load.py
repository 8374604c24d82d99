"""From a checkpoint to a model that runs: each weight where and as its placement says, adapters on it, an engine around its blocks."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from musubi_tuner.config.model import MemoryOptions
from musubi_tuner.config.network import NetworkOptions, parse_pairs
from musubi_tuner.ltxv2.text.connectors import Connectors
from musubi_tuner.ltxv2.transformer.block import sequence_axes
from musubi_tuner.ltxv2.transformer.load import STREAMS, load_transformer, read_config
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.memory.engine import BlockEngine
from musubi_tuner.memory.quantized import LowBitPlacer
from musubi_tuner.memory.regions import Gather, Region, share_regions
from musubi_tuner.memory.step_model import ModelShape
from musubi_tuner.memory.streaming import BlockStreamer
from musubi_tuner.networks.lora import adds_everywhere, group_projections
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.networks.stack import Strength
from musubi_tuner.networks.whole import TrainedNetwork, train_whole
from musubi_tuner.placement.adapters import (
    Place,
    adapted_connectors,
    load_connectors_of,
    make_network,
    read_start,
    report_network,
    with_base_networks,
    with_networks,
)
from musubi_tuner.placement.planning import BatchTokens, Placement
from musubi_tuner.placement.sharding import shard
from musubi_tuner.runtime.processes import Processes

log = logging.getLogger(__name__)

LOW_BIT = re.compile(r"transformer_blocks\.(\d+)\.\w*(attn\w*\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))\.weight")
"""Weights that few bits suffice for."""

_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRequest:
    """A model that is to be trained: what it is, what is put onto it, and what a step of it has to hold."""

    checkpoint: Checkpoint
    mode: str
    """`video`, `av` or `audio`: the streams that are built."""
    timestep_format: str
    timestep_rule: str = "official"
    """`--av_timestep_rule`"""
    device: torch.device
    dtype: torch.dtype
    """Compute dtype, of all weights that are not quantized."""
    network: NetworkOptions
    seed: int
    """Of the network's first weights."""
    shows_references: bool = False
    """Training shows references (IC-LoRA)."""
    memory: MemoryOptions
    tokens: BatchTokens
    """Of the largest batch."""
    other_tokens: tuple[BatchTokens, ...] = ()
    """Of others that may take more memory for their text or their attention (`dataset.items.largest_items`)."""
    state_bytes: float = 8.0
    """Kept for each trained weight beside its gradient: `planning.state_bytes`."""
    copy_bytes: float = 0.0
    """Of copies of each trained weight that stay as they were (`training.preflight.RunInputs`)."""
    accumulates: bool = False
    """A step has several backward passes, so gradients wait while the next ones are computed."""
    updates_within_backward: bool = False
    """Weights are updated as soon as their gradients are complete, which are freed there (`--fused_backward_pass`)."""
    streams_trained: bool = False
    """Trained blocks may be streamed from host memory and back to it."""
    shards: int = 1
    """Processes that hold a part each of the model that they train; 1 = each holds all of it."""
    processes: Processes


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model that is ready for its first step."""

    wrapper: OfficialLTXV2Wrapper
    network: TrainedNetwork
    placement: Placement
    notes: tuple[tuple[str, str], ...]
    """What was measured: rows for the banner."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The frozen model, as it is placed."""

    transformer: LTXModel
    errors: dict[str, float]
    """Relative error of each quantized weight."""
    regions: list[Region] | None
    """Host memory of the streamed blocks, in their order; None = they still lie on the device."""


def load_for_generation(
    checkpoint: Checkpoint,
    placement: Placement,
    *,
    mode: str,
    timestep_format: str,
    device: torch.device,
    dtype: torch.dtype,
    loras: Sequence[tuple[Path, Strength]] = (),
) -> OfficialLTXV2Wrapper:
    """A model to sample with, without a trained network or a trial.

    Args:
        loras: LoRA files that are merged into the weights, each with its strength.

    Raises:
        UserError: a checkpoint or a LoRA file that does not fit.
    """
    weights = load_weights(
        checkpoint,
        placement,
        mode=mode,
        device=device,
        dtype=dtype,
        before=lambda place: with_networks(loras, checkpoint, place, device),
    )
    run_blocks(weights, placement, device, max_rank=0, samples=True)
    return OfficialLTXV2Wrapper(weights.transformer, timestep_format).eval()


def load_weights(
    checkpoint: Checkpoint,
    placement: Placement,
    *,
    mode: str,
    device: torch.device,
    dtype: torch.dtype,
    timestep_rule: str = "official",
    whole: frozenset[str] = frozenset(),
    gather: Gather = lambda value: [value],
    before: Callable[[Place], Place] = lambda place: place,
) -> Weights:
    """The frozen transformer.

    Args:
        whole: linears that are not quantized whatever `placement` says.
        gather: over the processes that load together.
        before: wraps what places a weight, for changes to it that come before.
    """

    def low_bit(name: str) -> bool:
        return bool(LOW_BIT.fullmatch(name)) and _block(name) not in placement.unquantized and name.removesuffix(".weight") not in whole

    regions: dict[int | None, Region] = {}
    placer = LowBitPlacer(
        device=device,
        dtype=dtype,
        weight_format=placement.weight_format,
        low_bit=low_bit,
        region_of=lambda name: regions.get(_block(name)),
    )
    if placement.streamed:
        of_block = _block_bytes(checkpoint, mode, placer)
        sizes = [of_block[index] for index in placement.streamed]
        found = Region.of_own(sizes) if placement.sharers == 1 else share_regions(sizes, gather)
        assert found is not None, "it was tried before the run was planned"
        regions |= zip(placement.streamed, found, strict=True)
    transformer = load_transformer(checkpoint, mode=mode, device=device, dtype=dtype, timestep_rule=timestep_rule, place=before(placer))
    placer.swap_linears(transformer)
    return Weights(transformer, placer.errors, list(regions.values()))


def load_request(request: ModelRequest, placement: Placement) -> Weights:
    """The frozen transformer of `request`, with its base LoRAs merged in and the linears whole that train as they are."""
    return load_weights(
        request.checkpoint,
        placement,
        mode=request.mode,
        device=request.device,
        dtype=request.dtype,
        timestep_rule=request.timestep_rule,
        whole=_trained_whole(request),
        gather=request.processes.gather,
        before=lambda place: with_base_networks(request.network.base_networks, request.checkpoint, request.mode, place),
    )


def assemble(request: ModelRequest, placement: Placement, weights: Weights) -> LoadedModel:
    """Network, connectors and engine around the model, which stays frozen but under `--full_finetune`."""
    options, device, transformer = request.network, request.device, weights.transformer
    if options.full_finetune:
        return _assemble_whole(request, placement, weights)
    start = read_start(options, request.checkpoint, transformer)
    network = make_network(options, transformer, start, seed=request.seed, shows_references=request.shows_references)
    if start is not None:
        network.load(start)
    report_network(options, transformer, network, start)
    for parameter in network.parameters():  # blocks that are streamed still lie on the host
        parameter.data = parameter.data.to(device)
    connectors = None
    if options.train_connectors:
        connectors, part = adapted_connectors(
            options, request.checkpoint, transformer, network.kind, seed=request.seed, device=device, dtype=request.dtype
        )
        network = network.joined_with(part)
    group_projections(transformer)
    run_blocks(weights, placement, device, max_rank=network.max_rank, keeps_trained=network.trains_base_weights)
    return LoadedModel(
        wrapper=OfficialLTXV2Wrapper(transformer, request.timestep_format, connectors).train(),
        network=network,
        placement=placement,
        notes=_describe_errors(weights.errors),
    )


def _assemble_whole(request: ModelRequest, placement: Placement, weights: Weights) -> LoadedModel:
    """The model as its own network."""
    options, transformer = request.network, weights.transformer
    connectors = None
    if options.train_connectors:
        connectors = load_connectors_of(request.checkpoint, transformer, device=request.device, dtype=request.dtype)
    network = train_whole(transformer, parse_pairs(options.network_args, "--network_args"), connectors)
    streamer = run_blocks(weights, placement, request.device, max_rank=network.max_rank, keeps_trained=True, trained=True)
    if request.shards > 1:
        shard(transformer, request.device)
    network = network.found_again(transformer, streamer)
    return LoadedModel(
        wrapper=OfficialLTXV2Wrapper(transformer, request.timestep_format, connectors).train(),
        network=network,
        placement=placement,
        notes=(),
    )


def shape_of(model: LTXModel, *, beside: int = 0) -> ModelShape:
    """A model's sizes, for plans.

    Args:
        beside: weights of what lies on the device with it.
    """
    config = model.config
    each = sum(p.numel() for name, p in model.named_parameters() if LOW_BIT.fullmatch(name)) // config.num_layers
    return ModelShape(
        blocks=config.num_layers,
        video_dim=config.video_dim,
        audio_dim=config.audio_dim,
        block_weights=each,
        other_weights=sum(p.numel() for p in model.parameters()) + beside - each * config.num_layers,
        heads=config.num_attention_heads,
    )


def model_on_meta(request: ModelRequest) -> tuple[LTXModel, Callable[[], TrainedNetwork]]:
    """The frozen transformer without memory, for counting, and what puts its network on it."""
    with torch.device("meta"):
        model = LTXModel(read_config(request.checkpoint), STREAMS[request.mode]).requires_grad_(False)

    def adapt() -> TrainedNetwork:
        if request.network.full_finetune:
            return train_whole(model, parse_pairs(request.network.network_args, "--network_args"), trained_connectors(request, model))
        start = read_start(request.network, request.checkpoint, model)
        return make_network(request.network, model, start, seed=request.seed, shows_references=request.shows_references)

    return model, adapt


def trained_connectors(request: ModelRequest, model: LTXModel) -> Connectors | None:
    """Those that are trained, or have adapters that are, without memory, for counting; None without `--train_connectors`."""
    if not request.network.train_connectors:
        return None
    return load_connectors_of(request.checkpoint, model, device=torch.device("meta"), dtype=request.dtype)


def run_blocks(
    weights: Weights,
    placement: Placement,
    device: torch.device,
    *,
    max_rank: int,
    keeps_trained: bool = False,
    samples: bool = False,
    trained: bool = False,
) -> BlockStreamer | None:
    """Let an engine run the blocks: it streams, recomputes and compiles them.

    Args:
        max_rank, keeps_trained: as `BlockEngine`.
        samples: nothing is trained, so what is compiled is passes without gradients.
        trained: as `BlockStreamer`.

    Returns:
        What streams them; None where all lie on the device.
    """
    blocks = list(weights.transformer.transformer_blocks)
    streamed = [blocks[index] for index in placement.streamed]
    streamer = BlockStreamer(streamed, device, regions=weights.regions, trained=trained) if streamed else None
    weights.transformer.run_block = BlockEngine(
        blocks,
        placement.levels,
        max_rank=max_rank,
        keeps_sums=adds_everywhere(blocks),
        keeps_trained=keeps_trained,
        compiled=placement.compiled,
        sequence_axes=sequence_axes,
        streamer=streamer,
        inputs_on_host=placement.inputs_on_host,
        compiles_always=samples,
    )
    return streamer


def _trained_whole(request: ModelRequest) -> frozenset[str]:
    """Linears that train as they are, which no quantization may touch."""
    if "type=full" not in request.network.network_args and not request.network.dim_from_weights:
        return frozenset()
    network = model_on_meta(request)[1]()
    return frozenset(network.names) if network.trains_base_weights else frozenset()


def _block_bytes(checkpoint: Checkpoint, mode: str, placer: LowBitPlacer) -> dict[int, int]:
    """Of each block, as it is placed."""
    with torch.device("meta"):
        model = LTXModel(read_config(checkpoint), STREAMS[mode])
    sizes = dict.fromkeys(range(len(model.transformer_blocks)), 0)
    for name, tensor in model.state_dict().items():
        if (block := _block(name)) is not None:
            sizes[block] += placer.bytes_of(name, tensor.shape)
    return sizes


def _block(name: str) -> int | None:
    found = _BLOCK.match(name)
    return int(found.group(1)) if found else None


def _describe_errors(errors: dict[str, float]) -> tuple[tuple[str, str], ...]:
    """A row for the banner, where anything was quantized."""
    if not errors:
        return ()
    worst, mean = max(errors, key=errors.__getitem__), sum(errors.values()) / len(errors)
    text = f"relative error of {len(errors)} weights: {mean:.2%} in the mean, {errors[worst]:.2%} at worst ({worst})"
    return (("quantization", text),)
