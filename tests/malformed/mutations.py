"""Seeded mutations without end: bytes and structure of every file that programs read, several faults at once."""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.malformed import binaries, documents, media, tools
from tests.malformed.base import IMPORT, TEXT, TRAIN, Malformed, put
from tests.malformed.values import ANY

_DOCUMENTS = {"dataset.toml": "dataset", "clips.jsonl": "jsonl", "recipe.toml": "recipe", "flags.toml": "config"}
_DOCUMENTS |= {f"prompts.{ending}": "prompts" for ending in ("txt", "toml", "json")}
_RESUME = ("--resume", "state", "--max_train_steps", "3")
User = tuple[str, tuple[str, ...]]


def _files() -> Mapping[str, list[tuple[str, User]]]:
    """By family: (pattern of a file, (program, flags) that read it)."""
    found: dict[str, list[tuple[str, User]]] = {}
    for name, family in _DOCUMENTS.items():
        found.setdefault(family, []).extend((name, user) for user in documents.users(name))
    for name, (family, users) in binaries.USERS.items():
        found.setdefault(family, []).extend((name, user) for user in users)
    for family, (name, users) in media.USERS.items():
        found.setdefault(family, []).extend((name, user) for user in users)
    found["index"] = [("cache/ltxv2_index_*.json", (TRAIN, ()))]
    found["state"] += [("state/progress.json", (TRAIN, _RESUME)), ("state/optimizer.pt", (TRAIN, _RESUME))]
    found["precomputed"] = [(f"precomputed/{kind}/clip_0.pt", (IMPORT, ())) for kind in ("latents", "audio_latents", "conditions")]
    found["encoder"] += [(f"models/gemma3/{name}", (TEXT, ("--no-skip_existing",))) for name in ("config.json", "tokenizer.json")]
    found["captions"] = [("clips/clip_000.txt", (TEXT, ()))]
    return found | tools.files()


FILES = _files()


def mutated(family: str, seed: int) -> Iterator[Malformed]:
    """Without end; a family that has no files has none."""
    number = 0
    while family in FILES:
        yield _mutation(family, seed, number)
        number += 1


def _mutation(family: str, seed: int, number: int) -> Malformed:
    pattern, (program, more) = FILES[family][number % len(FILES[family])]

    def prepare(folder: Path) -> None:
        random_ = random.Random(f"{seed} {family} {number}")
        path = min(folder.glob(pattern))
        put(folder, str(path.relative_to(folder)), mutate(path.read_bytes(), random_))

    return Malformed(
        id=f"{family}/mutation {seed}.{number} of {Path(pattern).name} in {program}", program=program, more=more, prepare=prepare
    )


def mutate(data: bytes, random_: random.Random) -> bytes:
    """One to four faults; of JSON and safetensors headers half the time in their structure."""
    for _ in range(random_.choice((1, 1, 2, 4))):
        change = random_.choice((_bytes, _structure))
        data = change(data, random_)
    return data


def _bytes(data: bytes, random_: random.Random) -> bytes:
    """Faults of a disk, a download or an editor."""
    head = len(data) if random_.random() < 0.5 else min(len(data), 4096)  # what is told at the front matters most
    start = random_.randrange(head + 1)
    length = random_.choice((1, 2, 8, 64, 1000))
    other = data[start : start + length]
    place = random_.randrange(len(data) + 1)
    kinds: Mapping[str, Callable[[], bytes]] = {
        "flip": lambda: bytes([data[start] ^ (1 << random_.randrange(8))]) + data[start + 1 :] if start < len(data) else b"",
        "overwrite": lambda: random_.randbytes(length) + data[start + length :],
        "zero": lambda: bytes(length) + data[start + length :],
        "delete": lambda: data[start + length :],
        "insert": lambda: random_.randbytes(length) + data[start:],
        "duplicate": lambda: other + data[start:],
        "truncate": lambda: b"",
        "move": lambda: data[place : place + length] + data[start + length :],
        "sign": lambda: (
            random_.choice((b"-", b'"', b"{", b"]", b"=", b"\n", b"1e400", b"nan", b"\xff", b"\0", b"9" * 30)) + data[start + 1 :]
        ),
    }
    return data[:start] + random_.choice(list(kinds.values()))()


def _structure(data: bytes, random_: random.Random) -> bytes:
    """Another value, no value or another key at a place of JSON, TOML, or a safetensors header; other files: their bytes."""
    length = int.from_bytes(data[:8], "little")
    if 8 + length <= len(data) and data[8:9] == b"{":
        header = _of_json(data[8 : 8 + length], random_)
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    if data[:1] in (b"{", b"["):
        return _of_json(data, random_)
    lines = data.split(b"\n")
    places = [place for place, line in enumerate(lines) if b" = " in line]
    if not places or b"\0" in data:
        return _bytes(data, random_)
    place = random_.choice(places)
    key, _, value = lines[place].partition(b" = ")
    text = random_.choice(ANY).toml or "null"
    lines[place] = random_.choice(
        (key + b" = " + text.encode(), b"", lines[place] + b"\n" + lines[place], key + b"x = " + value, value + b" = " + key)
    )
    return b"\n".join(lines)


def _of_json(data: bytes, random_: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes(data, random_)
    holder, key = _place(value, random_)
    if holder is None:
        return (random_.choice(ANY).json or "0").encode("utf-8", "surrogatepass")
    fault = random_.choice(("other", "other", "delete", "rename", "swap"))
    if fault == "delete":
        del holder[key]
    elif fault == "rename" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif fault == "swap":
        other, there = _place(value, random_)
        if other is not None:
            holder[key] = json.loads(json.dumps(other[there]))
    else:
        mark = "\x00here\x00"
        holder[key] = mark
        return json.dumps(value).replace(json.dumps(mark), random_.choice(ANY).json or "0").encode("utf-8", "surrogatepass")
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _place(value: Any, random_: random.Random) -> tuple[Any, Any]:
    """A list or dict somewhere in the value, and a key of it; None where there is none."""
    holder, key = None, None
    while isinstance(value, dict | list) and value and (holder is None or random_.random() < 0.7):
        holder = value
        key = random_.choice(list(value)) if isinstance(value, dict) else random_.randrange(len(value))
        value = holder[key]
    return holder, key
