"""Captions of a batch: dropped in a share of the items, stacked, padded where they are features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from musubi_tuner.dataset.items import Item
from musubi_tuner.dataset.merge import merge_sources, stack_equal


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionDropout:
    """Shares of items whose text is replaced by the empty prompt's, in both streams or in one."""

    both: float
    video: float
    audio: float
    empty: Path
    """Cache file of the empty prompt."""
    video_width: int
    """Of the video's part of a text."""

    def apply(self, tensors: dict[str, Tensor], generator: torch.Generator, own_share: float | None) -> dict[str, Tensor]:
        """An item's tensors, with its `text` (S, W) replaced, and `text_mask` (S,) where the whole text is.

        Args:
            own_share: of the item's dataset, in place of `both`.
        """
        text = tensors["text"]
        shares = (self.both if own_share is None else own_share, self.video, self.audio)
        both, video, audio = (
            share > lot for share, lot in zip(shares, torch.rand(3, generator=generator, dtype=torch.float64).tolist(), strict=True)
        )
        if not (both or video or audio):
            return tensors
        found = merge_sources([self.empty])
        width = min(text.shape[1], found["text"].shape[1])  # --ltx_mode video reads texts that were cached with those of the sound, too
        text, empty = text[:, :width], found["text"][:, :width].to(text.dtype)
        alone = text.shape[1] <= self.video_width
        if both or (video and (audio or alone)):
            masks = {"text_mask": found["text_mask"]} if "text_mask" in tensors and "text_mask" in found else {}
            return tensors | {"text": empty} | masks
        parts = (empty, text) if video else (text, empty)
        return tensors | {"text": torch.cat([parts[0][:, : self.video_width], parts[1][:, self.video_width :]], dim=-1)}


def stack_text(items: Sequence[Item], merged: Sequence[Mapping[str, Tensor]], *, features: bool) -> tuple[Tensor, Tensor | None]:
    """(B, S, W) texts, and (B, S) bool which of their tokens are real, None = all.

    Args:
        features: texts are of unequal length, as they come before the connectors.
    """
    if features:
        texts = [tensors["text"] for tensors in merged]
        lengths = torch.tensor([text.shape[0] for text in texts])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        return pad_sequence(texts, batch_first=True), None if bool(mask.all()) else mask
    text = stack_equal(items, merged, "text")
    if not all("text_mask" in tensors for tensors in merged):
        return text, None
    mask = stack_equal(items, merged, "text_mask").bool()
    return text, None if bool(mask.all()) else mask
