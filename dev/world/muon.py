"""Muon for matrices and kernels (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), AdamW for all else.

Matrices of one shape are orthogonalized together, and nothing waits for the device: a step can be part of a CUDA graph.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon:
    """Steps for two lists of parameters, whose learning rates rise and fall together."""

    def __init__(
        self, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], *, rate: float, other_rate: float, decay: float = 0.0
    ) -> None:
        """
        Args:
            rate: of `matrices`: the size of an update, whatever the gradient's.
            other_rate: of `others`.
            decay: of matrices, for a step at rate 1.
        """
        self._matrices: list[Tensor] = list(matrices)
        self._others: list[Tensor] = list(others)
        device = self._matrices[0].device
        self._rate, self._other_rate, self._decay = rate, other_rate, decay
        self._buffers = [torch.zeros_like(one) for one in self._matrices]
        self._share = torch.ones((), device=device)
        on_card = device.type == "cuda"
        self._adam = torch.optim.AdamW(self._others, lr=other_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=on_card, capturable=on_card)
        self._adam_rate = torch.tensor(other_rate, device=device) if on_card else None
        """On a card a tensor, which a graph reads anew at every step."""
        self.set_share(1.0)
        shapes: dict[tuple[int, int], list[int]] = {}
        for place, one in enumerate(self._matrices):
            shapes.setdefault((one.shape[0], one[0].numel()), []).append(place)
        self._groups = shapes

    def set_share(self, share: float) -> None:
        """Of both learning rates, from the next step on."""
        self._share.fill_(share)
        rate = self._other_rate * share
        for group in self._adam.param_groups:
            group["lr"] = rate if self._adam_rate is None else self._adam_rate.fill_(rate)

    @torch.no_grad()
    def step(self) -> None:
        """Update by the gradients that the parameters have."""
        gradients: list[Tensor] = []
        for one in self._matrices:
            assert one.grad is not None
            gradients.append(one.grad)
        torch._foreach_mul_(self._buffers, _MOMENTUM)
        torch._foreach_add_(self._buffers, gradients)
        ahead = torch._foreach_add(gradients, self._buffers, alpha=_MOMENTUM)
        if self._decay:
            torch._foreach_mul_(self._matrices, 1 - self._rate * self._decay * self._share)
        for (rows, columns), places in self._groups.items():
            stack = orthogonalized(torch.stack([ahead[place].flatten(1) for place in places]))
            stack = stack * (self._share * (-self._rate * max(1.0, rows / columns) ** 0.5))
            some = [self._matrices[place] for place in places]
            torch._foreach_add_(some, [update.view_as(one) for update, one in zip(stack.unbind(0), some, strict=True)])
        self._adam.step()

    def zero_grad(self) -> None:
        """Drop all gradients; the next backward pass sets them instead of adding to them."""
        for one in (*self._matrices, *self._others):
            one.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"buffers": self._buffers, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, saved in zip(self._buffers, state["buffers"], strict=True):
            mine.copy_(saved)
        self._adam.load_state_dict(state["adam"])
        self.set_share(float(self._share))


def orthogonalized(stack: Tensor) -> Tensor:
    """(K, m, n) -> as many matrices with the same singular vectors and values near 1, float32.

    x -> a x + b x^3 + c x^5 on singular values, five times, by products alone; in bfloat16, as the values need not be exact.
    """
    a, b, c = _COEFFICIENTS
    x = stack.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()
