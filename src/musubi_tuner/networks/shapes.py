"""Which shapes the tensors of a stored adapter may have, and the (out, in) of the linear that they were made for."""

from collections.abc import Mapping

from musubi_tuner.networks.base import Tensors
from musubi_tuner.networks.lora import DOWN, MAGNITUDE, UP
from musubi_tuner.networks.lycoris import LOHA, W1, W2, W2_DOWN, W2_UP
from musubi_tuner.networks.types import DIFF

_PRODUCTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "lora": ((UP, DOWN),),
    "dora": ((UP, DOWN),),
    "loha": ((LOHA[0], LOHA[1]), (LOHA[2], LOHA[3])),
    "lokr": ((f"{W1}_a", f"{W1}_b"), (W2_UP, W2_DOWN)),
    "full": (),
}
"""Type -> the pairs of matrices that it multiplies."""


def broken_shape(kind: str, tensors: Tensors) -> str | None:
    """The first shape that does not go together with the others, in words."""
    for leaf, tensor in tensors.items():
        if leaf != MAGNITUDE and (tensor.ndim != 2 or not tensor.numel()):
            return f"{leaf} has the shape {tuple(tensor.shape)}; it must be a matrix, and not empty"
    for left, right in _PRODUCTS[kind]:
        if left in tensors and tensors[left].shape[1] != tensors[right].shape[0]:
            return f"{left} {tuple(tensors[left].shape)} and {right} {tuple(tensors[right].shape)} do not have one rank"
    if kind == "loha" and len({(tensors[left].shape[0], *tensors[right].shape) for left, right in _PRODUCTS[kind]}) > 1:
        return f"its two products have the shapes {[tuple(tensors[leaf].shape) for leaf in LOHA]}; they must be alike"
    return None


def adapted_shape(kind: str, tensors: Tensors) -> tuple[int, int]:
    """(out, in) of whole tensors."""
    if kind == "full":
        rows, columns = tensors[DIFF].shape
    elif kind == "lokr":
        (o1, i1), (o2, i2) = (_product(tensors, whole, *pair) for whole, pair in zip((W1, W2), _PRODUCTS["lokr"], strict=True))
        rows, columns = o1 * o2, i1 * i2
    else:
        left, right = _PRODUCTS[kind][0]
        rows, columns = tensors[left].shape[0], tensors[right].shape[1]
    return rows, columns


def _product(tensors: Tensors, whole: str, left: str, right: str) -> tuple[int, int]:
    if whole in tensors:
        rows, columns = tensors[whole].shape
        return rows, columns
    return tensors[left].shape[0], tensors[right].shape[1]
