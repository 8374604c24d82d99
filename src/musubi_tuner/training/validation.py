"""Held-out loss on fixed noise and a fixed grid of noise levels, so that two readings differ by the model alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from musubi_tuner.dataset.collate import DrawRules, make_batch
from musubi_tuner.dataset.items import Item
from musubi_tuner.dataset.sampler import Draw
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.training.metrics import LossMeter
from musubi_tuner.training.step import StepInputs, item_losses

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, kw_only=True, slots=True)
class Validator:
    """The held-out items of this process."""

    items: Sequence[Item]
    mode: str
    rules: DrawRules
    device: torch.device
    processes: int

    @torch.no_grad()
    def run(self, wrapper: OfficialLTXV2Wrapper) -> dict[str, float]:
        """Mean loss of each stream over items and `SIGMAS`, under `validation/...`, and of each sigma apart."""
        values: dict[str, float] = {}
        meters = {sigma: LossMeter(self.device) for sigma in SIGMAS}
        for item in self.items:
            batch = make_batch([Draw(item, epoch=0, repeat=0)], self.mode, self.rules).to(self.device)
            for sigma, meter in meters.items():
                level = torch.full((1,), sigma, device=self.device)
                meter.add(item_losses(wrapper, batch, StepInputs(video_sigma=level, audio_sigma=level)), 1, batch.audio_supervised)
        readings = {sigma: meter.read(self.mode, self.processes) for sigma, meter in meters.items()}
        for name in ("loss_video", "loss_audio"):
            found = {sigma: reading[name] for sigma, reading in readings.items() if name in reading}
            if found:
                values[f"validation/{name}"] = sum(found.values()) / len(found)
                values |= {f"validation/{name}_sigma{sigma}": value for sigma, value in found.items()}
        return values
