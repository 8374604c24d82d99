"""What came of flags that were left to their defaults: kept in a recipe beside what was typed, as defaults may change.

It is no part of what tells clips from each other (`Recipe.digest`): a clip is the same whether its scales were typed or not.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from musubi_tuner.flow.guidance import GuidanceScales, defaults_for
from musubi_tuner.generation.pipelines import FIXED_STEPS, HQ, HQ_STEPS, Stage
from musubi_tuner.generation.sampling import SamplingPlan

_RELEASES = ("2.0", "2.3", "2.5")
_LOW_BIT_FORMATS = ("fp8", "int8", "nf4")
_OF_BOTH = ("stg_scale", "rescale_scale", "modality_scale")
"""Flags that hold for the sound too, where its own, which begin with `audio_`, are not given."""


def used_by(stages: Sequence[Stage], pipeline: str, *, version: str, num_layers: int, dtype: torch.dtype) -> dict[str, Any]:
    """Of one clip: its stages' steps, and guidance by the names of its flags, where the pipeline has any."""
    used: dict[str, Any] = {
        "release": version,
        "blocks": num_layers,
        "dtype": str(dtype).removeprefix("torch."),
        "stages": [_stage(stage.plan) for stage in stages],
    }
    if pipeline not in FIXED_STEPS:
        first = stages[0].plan
        used["guidance"] = _flags(first.video, first.audio, first.steps, first.stg_blocks)
    return used


def changed_defaults(used: Mapping[str, Any], typed: Mapping[str, Any], pipeline: Any) -> dict[str, Any]:
    """The values that a clip was made with, of flags that were not typed and would be others today.

    Args:
        used: a recipe's; not trusted, so what comes of it is still to be checked as flags are.
        typed: values by flag, None where nothing was typed.
    """
    then, release, blocks = used.get("guidance"), used.get("release"), used.get("blocks")
    if not isinstance(then, dict) or release not in _RELEASES or not isinstance(blocks, int):
        return {}
    defaults = defaults_for(release)
    video, audio, steps = (HQ["video"], HQ["audio"], HQ_STEPS) if pipeline == "hq" else (defaults.video, defaults.audio, defaults.steps)
    now = _flags(video, audio, steps, [min(block, blocks - 1) for block in defaults.stg_blocks])
    now |= {f"audio_{name}": typed[name] for name in _OF_BOTH if typed.get(name) is not None}
    left = [name for name in now if typed.get(name) in (None, []) and name in then]
    changed = {name: then[name] for name in left if then[name] != now[name]}
    own = [f"audio_{name}" for name in _OF_BOTH if name in changed]  # or the sound would follow the pictures
    return changed | {name: then[name] for name in own if name in left}


def changed_format(used: Mapping[str, Any], typed: Any) -> dict[str, str]:
    """The low-bit format that a memory plan chose for a clip's weights, as another plan, by another card or with less of it free, may
    choose another. Weights as they are need no flag: they are what a plan takes where there is room.

    Args:
        used: as of `changed_defaults`.
        typed: `--weight_format` of the recipe.
    """
    formats = used.get("weight_formats")
    if typed != "auto" or not isinstance(formats, list) or len(formats) == 0 or any(one != formats[0] for one in formats):
        return {}
    return {"weight_format": formats[0]} if formats[0] in _LOW_BIT_FORMATS else {}


def _flags(video: GuidanceScales, audio: GuidanceScales, steps: int, stg_blocks: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = {"sample_steps": steps, "stg_blocks": list(stg_blocks)}
    found |= {"video_cfg_scale": video.cfg, "audio_cfg_scale": audio.cfg}
    for name in _OF_BOTH:
        scale = name.removesuffix("_scale")
        found |= {name: getattr(video, scale), f"audio_{name}": getattr(audio, scale)}
    return found


def _stage(plan: SamplingPlan) -> dict[str, Any]:
    return {
        "steps": plan.steps,
        "sampler": plan.sampler,
        "sigmas": [round(sigma, 6) for sigma in plan.sigmas.tolist()],
        "stg_blocks": list(plan.stg_blocks),
        **{stream: dataclasses.asdict(plan.scales(stream)) for stream in plan.streams},
    }
