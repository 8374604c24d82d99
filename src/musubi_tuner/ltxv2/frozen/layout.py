"""Memory layouts of a causal encoder.

A GPU's convolutions in few bits work on channels that lie side by side; tensors in the usual order are turned round before each of them and
after. Weights in the other order are not enough: diffusers' causal convolution repeats the first frame and joins it to the clip, and torch
joins tensors of different layouts in the usual one. `CausalConv3d` therefore pads in the layout that is wanted.
"""

import torch
from torch import Tensor, nn

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
"""Names of the layouts, the usual one first."""


class CausalConv3d(nn.Module):
    """A convolution over frames of the past: the first frame stands for those before it.

    Takes the place of diffusers' `LTX2VideoCausalConv3d` with its names (`conv.weight`) and its values, bit for bit in the usual layout.
    """

    def __init__(self, conv: nn.Conv3d, layout: torch.memory_format) -> None:
        super().__init__()
        self.conv = conv
        self.layout = layout

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H', W') in the layout of this convolution."""
        assert causal, "an encoder's convolutions are causal"
        before = self.conv.kernel_size[0] - 1
        batch, channels, frames, *size = x.shape
        padded = torch.empty((batch, channels, before + frames, *size), dtype=x.dtype, device=x.device, memory_format=self.layout)
        padded[:, :, :before] = x[:, :, :1]
        padded[:, :, before:] = x
        return self.conv(padded)


def use_layout(encoder: nn.Module, name: str) -> None:
    """Have an encoder's weights and activations in a layout of `LAYOUTS`; weights keep their values."""
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoCausalConv3d

    encoder.to(memory_format=LAYOUTS[name])
    for parent in list(encoder.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, LTX2VideoCausalConv3d | CausalConv3d):
                setattr(parent, child_name, CausalConv3d(child.conv, LAYOUTS[name]))
