"""Full fine-tuning: the weights of the model itself, trained in place. There is no base model beside it, so nothing can switch them off."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from musubi_tuner.ltxv2.text.connectors import Connectors
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.memory.streaming import BlockStreamer
from musubi_tuner.networks.arguments import patterns
from musubi_tuner.networks.network import LoRANetwork
from musubi_tuner.networks.targets import compile_pattern, count_by_stream, is_audio_side
from musubi_tuner.runtime.errors import UserError

_ARGUMENTS = ("include_patterns", "exclude_patterns")


class WholeTransformer:
    """The trained weights by their official names: parameters of the transformer, and of the text connectors where these are trained."""

    kind = "whole"
    trains_base_weights = True
    max_rank = 1
    """As of a `LoRANetwork`: there are no thin products."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], left_out: int = 0, streamer: BlockStreamer | None = None) -> None:
        """
        Args:
            left_out: how many parameters of the model stay as they are.
            streamer: of the blocks whose weights lie on the host.
        """
        self._parameters = dict(parameters)
        self._left_out = left_out
        self.streamer = streamer

    def found_again(self, transformer: LTXModel, streamer: BlockStreamer | None = None) -> "WholeTransformer":
        """The same weights, once other parameters are in their places."""
        now = self._parameters | dict(transformer.named_parameters())
        return WholeTransformer({name: now[name] for name in self._parameters}, self._left_out, streamer)

    @property
    def names(self) -> list[str]:
        return list(self._parameters)

    def describe(self) -> str:
        """For the banner and the metadata."""
        return f"all but {self._left_out} of its tensors" if self._left_out else "every weight"

    def parameters(self) -> list[nn.Parameter]:
        """Every trained tensor, in the model's order."""
        return list(self._parameters.values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._parameters)

    def home(self, parameter: Tensor) -> Tensor:
        """Where a weight of the model lies between steps: on the host where its block is streamed."""
        return parameter.detach() if self.streamer is None else self.streamer.home(parameter).detach()

    def parameter_groups(self, learning_rate: float, audio_learning_rate: float | None = None) -> list[dict[str, Any]]:
        """As `LoRANetwork.parameter_groups`.

        Raises:
            UserError: a rate for an audio side that is not trained.
        """
        audio = [parameter for name, parameter in self._parameters.items() if is_audio_side(name)]
        if audio_learning_rate is None:
            return [{"params": self.parameters(), "lr": learning_rate}]
        if not audio:
            raise UserError(f"--audio_learning_rate {audio_learning_rate}: nothing of the audio side is trained; leave the flag out.")
        rest = [parameter for name, parameter in self._parameters.items() if not is_audio_side(name)]
        groups = [{"params": rest, "lr": learning_rate}, {"params": audio, "lr": audio_learning_rate}]
        return [group for group in groups if group["params"]]

    def count_by_stream(self) -> dict[str, int]:
        """Tensors of each stream."""
        return count_by_stream(self.names)

    @contextmanager
    def dropout(self, seeds: Sequence[int]) -> Iterator[None]:
        """Nothing is dropped of a model's own weights."""
        yield

    def disabled(self) -> NoReturn:
        raise AssertionError("what needs the base model is refused before a model is loaded")


TrainedNetwork = LoRANetwork | WholeTransformer


def settled_values(network: TrainedNetwork) -> dict[str, Tensor]:
    """Its tensors as they are now, by their names, to be read between steps or after the last one.

    What is streamed is read where it lies on the host, which has all of it from here on, states of an optimizer too.
    """
    if not isinstance(network, WholeTransformer):
        return {name: parameter.detach() for name, parameter in network.named_parameters().items()}
    if network.streamer is not None:
        network.streamer.settle()
    return {name: network.home(parameter) for name, parameter in network.named_parameters().items()}


def set_values(network: TrainedNetwork, values: Mapping[str, Tensor], part_of: Callable[[Tensor], Tensor]) -> None:
    """Put others in their places.

    Args:
        part_of: a tensor -> what this process holds of it, as `values` have it.
    """
    with torch.no_grad():
        for name, value in settled_values(network).items():
            part_of(value).copy_(values[name])
    if isinstance(network, WholeTransformer) and network.streamer is not None:
        network.streamer.forget()


def check_arguments(args: Mapping[str, str]) -> None:
    """Of `--network_args` under `--full_finetune`.

    Raises:
        UserError: another key than the two that choose weights, or a malformed pattern.
    """
    for key, value in args.items():
        if key not in _ARGUMENTS:
            raise UserError(
                f"--network_args {key}={value}: is of networks. --full_finetune takes {' and '.join(_ARGUMENTS)} alone, which say what is "
                "trained and what stays as it is."
            )
    for key in _ARGUMENTS:
        for pattern in patterns(args, key):
            compile_pattern(pattern)


def train_whole(transformer: LTXModel, args: Mapping[str, str], connectors: Connectors | None = None) -> WholeTransformer:
    """Have the model's own weights take gradients, all of them or those that `args` choose.

    Args:
        args: `include_patterns` and `exclude_patterns`, regular expressions over names such as `transformer_blocks.0.attn1.to_q.weight`.
        connectors: whose weights are trained with them.

    Raises:
        UserError: patterns that leave nothing, or one that matches nothing.
    """
    check_arguments(args)
    include, exclude = ([compile_pattern(pattern) for pattern in patterns(args, key)] for key in _ARGUMENTS)
    found = dict(transformer.named_parameters())
    if connectors is not None:
        found |= dict(connectors.named_parameters())
    for key, given in zip(_ARGUMENTS, (include, exclude), strict=True):
        for pattern in given:
            if not any(pattern.search(name) for name in found):
                raise UserError(
                    f"--network_args {key}={pattern.pattern}: matches no weight of this model. Names look like "
                    "'transformer_blocks.0.attn1.to_q.weight' and 'proj_out.bias'; in video mode there are no audio weights."
                )
    chosen = {name: parameter for name, parameter in found.items() if _is_chosen(name, include, exclude)}
    if not chosen:
        raise UserError(f"--network_args {' '.join(f'{key}={value}' for key, value in args.items())}: leaves no weight to train.")
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return WholeTransformer(chosen, len(found) - len(chosen))


def _is_chosen(name: str, include: Sequence[re.Pattern[str]], exclude: Sequence[re.Pattern[str]]) -> bool:
    wanted = not include or any(pattern.search(name) for pattern in include)
    return wanted and not any(pattern.search(name) for pattern in exclude)
