"""Automatic weight of the audio loss: keeps it at a third of the video loss, raising or lowering it.

multiplier = 0.33 * ema(video) / ema(audio), within 0.05 to 20; the averages are of raw losses, over items whose stream is supervised,
with a decay of 0.99 a step and corrected for their start at zero. Everything stays on the device.
"""

import torch
import torch.distributed
from torch import Tensor

from musubi_tuner.training.objective import ItemLosses

TARGET, DECAY, LEAST, MOST = 0.33, 0.99, 0.05, 20.0


class AudioBalance:
    """The averages of one run; 1 until both streams have been heard of."""

    def __init__(self, device: torch.device) -> None:
        self._averages = torch.zeros(2, dtype=torch.float64, device=device)
        """Of video and audio, not corrected."""
        self._weights = torch.zeros(2, dtype=torch.float64, device=device)
        """What the averages have seen of 1."""
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def multiplier(self) -> Tensor:
        """() float32, from the steps before this one, so that all micro-batches and processes of a step use the same."""
        known = (self._weights > 0).all()
        corrected = self._averages / self._weights.clamp(min=1e-12)
        ratio = TARGET * corrected[0] / corrected[1].clamp(min=1e-12)
        return torch.where(known, ratio.clamp(LEAST, MOST), torch.ones_like(ratio)).float()

    def add(self, losses: ItemLosses, video_weight: Tensor, audio_weight: Tensor) -> None:
        """Take in a micro-batch; sound that is absent or given has no part in it, nor have items that weigh nothing.

        Args:
            video_weight, audio_weight: (B,).
        """
        rows = ((losses.video, losses.video_present, video_weight), (losses.audio, losses.audio_present, audio_weight))
        for place, (values, present, weight) in enumerate(rows):
            if values is not None:
                counted = weight > 0 if present is None else present & (weight > 0)
                self._sums[2 * place] += (values.detach().double() * counted).sum()
                self._sums[2 * place + 1] += counted.double().sum()

    def step(self, processes: int) -> None:
        """End an optimizer step."""
        if processes > 1:
            torch.distributed.all_reduce(self._sums)
        sums, counts = self._sums[0::2], self._sums[1::2]
        seen = counts > 0
        means = sums / counts.clamp(min=1)
        self._averages = torch.where(seen, DECAY * self._averages + (1 - DECAY) * means, self._averages)
        self._weights = torch.where(seen, DECAY * self._weights + (1 - DECAY), self._weights)
        self._sums = torch.zeros_like(self._sums)

    def state_dict(self) -> dict[str, Tensor]:
        return {"averages": self._averages, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._averages = state["averages"].to(self._averages)
        self._weights = state["weights"].to(self._weights)


def at_bound(multiplier: float) -> str | None:
    """What to say where the balance would go further than it may."""
    if multiplier <= LEAST * (1 + 1e-6):
        return f"the audio loss is so large that its weight rests at the lowest allowed, {LEAST}"
    if multiplier >= MOST * (1 - 1e-6):
        return f"the audio loss is so small that its weight rests at the highest allowed, {MOST:g}"
    return None
