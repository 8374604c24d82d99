"""Texts beside the captions that a run reads from the cache: the empty prompt of dropped captions, the prompt of `--dop_prompt`."""

from collections.abc import Sequence
from pathlib import Path

import torch

from musubi_tuner.cache.audit import reason_to_rebuild
from musubi_tuner.cache.names import TEXT_MASK_KEY, prompt_path
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.config.losses import LossOptions, PreservationOptions
from musubi_tuner.dataset.collate import CaptionDropout
from musubi_tuner.dataset.merge import merge_sources
from musubi_tuner.dataset.verify import Wanted
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.preservation import PromptPreservation


def caption_dropout(losses: LossOptions, datasets: Sequence[DatasetSpec], wanted: Wanted, video_width: int) -> CaptionDropout | None:
    """None where every item keeps its caption.

    Args:
        wanted: what the caches of this run must be.
        video_width: of the video's part of a text.

    Raises:
        UserError: the empty prompt is not cached, or for another model.
    """
    if not (losses.drops_captions or any(spec.caption_dropout_rate for spec in datasets)):
        return None
    return CaptionDropout(
        both=losses.caption_dropout_rate,
        video=losses.video_caption_dropout_rate,
        audio=losses.audio_caption_dropout_rate,
        empty=_cached(datasets, "", wanted, "dropped captions are replaced by it", ""),
        video_width=video_width,
    )


def prompt_preservation(
    options: PreservationOptions, datasets: Sequence[DatasetSpec], wanted: Wanted, device: torch.device
) -> PromptPreservation | None:
    """None without `--dop_prompt`.

    Raises:
        UserError: the prompt is not cached, or for another model.
    """
    prompt = options.dop_prompt
    if prompt is None or not options.dop_weight:
        return None
    quoted = f' --dop_prompt "{prompt}"'
    tensors = merge_sources([_cached(datasets, prompt, wanted, "--dop_prompt needs it", quoted)])
    mask = tensors[TEXT_MASK_KEY].bool()
    return PromptPreservation(
        text=tensors["text"][None].to(device), text_mask=None if bool(mask.all()) else mask[None].to(device), weight=options.dop_weight
    )


def _cached(datasets: Sequence[DatasetSpec], prompt: str, wanted: Wanted, why: str, flags: str) -> Path:
    path = prompt_path(datasets[0].cache_directory, prompt)  # the first dataset's folder holds all prompts
    reason = reason_to_rebuild(path, {"kind": "text", **wanted.text}, ("text", TEXT_MASK_KEY))
    if reason is not None:
        name, program = f"the prompt '{prompt}'" if prompt else "the empty prompt", "ltxv2_cache_text_encoder_outputs.py"
        raise UserError(
            f"{path}: {name} is not cached as it should be ({reason}), and {why}. "
            f"Run, then start training again:\n  python {program} {wanted.arguments[program]}{flags}"
        )
    return path
