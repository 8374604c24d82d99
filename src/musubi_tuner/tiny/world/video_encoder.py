"""The world's video encoder: a chain of projections that was computed from covariances, laid into the official convolutional encoder.

Only the middle tap of a convolution is used, so each is a matrix between channels, and a downsampling that moves space and time into
channels lets the next matrix see a larger block: 4 x 4 pixels, then 8 x 8 x 2, 16 x 16 x 4, 32 x 32 x 4, and two of those in time. What is
not linear in the official network is undone:

- silu(a) - silu(-a) = a: the last values are carried with both signs, and the last convolution takes differences;
- the pixel norm before it divides by the root mean square of all channels; two constant channels, much larger than the signal, keep that
  nearly the same everywhere;
- a downsampler adds means of its input's channels; the last one's weights take them away again. There the signal is multiplied by `GAIN`,
  which the norm divides out: in bfloat16 the small difference of large numbers would otherwise be lost in rounding.

`VideoEncoder.encode` computes the same as the network from the few taps that are not zero.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GAIN = 300.0
CONSTANT = 60.0
"""Of the two channels beside the signal, whose spread is 1."""
_WIDTH = 128
_PATCH = 4
_PATCH_CHANNELS = 16
_FIRST = _WIDTH - _PATCH_CHANNELS
"""Channel of the first patch component: the first downsampler's residual then adds its means to the last 16 channels."""
SIGNAL = 63
"""Numbers of a cell and half; with both signs and two constants they fill 128 channels."""
_STRIDES = ((2, 2, 2), (2, 2, 2), (1, 2, 2), (2, 1, 1))
_EPS = 1e-8


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoEncoder:
    """The taps that are not zero, float32."""

    patches: Tensor
    """(16, 48) patch -> its components"""
    second: Tensor
    """(16, 128)"""
    third: Tensor
    """(32, 128)"""
    last: Tensor
    """(63, 128)"""
    last_bias: Tensor
    """(63,)"""

    def to(self, device: torch.device | str) -> "VideoEncoder":
        return VideoEncoder(**{name: tensor.to(device) for name, tensor in self.named().items()})

    def named(self) -> dict[str, Tensor]:
        """By name, as they are stored."""
        return {name: getattr(self, name) for name in ("patches", "second", "third", "last", "last_bias")}

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, F, H, W) in -1..1, F = 8n+1 and sides multiples of 32 -> (B, 128, f, h, w) raw means, the last two channels 0."""
        signal = self.last_level(self.levels(pixels)[-1])
        cells = _into_channels(signal, _STRIDES[3])
        power = (2 * cells.square().sum(1, keepdim=True) + 4 * CONSTANT**2) / (2 * _WIDTH)
        means = cells * (_norm_of_constants() / torch.sqrt(power + _EPS / GAIN**2))
        return F.pad(means, (0, 0, 0, 0, 0, 0, 0, _WIDTH - means.shape[1]))

    def levels(self, pixels: Tensor) -> list[Tensor]:
        """What enters the second, third and last downsampler, (B, 128, f, h, w) each."""
        x = torch.einsum("kc,bcfhw->bkfhw", self.patches, into_patches(pixels))
        x = _first_twice(x)
        first = _into_channels(x, _STRIDES[0])
        first = torch.cat([first[:, :_FIRST], first[:, _FIRST:] + F.avg_pool3d(x, 2)], dim=1)
        second = downsample(first, self.second, _STRIDES[1])
        return [first, second, downsample(second, self.third, _STRIDES[2])]

    def last_level(self, x: Tensor) -> Tensor:
        """(B, 128, F, h, w), its first frame doubled -> (B, 63, F + 1, h, w) signal before time moves into channels."""
        signal = torch.einsum("kc,bcfhw->bkfhw", self.last, _first_twice(x))
        return signal + self.last_bias[:, None, None, None]

    def tensors(self) -> dict[str, Tensor]:
        """All weights of the encoder under diffusers' names, float32."""
        device = self.patches.device
        weights = {
            "conv_in": torch.zeros(_WIDTH, 48, device=device),
            "down_blocks.0.downsamplers.0.conv": torch.zeros(_PATCH_CHANNELS, _WIDTH, device=device),
            "down_blocks.1.downsamplers.0.conv": self.second,
            "down_blocks.2.downsamplers.0.conv": self.third,
            "down_blocks.3.downsamplers.0.conv": -torch.eye(_WIDTH, device=device),
            "conv_out": torch.zeros(_WIDTH + 1, 2 * _WIDTH, device=device),
        }
        biases = {name: torch.zeros(weight.shape[0], device=device) for name, weight in weights.items()}
        weights["conv_in"][_FIRST:] = self.patches
        numbers = torch.arange(_PATCH_CHANNELS)
        weights["down_blocks.0.downsamplers.0.conv"][numbers, _FIRST + numbers] = 1
        last, bias = weights["down_blocks.3.downsamplers.0.conv"], biases["down_blocks.3.downsamplers.0.conv"]
        last[:SIGNAL] += GAIN * self.last
        last[SIGNAL : 2 * SIGNAL] -= GAIN * self.last
        bias[:SIGNAL], bias[SIGNAL : 2 * SIGNAL], bias[2 * SIGNAL :] = GAIN * self.last_bias, -GAIN * self.last_bias, GAIN * CONSTANT
        numbers = torch.arange(2 * SIGNAL)
        weights["conv_out"][numbers, numbers] = _norm_of_constants()
        weights["conv_out"][numbers, numbers + 2 * SIGNAL] = -_norm_of_constants()
        tensors = {}
        for name, weight in weights.items():
            taps = torch.zeros(*weight.shape, 3, 3, 3, device=device)
            taps[:, :, 2, 1, 1] = weight
            tensors |= {f"encoder.{name}.conv.weight": taps, f"encoder.{name}.conv.bias": biases[name]}
        return tensors


def into_patches(pixels: Tensor) -> Tensor:
    """(B, 3, F, H, W) -> (B, 48, F, H / 4, W / 4); channels in the order (color, column, row) of the official encoder."""
    batch, colors, frames, height, width = pixels.shape
    cells = pixels.reshape(batch, colors, frames, height // _PATCH, _PATCH, width // _PATCH, _PATCH)
    return cells.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def downsample(x: Tensor, weight: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """An official downsampler whose convolution is the (C', C) matrix `weight`: values and, beside them, means of the input's channels."""
    x = _first_twice(x) if stride[0] > 1 else x
    values = _into_channels(torch.einsum("kc,bcfhw->bkfhw", weight, x), stride)
    means = _into_channels(x, stride).unflatten(1, (values.shape[1], -1)).mean(2)
    return values + means


def _first_twice(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, :1], x], dim=2)


def _into_channels(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """(B, C, F, H, W) -> (B, C * strides, F', H', W'); channels in the order (C, time, row, column)."""
    for axis, size in zip((4, 3, 2), reversed(stride), strict=True):
        x = x.unflatten(axis, (-1, size))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def _norm_of_constants() -> float:
    """Root mean square of the channels before the last convolution, the signal aside: two constants in each of two frames, of 256."""
    return CONSTANT * (4 / (2 * _WIDTH)) ** 0.5
