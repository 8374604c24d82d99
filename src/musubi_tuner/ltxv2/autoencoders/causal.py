"""Two things that diffusers' causal encoder cannot do: keep a memory layout, and take a clip a part at a time.

A GPU's convolutions in few bits work on channels that lie side by side; tensors in the usual order are turned round before each of them and
after. Weights in the other order are not enough: diffusers' causal convolution repeats the first frame and joins it to the clip, and torch
joins tensors of different layouts in the usual one. `CausalConv3d` therefore pads in the layout that is wanted.

Every layer sees frames of the past alone, two of them at most. A convolution that keeps the last two frames of its input goes on where it
stopped, so a clip in parts has the latents of the whole, and only a part is held.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
"""Names of the layouts, the usual one first."""


class CausalConv3d(nn.Module):
    """A convolution over frames of the past: at a clip's beginning its first frame stands for those before it.

    Takes the place of diffusers' `LTX2VideoCausalConv3d` with its names (`conv.weight`) and its values, bit for bit in the usual layout.
    """

    def __init__(self, conv: nn.Conv3d, layout: torch.memory_format) -> None:
        super().__init__()
        self.conv = conv
        self.layout = layout
        self.keeps = False
        """Whether the next call goes on with the same clip."""
        self.past: Tensor | None = None
        """(B, C, kernel - 1, H, W): the frames before those of the next call; None at a clip's beginning."""

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H', W') in the layout of this convolution."""
        assert causal, "an encoder's convolutions are causal"
        before = self.conv.kernel_size[0] - 1
        batch, channels, frames, *size = x.shape
        padded = torch.empty((batch, channels, before + frames, *size), dtype=x.dtype, device=x.device, memory_format=self.layout)
        padded[:, :, :before] = x[:, :, :1] if self.past is None else self.past
        padded[:, :, before:] = x
        if self.keeps:
            self.past = padded[:, :, frames:].clone(memory_format=self.layout)
        return self.conv(padded)


class CausalDownsampler(nn.Module):
    """A convolution whose results move from space and time into channels, beside means of neighboring channels of its input.

    Takes the place of diffusers' `LTX2VideoDownsampler3d`: halving time, it sees the first frame of a clip
    twice, and that of a later part once.
    """

    def __init__(self, conv: CausalConv3d, stride: tuple[int, int, int], group_size: int) -> None:
        super().__init__()
        self.conv = conv
        self.stride = stride
        self.group_size = group_size

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T', H', W'); T' = (T + 1) / 2 at a clip's beginning and T / 2 later, where time is halved."""
        if self.stride[0] > 1 and self.conv.past is None:
            x = torch.cat([x[:, :, :1], x], dim=2)
        beside = self._into_channels(x).unflatten(1, (-1, self.group_size)).mean(dim=2)
        return self._into_channels(self.conv(x, causal)) + beside

    def _into_channels(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C * strides, T', H', W'); channels in the order (C, time, row, column)."""
        time, rows, columns = self.stride
        batch, channels, *size = x.shape
        frames, height, width = size[0] // time, size[1] // rows, size[2] // columns
        cells = x.reshape(batch, channels, frames, time, height, rows, width, columns).permute(0, 1, 3, 5, 7, 2, 4, 6)
        return cells.reshape(batch, channels * time * rows * columns, frames, height, width)


def use_layout(encoder: Any, name: str) -> None:
    """Have an encoder of diffusers in a layout of `LAYOUTS`, with the layers above; weights keep their values."""
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoCausalConv3d, LTX2VideoDownsampler3d

    encoder.to(memory_format=LAYOUTS[name])
    _replace(encoder, LTX2VideoCausalConv3d | CausalConv3d, lambda old: CausalConv3d(old.conv, LAYOUTS[name]))
    _replace(encoder, LTX2VideoDownsampler3d, lambda old: CausalDownsampler(old.conv, old.stride, old.group_size))


@contextmanager
def clip_in_parts(encoder: nn.Module) -> Iterator[None]:
    """Within this, each call of the encoder goes on with the clip of the call before; the first has 8n+1 frames, the others have 8n."""
    convolutions = [module for module in encoder.modules() if isinstance(module, CausalConv3d)]
    for module in convolutions:
        module.keeps = True
    try:
        yield
    finally:
        for module in convolutions:
            module.keeps, module.past = False, None


def _replace(root: nn.Module, kind: Any, make: Callable[[Any], nn.Module]) -> None:
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, make(child).train(child.training))
