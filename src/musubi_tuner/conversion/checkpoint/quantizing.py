"""A checkpoint whose linears are stored in 8 bits: fp8 with a scale for each row, int8, or int8 ConvRot, in the form that ComfyUI declares.

Linears of the transformer's blocks alone, as programs quantize them; the first and the last blocks, and gates, stay as they are.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from musubi_tuner.conversion.checkpoint.parts import whole_metadata
from musubi_tuner.conversion.checkpoint.streaming import Part, copied
from musubi_tuner.ltxv2.quantization import codes_of, read_quantization, rotated
from musubi_tuner.ltxv2.versions import transformer_names
from musubi_tuner.ltxv2.weights import QUANTIZATION, Checkpoint
from musubi_tuner.runtime.errors import UserError

FORMATS: Mapping[str, tuple[str, torch.dtype]] = {
    "fp8": ("float8_e4m3fn", torch.float8_e4m3fn),
    "int8": ("int8_tensorwise", torch.int8),
    "int8_convrot": ("int8_tensorwise", torch.int8),
}
"""What ComfyUI's declarations call them, and the dtype of their codes."""
GROUP = 256
"""Inputs that ConvRot turns together."""
_LINEAR = re.compile(r"transformer_blocks\.(\d+)\..*(?<!to_gate_logits)\.weight")


@dataclass(slots=True)
class Errors:
    """By linear: |stored - weight| / |weight|; filled while they are written."""

    relative: dict[str, float] = field(default_factory=dict)


def quantized_parts(checkpoint: Checkpoint, form: str, *, keep_blocks: int, errors: Errors) -> tuple[list[Part], dict[str, str]]:
    """What the new file holds, and its metadata.

    Args:
        form: one of `FORMATS`.
        keep_blocks: the first and the last blocks that stay as they are.

    Raises:
        UserError: a checkpoint that is quantized already, or nothing in it that can be. What the parts make raises it where a weight is not
            finite.
    """
    names = transformer_names(checkpoint)
    if (receipt := read_quantization(checkpoint, names).receipt) or QUANTIZATION in checkpoint.metadata:
        raise UserError(f"{checkpoint.path}: is stored as {receipt or 'quantized layers'} already. Give the release's bf16 file.")
    chosen = _chosen(checkpoint, names, form, keep_blocks)
    parts: list[Part] = []
    declared, dtype = FORMATS[form]
    layers = {}
    for full in checkpoint.names():
        entry = checkpoint.entries[full]
        if full not in chosen:
            parts.append(copied(full, entry))
            continue
        one = _Quantized(checkpoint, full, form, errors)
        owner = full.removesuffix(".weight")
        parts.append(Part(full, dtype, entry.shape, one.codes))
        parts.append(Part(f"{owner}.weight_scale", torch.float32, (entry.shape[0], 1), one.scale))
        layers[owner] = {"format": declared} | ({"convrot": True, "convrot_groupsize": GROUP} if form == "int8_convrot" else {})
    return parts, whole_metadata(checkpoint) | {QUANTIZATION: json.dumps({"layers": layers})}


def _chosen(checkpoint: Checkpoint, names: Mapping[str, str], form: str, keep_blocks: int) -> set[str]:
    matches = {full: match for name, full in names.items() if (match := _LINEAR.fullmatch(name)) and len(checkpoint.shape(full)) == 2}
    count = 1 + max((int(match[1]) for match in matches.values()), default=-1)
    inner = {full for full, match in matches.items() if keep_blocks <= int(match[1]) < count - keep_blocks}
    odd: Sequence[str] = sorted(full for full in inner if form == "int8_convrot" and checkpoint.shape(full)[1] % GROUP)
    if odd:
        raise UserError(
            f"{checkpoint.path}: '{odd[0]}' takes {checkpoint.shape(odd[0])[1]} values; ConvRot turns groups of {GROUP}. Use int8."
        )
    if not inner:
        most = max(0, (count - 1) // 2)
        raise UserError(
            f"{checkpoint.path}: with --keep_blocks {keep_blocks} (the first and as many of the last stay as they are) no linear of its "
            f"{count} blocks is left to be quantized. Give --keep_blocks {most}{' or less' if most else ''}."
        )
    return inner


class _Quantized:
    """One linear: its scale is written right behind its codes, so it is kept until then."""

    def __init__(self, checkpoint: Checkpoint, full: str, form: str, errors: Errors) -> None:
        self._checkpoint, self._full, self._form, self._errors = checkpoint, full, form, errors
        self._scale: Tensor | None = None

    def codes(self) -> Tensor:
        weight = self._checkpoint.tensor(self._full).float()
        turns = self._form == "int8_convrot"
        codes, self._scale = codes_of(rotated(weight, GROUP) if turns else weight, FORMATS[self._form][1], by_row=True)
        back = codes.float() * self._scale
        norm = float(weight.double().norm())
        difference = float(((rotated(back, GROUP) if turns else back).double() - weight).norm())
        if not math.isfinite(difference):
            what = f"has values that {self._form} cannot hold" if math.isfinite(norm) else "holds NaN or infinity"
            raise UserError(f"{self._checkpoint.path}: '{self._full}' {what}. `ltxv2 checkpoint verify` names all such tensors.")
        self._errors.relative[self._full] = difference / norm if norm else 0.0
        return codes

    def scale(self) -> Tensor:
        assert self._scale is not None, "codes come first"
        scale, self._scale = self._scale, None
        return scale


def by_kind(errors: Errors) -> list[tuple[str, int, float, float]]:
    """(kind of linear, count, error in the mean, largest error), the worst kind first."""
    groups: dict[str, list[float]] = {}
    for full, error in errors.relative.items():
        kind = re.sub(r".*transformer_blocks\.\d+\.", "", full).removesuffix(".weight")
        groups.setdefault(kind, []).append(error)
    rows = [(kind, len(values), sum(values) / len(values), max(values)) for kind, values in groups.items()]
    return sorted(rows, key=lambda row: -row[3])
