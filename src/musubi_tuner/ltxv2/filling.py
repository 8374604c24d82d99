"""Filling a module from a checkpoint: strictly, tensor by tensor, with quantized weights brought back, and every number looked at."""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from musubi_tuner.ltxv2.quantization import Quantization, read_quantization
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.runtime.errors import UserError

log = logging.getLogger(__name__)

Place = Callable[[str, Tensor], Tensor]


def cast(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Move to the device, and to `dtype` where the tensor is of floating point."""
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def fill(
    module: nn.Module,
    sources: Mapping[str, str],
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    place: Place | None = None,
    remedy: str = "",
) -> None:
    """Give a module that was built on the meta device its weights, strictly and in the order of `sources`.

    Weights stored in 8 bits are brought back to `dtype` first, and a line in the log says so. Single numbers that merging tools leave in a
    file are left aside with a warning.

    Args:
        module: parameters and persistent buffers are replaced in place.
        sources: {name in the module: full name in the checkpoint}, with the scales beside quantized weights.
        device: on `meta` names, shapes and dtypes are held against the module, and no number is read.
        dtype: of floating point tensors.
        place: called as `place(name, tensor)` instead of the plain move to `device` and `dtype`; keeps nothing of `tensor` but what
            it returns.
        remedy: what to do about tensors that do not fit.

    Raises:
        UserError: a quantization that is not read, names missing from the checkpoint, names the module lacks, shapes that differ, or
            NaN or infinity among the weights, or other numbers than weights are.
    """
    device = torch.device(device)
    expected = module.state_dict()
    quantization = read_quantization(checkpoint, sources)
    sources = _without_leftovers(expected, quantization.weights, checkpoint)
    problems = _differences(expected, sources, checkpoint) or _no_weights(expected, sources, checkpoint, quantization)
    if problems:
        text = f"{checkpoint.path}: its tensors do not fit {type(module).__name__}: " + "; ".join(problems) + "."
        raise UserError(f"{text} {remedy}".rstrip())
    if device.type == "meta":
        return
    if quantization.receipt:
        log.info("%s: stored as %s; loaded as %s", checkpoint.path.name, quantization.receipt, str(dtype).removeprefix("torch."))
    finite = _FiniteCheck()
    with checkpoint.tensors(sources.values()) as tensors:
        for name, full in sources.items():
            # No name for the tensor itself: a large one has to be gone before the next one is read.
            placed = _placed(finite.seen(full, quantization.restored(name, next(tensors), device, dtype)), name, device, dtype, place)
            set_tensor(module, name, tensors.own(placed))
    finite.check(checkpoint)


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter or buffer called `name`; a parameter stays frozen or trainable as it was."""
    owner_path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_path)
    old = getattr(owner, leaf)
    if isinstance(old, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point()))
    else:
        owner.register_buffer(leaf, tensor)


def _placed(tensor: Tensor, name: str, device: torch.device, dtype: torch.dtype, place: Place | None) -> Tensor:
    return place(name, tensor) if place else cast(tensor, device, dtype)


class _FiniteCheck:
    """Looks at each tensor where it lies, and reads what it saw once, at the end: a card is not waited for in between."""

    def __init__(self) -> None:
        self._flags: dict[torch.device, dict[str, Tensor]] = {}

    def seen(self, full: str, tensor: Tensor) -> Tensor:
        """`tensor` itself."""
        if tensor.is_floating_point() and tensor.numel():
            # The extremes are NaN where any number is, and one pass over memory.
            extremes = torch.stack(torch.aminmax(tensor))
            self._flags.setdefault(tensor.device, {})[full] = extremes.isfinite().all()
        return tensor

    def check(self, checkpoint: Checkpoint) -> None:
        """
        Raises:
            UserError: some tensors were not finite.
        """
        bad = [
            full
            for flags in self._flags.values()
            for full, finite in zip(flags, torch.stack(list(flags.values())).tolist(), strict=True)
            if not finite
        ]
        if bad:
            raise UserError(
                f"{checkpoint.path}: holds NaN or infinity in {_some(bad)}. The file is damaged, or was merged or converted wrongly: "
                "download the release's own file."
            )


def _without_leftovers(expected: Mapping[str, Tensor], sources: Mapping[str, str], checkpoint: Checkpoint) -> Mapping[str, str]:
    """Without single numbers that stand outside the module's own parts, such as `zsnr` and `model_ema.decay`."""
    parts = {name.partition(".")[0] for name in expected}
    left = [
        name
        for name, full in sources.items()
        if name not in expected and name.partition(".")[0] not in parts and checkpoint.entries[full].count <= 1
    ]
    if not left:
        return sources
    log.warning("WARNING: %s: left aside, as leftovers of merging or training tools: %s", checkpoint.path, _some(left))
    return {name: full for name, full in sources.items() if name not in left}


def _differences(expected: Mapping[str, Tensor], sources: Mapping[str, str], checkpoint: Checkpoint) -> list[str]:
    problems = []
    if missing := sorted(expected.keys() - sources.keys()):
        problems.append(f"missing {_some(missing)}")
    if unexpected := sorted(sources.keys() - expected.keys()):
        problems.append(f"unexpected {_some(unexpected)}")
    for name in sorted(expected.keys() & sources.keys()):
        wanted, found = tuple(expected[name].shape), checkpoint.shape(sources[name])
        if wanted != found:
            problems.append(f"'{name}' has the shape {found}, expected {wanted}")
        if len(problems) > 5:
            break
    return problems


def _no_weights(
    expected: Mapping[str, Tensor], sources: Mapping[str, str], checkpoint: Checkpoint, quantization: Quantization
) -> list[str]:
    """Tensors of whole or complex numbers, or of yes and no, where weights belong."""
    dtypes = {name: checkpoint.dtype(full) for name, full in sources.items() if expected[name].is_floating_point()}
    wrong = [name for name, dtype in dtypes.items() if not dtype.is_floating_point and not quantization.holds_codes(name)]
    return [f"'{name}' is stored as {str(dtypes[name]).removeprefix('torch.')}, which is no weight" for name in wrong[:3]]


def _some(names: Sequence[str], most: int = 4) -> str:
    listed = ", ".join(f"'{name}'" for name in names[:most])
    return f"{len(names)} tensor(s): {listed}" + (", ..." if len(names) > most else "")
