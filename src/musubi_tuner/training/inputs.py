"""What the entry hands over."""

from dataclasses import dataclass

import torch

from musubi_tuner.config.dataset import DatasetConfig
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.dataset.items import Item
from musubi_tuner.dataset.verify import Wanted
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.runtime.processes import Processes
from musubi_tuner.training.run import Preview
from musubi_tuner.training.trackers import Trackers


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What the entry has found before the transformer is loaded."""

    config: TrainingConfig
    processes: Processes
    device: torch.device
    dtype: torch.dtype
    trackers: Trackers
    checkpoint: Checkpoint
    datasets: DatasetConfig
    items: tuple[Item, ...]
    validation_items: tuple[Item, ...]
    wanted: Wanted
    """What the caches of this run must be."""
    preview: Preview | None
