"""What the captions say: missing and empty ones, one caption on several sources, captions without the trigger word, their lengths."""

import statistics
from collections.abc import Iterator, Mapping

from musubi_tuner.cache.store import read_metadata
from musubi_tuner.curation.auditing.findings import Finding
from musubi_tuner.dataset.items import Item
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.tables import names_of
from musubi_tuner.sources.captions import Caption


def cached_captions(items: list[Item]) -> dict[str, Caption]:
    """By source, from the text caches: for datasets whose media and captions are gone."""
    found = {}
    for item in items:
        path = item.paths.get("text")
        if path is not None and item.clip.source not in found and path.is_file():
            try:
                found[item.clip.source] = Caption(read_metadata(path).get("caption"))
            except UserError:  # the file is told of as a hole
                continue
    return found


def caption_findings(label: str, captions: Mapping[str, Caption], trigger: str | None) -> Iterator[Finding]:
    """Of one dataset."""
    by_text: dict[str, list[tuple[str, str]]] = {}
    for name, caption in captions.items():
        if caption.problem or not caption.text:
            text = caption.problem or ("empty" if caption.text is not None else "missing")
            yield Finding(kind="caption", dataset=label, name=name, text=text)
            continue
        by_text.setdefault(" ".join(caption.text.split()).casefold(), []).append((name, caption.text))
        if trigger is not None and trigger.casefold() not in caption.text.casefold():
            yield Finding(kind="no_trigger", dataset=label, name=name, text=f"no '{trigger}' in: {_shortened(caption.text)}")
    for same in by_text.values():
        if len(same) > 1:
            names, text = names_of([name for name, _ in same], 5), f"{len(same)} sources: {_shortened(same[0][1])}"
            yield Finding(kind="same_caption", dataset=label, name=names, text=text, value=len(same))


def word_counts(captions: Mapping[str, Caption]) -> tuple[int, float, int]:
    """Least, median and most words."""
    counts = [len(caption.text.split()) for caption in captions.values() if caption.text]
    return (min(counts), statistics.median(counts), max(counts)) if counts else (0, 0, 0)


def _shortened(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:120]} ..."
