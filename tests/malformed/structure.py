"""Taking JSON apart: every place of a document with something else there, missing, or twice."""

import json
from collections.abc import Iterator
from typing import Any

from tests.malformed.values import ANY

_HERE = "\x00here\x00"
Place = tuple[str | int, ...]


def places(document: Any, *, most: int) -> list[Place]:
    """Where something stands in the document, the whole of it first; of many, `most` that are spread over it."""
    found = list(_walk(document, ()))
    step = max(1, -(-len(found) // most))
    return found[::step]


def _walk(value: Any, place: Place) -> Iterator[Place]:
    yield place
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from _walk(inner, (*place, key))


def replaced(document: Any, place: Place, text: str) -> str:
    """The document's JSON with `text` at the place."""
    copy = [json.loads(json.dumps(document))]
    holder: Any = copy
    *way, last = (0, *place)
    for key in way:
        holder = holder[key]
    holder[last] = _HERE
    return json.dumps(copy[0], ensure_ascii=False).replace(json.dumps(_HERE), text)


def without(document: Any, place: Place) -> str:
    copy = json.loads(json.dumps(document))
    holder = copy
    *way, last = place
    for key in way:
        holder = holder[key]
    del holder[last]
    return json.dumps(copy, ensure_ascii=False)


def variants(document: Any, *, most: int = 60) -> Iterator[tuple[str, str]]:
    """(label, JSON) of the document with one thing wrong: other values at a place, the place missing, a key twice."""
    for place in places(document, most=most):
        name = "/".join(map(str, place)) or "all"
        for value in ANY:
            if value.json is not None:
                yield f"{name} = {value.label}", replaced(document, place, value.json)
        if place:
            yield f"{name} is missing", without(document, place)
        if place and isinstance(place[-1], str):
            yield f"{name} twice", replaced(document, place, f"1, {json.dumps(place[-1])}: 2")
    text = json.dumps(document)
    yield from (("half of it", text[: len(text) // 2]), ("twice over", text + text), ("more after it", text + "}"), ("deep", "[" * 100_000))
