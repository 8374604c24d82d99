"""How long clips are whose prompts do not say so: as long as LTX-2.5's duration head predicts from their text."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from musubi_tuner.generation.contexts import TextContext, load_contexts, remembering
from musubi_tuner.generation.setting import Setting
from musubi_tuner.ltxv2.text.duration import DurationHead, frames_of
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.versions import detect_version
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.prompts.prompt import PreviewPrompt
from musubi_tuner.prompts.sample_prompts import check_prompt
from musubi_tuner.runtime.errors import UserError

log = logging.getLogger(__name__)

_BEFORE = (2, 3)
"""The last model without one."""


def timed(prompts: Sequence[PreviewPrompt], setting: Setting) -> tuple[tuple[PreviewPrompt, ...], Setting]:
    """The prompts, those that name no frames with the predicted ones, and the setting, whose texts are not encoded twice.

    Raises:
        UserError: a head of another model, texts that are neither cached nor can be encoded, or frames of a prompt's files that lie behind
            its predicted end.
    """
    path = setting.config.model.duration_head
    if path is None:
        return tuple(prompts), setting
    head, config = DurationHead.load(open_checkpoint(path)), read_config(setting.files.transformer)
    ours, version = (config.video_context_width, config.audio_context_width), detect_version(setting.files.transformer)
    if head.widths != ours or tuple(map(int, version.split("."))) <= _BEFORE:
        raise UserError(
            f"--duration_head {path}: reads texts as LTX-2.5 has them, contexts of {head.widths[0]} and {head.widths[1]} values, and "
            f"{setting.files.transformer.path.name} is LTX-{version}, with {ours[0]} and {ours[1]}. Leave it out, and give --f in the "
            "prompt or --sample_frames."
        )
    setting = dataclasses.replace(setting, texts=remembering(setting.texts))
    texts = list(dict.fromkeys(prompt.prompt for prompt in prompts if not prompt.names_frames))
    both = (sum(ours), ours[0]) if setting.config.model.ltx_mode == "video" else (sum(ours),)
    contexts = load_contexts(texts, setting.texts, widths=both) if texts else {}
    return tuple(_timed(prompt, contexts, head, config, path) for prompt in prompts), setting


def _timed(
    prompt: PreviewPrompt, contexts: dict[str, TextContext], head: DurationHead, config: TransformerConfig, path: Path
) -> PreviewPrompt:
    if prompt.names_frames:
        return prompt
    context = contexts[prompt.prompt]
    text = context.text if context.mask is None else context.text[:, context.mask[0]]
    video, audio = text[..., : config.video_context_width], text[..., config.video_context_width :]
    seconds = head.seconds(video, audio if audio.shape[-1] else None)
    if math.isnan(seconds):
        raise UserError(f"--duration_head {path}: predicts no number for '{prompt.prompt[:40]}'. The file is damaged: download it again.")
    frames = frames_of(seconds, prompt.fps)
    log.info("prompt %d: %s predicts %.2f s; it gets %d frames, %.2f s", prompt.index, path.name, seconds, frames, frames / prompt.fps)
    where = f"{prompt.where} (of {frames} frames by --duration_head; --f gives others)"
    found = dataclasses.replace(prompt, frames=frames, names_frames=True, where=where)
    check_prompt(found)
    return dataclasses.replace(found, where=prompt.where)
