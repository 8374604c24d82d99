"""A start for the video decoder without a gradient: layer by layer, least squares (docs/development/world.md).

The pictures' own chain of principal components, from the patch upwards, is what each level of the decoder shall give; every upsampling
convolution is fitted to it with its whole 3 x 3 x 3 neighborhood, from the values that the levels before it really produce. Residual units
begin small. The finest components are rotated at random, so that channels are alike, and a constant channel beside them keeps the last
pixel norm from dividing by the signal's own size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dev.world.fit_video_encoder import principal

_STRIDES = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (1, 2, 2))
"""Between one level of components and the next, finest first; the decoder goes the other way, after halving time once more."""
_UPSAMPLINGS = ((2, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2))
_CLIPS_AT = (None, 800, 300, 60)
"""How many clips each upsampling is fitted on, coarsest first."""
_WIDTHS = (15, 32, 63, 63)
_RIDGES = (1e-3, 1e-4, 1e-4, 1e-4)
_LAST_RIDGE = 1e-5
_RESIDUAL = 0.03
_FINEST_SIZE = 0.3
"""Length of the finest components beside the constant channel's 1."""


@torch.no_grad()
def start_linearly(decoder: Any, latents: Tensor, pixels: Tensor) -> None:
    """Give diffusers' decoder weights that already decode.

    Args:
        latents: (B, 128, f, h, w) raw means of `pixels`.
        pixels: (B, 3, F, H, W) in -1..1.
    """
    directions = _component_chain(pixels[:120])
    sizes = [1 / level.pow(2).mean().sqrt() for level in _components(pixels[:60], directions)]
    sizes[0] = _FINEST_SIZE / _components(pixels[:60], directions)[0].pow(2).sum(-1).mean().sqrt()
    for name, parameter in decoder.named_parameters():
        if "conv2.conv" in name:
            parameter.mul_(_RESIDUAL)
    first = decoder.conv_in.conv
    first.weight.zero_()
    first.bias.zero_()
    first.weight[torch.arange(128), torch.arange(128), 1, 1, 1] = 1
    x = decoder.conv_in(latents, causal=False)
    for level, (block, stride, count, ridge) in enumerate(zip(decoder.up_blocks, _UPSAMPLINGS, _CLIPS_AT, _RIDGES, strict=True)):
        finer = len(_STRIDES) - 1 - level
        x = x[:count]
        wanted = torch.cat([_components(pixels[i : i + 20], directions)[finer] for i in range(0, len(x), 20)]) * sizes[finer]
        channels, pieces = wanted.shape[-1], stride[0] * stride[1] * stride[2]
        wanted = merged(wanted, stride)[:, -x.shape[2] :].unflatten(-1, (pieces, channels)).transpose(-1, -2).flatten(4)
        convolution = block.upsamplers[0].conv.conv
        _fit(convolution, x, wanted, ridge)
        if finer == 0:
            convolution.bias[channels * pieces :] = 1.0
        x = block.upsamplers[0](x, causal=False)
    # The decoder's patches are in the order (color, column, row).
    picture = _patches(pixels[: len(x)]).unflatten(-1, (3, 4, 4)).transpose(-1, -2).flatten(4)
    _fit(decoder.conv_out.conv, x, picture, _LAST_RIDGE, lambda values: decoder.conv_act(decoder.norm_out(values)), together=5)


def _component_chain(pixels: Tensor) -> list[Tensor]:
    """(C, C') directions of each level, finest first."""
    values, directions = _patches(_seven_before(pixels)), []
    for number, (stride, count) in enumerate(zip(_STRIDES, _WIDTHS, strict=True)):
        values = merged(values, stride)
        rows = values.flatten(0, 3)
        found = principal(rows[:: max(1, len(rows) // 200_000)], count).T
        if number == 0:
            generator = torch.Generator().manual_seed(1)
            found = found @ torch.linalg.qr(torch.randn(count, count, generator=generator)).Q
        directions.append(found)
        values = values @ found
    return directions


def _components(pixels: Tensor, directions: list[Tensor]) -> list[Tensor]:
    """(B, F', H', W', C) of each level, finest first."""
    values, levels = _patches(_seven_before(pixels)), []
    for stride, direction in zip(_STRIDES, directions, strict=True):
        values = merged(values, stride) @ direction
        levels.append(values)
    return levels


def _fit(
    convolution: Any,
    x: Tensor,
    wanted: Tensor,
    ridge: float,
    before: Callable[[Tensor], Tensor] = lambda values: values,
    together: int = 20,
) -> None:
    """Ridge regression of a 3 x 3 x 3 convolution, padded by its edge in time and by zeros in space.

    Args:
        x: (B, C, F, H, W)
        wanted: (B, F, H, W, O); outputs beyond O are set to 0.
        ridge: relative to the mean square of the inputs.
        before: what the decoder does to `x` before the convolution.
    """
    channels, outputs = x.shape[1], wanted.shape[-1]
    size = 27 * channels + 1
    squares = torch.zeros(size, size, dtype=torch.float64)
    products = torch.zeros(size, outputs, dtype=torch.float64)
    for start in range(0, len(x), together):
        values = before(x[start : start + together])
        values = F.pad(torch.cat([values[:, :, :1], values, values[:, :, -1:]], 2), (1, 1, 1, 1))
        windows = values.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)
        rows = windows.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(0, 3)
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        squares += (rows.T @ rows).double()
        products += (rows.T @ wanted[start : start + together].reshape(-1, outputs)).double()
    diagonal = squares.diagonal()[:-1]
    diagonal += ridge * diagonal.mean()
    solved = torch.linalg.solve(squares, products).float()
    convolution.weight.zero_()
    convolution.bias.zero_()
    convolution.weight[:outputs] = solved[:-1].T.reshape(outputs, channels, 3, 3, 3)
    convolution.bias[:outputs] = solved[-1]


def _seven_before(pixels: Tensor) -> Tensor:
    """The first frame eight times, as the first latent frame stands for it alone: (B, 3, F, H, W) -> (B, 3, F + 7, H, W)."""
    return torch.cat([pixels[:, :, :1].expand(-1, -1, 7, -1, -1), pixels], 2)


def _patches(pixels: Tensor) -> Tensor:
    """(B, 3, F, H, W) -> (B, F, H / 4, W / 4, 48)"""
    return pixels.unflatten(4, (-1, 4)).unflatten(3, (-1, 4)).permute(0, 2, 3, 5, 1, 4, 6).flatten(4)


def merged(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """(B, F, H, W, C) -> (B, F', H', W', strides * C)"""
    for axis, size in zip((3, 2, 1), reversed(stride), strict=True):
        x = x.unflatten(axis, (-1, size))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)
