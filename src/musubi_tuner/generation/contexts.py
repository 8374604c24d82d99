"""The text contexts of previews: from the cache, or encoded before training starts where an encoder was given."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.cache.audit import reason_to_rebuild
from musubi_tuner.cache.names import TEXT_MASK_KEY, prompt_path, strip_key
from musubi_tuner.cache.store import read
from musubi_tuner.runtime.errors import UserError


@dataclass(frozen=True, slots=True)
class TextContext:
    """One text as the transformer takes it."""

    text: Tensor
    """(1, S, Cv) or (1, S, Cv + Ca)"""
    mask: Tensor | None
    """(1, S) bool, True = real; None where all are."""

    def mask_on(self, device: torch.device) -> Tensor | None:
        return None if self.mask is None else self.mask.to(device)


EncodePrompts = Callable[[Sequence[str]], Sequence[tuple[Tensor, Tensor]]]
"""Texts -> (S, W) contexts and (S,) masks, as text caching makes them; keeps no encoder after it returns."""

CACHED_DTYPE = torch.bfloat16
"""What text caching stores: what is encoded here is rounded to it, so that it makes no difference where it was done."""


def load_contexts(
    texts: Sequence[str],
    cache_directory: Path,
    *,
    expected: Mapping[str, str],
    widths: tuple[int, ...],
    encode: EncodePrompts | None,
) -> dict[str, TextContext]:
    """Context of each text.

    Args:
        expected: metadata that a cached context must have, as in `cache.audit.reason_to_rebuild`.
        widths: context widths that the model can take.
        encode: for what is not cached; None where no text encoder was given.

    Raises:
        UserError: texts that are not cached and cannot be encoded, with the command that caches them; or a wrong width.
    """
    reasons = {text: reason_to_rebuild(prompt_path(cache_directory, text), expected, ("text", TEXT_MASK_KEY)) for text in texts}
    missing = {text: reason for text, reason in reasons.items() if reason is not None}
    if missing and encode is None:
        raise UserError(_explain_missing(missing, cache_directory))
    contexts = {text: _read_context(prompt_path(cache_directory, text)) for text in texts if text not in missing}
    if missing and encode is not None:
        encoded = encode(list(missing))
        contexts |= {text: _to_context(values.to(CACHED_DTYPE), mask) for text, (values, mask) in zip(missing, encoded, strict=True)}
    for text, context in contexts.items():
        if context.text.shape[-1] not in widths:
            raise UserError(
                f"sample prompt {text[:40]!r}: its context is {context.text.shape[-1]} wide, "
                f"the model takes {' or '.join(map(str, widths))}. Cache the prompts again: ltxv2_cache_text_encoder_outputs.py "
                "with the --ltxv2_model, --text_encoder_backend and --ltx_mode of training."
            )
    return contexts


def _read_context(path: Path) -> TextContext:
    tensors = {strip_key(key): tensor for key, tensor in read(path).items()}
    return _to_context(tensors["text"], tensors[TEXT_MASK_KEY])


def _to_context(text: Tensor, mask: Tensor) -> TextContext:
    real = mask.bool()
    return TextContext(text[None], None if bool(real.all()) else real[None])


def _explain_missing(missing: Mapping[str, str], cache_directory: Path) -> str:
    rows = "\n".join(f"  {text[:60]!r}: {reason}" for text, reason in missing.items())
    return (
        f"{len(missing)} text(s) of the sample prompts cannot be used from {cache_directory}:\n{rows}\n"
        "Run ltxv2_cache_text_encoder_outputs.py with the same --dataset_config, --ltxv2_model, --ltx_mode and --sample_prompts, "
        "or give training --text_encoder, which then encodes them before it starts."
    )
