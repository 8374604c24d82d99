"""The adapters of one model: what is trained, saved, started from and switched off."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.ltxv2.versions import CONNECTORS
from musubi_tuner.networks.arguments import NetworkArguments
from musubi_tuner.networks.base import AdapterLayer, Masks, ShapeMismatch
from musubi_tuner.networks.formats import Contents, check_file, file_keys, to_file
from musubi_tuner.networks.lora import LoRALayer
from musubi_tuner.networks.reading import NetworkFile
from musubi_tuner.networks.targets import count_by_stream, is_audio_side
from musubi_tuner.runtime.errors import UserError

log = logging.getLogger(__name__)

DYNAMIC = "Dynamic"
"""What metadata say of a rank or alpha that is not the same in all modules, as kohya's do."""


class LoRANetwork:
    """Layers of one type (`kind`: lora, dora, lokr, loha or full) by official module name."""

    def __init__(self, layers: Mapping[str, AdapterLayer], arguments: NetworkArguments, kind: str) -> None:
        self.layers = dict(layers)
        self.arguments = arguments
        self.kind = kind
        self._dropout = _dropout_rules(self.layers)

    @property
    def names(self) -> list[str]:
        return list(self.layers)

    @property
    def max_rank(self) -> int:
        """The most that the second product of a LoRA or DoRA contracts; 1 for types that have no thin products."""
        return max(layer.rank if isinstance(layer, LoRALayer) else 1 for layer in self.layers.values())

    @property
    def rank_and_alpha(self) -> tuple[int | str, float | str]:
        """Of all layers, as metadata have them: "Dynamic" where they differ."""
        specs = [layer.spec for layer in self.layers.values()]
        ranks, alphas = {spec.rank for spec in specs}, {spec.alpha for spec in specs}
        return (ranks.pop() if len(ranks) == 1 else DYNAMIC, alphas.pop() if len(alphas) == 1 else DYNAMIC)

    @property
    def trains_base_weights(self) -> bool:
        """Full fine-tuning; reference conditioning needs an adapter and refuses it."""
        return self.kind == "full"

    def describe(self) -> str:
        """Type, rank and alpha in a few words, for the banner and the metadata."""
        specs = {(layer.spec.rank, layer.spec.alpha) for layer in self.layers.values()}
        if self.kind == "full":
            return "full weights"
        shown = ", ".join(f"rank {rank} alpha {alpha:g}" for rank, alpha in sorted(specs)[:4])
        return f"{self.kind} {shown}{', ...' if len(specs) > 4 else ''}"

    def parameters(self) -> list[nn.Parameter]:
        """Every trained tensor, in a fixed order."""
        return list(self.named_parameters().values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{leaf}": parameter for name, layer in self.layers.items() for leaf, parameter in layer.named_parameters(recurse=False)
        }

    def parameter_groups(self, learning_rate: float, audio_learning_rate: float | None = None) -> list[dict[str, Any]]:
        """Groups for an optimizer, each with its `lr`; those that are empty are left out.

        Args:
            audio_learning_rate: of the audio side (`targets.is_audio_side`); None = the same.

        Raises:
            UserError: a rate for an audio side that this network has not.
        """
        if audio_learning_rate is not None and not any(map(is_audio_side, self.layers)):
            raise UserError(f"--audio_learning_rate {audio_learning_rate}: this network adapts no audio module; leave the flag out.")
        groups: dict[float, list[nn.Parameter]] = {learning_rate: []}
        for name, layer in self.layers.items():
            rate = learning_rate if audio_learning_rate is None or not is_audio_side(name) else audio_learning_rate
            fast = {id(parameter) for parameter in layer.fast_parameters}
            for parameter in layer.parameters(recurse=False):
                factor = self.arguments.loraplus_ratio if id(parameter) in fast else 1.0
                groups.setdefault(rate * factor, []).append(parameter)
        return [{"params": parameters, "lr": rate} for rate, parameters in groups.items() if parameters]

    def count_by_stream(self) -> dict[str, int]:
        return count_by_stream(self.names)

    def idle_patterns(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """(argument, pattern) of those of `--network_args` that match none of the model's linears `names` or, of ranks and alphas, none
        of those that are adapted."""
        arguments, adapted = self.arguments, self.names
        given = [
            ("include_patterns", arguments.targets.include, names),
            ("exclude_patterns", arguments.targets.exclude, names),
            ("ranks", [pattern.pattern for pattern, _ in arguments.ranks], adapted),
            ("alphas", [pattern.pattern for pattern, _ in arguments.alphas], adapted),
        ]
        return [
            (key, pattern) for key, patterns, where in given for pattern in patterns if not any(re.search(pattern, name) for name in where)
        ]

    def contents(self) -> Contents:
        """What a file of this network holds, in float32, scale folded in."""
        return {name: layer.file_tensors() for name, layer in self.layers.items()}

    def of_transformer(self) -> "LoRANetwork":
        """The part on the transformer, which its file holds."""
        return self._part(lambda name: not name.startswith(CONNECTORS))

    def of_connectors(self) -> "LoRANetwork | None":
        """The part on the text connectors, which has a file of its own; None where they are not trained."""
        part = self._part(lambda name: name.startswith(CONNECTORS))
        return part if part.layers else None

    def joined_with(self, other: "LoRANetwork") -> "LoRANetwork":
        """One network of both, to be trained, stored and switched off together."""
        assert other.kind == self.kind and not set(other.layers) & set(self.layers)
        return LoRANetwork(self.layers | other.layers, self.arguments, self.kind)

    def _part(self, wanted: Callable[[str], bool]) -> "LoRANetwork":
        return LoRANetwork({name: layer for name, layer in self.layers.items() if wanted(name)}, self.arguments, self.kind)

    def file_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """A checked file.

        Raises:
            UserError: not whole, not finite, or all zero.
        """
        contents, key = self.contents(), self.arguments.dora_key
        tensors = to_file(contents, dtype, dora_key=key)
        zero = next(iter(self.layers.values())).zero_at_start
        check_file(tensors, file_keys({name: list(own) for name, own in contents.items()}, dora_key=key), zero)
        return tensors

    def load(self, file: NetworkFile) -> None:
        """Start from a trained network.

        Raises:
            UserError: another type or rank, or modules that this network does not adapt.
        """
        if file.kind != self.kind:
            raise UserError(
                f"--network_weights {file.path}: of type {file.kind}, this network is {self.kind}. Give --network_args type={file.kind}."
            )
        foreign = sorted(set(file.adapters) - set(self.layers))
        if foreign:
            raise UserError(
                f"--network_weights {file.path}: adapts {len(foreign)} module(s) that this network does not, first '{foreign[0]}'. "
                "Choose the same targets with --network_args, or give --dim_from_weights."
            )
        if left := [name for name in self.layers if name not in file.adapters]:
            log.warning("WARNING: --network_weights %s lacks %d module(s), which start fresh, first '%s'", file.path, len(left), left[0])
        for name, adapter in file.adapters.items():
            try:
                self.layers[name].load(adapter.tensors)
            except ShapeMismatch as error:
                if len(ranks := sorted({one.rank for one in file.adapters.values() if one.rank})) > 1:
                    raise UserError(
                        f"--network_weights {file.path}: its modules have ranks from {ranks[0]} to {ranks[-1]}; give --dim_from_weights."
                    ) from error
                raise UserError(f"--network_weights {file.path}: '{name}': {error}; or give --dim_from_weights.") from error

    @contextmanager
    def dropout(self, seeds: Sequence[int]) -> Iterator[None]:
        """Drop what the arguments say, for as long as the context lasts: around a training batch, forward and backward.

        Args:
            seeds: of each item of the batch; the masks depend on nothing else.
        """
        if self._dropout is None or not seeds:
            yield
            return
        for layer, masks in self._draw(seeds, *self._dropout).items():
            layer.masks = masks
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.masks = None

    def _draw(self, seeds: Sequence[int], thresholds: Tensor, gains: Tensor) -> dict[AdapterLayer, Masks]:
        """Masks of one batch, in one transfer."""
        drawn = [torch.rand(thresholds.numel(), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        kept = (torch.stack(drawn) >= thresholds) * gains
        device = self.parameters()[0].device
        kept = (kept.pin_memory() if device.type == "cuda" else kept).to(device, non_blocking=True)[:, None]
        start, found = 0, {}
        for layer in self.layers.values():
            masks = []
            for width in _widths(layer):
                masks.append(kept[..., start : start + width] if width else None)
                start += width
            found[layer] = Masks(*masks)
        return found

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, for as long as the context lasts."""
        before = {name: layer.enabled for name, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                layer.enabled = before[name]


def _widths(layer: AdapterLayer) -> tuple[int, int, int]:
    """Lengths of a layer's masks in the order of `Masks`; 0 = nothing is dropped there."""
    dropout = layer.spec.dropout
    return (layer.dropout_width if dropout.rank else 0, layer.base.in_features if dropout.neuron else 0, 1 if dropout.module else 0)


def _dropout_rules(layers: Mapping[str, AdapterLayer]) -> tuple[Tensor, Tensor] | None:
    """For all masks of all layers in one row: the draw under which an entry is dropped, and what it is multiplied by where it stays; None
    where nothing is dropped."""
    thresholds, gains = [], []
    for layer in layers.values():
        dropout = layer.spec.dropout
        probabilities = (dropout.rank, dropout.neuron, dropout.module)
        for place, (width, p) in enumerate(zip(_widths(layer), probabilities, strict=True)):
            thresholds.append(torch.full((width,), p))
            gains.append(torch.full((width,), 1.0 if place == 2 else 1 / (1 - p)))
    if not any(part.numel() for part in thresholds):
        return None
    return torch.cat(thresholds), torch.cat(gains)
