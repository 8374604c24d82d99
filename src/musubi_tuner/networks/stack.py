"""Trained networks beside a frozen model, any number of them, each at a strength of its own for video and for sound.

Nothing is merged: choosing other files, or other strengths, changes no weight of the model and costs a read of the file. What has
strength 0 is not computed, so the model's own bits come out. Several networks add up what each alone would change:
y = W x + sum of s (W' - W) x, with W' the weight that `merging` would make; of LoRA that is the same as merging them all.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.networks.base import AddingLayer, FrozenLinear, base_device, run_base
from musubi_tuner.networks.lora import LoRALayer
from musubi_tuner.networks.reading import Linears, NetworkFile, StoredAdapter, read_network
from musubi_tuner.networks.targets import is_audio_side, linear_shapes
from musubi_tuner.networks.types import DIFF, TYPES
from musubi_tuner.runtime.draws import generator_for

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Strength:
    """Of one network; 0 is off, 1 as trained."""

    video: float
    """Of all that is not on the audio's side (`targets.is_audio_side`)."""
    audio: float

    def of(self, module: str) -> float:
        return self.audio if is_audio_side(module) else self.video

    def __mul__(self, factor: float) -> "Strength":
        return Strength(self.video * factor, self.audio * factor)


class NetworkStack:
    """The networks on one model."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, elsewhere: Linears | None = None) -> None:
        """
        Args:
            model: its linears are wrapped where a network first needs it; call it after what moves their weights is built.
            dtype: in which LoRA are multiplied.
            elsewhere: linears of streams that the model was built without; what networks do to them is left out.
        """
        self._model = model
        self._dtype = dtype
        self._built = linear_shapes(model)
        self._shapes: Linears = {**(elsewhere or {}), **self._built}
        self._wrapped: dict[str, _Stacked] = {}
        self._used: dict[Path, dict[str, AddingLayer | _Difference]] = {}

    def check(self, path: Path) -> None:
        """Read a file and see that it fits, unless it is in use.

        Raises:
            UserError: what `read_network` raises.
        """
        if path not in self._used:
            read_network(path, self._shapes)

    def use(self, networks: Sequence[tuple[Path, Strength]]) -> None:
        """From now on these, and no others. Files that were in use stay in memory, others are let go.

        Raises:
            UserError: a file that cannot be read, or was made for another model.
        """
        active = [(path, strength) for path, strength in networks if strength != Strength(0, 0)]
        wanted = {path for path, _ in active}
        self._used = {path: layers for path, layers in self._used.items() if path in wanted}
        for path in wanted - set(self._used):
            self._used[path] = self._layers(read_network(path, self._shapes))
        for stacked in self._wrapped.values():
            stacked.added = ()
        for path, strength in active:
            for name, layer in self._used[path].items():
                if factor := strength.of(name):
                    stacked = self._wrapped[name]
                    stacked.added = (*stacked.added, (layer, factor))

    def remove(self) -> None:
        """Put the model's own linears back."""
        for name, stacked in self._wrapped.items():
            owner_name, _, leaf = name.rpartition(".")
            self._model.get_submodule(owner_name).add_module(leaf, stacked.base)
        self._wrapped, self._used = {}, {}

    def _layers(self, file: NetworkFile) -> dict[str, "AddingLayer | _Difference"]:
        log.info("%s: %s", file.path.name, file.describe())
        if file.left_out:
            log.warning("WARNING: its %d adapter(s) of the text connectors are left out, first '%s'", len(file.left_out), file.left_out[0])
        return {name: self._layer(self._wrap(name).base, adapter) for name, adapter in file.adapters.items() if name in self._built}

    def _wrap(self, name: str) -> "_Stacked":
        if name not in self._wrapped:
            owner_name, _, leaf = name.rpartition(".")
            owner = self._model.get_submodule(owner_name)
            base = owner.get_submodule(leaf)
            assert isinstance(base, FrozenLinear)
            self._wrapped[name] = _Stacked(base)
            owner.add_module(leaf, self._wrapped[name])
        return self._wrapped[name]

    def _layer(self, base: FrozenLinear, adapter: StoredAdapter) -> "AddingLayer | _Difference":
        device, tensors = base_device(base), adapter.tensors
        if adapter.kind == "full":
            return _Difference(tensors, device, self._dtype)
        layer_class = TYPES[adapter.kind]
        layer = layer_class(base, replace(layer_class.spec_of(tensors), base_moves=True), generator_for(0, "replaced by what is loaded"))
        assert isinstance(layer, AddingLayer)
        layer.load(tensors)
        layer.requires_grad_(False)
        if type(layer) is LoRALayer:
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.to(self._dtype)
        return layer


class _Difference:
    """Of a weight that was trained as a whole."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self._difference = tensors[DIFF].to(device, dtype)

    def change(self, x: Tensor, y: Tensor, inner: Tensor | None) -> Tensor:
        return F.linear(x, self._difference.to(x.dtype))


class _Stacked(nn.Module):
    """A frozen linear and what is added to it."""

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__()
        self.base = base
        self.added: tuple[tuple[AddingLayer | _Difference, float], ...] = ()

    @property
    def weight(self) -> Tensor:
        """The base's, for callers that ask a linear for its dtype."""
        assert isinstance(self.base, nn.Linear)
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y = run_base(self.base, x)
        total = y
        for layer, strength in self.added:
            change = layer.change(x, y, None)
            if torch.is_grad_enabled() or change.dtype != total.dtype:
                total = total + strength * change
            else:  # the same sum, in memory that is there: of a feed-forward and a long clip each tensor more is most of a GB
                total = change.mul_(strength).add_(total)
        return total
