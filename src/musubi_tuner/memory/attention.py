"""Which attention kernels run: those that are fastest on the largest clip, with a mask and without, or the one that was asked for.

torch has one order of kernels for all attention, and gives each call to the first one that takes it. So a kernel that takes no masks
(flash) may stand before another one, which then gets the calls with a mask; a kernel that takes both gets both. A kernel that torch finds
fit may fail all the same when it runs: cuDNN's are built at the first call, and the library or the card may have none for it. So each is
tried in both forms before the first step, and what has failed in one of them is never used.
"""

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from musubi_tuner.memory.card import seconds_of
from musubi_tuner.memory.compiling import first_line, keep_graphs_apart
from musubi_tuner.runtime.errors import UserError

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
KERNELS_OF_A_CPU = ("flash", "math")
_LAST_RESORT = "math"
"""Products and a softmax, which run everywhere and take everything; it keeps all scores, so it is slow and large."""
SCORE_BYTES = 4
"""Of each score that it keeps, in float32 whatever the inputs are."""
_chosen = contextlib.ExitStack()


@dataclass(frozen=True, slots=True)
class KernelTimes:
    """Seconds of one forward and backward pass of each kernel that runs here."""

    plain: Mapping[str, float]
    """Without a mask."""
    masked: Mapping[str, float]
    """With a mask of keys; a kernel that torch never gives a mask to is not here."""
    failed: Mapping[str, str]
    """Kernels that failed in one of the forms although torch would have used them: the first line of the error. They are in neither of
    the others."""


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """Who gets which call."""

    plain: str
    masked: str
    order: tuple[str, ...]
    """As torch is to try them: after these two those that stand by for other shapes and dtypes, of which none failed."""

    @property
    def keeps_scores(self) -> bool:
        """Whether attention without a mask keeps its scores, tokens times tokens of each head."""
        return self.plain == _LAST_RESORT


def try_kernels(device: torch.device, dtype: torch.dtype, *, tokens: int, heads: int, head_dim: int) -> KernelTimes:
    """Run each kernel on a clip of so many tokens, with a mask and without; the large one that runs everywhere only where no other does."""
    shape = (1, heads, tokens, head_dim)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = (torch.arange(tokens, device=device) < tokens - tokens // 8)[None, None, None]
    found: dict[bool, dict[str, float]] = {False: {}, True: {}}
    failed: dict[str, str] = {}
    for masked, times in found.items():
        chosen = mask if masked else None
        for name, kernel in KERNELS.items():
            if name in failed or (name == _LAST_RESORT and times):
                continue
            with sdpa_kernel([kernel]):
                if not _takes(query, key, value, chosen):
                    continue
                try:
                    times[name] = seconds_of(lambda: _attend_and_return(query, key, value, chosen), device)  # noqa: B023 - run at once
                except RuntimeError as error:  # out of memory too
                    failed[name] = first_line(error)
    plain, masked_times = ({name: seconds for name, seconds in times.items() if name not in failed} for times in found.values())
    return KernelTimes(plain, masked_times, failed)


def choose_kernels(times: KernelTimes, *, asked: str | None = None, masks_are_rare: bool) -> KernelChoice:
    """The fastest order.

    Where the two kernels that are fastest with a mask and without cannot both be had, as the latter would take the masks too, rare masks
    yield, and others weigh as much as calls without.

    Args:
        asked: gets all calls that it takes.
        masks_are_rare: as in batches of one clip, of which nothing is padded.

    Raises:
        UserError: no kernel runs, or not the one that is asked for.
    """
    if asked is not None and asked not in times.plain:
        reason = times.failed.get(asked, "this card, or this build of torch, does not have it")
        found = ", ".join(times.plain) or "none does"
        raise UserError(f"--attn_mode {asked}: {reason}. Leave the flag out, and the fastest one that runs here is taken ({found}).")
    if not times.plain:
        reasons = "".join(f"; {name}: {reason}" for name, reason in times.failed.items())
        raise UserError(f"no attention kernel runs on this device{reasons}. Update torch, or use --mixed_precision no.")

    def seconds(pair: tuple[str, str]) -> tuple[float, float]:
        without, with_mask = times.plain[pair[0]], times.masked.get(pair[1], float("inf"))
        return (without, with_mask) if masks_are_rare else (without + with_mask, without)

    for_masks = min(times.masked, key=times.masked.__getitem__, default=_LAST_RESORT)
    pairs = [(name, name if name in times.masked else for_masks) for name in ([asked] if asked else times.plain)]
    plain, masked = min(pairs, key=seconds)
    order = dict.fromkeys((plain, masked, *sorted(times.plain, key=times.plain.__getitem__), _LAST_RESORT))
    return KernelChoice(plain, masked, tuple(order))


def describe_choice(times: KernelTimes, choice: KernelChoice, *, asked: str | None) -> str:
    """For the banner."""
    if asked is None:
        return f"{_listed(times.plain)} -> {choice.plain}; with a mask {_listed(times.masked) or 'none'} -> {choice.masked}"
    if choice.masked == asked:
        return f"{asked}, as asked"
    return f"{asked}, as asked; it takes no mask, so with one {_listed(times.masked) or 'none'} -> {choice.masked}"


def use_attention(order: Sequence[str]) -> None:
    """Have each attention of this process run by the first of these kernels that takes it, and by no other."""
    if torch.cuda.is_available():
        _let_torch_choose_first()
    _chosen.close()
    _chosen.enter_context(sdpa_kernel([KERNELS[name] for name in order], set_priority=True))
    keep_graphs_apart()


def use_default_attention() -> None:
    """Restore torch's own order of kernels."""
    _chosen.close()
    keep_graphs_apart()


def _let_torch_choose_first() -> None:
    """At the first attention of a process torch installs an order of its own for the card, over any that was chosen before."""
    small = torch.empty(1, 1, 64, 64, device="cuda", dtype=torch.bfloat16)
    torch._fused_sdp_choice(small, small, small)


def _takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether torch gives this attention to a kernel that is enabled; it warns of every reason against."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch._fused_sdp_choice(query, key, value, attn_mask=mask) != SDPBackend.ERROR.value
        except RuntimeError:  # "no available kernel"
            return False


def _attend_and_return(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    F.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()


def _listed(times: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {1000 * times[name]:.2f} ms" for name in sorted(times, key=times.__getitem__))
