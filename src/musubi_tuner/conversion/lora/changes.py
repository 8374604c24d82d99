"""LoRAs made of LoRAs: parts removed, scaled, brought to another rank, several added up or averaged."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.conversion.lora.contents import LoraContents, lora_of, require_kinds, scaled
from musubi_tuner.networks.keys import is_text_side
from musubi_tuner.networks.lora import DOWN, UP
from musubi_tuner.networks.reading import StoredAdapter
from musubi_tuner.networks.shapes import adapted_shape
from musubi_tuner.networks.stack import Strength
from musubi_tuner.networks.targets import is_audio_side, stream_of
from musubi_tuner.networks.types import TYPES
from musubi_tuner.runtime.errors import UserError

PARTS: Mapping[str, Callable[[str], bool]] = {
    "audio": lambda name: is_audio_side(name) and not is_text_side(name),
    "video": lambda name: not is_audio_side(name) and not is_text_side(name),
    "cross": lambda name: stream_of(name) == "cross",
    "connectors": is_text_side,
}
"""What of a file a word stands for: all that makes the sound, all that makes the pictures, the attention between them, the text side."""
WIDEST = 0.288
"""Of a power function average: an average with equal weights from the start."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What one adapter lost at a lower rank."""

    rank: int
    before: float
    """Squared norm of the change that it makes to the weight."""
    lost: float
    """Of that."""


def without(contents: LoraContents, parts: Sequence[str], patterns: Sequence[re.Pattern[str]]) -> LoraContents:
    """The file without the modules of any of `PARTS`, and without those whose official names a pattern is found in.

    Raises:
        UserError: nothing is there to be removed, or all of it.
    """
    chosen = [PARTS[part] for part in parts] + [lambda name, one=pattern: one.search(name) is not None for pattern in patterns]
    kept = {name: one for name, one in contents.adapters.items() if not any(choose(name) for choose in chosen)}
    if len(kept) == len(contents.adapters):
        raise UserError(f"{contents.path}: has no module of what is to be removed; `inspect` lists what it has.")
    if not kept:
        raise UserError(f"{contents.path}: nothing would be left of it.")
    return contents.with_adapters(kept)


def strengthened(contents: LoraContents, strength: Strength) -> LoraContents:
    """The file at another strength; modules with strength 0 are left out.

    Raises:
        UserError: a DoRA, or nothing that is left.
    """
    try:
        adapters = {
            name: scaled(one, factor) if (factor := strength.of(name)) != 1 else one
            for name, one in contents.adapters.items()
            if strength.of(name)
        }
    except ValueError as error:
        raise UserError(f"{contents.path}: {error}.") from error
    if not adapters:
        raise UserError(f"{contents.path}: at strength 0 nothing would be left of it.")
    return contents.with_adapters(adapters)


def change_of(adapter: StoredAdapter) -> Tensor:
    """(out, in) float32, what an adapter that is no DoRA adds to the weight."""
    return TYPES[adapter.kind].merged(torch.zeros(adapted_shape(adapter.kind, adapter.stored)), adapter.tensors)


def resized(contents: LoraContents, *, rank: int | None, energy: float | None) -> tuple[LoraContents, dict[str, Cut]]:
    """Every adapter as the LoRA of least error (singular values, Eckart and Young 1936).

    Args:
        rank: of all; with `energy`, the highest.
        energy: the share of each change's squared norm that is kept, by as low a rank as does; None = `rank` decides.

    Raises:
        UserError: a DoRA, whose change is known beside the base alone, or values whose products are beyond float32.
    """
    require_kinds(
        contents,
        ("lora", "lokr", "loha", "full"),
        "what it changes depends on the base's weights",
        "Only LoRA, LoKr, LoHa and diff can be resized.",
    )
    adapters, cuts = {}, {}
    for name, one in contents.adapters.items():
        found = _singular(one)
        if found is None:
            raise UserError(
                f"{contents.path}: '{name}' has values of up to {_largest(one):.1e}, whose products are beyond float32: it cannot be "
                "brought to another rank. `scale` makes it weaker."
            )
        left, values, right = found
        squares = values.double().square()
        total = float(squares.sum())
        count = _needed(squares, energy) if energy is not None else len(values)
        count = max(1, min(count, len(values) if rank is None else rank, len(values)))
        root = values[:count].sqrt()
        adapters[name] = lora_of(root[:, None] * right[:count], left[:, :count] * root)
        cuts[name] = Cut(count, total, float(squares[count:].sum()))
    return contents.with_adapters(adapters), cuts


def added(files: Sequence[tuple[LoraContents, Strength]]) -> LoraContents:
    """Several LoRAs as one that does what all of them do together, exactly: their ranks are laid side by side.

    Raises:
        UserError: a file that is no LoRA, or modules of another size.
    """
    parts: dict[str, list[StoredAdapter]] = {}
    for contents, strength in files:
        require_kinds(contents, ("lora", "dora"), "only LoRAs are laid side by side", "`resize --rank N` makes one of it, with its error.")
        require_kinds(
            contents,
            ("lora",),
            "what it changes depends on the base's weights, so no file holds its sum with others",
            "Give it and the others to generation side by side, or bake them into a checkpoint.",
        )
        for name, one in strengthened(contents, strength).adapters.items():
            there = parts.setdefault(name, [])
            if there and adapted_shape("lora", there[0].stored) != adapted_shape("lora", one.stored):
                raise UserError(f"{contents.path}: '{name}' has another size than in {files[0][0].path}; they are of different models.")
            there.append(one)
    adapters = {}
    for name, some in parts.items():
        tensors = [one.tensors for one in some]
        adapters[name] = lora_of(torch.cat([own[DOWN] for own in tensors]), torch.cat([own[UP] for own in tensors], dim=1))
    return dataclasses.replace(files[0][0].with_adapters(adapters), metadata=_agreed([contents.metadata for contents, _ in files]))


def _agreed(all_metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What is true of a sum: entries that are the same in all of its parts, and how a reference is given to those that were trained with
    one."""
    first, *others = all_metadata
    agreed = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    of_references = {key: value for metadata in reversed(all_metadata) for key, value in metadata.items() if key.startswith("reference_")}
    return agreed | of_references


def averaged(files: Sequence[LoraContents], shares: Sequence[float]) -> LoraContents:
    """Checkpoints of one run as one: each tensor is the sum of theirs, each by its share. The rest is as in the last one.

    Raises:
        UserError: files that are not of one run: other modules, types, ranks or sizes.
    """
    first = files[0]
    for other in files[1:]:
        if set(other.adapters) != set(first.adapters):
            odd = sorted(set(other.adapters) ^ set(first.adapters))[0]
            raise UserError(f"{other.path} and {first.path}: '{odd}' is in one of them alone. Give checkpoints of one run.")
        for name, one in first.adapters.items():
            theirs = other.adapters[name]
            shapes = [{leaf: tuple(value.shape) for leaf, value in each.stored.items()} for each in (one, theirs)]
            if one.kind != theirs.kind or shapes[0] != shapes[1]:
                raise UserError(f"{other.path} and {first.path}: '{name}' has another type or rank. Give checkpoints of one run.")
    adapters = {}
    for name, one in first.adapters.items():
        each = [file.adapters[name].tensors for file in files]
        sums = {leaf: torch.stack([share * own[leaf] for share, own in zip(shares, each, strict=True)]).sum(0) for leaf in each[0]}
        adapters[name] = dataclasses.replace(one, stored=sums, scale=1.0)
    return files[-1].with_adapters(adapters)


def shares_by_decay(count: int, decay: float, last: float | None) -> list[float]:
    """Of an exponential average that goes through `count` files in their order: m <- b m + (1 - b) file, begun at the first.

    Args:
        last: b at the last file, where it goes there from `decay` in equal steps.
    """
    shares = [1.0]
    for place in range(1, count):
        share = decay if last is None else decay + (last - decay) * (place - 1) / max(1, count - 2)
        shares = [share * one for one in shares] + [1 - share]
    return shares


def shares_by_width(steps: Sequence[int], width: float) -> list[float]:
    """Of the power function average (Karras et al. 2024, arXiv 2312.02696, section 3.1): at step t, m <- b m + (1 - b) file with
    b = (s / t)^(g + 1), s the step of the file before.

    Args:
        steps: that the files were trained for, rising.
        width: sigma_rel, the standard deviation of the average's weights as a share of the training, above 0 and below `WIDEST`.
    """
    power = _gamma(width) + 1
    shares = [1.0]
    for before, now in zip(steps, steps[1:], strict=False):
        kept = (before / now) ** power
        shares = [kept * one for one in shares] + [1 - kept]
    return shares


def _gamma(width: float) -> float:
    """The g for which (g + 1)^(1/2) (g + 2)^-1 (g + 3)^-(1/2) is `width`, which falls with it."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        if (middle + 1) ** 0.5 / (middle + 2) / (middle + 3) ** 0.5 > width:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _singular(adapter: StoredAdapter) -> tuple[Tensor, Tensor, Tensor] | None:
    """(out, n), (n,) falling and (n, in), of a LoRA by way of its two halves, without the matrix between; None beyond float32."""
    try:
        if adapter.kind == "lora":
            tensors = adapter.tensors
            up, up_rest = torch.linalg.qr(tensors[UP])
            down, down_rest = torch.linalg.qr(tensors[DOWN].mT)
            left, values, right = torch.linalg.svd(up_rest @ down_rest.mT, full_matrices=False)
            rounded = torch.finfo(values.dtype).eps * up_rest.norm() * down_rest.norm()
            values = torch.where(values > rounded, values, 0)  # halves that take each other away leave rounding, and no change
            left, right = up @ left, right @ down.mT
        else:
            left, values, right = torch.linalg.svd(change_of(adapter), full_matrices=False)
    except torch.linalg.LinAlgError:  # of NaN, which infinities have become on the way
        return None
    return (left, values, right) if all(bool(part.isfinite().all()) for part in (left, values, right)) else None


def _largest(adapter: StoredAdapter) -> float:
    return max(float(value.abs().max()) for value in adapter.tensors.values())


def _needed(squares: Tensor, energy: float) -> int:
    """The least count of values whose squares hold that share."""
    return int((squares.cumsum(0) < energy * float(squares.sum())).sum()) + 1
