"""A transformer that samples: where its weights lie, in which format, and how its blocks run."""

import logging
from collections.abc import Sequence

import torch

from musubi_tuner.config.model import MemoryOptions
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.placement.load import load_for_generation
from musubi_tuner.placement.planning import place_by_hand

log = logging.getLogger(__name__)


def load_for_sampling(
    checkpoint: Checkpoint,
    options: MemoryOptions,
    *,
    mode: str,
    timestep_format: str,
    device: torch.device,
    dtype: torch.dtype,
    samples: Sequence[object],
) -> OfficialLTXV2Wrapper:
    """A model to sample `samples` with."""
    placement = place_by_hand(options, read_config(checkpoint).num_layers, device)
    return load_for_generation(checkpoint, placement, mode=mode, timestep_format=timestep_format, device=device, dtype=dtype)
