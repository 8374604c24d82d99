"""A LoRA of the difference of two checkpoints: of each linear, the product of least error of a rank (Eckart and Young 1936).

Text connectors are compared where both files have them. Tensors are read one by one. The singular values are those of a random projection
(Halko, Martinsson and Tropp 2011, arXiv 0909.4061), which has them to a part in a thousand; what is not in the LoRA is reported as it is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.conversion.checkpoint.components import model_names
from musubi_tuner.conversion.lora.contents import lora_of
from musubi_tuner.ltxv2.quantization import read_quantization
from musubi_tuner.ltxv2.versions import transformer_names
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.networks.keys import is_text_side
from musubi_tuner.networks.reading import StoredAdapter
from musubi_tuner.runtime.errors import UserError

_OVERSAMPLING, _ITERATIONS = 16, 4


@dataclass(frozen=True, slots=True)
class Extracted:
    """What was found."""

    adapters: dict[str, StoredAdapter]
    kept: dict[str, float]
    """By module: the share of the difference's squared norm that is in the LoRA."""
    alike: int
    """Linears that are the same in both."""
    left_out: dict[str, float]
    """Tensors that differ and are no linear's weight, and the norm of their difference."""


def extract(
    tuned: Checkpoint, base: Checkpoint, *, rank: int, energy: float | None, device: torch.device, advance: Callable[[], object]
) -> Extracted:
    """
    Args:
        rank: of each module; with `energy`, the highest.
        energy: the share of a difference's squared norm that is kept, by as low a rank as does.
        advance: called after each tensor.

    Raises:
        UserError: checkpoints of other shapes.
    """
    names, theirs = _compared_names(tuned, base)
    one, other = read_quantization(tuned, names), read_quantization(base, theirs)
    if odd := sorted(set(one.weights) ^ set(other.weights)):
        raise UserError(
            f"{tuned.path} and {base.path}: '{odd[0]}' is in one of them alone ({len(odd)} such tensors). They are of two models."
        )
    found = Extracted({}, {}, 0, {})
    alike = 0
    for name, full in one.weights.items():
        first = one.restored(name, tuned.tensor(full), device, torch.float32).to(device).float()
        second = other.restored(name, base.tensor(other.weights[name]), device, torch.float32).to(device).float()
        if first.shape != second.shape:
            raise UserError(
                f"{tuned.path} and {base.path}: '{name}' is {tuple(first.shape)} and {tuple(second.shape)}. They are of two models."
            )
        difference = first - second
        norm = float(difference.norm())
        if not math.isfinite(norm):
            bad = base if bool(first.isfinite().all()) else tuned
            raise UserError(
                f"{bad.path}: '{name}' holds NaN or infinity, or values whose squares are beyond float32: it has no difference."
            )
        module = name.removesuffix(".weight")
        if norm == 0:
            alike += difference.ndim == 2
        elif difference.ndim == 2 and module != name:
            down, up, kept = _halves(difference, norm, rank, energy, seed=len(found.adapters))
            found.adapters[module] = lora_of(down.cpu(), up.cpu())
            found.kept[module] = kept
        else:
            found.left_out[name] = norm
        advance()
    if not found.adapters:
        raise UserError(f"{tuned.path} and {base.path}: no linear differs between them; there is nothing to extract.")
    return Extracted(found.adapters, found.kept, alike, found.left_out)


def tensors_of(tuned: Checkpoint, base: Checkpoint) -> int:
    """How many tensors `extract` goes through."""
    return len(read_quantization(tuned, _compared_names(tuned, base)[0]).weights)


def _compared_names(tuned: Checkpoint, base: Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
    """Of the transformers, and of the text connectors where both files have them."""
    names, theirs = model_names(tuned), model_names(base)
    if any(map(is_text_side, names)) == any(map(is_text_side, theirs)):
        return names, theirs
    return transformer_names(tuned), transformer_names(base)


def _halves(difference: Tensor, norm: float, rank: int, energy: float | None, seed: int) -> tuple[Tensor, Tensor, float]:
    """(r, in), (out, r) and the share of the squared norm that they hold."""
    most = min(difference.shape)
    if rank + _OVERSAMPLING >= most // 2:
        left, values, right = torch.linalg.svd(difference, full_matrices=False)
    else:
        left, values, right = _projected(difference, rank + _OVERSAMPLING, seed)
    squares = values.double().square() / norm**2
    count = min(rank, len(values))
    if energy is not None:
        count = min(count, int((squares.cumsum(0) < energy).sum()) + 1)
    root = values[:count].sqrt()
    return root[:, None] * right[:count], left[:, :count] * root, min(1.0, float(squares[:count].sum()))


def _projected(matrix: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    basis = matrix @ torch.randn(matrix.shape[1], size, generator=generator).to(matrix)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(basis)[0]
        basis = matrix @ torch.linalg.qr(matrix.mT @ basis)[0]
    basis = torch.linalg.qr(basis)[0]
    left, values, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ left, values, right
