"""Texts beside the captions that a run reads from the cache: the empty prompt of dropped captions, the prompt of `--dop_prompt`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from musubi_tuner.cache.audit import reason_to_rebuild
from musubi_tuner.cache.keys import TEXT_MASK_KEY
from musubi_tuner.cache.names import prompt_path
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.config.losses import LossOptions, PreservationOptions
from musubi_tuner.dataset.collate import CaptionDropout
from musubi_tuner.dataset.merge import merge_sources
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.preservation import PromptPreservation


def caption_dropout(
    losses: LossOptions, datasets: Sequence[DatasetSpec], wanted: Mapping[str, str], video_width: int
) -> CaptionDropout | None:
    """None where every item keeps its caption.

    Args:
        wanted: metadata that a cached text of this run has.
        video_width: of the video's part of a text.

    Raises:
        UserError: the empty prompt is not cached, or for another model.
    """
    if not (losses.drops_captions or any(spec.caption_dropout_rate for spec in datasets)):
        return None
    remedy = "dropped captions are replaced by it. Run ltxv2_cache_text_encoder_outputs.py with the same --dataset_config"
    return CaptionDropout(
        both=losses.caption_dropout_rate,
        video=losses.video_caption_dropout_rate,
        audio=losses.audio_caption_dropout_rate,
        empty=_cached(datasets, "", wanted, f"{remedy}; it always caches it."),
        video_width=video_width,
    )


def prompt_preservation(
    options: PreservationOptions, datasets: Sequence[DatasetSpec], wanted: Mapping[str, str], device: torch.device
) -> PromptPreservation | None:
    """None without `--dop_prompt`.

    Raises:
        UserError: the prompt is not cached, or for another model.
    """
    prompt = options.dop_prompt
    if prompt is None or not options.dop_weight:
        return None
    remedy = "--dop_prompt needs it. Run ltxv2_cache_text_encoder_outputs.py with the same --dataset_config and --dop_prompt."
    tensors = merge_sources([_cached(datasets, prompt, wanted, remedy)])
    mask = tensors[TEXT_MASK_KEY].bool()
    return PromptPreservation(
        text=tensors["text"][None].to(device), text_mask=None if bool(mask.all()) else mask[None].to(device), weight=options.dop_weight
    )


def _cached(datasets: Sequence[DatasetSpec], prompt: str, wanted: Mapping[str, str], remedy: str) -> Path:
    path = prompt_path(datasets[0].cache_directory, prompt)  # the first dataset's folder holds all prompts
    name = f"the prompt '{prompt}'" if prompt else "the empty prompt"
    if not path.is_file():
        raise UserError(f"{path}: {name} is not cached, and {remedy}")
    if (reason := reason_to_rebuild(path, wanted, ("text", TEXT_MASK_KEY))) is not None:
        raise UserError(f"{path}: {name} is of no use ({reason}), and {remedy}")
    return path
