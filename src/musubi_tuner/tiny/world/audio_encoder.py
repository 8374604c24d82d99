"""The world's audio encoder: a projection of 4 x 4 cells of the log mel spectrogram, laid into the official convolutional encoder.

As in `video_encoder`: silu(a) - silu(-a) = a, and channels that hold a large constant keep the pixel norm from turning with the signal. The
two downsamplings gather the cell's values in channels; the second one already gives their principal components, with both signs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CONSTANT = 60.0
SIGNAL = 8
"""Numbers of a cell of 4 hops and 4 mel bins in 2 channels, 32 values."""
_WIDTH = 128
_CENTER, _SPREAD = -6.0, 3.0
"""Of log mel values, roughly."""
_EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioEncoder:
    """The taps that are not zero, float32."""

    cells: Tensor
    """(8, 8, 2, 2): components of what the first downsampling gives, by its channel and the second one's hop and bin"""
    bias: Tensor
    """(8,)"""

    def to(self, device: torch.device | str) -> "AudioEncoder":
        return AudioEncoder(cells=self.cells.to(device), bias=self.bias.to(device))

    def named(self) -> dict[str, Tensor]:
        """By name, as they are stored."""
        return {"cells": self.cells, "bias": self.bias}

    def encode(self, mel: Tensor) -> Tensor:
        """(B, 2, T, 64) log mel -> (B, 8, T', 16) raw means, T' = (T - 1) // 4 + 1."""
        signal = F.conv2d(_padded(self.gathered(mel)), F.pad(self.cells, (0, 1, 1, 0)), self.bias, stride=2)
        power = (2 * signal.square().sum(1, keepdim=True) + (_WIDTH - 2 * SIGNAL) * CONSTANT**2) / _WIDTH
        return signal * (_norm_of_constants() / torch.sqrt(power + _EPS))

    def gathered(self, mel: Tensor) -> Tensor:
        """(B, 2, T, 64) -> (B, 8, (T + 1) // 2, 32): each channel's 2 x 2 values, as the first downsampling gathers them."""
        return F.conv2d(_padded((mel - _CENTER) / _SPREAD), _gathering(mel.device), stride=2)

    def tensors(self, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        """All weights of the encoder under their names, float32.

        Args:
            shapes: of each of them, as the network has them; what is not set here is zero.
        """
        tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for channel in range(2):
            tensors["encoder.conv_in.conv.weight"][channel, channel, 2, 1] = 1 / _SPREAD
            tensors["encoder.conv_in.conv.bias"][channel] = -_CENTER / _SPREAD
        tensors["encoder.down.0.downsample.conv.weight"][:SIGNAL, :2] = _gathering("cpu")
        weight, bias = tensors["encoder.down.1.downsample.conv.weight"], tensors["encoder.down.1.downsample.conv.bias"]
        weight[:SIGNAL, :SIGNAL, 1:, :2], weight[SIGNAL : 2 * SIGNAL, :SIGNAL, 1:, :2] = self.cells, -self.cells
        bias[:SIGNAL], bias[SIGNAL : 2 * SIGNAL], bias[2 * SIGNAL :] = self.bias, -self.bias, CONSTANT
        numbers = torch.arange(SIGNAL)
        tensors["encoder.conv_out.conv.weight"][numbers, numbers, 2, 1] = _norm_of_constants()
        tensors["encoder.conv_out.conv.weight"][numbers, SIGNAL + numbers, 2, 1] = -_norm_of_constants()
        return tensors


def cells_of(gathered: Tensor) -> Tensor:
    """What the second downsampling sees: (B, 8, T, 32) -> (B, 32, T', 16), channels in the order (channel, hop, bin)."""
    padded = _padded(gathered)
    hops, bins = (padded.shape[2] - 3) // 2 + 1, (padded.shape[3] - 3) // 2 + 1
    parts = [padded[:, :, 1 + a : 1 + a + 2 * hops : 2, b : b + 2 * bins : 2] for a in range(2) for b in range(2)]
    return torch.stack(parts, 2).flatten(1, 2)


def _padded(x: Tensor) -> Tensor:
    """As the official downsampler does: two hops before, one bin after."""
    return F.pad(x, (0, 1, 2, 0))


def _gathering(device: torch.device | str) -> Tensor:
    """(8, 2, 3, 3): one output for each channel, hop and bin of a 2 x 2 block."""
    weight = torch.zeros(8, 2, 3, 3, device=device)
    for channel in range(2):
        for hop in range(2):
            for place in range(2):
                weight[channel * 4 + hop * 2 + place, channel, 1 + hop, place] = 1
    return weight


def _norm_of_constants() -> float:
    """Root mean square of the channels before the last convolution, the signal aside."""
    return CONSTANT * ((_WIDTH - 2 * SIGNAL) / _WIDTH) ** 0.5
