"""The text contexts of samples: from the cache, or encoded before the transformer is loaded where there is an encoder."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.cache.audit import header_of, reason_to_rebuild
from musubi_tuner.cache.forms import text_forms
from musubi_tuner.cache.names import TEXT_MASK_KEY, prompt_path, training_key
from musubi_tuner.cache.store import read
from musubi_tuner.ltxv2.text.connectors import CONTEXT_TOKENS
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

_CACHED_DTYPE = torch.bfloat16
"""What text caching stores: what is encoded here is rounded to it, so that it makes no difference where it was done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSource:
    """Where contexts come from."""

    cache_directory: Path
    expected: Mapping[str, str] = field(default_factory=dict)
    """Metadata that a cached context must have beside its kind and stage, as in `cache.audit.reason_to_rebuild`."""
    encode: EncodePrompts | None = None
    """For what is not cached; None where no text encoder was given."""
    encoder: str | None = None
    """Fingerprint of what `encode` encodes with, as cached texts have it."""
    projection: Callable[[], str] | None = None
    """The same of text projection and connectors, asked for where a text is not cached."""
    max_length: int | None = None
    """Tokens that `encode` cuts texts to."""
    command: str = "ltxv2_cache_text_encoder_outputs.py"
    """What caches the texts of the prompts, as it is typed; for messages."""
    remedy: str = "or give training --text_encoder, which then encodes them before it starts."
    """What else helps; for messages."""


def remembering(source: TextSource) -> TextSource:
    """The same source, which encodes no text a second time."""
    encode, known = source.encode, {}
    if encode is None:
        return source

    def encoded(texts: Sequence[str]) -> Sequence[tuple[Tensor, Tensor]]:
        if missing := [text for text in texts if text not in known]:
            known.update(zip(missing, encode(missing), strict=True))
        return [known[text] for text in texts]

    return replace(source, encode=encoded)


@dataclass(frozen=True, slots=True)
class EncodedBy:
    """What a text's context is made by; None where nothing tells."""

    encoder: str | None
    """Fingerprint."""
    projection: str | None
    """Fingerprint of text projection and connectors."""
    max_length: int | None
    """Tokens that it is cut to; None also where they are as many as a context has, which is the default."""


def encoders_of(texts: Collection[str], source: TextSource) -> dict[str, EncodedBy]:
    """Of each text: what its cache file says, or `source` where it is to be encoded."""
    found = {}
    for text in texts:
        path = prompt_path(source.cache_directory, text)
        header = header_of(path) if _reason_against(path, source) is None else ""
        if isinstance(header, str):
            projection = None if source.projection is None else source.projection()
            found[text] = EncodedBy(source.encoder, projection, _if_cut(source.max_length))
        else:
            metadata, _ = header
            length = metadata.get("max_length", "")
            cut = _if_cut(int(length)) if length.isdecimal() else None
            found[text] = EncodedBy(metadata.get("encoder_fingerprint"), metadata.get("projection_fingerprint"), cut)
    return found


def _if_cut(max_length: int | None) -> int | None:
    return None if max_length == CONTEXT_TOKENS else max_length


def load_contexts(texts: Sequence[str], source: TextSource, *, widths: tuple[int, ...]) -> dict[str, TextContext]:
    """Context of each text.

    Args:
        widths: context widths that the model can take.

    Raises:
        UserError: texts that are not cached and cannot be encoded, with the command that caches them; or a wrong width.
    """
    paths = {text: prompt_path(source.cache_directory, text) for text in texts}
    reasons = {text: _reason_against(path, source) for text, path in paths.items()}
    missing = {text: reason for text, reason in reasons.items() if reason is not None}
    if missing and source.encode is None:
        rows = "\n".join(f"  {text[:60]!r}: {reason}" for text, reason in missing.items())
        raise UserError(
            f"{len(missing)} text(s) of the sample prompts cannot be used from {source.cache_directory}:\n{rows}\n"
            f"Run:\n  {source.command}\n{source.remedy}"
        )
    contexts = {}
    for text, path in paths.items():
        if text not in missing:
            tensors = {training_key(key): tensor for key, tensor in read(path).items()}
            contexts[text] = _to_context(tensors["text"], tensors[TEXT_MASK_KEY])
    if missing and source.encode is not None:
        encoded = source.encode(list(missing))
        contexts |= {text: _to_context(values.to(_CACHED_DTYPE), mask) for text, (values, mask) in zip(missing, encoded, strict=True)}
    for text, context in contexts.items():
        if context.text.shape[-1] not in widths:
            raise UserError(
                f"sample prompt {text[:40]!r}: its context is {context.text.shape[-1]} wide, "
                f"the model takes {' or '.join(map(str, widths))}. Cache the prompts again: ltxv2_cache_text_encoder_outputs.py "
                "with the --ltxv2_model, --text_encoder_backend and --ltx_mode of training."
            )
    return contexts


def _reason_against(path: Path, source: TextSource) -> str | None:
    expected = {"kind": "text", "stage": "context", **source.expected}
    return reason_to_rebuild(path, expected, ("text", TEXT_MASK_KEY), text_forms, to_read=True)


def _to_context(text: Tensor, mask: Tensor) -> TextContext:
    real = mask.bool()
    return TextContext(text[None], None if bool(real.all()) else real[None])
