"""LoRAs baked into a checkpoint: its own names, dtypes, quantized forms and metadata, with the weights that the LoRAs change changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from musubi_tuner.conversion.checkpoint.components import model_names
from musubi_tuner.conversion.checkpoint.parts import whole_metadata
from musubi_tuner.conversion.checkpoint.streaming import Part, copied
from musubi_tuner.conversion.lora.contents import LoraContents
from musubi_tuner.ltxv2.quantization import Quantization, read_quantization, scale_of
from musubi_tuner.ltxv2.versions import detect_version
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.networks.formats import BAKED_KEY
from musubi_tuner.networks.merging import merge_weight
from musubi_tuner.networks.release import check_release
from musubi_tuner.networks.shapes import adapted_shape
from musubi_tuner.networks.stack import Strength
from musubi_tuner.runtime.errors import UserError


@dataclass(slots=True)
class Baked:
    """Filled while weights are written, by official module name."""

    changed: dict[str, float] = field(default_factory=dict)
    """|stored - weight| / |weight|."""
    rounded: dict[str, float] = field(default_factory=dict)
    """What storing it lost: |stored - wanted| / |wanted - weight|, a share of the change."""


def baked_parts(checkpoint: Checkpoint, loras: Sequence[tuple[LoraContents, Strength]], baked: Baked) -> tuple[list[Part], dict[str, str]]:
    """What the new file holds, in the order of the old one, and its metadata.

    Raises:
        UserError: a module that the checkpoint lacks, or has in another size, a LoRA of another release, or nothing that would change. What
            the parts make raises it where a weight would be NaN or infinity in the checkpoint's dtype.
    """
    version = detect_version(checkpoint)
    for contents, _ in loras:
        check_release(contents.path, contents.metadata, version, named=str(checkpoint.path))
    names = model_names(checkpoint)
    quantization = read_quantization(checkpoint, names)
    modules: dict[str, list[tuple[LoraContents, float]]] = {}
    for contents, strength in loras:
        for module in contents.adapters:
            if f"{module}.weight" not in quantization.weights:
                raise UserError(f"{checkpoint.path}: has no '{module}', which {contents.path} adapts. It was made for another model.")
            _check_size(checkpoint, quantization.weights[f"{module}.weight"], contents, module)
            if factor := strength.of(module):
                modules.setdefault(module, []).append((contents, factor))
    if not modules:
        raise UserError("--lora: at strength 0 no weight would change; the checkpoint would be the same. Give another strength.")
    makers: dict[str, Part] = {}
    for module, some in modules.items():
        name = f"{module}.weight"
        full, scale = names[name], scale_of(name, names)
        merged = _Merged(checkpoint, names, quantization, name, some, baked)
        makers[full] = Part(full, checkpoint.dtype(full), checkpoint.shape(full), merged.codes)
        if scale is not None:
            makers[names[scale]] = Part(names[scale], checkpoint.dtype(names[scale]), checkpoint.shape(names[scale]), merged.scale)
    parts = [makers.get(full) or copied(full, checkpoint.entries[full]) for full in checkpoint.names()]
    said = ", ".join(f"{contents.path.name} x {one.video:g} (sound {one.audio:g})" for contents, one in loras)
    before = checkpoint.metadata.get(BAKED_KEY)
    return parts, whole_metadata(checkpoint) | {BAKED_KEY: f"{before}, {said}" if before else said}


def _check_size(checkpoint: Checkpoint, full: str, contents: LoraContents, module: str) -> None:
    adapter, size = contents.adapters[module], checkpoint.shape(full)
    own = adapted_shape(adapter.kind, adapter.stored)
    if own != size:
        raise UserError(
            f"{contents.path}: '{module}' is for a weight of {own} and does not fit {checkpoint.path}, whose is {size}. "
            "It was made for another model."
        )


class _Merged:
    """One weight, whose codes and scale may stand in either order in the file."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Mapping[str, str],
        quantization: Quantization,
        name: str,
        loras: Sequence[tuple[LoraContents, float]],
        baked: Baked,
    ) -> None:
        self._checkpoint, self._names, self._quantization, self._name = checkpoint, names, quantization, name
        self._loras, self._baked = loras, baked
        self._scale: Tensor | None = None

    def codes(self) -> Tensor:
        return self._make()[0]

    def scale(self) -> Tensor:
        scale, name = self._scale if self._scale is not None else self._make()[1], scale_of(self._name, self._names)
        assert scale is not None and name is not None
        entry = self._checkpoint.entries[self._names[name]]
        return scale.reshape(entry.shape).to(entry.dtype)

    def _make(self) -> tuple[Tensor, Tensor | None]:
        full, module = self._names[self._name], self._name.removesuffix(".weight")
        stored = self._checkpoint.tensor(full)
        plain = self._quantization.restored(self._name, stored, torch.device("cpu"), torch.float32).float()
        wanted = plain.clone()
        for contents, factor in self._loras:
            try:
                wanted += merge_weight(plain, contents.adapters[module], factor) - plain
            except ValueError as error:
                raise UserError(f"{contents.path}: '{module}' does not fit {self._checkpoint.path} ({error}).") from error
        codes, self._scale = self._quantization.stored(self._name, wanted, stored.dtype)
        back = self._quantization.numbers(self._name, codes, self._scale).float()
        if not bool((wanted.isfinite() & back.isfinite()).all()):
            paths = ", ".join(str(contents.path) for contents, _ in self._loras)
            raise UserError(
                f"{self._checkpoint.path}: with {paths} baked in, '{full}' would hold NaN or infinity in "
                f"{str(stored.dtype).removeprefix('torch.')}. Lower the strength, or bake into a checkpoint in bfloat16."
            )
        change, norm = _distance(wanted, plain), _distance(plain, torch.zeros(()))
        self._baked.changed[module] = _distance(back, plain) / max(norm, torch.finfo(torch.float32).tiny)
        self._baked.rounded[module] = _distance(back, wanted) / change if change else 0.0
        return codes, self._scale


def _distance(one: Tensor, other: Tensor) -> float:
    """In float64: squares of large weights are beyond float32."""
    return float((one.double() - other.double()).norm())
