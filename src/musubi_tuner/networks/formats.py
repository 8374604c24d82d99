"""LoRA files: the one form that ComfyUI, diffusers and the official pipelines load, and the forms that we read.

Official loaders compute W + B A and never read an alpha, so alpha / rank is folded into B.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from musubi_tuner.runtime.errors import UserError

PREFIX = "diffusion_model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_KOHYA = "lora_unet_"

Factors = dict[str, tuple[Tensor, Tensor]]
"""{official module name: (A (rank, in), B (out, rank))}, scale folded into B."""

_FROM_DIFFUSERS = (
    ("av_cross_attn_video_scale_shift.", "av_ca_video_scale_shift_adaln_single."),
    ("av_cross_attn_audio_scale_shift.", "av_ca_audio_scale_shift_adaln_single."),
    ("av_cross_attn_video_a2v_gate.", "av_ca_a2v_gate_adaln_single."),
    ("av_cross_attn_audio_v2a_gate.", "av_ca_v2a_gate_adaln_single."),
    ("audio_prompt_adaln.", "audio_prompt_adaln_single."),
    ("prompt_adaln.", "prompt_adaln_single."),
    ("audio_time_embed.", "audio_adaln_single."),
    ("time_embed.", "adaln_single."),
    ("audio_proj_in.", "audio_patchify_proj."),
    ("proj_in.", "patchify_proj."),
)


def to_file(factors: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a LoRA file in the official naming."""
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"{PREFIX}{name}{_DOWN}"] = down.detach().to(device="cpu", dtype=dtype).contiguous()
        tensors[f"{PREFIX}{name}{_UP}"] = up.detach().to(device="cpu", dtype=dtype).contiguous()
    return tensors


def check_file(tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """What is about to be written must be whole, finite and not all zero.

    Raises:
        UserError: lists the tensors that are at fault.
    """
    expected = {f"{PREFIX}{name}{leaf}" for name in names for leaf in (_DOWN, _UP)}
    if expected != set(tensors):
        odd = sorted(expected ^ set(tensors))
        raise UserError(f"the LoRA is not whole: {len(odd)} tensor(s) missing or foreign, first '{odd[0]}'. Nothing was written.")
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise UserError(
            f"the LoRA holds NaN or infinity in {len(bad)} tensor(s), first '{bad[0]}'. Nothing was written; "
            "the last file that was saved is good. Lower --learning_rate and resume from there."
        )
    if all(not bool(tensor.any()) for name, tensor in tensors.items() if name.endswith(_UP)):
        raise UserError(
            "the LoRA is all zero: nothing has been learned, and a file of zeros would look like a result. Check "
            "--learning_rate and the data."
        )


def read_lora(path: Path, model_names: Sequence[str]) -> tuple[Factors, dict[str, str]]:
    """Read a LoRA in our form, in kohya's, or under diffusers' names.

    Args:
        model_names: official names of the model's linears, which flattened kohya keys are looked up in.

    Returns:
        Factors under official names, and the file's metadata.

    Raises:
        UserError: an unreadable file, a key of no known form, half of a pair, or a module that the model lacks.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such LoRA file.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}).") from error
    flattened = {name.replace(".", "_"): name for name in model_names}
    factors: Factors = {}
    for name in tensors:
        if name.endswith((_DOWN, ".lora_down.weight")):
            module, up, scale = _pair(path, name, tensors, flattened)
            factors[module] = (tensors[name].float(), up.float() * scale)
        elif not name.endswith((_UP, ".lora_up.weight", ".alpha")):
            raise UserError(f"{path}: the key '{name}' is of no LoRA form that is read here (lora_A/lora_B, lora_down/lora_up).")
    foreign = sorted(set(factors) - set(model_names))
    if foreign:
        raise UserError(
            f"{path}: adapts {len(foreign)} module(s) that this model lacks, first '{foreign[0]}'. "
            "It was made for another model or mode (an AV LoRA does not fit --ltx_mode video)."
        )
    return factors, metadata


def _pair(path: Path, name: str, tensors: Mapping[str, Tensor], flattened: Mapping[str, str]) -> tuple[str, Tensor, float]:
    """Official module name, B, and the scale to fold into it."""
    kohya = name.endswith(".lora_down.weight")
    stem = name.removesuffix(".lora_down.weight").removesuffix(_DOWN)
    up_name = stem + (".lora_up.weight" if kohya else _UP)
    if up_name not in tensors:
        raise UserError(f"{path}: '{name}' has no partner '{up_name}'; the file is damaged.")
    alpha = tensors.get(f"{stem}.alpha")
    scale = 1.0 if alpha is None else float(alpha) / tensors[name].shape[0]
    return official_name(stem, flattened), tensors[up_name], scale


def official_name(stem: str, flattened: Mapping[str, str]) -> str:
    """The official module name behind a LoRA key without its ending."""
    if stem.startswith(_KOHYA):
        key = stem.removeprefix(_KOHYA)
        return flattened.get(key, key)
    for prefix in (PREFIX, "transformer.", "base_model.model."):
        stem = stem.removeprefix(prefix)
    for theirs, ours in _FROM_DIFFUSERS:
        if stem.startswith(theirs):
            return ours + stem.removeprefix(theirs)
    return stem
