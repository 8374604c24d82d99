"""Weights that a file holds in 8 bits, and what has to be known to have the numbers back: W = codes x scale, rotated back where they
were rotated.

Forms that are read (docs/reference/model_files.md):

    fp8     `X.weight` float8, `X.weight_scale`, or ComfyUI's older `X.scale_weight` with a `scaled_fp8` marker; plain casts have no scale
    int8    `X.weight` int8 and `X.weight_scale`
    ConvRot int8 codes of W R, R block-diagonal in groups of the input axis (https://arxiv.org/abs/2512.03673)

A scale is for the tensor or for each row: (), (out,) or (out, 1). ComfyUI declares a layer's format in JSON, in a uint8 tensor
`X.comfy_quant` or in the header's metadata `_quantization_metadata` = {"layers": {"X": {...}}}. Scales of activations (`input_scale`,
`scale_input`) are for programs that multiply in 8 bits, and are left aside. Every other form is refused by its name.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.ltxv2.weights import QUANTIZATION, Checkpoint
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import parse_json

_SCALES = ("weight_scale", "scale_weight")
_DECLARATION = "comfy_quant"
_LEAVES = (*_SCALES, _DECLARATION, "input_scale", "scale_input")
"""What lies beside a weight, by the last part of its name."""
_MARKER = "scaled_fp8"

_FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8_tensorwise": torch.int8}
"""Declared formats that are read, and the dtype of their codes."""
_NEUTRAL = ("format", "convrot", "convrot_groupsize", "full_precision_matrix_mult", "orig_dtype", "orig_shape", "per_row")
"""Keys of a declaration that are understood, or that say nothing about the numbers."""
_GROUP = 256
"""Of ConvRot, where a declaration gives none."""

_REFUSED = (
    ("weight_scale_2", "NVFP4 weights"),
    ("weight_scale_inv", "fp8 weights with a scale for each block"),
    ("quant_state.bitsandbytes__nf4", "weights prequantized to 4 bits by bitsandbytes"),
    ("quant_state.bitsandbytes__fp4", "weights prequantized to 4 bits by bitsandbytes"),
    ("weight.absmax", "weights prequantized to 4 bits by bitsandbytes"),
    ("SCB", "weights prequantized to 8 bits by bitsandbytes"),
    ("wscales", "SVDQuant weights"),
    ("wtscale", "SVDQuant weights"),
    ("qweight", "weights packed into 4 bits (GPTQ, AWQ or SVDQuant)"),
)
"""Endings of names that give a form away, and what it is called."""
_REMEDY = "Training reads bf16, fp8 and int8 with a scale for each tensor or row; give the release's bf16 or fp8 file."

_NAMES = {torch.float8_e4m3fn: "fp8 e4m3", torch.float8_e5m2: "fp8 e5m2", torch.int8: "int8"}


@dataclass(frozen=True, slots=True)
class _Form:
    """How one weight is stored."""

    scale: Tensor | None
    """Of the tensor, (); or of its rows, (out, 1, ...)"""
    group: int
    """Inputs that were rotated together; 0 = none were."""

    def describe(self, dtype: torch.dtype) -> str:
        name = _NAMES.get(dtype, str(dtype).removeprefix("torch."))
        rotated = f" ConvRot (groups of {self.group})" if self.group else ""
        scales = "no scales" if self.scale is None else "one scale a row" if self.scale.ndim else "one scale a tensor"
        return f"{name}{rotated}, {scales}"


@dataclass(frozen=True, slots=True)
class Quantization:
    """What some tensors of a checkpoint are, once scales and declarations are taken out."""

    weights: Mapping[str, str]
    """{name: full name} of the tensors that belong to the model."""
    receipt: str
    """Forms and their counts, in words; empty where nothing is quantized."""
    _forms: Mapping[str, _Form]

    def holds_codes(self, name: str) -> bool:
        """Whether a tensor is stored in codes, which `restored` brings back."""
        return name in self._forms

    def restored(self, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The numbers that a stored tensor stands for, on `device` and in `dtype`; a tensor that is not quantized as it is."""
        form = self._forms.get(name)
        if form is None:
            return tensor
        return self.numbers(name, tensor.to(device), form.scale).to(dtype)

    def numbers(self, name: str, codes: Tensor, scale: Tensor | None) -> Tensor:
        """What codes of that tensor's form stand for with a scale of theirs: float32, or as they are where there is no scale."""
        form = self._forms.get(name)
        if form is None or scale is None:
            return codes
        weight = codes.float()
        if form.group:  # before the scale: sums of whole numbers are exact, in whatever precision a card multiplies
            weight = rotated(weight, form.group)
        return weight * scale.to(codes.device)

    def stored(self, name: str, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The way back: codes of `dtype` in the form that the tensor was stored in, and their new scale, () or (out, 1, ...), or None.

        Args:
            weight: float32.
        """
        form = self._forms.get(name)
        if form is None:
            return weight.to(dtype), None
        if form.scale is None:
            most = torch.finfo(dtype).max
            return weight.clamp(-most, most).to(dtype), None
        if form.group:
            weight = rotated(weight, form.group)
        return codes_of(weight, dtype, by_row=form.scale.ndim > 0)


def rotated(weight: Tensor, group: int) -> Tensor:
    """(out, in) float32 in ConvRot's form, or back from it."""
    return (weight.view(weight.shape[0], -1, group) @ _rotation(group).to(weight.device)).view_as(weight)


def codes_of(weight: Tensor, dtype: torch.dtype, *, by_row: bool) -> tuple[Tensor, Tensor]:
    """A float32 weight as codes of fp8 or int8 and the scale that they are multiplied by, (out, 1, ...) or ()."""
    most = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    largest = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True) if by_row else weight.abs().max()
    scale = (largest / most).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (weight / scale).clamp(-most, most)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def scale_of(name: str, names: Mapping[str, str]) -> str | None:
    """The name of a weight's scale, where it has one."""
    owner = name.removesuffix(".weight")
    return next((f"{owner}.{leaf}" for leaf in _SCALES if owner != name and f"{owner}.{leaf}" in names), None)


def weight_of(name: str) -> str:
    """The weight that a tensor belongs to: `X.weight` of `X.weight_scale` and its like, else the name itself."""
    owner, _, leaf = name.rpartition(".")
    return f"{owner}.weight" if leaf in _LEAVES else name


def read_quantization(checkpoint: Checkpoint, names: Mapping[str, str]) -> Quantization:
    """Tell weights from what belongs to their quantization, and read the scales.

    Args:
        names: {name in the model: full name in the checkpoint}.

    Raises:
        UserError: a form that is not read, by its name; scales of another shape, below 0 or lost; a declaration that cannot be read or
            contradicts its weight.
    """
    declared = _declarations(checkpoint, names)
    for name, layer in declared.items():
        _check_declaration(checkpoint, name, layer, names.get(name))
    for name in names:
        for ending, what in _REFUSED:
            if name.endswith(f".{ending}"):
                raise UserError(f"{checkpoint.path}: {what} ('{names[name]}'). {_REMEDY}")
    weights = {
        name: full for name, full in names.items() if not (_is_marker(name) or (weight_of(name) != name and weight_of(name) in names))
    }
    forms = {name: form for name in weights if (form := _form(checkpoint, names, name, declared)) is not None}
    counts = Counter(form.describe(checkpoint.dtype(names[name])) for name, form in forms.items())
    receipt = "; ".join(f"{what}, {count:,} linears" for what, count in sorted(counts.items()))
    return Quantization(weights, receipt, forms)


def _is_marker(name: str) -> bool:
    return name.rpartition(".")[2] == _MARKER


def _form(checkpoint: Checkpoint, names: Mapping[str, str], name: str, declared: Mapping[str, Mapping[str, Any]]) -> _Form | None:
    """None for a tensor that is stored as it is."""
    where, dtype, shape = f"{checkpoint.path}: '{names[name]}'", checkpoint.dtype(names[name]), checkpoint.shape(names[name])
    owner = name.removesuffix(".weight")
    scales = [f"{owner}.{leaf}" for leaf in _SCALES if f"{owner}.{leaf}" in names] if owner != name else []
    if len(scales) > 1:
        raise UserError(f"{where} has two scales, '{scales[0]}' and '{scales[1]}': which one is right cannot be told. {_REMEDY}")
    if dtype == torch.uint8 and owner != name:
        raise UserError(f"{where}: weights packed into 4 bits (uint8). {_REMEDY}")
    layer = declared.get(name)
    if not scales:
        if layer is not None or dtype == torch.int8:
            raise UserError(f"{where} is {_NAMES.get(dtype, dtype)} without its scale ('{owner}.weight_scale'). {_REMEDY}")
        if dtype in _NAMES and owner != name and any(other.rpartition(".")[2] in _SCALES for other in names):
            _check_plain_cast(checkpoint.tensor(names[name]), where)
        return _Form(None, 0) if dtype in _NAMES else None
    if dtype == torch.int8 and layer is None and (declared or QUANTIZATION in checkpoint.metadata):
        raise UserError(f"{where} is int8 without a declaration, which others have: whether it is rotated cannot be told. {_REMEDY}")
    group = _group(where, shape, layer)
    scale = _scale(checkpoint, names[scales[0]], where, shape)
    _check_scale(scale, lambda: checkpoint.tensor(names[name]), f"{where} and its scale '{names[scales[0]]}'")
    return _Form(scale, group)


def _scale(checkpoint: Checkpoint, full: str, where: str, weight_shape: tuple[int, ...]) -> Tensor:
    shape, dtype, rows = checkpoint.shape(full), checkpoint.dtype(full), weight_shape[0] if weight_shape else 1
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        raise UserError(f"{where}: MXFP8 weights (scales of {dtype} in blocks). {_REMEDY}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"{where} has a scale of {dtype}, which is not read. {_REMEDY}")
    if all(side == 1 for side in shape):
        return checkpoint.tensor(full).float().reshape(())
    if shape[0] != rows or any(side != 1 for side in shape[1:]):
        raise UserError(f"{where} of the shape {weight_shape} has scales of {shape}, in blocks or of another weight. {_REMEDY}")
    return checkpoint.tensor(full).float().view(-1, *(1 for _ in weight_shape[1:]))


def _check_plain_cast(codes: Tensor, where: str) -> None:
    """
    Raises:
        UserError: codes that fill the range of their dtype, as only a division by a scale leaves them.
    """
    most = torch.finfo(codes.dtype).max
    if codes.numel() and float(codes.float().abs().max()) == most:
        raise UserError(
            f"{where} is {_NAMES[codes.dtype]} with numbers up to {most:g} and without a scale, which others have: it is lost. {_REMEDY}"
        )


def _check_scale(scale: Tensor, codes: Callable[[], Tensor], where: str) -> None:
    """
    Raises:
        UserError: a scale below 0, or one of 0 for numbers that are not 0.
    """
    if bool((scale < 0).any()):
        raise UserError(f"{where}: is {float(scale.min()):g}, and a scale is above 0. {_REMEDY}")
    if bool((scale == 0).any()) and bool(codes().float().masked_select(scale == 0).any()):
        raise UserError(f"{where}: is 0 for numbers that are not, so they are lost. {_REMEDY}")


def _group(where: str, shape: tuple[int, ...], layer: Mapping[str, Any] | None) -> int:
    if layer is None or not layer.get("convrot"):
        return 0
    group = layer.get("convrot_groupsize", _GROUP)
    if type(group) is not int or group not in [4**power for power in range(1, 7)] or len(shape) != 2 or shape[1] % group:
        raise UserError(
            f"{where} of the shape {shape} is declared to be rotated in groups of {group!r}; a group is a power of 4 that divides the "
            f"inputs. {_REMEDY}"
        )
    return group


def _declarations(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """{name of a weight: its declaration}, from the metadata and from the tensors beside the weights."""
    found: dict[str, Mapping[str, Any]] = {}
    if QUANTIZATION in checkpoint.metadata:
        where = f"{checkpoint.path}: its '{QUANTIZATION}' metadata"
        content = parse_json(checkpoint.metadata[QUANTIZATION], where)
        layers = content.get("layers") if isinstance(content, dict) else None
        if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
            raise UserError(f"{where} has no 'layers', an object for each quantized layer. {_REMEDY}")
        for name, full in names.items():
            layer = layers.get(full.removesuffix(".weight"), layers.get(name.removesuffix(".weight")))
            if layer is not None and name.endswith(".weight"):
                found[name] = layer
    for name, full in names.items():
        if name.rpartition(".")[2] == _DECLARATION and weight_of(name) in names:
            where = f"{checkpoint.path}: '{full}'"
            if checkpoint.dtype(full) != torch.uint8:
                raise UserError(f"{where} is {checkpoint.dtype(full)}; a declaration is JSON in a uint8 tensor. {_REMEDY}")
            text = bytes(checkpoint.tensor(full).flatten().tolist())
            layer = parse_json(text.decode(errors="replace"), where)
            if not isinstance(layer, dict):
                raise UserError(f"{where} is no JSON object. {_REMEDY}")
            found[weight_of(name)] = layer
    return found


def _check_declaration(checkpoint: Checkpoint, name: str, layer: Mapping[str, Any], full: str | None) -> None:
    assert full is not None, "declarations are of weights that are there"
    where, form = f"{checkpoint.path}: '{full}'", layer.get("format")
    if form not in _FORMATS:
        raise UserError(f"{where}: weights in the format {form!r} of ComfyUI, which is not read ({', '.join(_FORMATS)} are). {_REMEDY}")
    unknown = [key for key, value in layer.items() if value and key not in _NEUTRAL]
    if unknown:
        raise UserError(f"{where} is declared with {unknown[0]} = {layer[unknown[0]]!r}, which is not known here. {_REMEDY}")
    if layer.get("convrot") and form != "int8_tensorwise":
        raise UserError(f"{where}: ConvRot of {form}, which is not read (int8_tensorwise is). {_REMEDY}")
    if checkpoint.dtype(full) != _FORMATS[form]:
        raise UserError(f"{where} is declared to be {form} and stored as {checkpoint.dtype(full)}. {_REMEDY}")


@cache
def _rotation(size: int) -> Tensor:
    """(size, size): the Kronecker power of a regular Hadamard matrix of 4, of length 1; symmetric, and so its own inverse."""
    step = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32) / 2
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, step)
    return matrix
