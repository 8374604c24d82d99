"""Strict sound: whether the items that should have sound really trained it."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed

from musubi_tuner.config.losses import SoundOptions
from musubi_tuner.dataset.items import Item
from musubi_tuner.runtime.errors import UserError


class AudioSupervision:
    """Counts on the host, from what batches know of themselves; nothing is asked of the device."""

    def __init__(self, options: SoundOptions) -> None:
        self._options = options
        self.expected = 0
        self.supervised = 0
        self._told = False

    def add(self, expected: int, supervised: int) -> None:
        """
        Args:
            expected: items of a batch that should have sound: clips, whose sound is not given.
            supervised: those of them that have it.
        """
        self.expected += expected
        self.supervised += supervised

    def check(self, step: int, device: torch.device, processes: int) -> str | None:
        """Look at the share after a step; returns a warning where the mode is `warn`, once.

        Raises:
            UserError: the share is too small, and the mode is `error`.
        """
        options = self._options
        if options.audio_supervision_mode == "off" or step <= options.audio_supervision_warmup_steps:
            return None
        expected, supervised = self._totals(device, processes)
        if not expected or supervised >= options.audio_supervision_min_ratio * expected:
            return None
        text = (
            f"step {step}: {supervised} of {expected} items that should have sound had it ({supervised / expected:.0%}); "
            f"--audio_supervision_min_ratio is {options.audio_supervision_min_ratio:g}. Clips without an audio stream "
            "are listed by ltxv2_cache_audio_latents.py; give them sound, take them out of the dataset file, or lower the ratio."
        )
        if options.audio_supervision_mode == "error":
            raise UserError(text)
        told, self._told = self._told, True
        return None if told else text

    def _totals(self, device: torch.device, processes: int) -> tuple[int, int]:
        if processes == 1:
            return self.expected, self.supervised
        totals = torch.tensor([self.expected, self.supervised], device=device)
        torch.distributed.all_reduce(totals)
        expected, supervised = totals.tolist()
        return expected, supervised

    def state_dict(self) -> dict[str, int]:
        return {"expected": self.expected, "supervised": self.supervised}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.expected, self.supervised = int(state["expected"]), int(state["supervised"])


def silence_warning(items: Sequence[Item], mode: str, audio_dop_weight: float) -> str | None:
    """What to say before a run with sound whose clips have none."""
    if mode != "av" or audio_dop_weight or any(item.clip.has_audio for item in items):
        return None
    return (
        f"--ltx_mode av, and none of the {len(items)} items has sound: the video alone is trained, and nothing holds the sound that goes "
        "with it to the base model's. Give --audio_dop_weight 1 for that, or train with --ltx_mode video."
    )
