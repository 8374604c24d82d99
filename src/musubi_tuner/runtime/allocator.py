"""How torch takes a card's memory: in pieces that grow, where it has them.

Of pieces of fixed sizes more lies unused between tensors (docs/explanation/memory.md). The variable is read when torch is imported, so it
is set before; nothing here imports torch.
"""

import difflib
import os
import re
import sys

from musubi_tuner.runtime.errors import UserError

VARIABLE, GROWING = "PYTORCH_ALLOC_CONF", "expandable_segments:True"
_OLDER_NAME = "PYTORCH_CUDA_ALLOC_CONF"


_SWITCH, _NUMBER, _ABOVE_19, _SHARE = "True|False", r"\d+", r"[2-9]\d|\d{3,}", r"0?\.\d*[1-9]\d*"
_SETTINGS = {
    "backend": "native|cudaMallocAsync",
    "expandable_segments": _SWITCH,
    "garbage_collection_threshold": _SHARE,
    "graph_capture_record_stream_reuse": _SWITCH,
    "large_segment_size_mb": _ABOVE_19,
    "max_non_split_rounding_mb": _ABOVE_19,
    "max_split_size_mb": _ABOVE_19,
    "per_process_memory_fraction": rf"{_SHARE}|[01]|[01]\.0*",
    "pinned_max_cached_size_mb": _NUMBER,
    "pinned_max_round_threshold_mb": _NUMBER,
    "pinned_num_register_threads": _NUMBER,
    "pinned_reserve_segment_size_mb": _NUMBER,
    "pinned_use_background_threads": _SWITCH,
    "pinned_use_cuda_host_register": _SWITCH,
    "release_lock_on_cudamalloc": _SWITCH,
    "roundup_power2_divisions": r"\d+|\[(?:(?:\d+|>):\d+,?)+\]",
}
"""What torch 2.11 and 2.13 take, and the form of each value. Of names that are like none of these, later ones may know."""
_SETTING = re.compile(r"([^:,\[\]]*)(?::(\[[^\]]*\]|[^,\[\]]*))?(?:,|$)")


def choose_allocator() -> None:
    """Pieces that grow, unless the user has said how. On Windows torch has none.

    Raises:
        UserError: the user has said it in a way that torch does not take. Where it is imported it would end the process without words.
    """
    for name in (VARIABLE, _OLDER_NAME):
        if (fault := setting_fault(os.environ.get(name, ""))) is not None:
            raise UserError(
                f"{name}={os.environ[name]} (an environment variable that torch reads): {fault}. Unset it, and what is best here is "
                f"chosen; or write it as {GROWING}, with several settings separated by commas."
            )
    if sys.platform != "win32" and not {VARIABLE, _OLDER_NAME} & os.environ.keys():
        os.environ[VARIABLE] = GROWING


def setting_fault(text: str) -> str | None:
    """What torch would not take in a value of its variable; None = nothing."""
    rest = re.sub(r"\s", "", text)
    while rest:
        found = _SETTING.match(rest)
        if found is None:
            return f"{rest!r} is no setting with a value"
        name, value = found.groups()
        rest = rest[found.end() :]
        if not value:
            return f"{name!r} has no value"
        if name not in _SETTINGS and (near := difflib.get_close_matches(name, _SETTINGS, n=1, cutoff=0.8)):
            return f"{name!r} is no setting, {near[0]!r} is"
        if not re.fullmatch(_SETTINGS.get(name, ".*"), value):
            return f"{name} cannot be {value!r}"
    return None


def pieces_grow() -> bool:
    """Whether this process's do."""
    return sys.platform != "win32" and GROWING in (os.environ.get(VARIABLE) or os.environ.get(_OLDER_NAME) or "")
