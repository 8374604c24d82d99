"""Which attention kernel runs: the fastest one on the largest clip, or the one that was asked for."""

import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from musubi_tuner.memory.card import seconds_of
from musubi_tuner.runtime.errors import UserError

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_chosen = contextlib.ExitStack()


def use_attention(name: str, *, masked: bool = True) -> None:
    """Make a kernel the first choice of every attention of this process.

    Args:
        masked: there are masks, so the other kernels stand by for one that this kernel cannot take; False leaves it alone.
    """
    if torch.cuda.is_available():
        _let_torch_choose_first()
    others = [kernel for other, kernel in KERNELS.items() if other != name and masked and name != "math"]
    _chosen.close()
    _chosen.enter_context(sdpa_kernel([KERNELS[name], *others], set_priority=True))


def _let_torch_choose_first() -> None:
    """At the first attention of a process torch installs an order of its own for the card, over any that was chosen before."""
    small = torch.empty(1, 1, 64, 64, device="cuda", dtype=torch.bfloat16)
    torch._fused_sdp_choice(small, small, small)


def use_default_attention() -> None:
    """Restore torch's own order of kernels."""
    _chosen.close()


def fastest_attention(device: torch.device, dtype: torch.dtype, *, tokens: int, heads: int, head_dim: int) -> dict[str, float]:
    """Seconds of one forward and backward pass of each kernel that runs here, fastest first.

    Raises:
        UserError: none of them runs.
    """
    shape = (1, heads, tokens, head_dim)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    found: dict[str, float] = {}
    for name, kernel in KERNELS.items():
        if name == "math" and found:
            continue  # keeps all scores: never faster, and large
        with sdpa_kernel([kernel]):
            try:
                found[name] = seconds_of(lambda: F.scaled_dot_product_attention(query, key, value).sum().backward(), device)
            except RuntimeError:  # torch's answer for a kernel that this device or build has not
                continue
    if not found:
        raise UserError(f"no attention kernel runs on {device} in {dtype}; update torch, or use --mixed_precision no.")
    return dict(sorted(found.items(), key=lambda pair: pair[1]))
