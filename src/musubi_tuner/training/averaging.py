"""A moving average of the trained weights (EMA): often steadier than the last step's. It is what is saved, previewed and measured."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """average <- d average + (1 - d) weights after each step, with d = min(decay, (1 + n) / (10 + n)) after n steps: the start is forgotten
    soon (as in TensorFlow's ExponentialMovingAverage with `num_updates`)."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters = dict(parameters)
        self._averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._decay = decay
        self._steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """Take in the weights after an optimizer step."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        torch._foreach_lerp_(list(self._averages.values()), list(self._parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in place of the weights, which come back from it to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            weights = parameter.detach().clone()
            parameter.copy_(self._averages[name])
            self._averages[name] = weights

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"steps": self._steps} | self._averages

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        self._steps = int(state["steps"])
        for name, average in self._averages.items():
            average.copy_(state[name])
