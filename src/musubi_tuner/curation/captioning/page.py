"""A page of media with their captions, to be read in a browser: one file in the folder of the media, which opens from disk."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from musubi_tuner.cache.index import printable
from musubi_tuner.curation.captioning.media import Medium
from musubi_tuner.curation.captioning.places import Place
from musubi_tuner.curation.captioning.review import Review
from musubi_tuner.page.fill import as_json, part
from musubi_tuner.runtime.disk import not_written, write_whole

PAGE_NAME = "caption_review.html"


def write_pages(media: Sequence[Medium], places: Mapping[str, Place]) -> list[Path]:
    """One in each folder of media, in place of an older one; returns where they are.

    Raises:
        TemporaryFailure: the disk is full.
        UserError: it cannot be written.
    """
    by_folder: dict[Path, list[Medium]] = {}
    for medium in media:
        by_folder.setdefault(medium.spec.root, []).append(medium)
    return [_write(folder, own, places) for folder, own in by_folder.items()]


def _write(folder: Path, media: Sequence[Medium], places: Mapping[str, Place]) -> Path:
    review = Review(folder)
    rows = [_row(medium, places[medium.spec.label], review) for medium in media]
    template = part("musubi_tuner.curation.captioning", "review_page.html")
    title = f"Captions of {printable(folder.name)}"
    filled = {"title": html.escape(title), "data": as_json({"rows": rows})}
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], template) + "\n"
    path = folder / PAGE_NAME
    try:
        write_whole(path, page.encode("utf-8"), path.with_name(f".{PAGE_NAME}.tmp"), lasting=False)
    except OSError as error:
        raise not_written(path, error) from error
    return path


def _row(medium: Medium, place: Place, review: Review) -> dict[str, object]:
    now = place.now(medium)
    text, name = now.text or "", medium.source.name
    entry = review.entry(name, place.name_of(medium))
    ours = bool(text) and review.is_ours(name, place.name_of(medium), text)
    by = "" if not text else f"by {entry.get('model', '')}" if ours else "edited by a person" if entry else "by a person"
    return {
        "file": printable(name),
        "kind": medium.kind,
        "caption": text,
        "ours": ours,
        "by": by,
        "note": now.problem or (str(entry.get("note", "")) if ours else ""),
        "answer": str(entry.get("answer", "")) if ours else "",
    }
