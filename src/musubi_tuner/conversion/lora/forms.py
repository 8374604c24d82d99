"""The namings in which programs store a LoRA: what a file, or PEFT's folder, of each of them holds.

| form      | keys                                                    | scale                       | read by                           |
|-----------|---------------------------------------------------------|-----------------------------|-----------------------------------|
| official  | `diffusion_model.<official module>.lora_A.weight`       | folded in                   | official code, ComfyUI, diffusers |
| diffusers | `transformer.<diffusers' module>.lora_A.weight`         | folded in                   | diffusers                         |
| kohya     | `lora_unet_<official module, _ for .>.lora_down.weight` | `.alpha` beside each module | ComfyUI, kohya's tools            |
| peft      | `base_model.model.<diffusers' module>.lora_A.weight`    | `adapter_config.json`       | PEFT on diffusers' transformer    |

LyCORIS' types keep their leaves, and have the prefix `lycoris_` in kohya's naming. Diffusers and PEFT know LoRA and DoRA alone.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.conversion.lora.contents import LoraContents, require_kinds, unscaled
from musubi_tuner.ltxv2.transformer.diffusers_names import diffusers_module
from musubi_tuner.networks.base import Tensors
from musubi_tuner.networks.formats import DORA_SCALE, PREFIX
from musubi_tuner.networks.keys import ALPHA, is_text_side
from musubi_tuner.networks.lora import DOWN, MAGNITUDE, UP
from musubi_tuner.networks.reading import StoredAdapter
from musubi_tuner.runtime.errors import UserError

FORMS = ("official", "diffusers", "kohya", "peft")
WITH_ALPHA = ("kohya", "peft")
"""Those that keep the scale beside the tensors."""
_KOHYA_LEAVES = {DOWN: "lora_down.weight", UP: "lora_up.weight", MAGNITUDE: DORA_SCALE}
_LORA_AND_DORA = ("lora", "dora")


@dataclass(frozen=True, slots=True)
class Formed:
    """What is to be written."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None = None
    """Of PEFT's folder."""


def formed(contents: LoraContents, form: str, dtype: torch.dtype) -> Formed:
    """A LoRA in one of `FORMS`. Lengths of DoRA stay float32.

    Raises:
        UserError: an adapter that the form has no place for.
    """
    if form in ("diffusers", "peft"):
        require_kinds(
            contents,
            _LORA_AND_DORA,
            f"the form '{form}' holds LoRA and DoRA alone",
            "`resize --rank N` makes a LoRA of it, with its error.",
        )
        for name in contents.adapters:
            if is_text_side(name):
                raise UserError(
                    f"{contents.path}: '{name}' is of the text connectors, which '{form}' has no place for beside the transformer. "
                    "Take it out first: strip --remove connectors."
                )
    if form == "kohya":
        return Formed({key: value for name, one in contents.adapters.items() for key, value in _kohya(name, one, dtype).items()})
    if form == "peft":
        return _peft(contents, dtype)
    named = {name if form == "official" else diffusers_module(name): one for name, one in contents.adapters.items()}
    prefix = PREFIX if form == "official" else "transformer."
    return Formed({f"{prefix}{name}.{leaf}": value for name, one in named.items() for leaf, value in _cast(one.tensors, dtype).items()})


def rounding(contents: LoraContents, form: str, dtype: torch.dtype) -> float:
    """What writing it in a form and a dtype loses: the largest difference of a tensor, as a share of its norm."""
    worst = 0.0
    for adapter in contents.adapters.values():
        tensors = unscaled(adapter) if form in WITH_ALPHA else adapter.tensors
        for leaf, value in tensors.items():
            if leaf != MAGNITUDE and (norm := float(value.norm())):
                worst = max(worst, float((value.to(dtype).float() - value).norm()) / norm)
    return worst


def vanished(contents: LoraContents, form: str, dtype: torch.dtype) -> list[str]:
    """Modules that change something, and of which a tensor's values are all too small for a dtype."""
    found = []
    for name, adapter in contents.adapters.items():
        tensors = unscaled(adapter) if form in WITH_ALPHA else adapter.tensors
        if any(bool(value.any()) and not bool(value.to(dtype).any()) for leaf, value in tensors.items() if leaf != MAGNITUDE):
            found.append(name)
    return found


def _cast(tensors: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    return {leaf: (value.float() if leaf == MAGNITUDE else value.to(dtype)).contiguous() for leaf, value in tensors.items()}


def _kohya(name: str, adapter: StoredAdapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """With the scale as the file that was read had it, so that nothing is rounded."""
    prefix = "lora_unet_" if adapter.kind in (*_LORA_AND_DORA, "full") else "lycoris_"
    stem = f"{prefix}{name.replace('.', '_')}"
    tensors = {f"{stem}.{_KOHYA_LEAVES.get(leaf, leaf)}": value for leaf, value in _cast(unscaled(adapter), dtype).items()}
    if f"{stem}.{DORA_SCALE}" in tensors:
        tensors[f"{stem}.{DORA_SCALE}"] = tensors[f"{stem}.{DORA_SCALE}"][:, None]
    if adapter.rank:
        tensors[f"{stem}.{ALPHA}"] = torch.tensor(adapter.scale * adapter.rank)
    return tensors


def _peft(contents: LoraContents, dtype: torch.dtype) -> Formed:
    adapters = {diffusers_module(name): one for name, one in contents.adapters.items()}
    ranks = {name: one.rank for name, one in adapters.items()}
    alphas = {name: one.rank * one.scale for name, one in adapters.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    is_dora = {one.kind == "dora" for one in adapters.values()}
    if len(is_dora) > 1:
        raise UserError(f"{contents.path}: holds LoRA and DoRA; PEFT's folder holds one of them. Use another form.")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "r": rank,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(adapters),
        "task_type": None,
        "use_dora": True in is_dora,
        "use_rslora": False,
    }
    tensors = {}
    for name, one in adapters.items():
        for leaf, value in _cast(unscaled(one), dtype).items():
            tensors[f"base_model.model.{name}.{leaf}"] = value
    return Formed(tensors, config)


def _commonest(values: Mapping[str, float]) -> Any:
    return max(set(values.values()), key=list(values.values()).count)


def config_text(config: Mapping[str, Any]) -> str:
    """PEFT's `adapter_config.json`."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
