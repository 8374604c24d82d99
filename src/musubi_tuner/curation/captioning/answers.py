"""What a model answers -> a caption: without phrases around it, within its length, with the trigger word."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from musubi_tuner.curation.captioning.instruction import TRIGGER
from musubi_tuner.runtime.errors import UserError

USUAL_PREFIXES = (
    *(f"{article} {what} {verb}" for what in ("video", "clip", "image", "picture", "audio", "recording") for article in ("the", "this")
      for verb in ("shows", "depicts", "features", "captures", "begins with", "opens with")),
    *(f"in {article} {what}" for what in ("video", "clip", "image", "picture", "recording") for article in ("the", "this")),
    "caption:", "here is the caption:", "here is a caption:", "sure, here is the caption:", "description:",
)  # fmt: skip
"""Taken off where no others are given; in lower case."""

_THOUGHT = re.compile(r"<(think|thinking)>.*?</\1>", re.DOTALL)
_THOUGHT_END = re.compile(r"^.*</(?:think|thinking)>", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?。！？…][\"'”’»)]*(?=\s|$)|[。！？]")
_REFUSAL = re.compile(
    r"^(?:i(?:'|’)?m sorry,? (?:but )?i|i am sorry,? (?:but )?i|sorry,? (?:but )?i|i|as an ai(?: \w+)*,? i)"
    r" ?(?:can(?:not|(?:'|’)t)|am (?:unable|not able)|(?:'|’)m (?:unable|not able))"
    r" (?:to )?(?:assist|help|describe|identify|provide|process|view|see|hear|comply|caption|do that)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said."""

    text: str
    is_cut: bool
    """It ran out of tokens."""


@dataclass(frozen=True, slots=True)
class Caption:
    """What is written."""

    text: str
    note: str
    """That it was cut, and why; empty otherwise."""


def caption_of(answer: Answer, *, prefixes: Sequence[str], trigger: str | None, max_words: int) -> Caption:
    """
    Args:
        prefixes: beginnings to take off, in any case of letters.

    Raises:
        UserError: nothing was said, or that it will not say anything.
    """
    text = _THOUGHT_END.sub("", _THOUGHT.sub("", answer.text))
    if "<think>" in text or "<thinking>" in text:
        raise UserError("the model thought until it ran out of tokens. Raise --max_tokens, or switch its thinking off.")
    text = _bare(" ".join("".join(" " if unicodedata.category(sign) == "Cc" else sign for sign in text).split()))
    if _REFUSAL.match(text):
        raise UserError(f"the model refuses ('{text[:200]}'). Caption it by hand, or with another model or instruction.")
    text = _without_prefix(text, prefixes)
    if not re.search(r"\w", text):
        why = " before it ran out of tokens, perhaps as it was still thinking; raise --max_tokens" if answer.is_cut else ""
        raise UserError(f"the model answered nothing{why}. Try another instruction or model.")
    note = ""
    if answer.is_cut:
        text, note = _whole_sentences(text), "cut at --max_tokens"
    if len(words := text.split()) > max_words:
        text, note = _whole_sentences(" ".join(words[:max_words])), "cut at --max_words"
    return Caption(_with_trigger(text, trigger), note)


def _bare(text: str) -> str:
    """Without one pair of quotation marks around all of it, and without marks of headings and bold type at its ends."""
    text = text.strip("*#` ")
    for opening, closing in ('""', "“”", "''", "‘’"):
        if len(text) > 2 and text[0] == opening and text[-1] == closing and not {opening, closing} & set(text[1:-1]):
            return text[1:-1].strip()
    return text


def _without_prefix(text: str, prefixes: Sequence[str]) -> str:
    """Without the longest of the prefixes that it begins with, as often as it begins with one; the next word gets a capital letter."""
    by_length = sorted((one.strip() for one in prefixes), key=len, reverse=True)
    known = re.compile(
        "|".join(re.escape(one) + (r"(?!\w)" if one[-1].isalnum() else "") for one in by_length if one) or r"(?!)", re.IGNORECASE
    )
    while found := known.match(text):
        rest = re.sub(r"^[\s,:;–—-]+", "", text[found.end() :])
        if not rest:
            return ""
        text = rest[0].upper() + rest[1:]
    return text


def _whole_sentences(text: str) -> str:
    """Up to the end of the last sentence, where one ends in its second half; otherwise as it is."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].strip() if ends and ends[-1] >= len(text) / 2 else text


def _with_trigger(text: str, trigger: str | None) -> str:
    if trigger is None:
        return text
    text = text.replace(TRIGGER, trigger)
    there = re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text)
    return text if there else f"{trigger}, {text}"
