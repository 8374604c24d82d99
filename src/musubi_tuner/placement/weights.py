"""From a checkpoint to the frozen transformer of a run, each weight where and as its placement says."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from musubi_tuner.ltxv2.transformer.load import STREAMS, load_transformer, read_config
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.memory.quantized import LowBitPlacer
from musubi_tuner.memory.regions import Gather, Region, share_regions
from musubi_tuner.placement.adapters import Place
from musubi_tuner.placement.planning import Placement

LOW_BIT = re.compile(r"transformer_blocks\.(\d+)\.\w*(attn\w*\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))\.weight")
"""Weights that few bits suffice for."""

_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Weights:
    """The frozen model, as it is placed."""

    transformer: LTXModel
    errors: dict[str, float]
    """Relative error of each quantized weight."""
    regions: list[Region]
    """Host memory of the streamed blocks, in their order."""


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
    """
    Args:
        whole: linears that are not quantized whatever `placement` says.
        gather: over the processes that load together.
        before: wraps what places a weight, for changes to it that come before.
    """

    def low_bit(name: str) -> bool:
        return bool(LOW_BIT.fullmatch(name)) and _block(name) not in placement.kept and name.removesuffix(".weight") not in whole

    regions: dict[int | None, Region] = {}
    placer = LowBitPlacer(
        device=device,
        dtype=dtype,
        weight_format=placement.weight_format,
        low_bit=low_bit,
        region_of=lambda name: regions.get(_block(name)),
    )
    if placement.streamed:
        sizes = _block_bytes(checkpoint, mode, placer)
        regions |= zip(placement.streamed, _regions([sizes[index] for index in placement.streamed], placement.sharers, gather), strict=True)
    transformer = load_transformer(checkpoint, mode=mode, device=device, dtype=dtype, timestep_rule=timestep_rule, place=before(placer))
    placer.swap_linears(transformer)
    return Weights(transformer, placer.errors, list(regions.values()))


def _regions(sizes: list[int], sharers: int, gather: Gather) -> list[Region]:
    if sharers == 1:
        return Region.of_own(sizes)
    regions = share_regions(sizes, gather)
    assert regions is not None, "it was tried before the run was planned"
    return regions


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
