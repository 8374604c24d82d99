"""Folders that programs read as one thing: indices, training states, encoders, precomputed trees; and captions."""

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from tests.malformed.base import DOCTOR, DRY, IMPORT, LATENTS, TEXT, TRAIN, Malformed, put, writes
from tests.malformed.binaries import changed, pickled
from tests.malformed.structure import variants

_RESUME = ("--resume", "state", "--max_train_steps", "3")
_OBJECTS: Mapping[str, Callable[[], object]] = {
    "a number": lambda: 5,
    "null": lambda: None,
    "text": lambda: "a",
    "a list": lambda: [1, {"a": 2}],
    "an empty dict": dict,
    "a tensor": lambda: torch.zeros(3),
    "a scalar": lambda: torch.tensor(1.0),
    "an empty tensor": lambda: torch.zeros(0, 4),
    "a sparse tensor": lambda: torch.eye(3).to_sparse(),
    "a meta tensor": lambda: torch.empty(3, device="meta"),
    "a complex tensor": lambda: torch.zeros(3, dtype=torch.complex64),
    "a tensor of yes and no": lambda: torch.zeros(3, dtype=torch.bool),
    "a quantized tensor": lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8),
    "nan": lambda: torch.full((3,), float("nan")),
    "a large tensor of one value": lambda: torch.zeros(1).expand(2**40),
    "a module": lambda: torch.nn.Linear(2, 2),
    "a function": lambda: print,
    "-1": lambda: -1,
    "inf": lambda: float("inf"),
    "10^400": lambda: 10**400,
    "true": lambda: True,
}
_BYTES: Mapping[str, bytes] = {
    "empty": b"", "four bytes": b"\x80\x02\x8a\n", "junk of four": b"junk", "zeros": bytes(100),
    "a zip of nothing": b"PK\x05\x06" + bytes(18),
    "text": b"this is no tensor\n", "plain pickle": pickle.dumps({"latents": [1, 2]}), "half a pickle": pickle.dumps([0] * 100)[:50],
}  # fmt: skip


def systematic() -> Iterator[Malformed]:
    yield from _indices()
    yield from _states()
    yield from _encoders()
    yield from _precomputed()
    yield from _captions()
    yield from _places()


def _json_file(family: str, pattern: str, program: str, more: tuple[str, ...], most: int) -> Iterator[Malformed]:
    """The variants of a JSON file, taken when the input is run, by number."""
    for place in range(most):

        def change(file: bytes, place: int = place) -> bytes:
            made = list(variants(json.loads(file), most=40))
            return made[place * 7919 % len(made)][1].encode("utf-8", "surrogatepass")

        yield changed(family, pattern, f"variant {place}", program, more, change, "any", ("cache", "state", "models/gemma3"))
    for label, data in (("empty", b""), ("not UTF-8", b'{"a": "\xff"}'), ("UTF-16", "{}".encode("utf-16")), ("zeros", bytes(20))):
        yield changed(family, pattern, label, program, more, lambda file, data=data: data, "refused")


def _indices() -> Iterator[Malformed]:
    yield from _json_file("index", "cache/ltxv2_index_*.json", TRAIN, (), 400)
    yield from _json_file("index", "cache/ltxv2_index_*.json", DOCTOR, (), 100)
    for label, text in (
        ("other settings", '{"settings": {"a": 1}, "clips": []}'),
        ("no settings", "{}"),
        ("a list", "[]"),
        ("deep", "[" * 100_000),
    ):

        def prepare(folder: Path, text: str = text) -> None:
            for path in folder.glob("cache/ltxv2_index_*.json"):
                path.rename(path.with_name("ltxv2_index_00000000.json"))
            put(folder, "cache/ltxv2_index_00000000.json", text)

        yield Malformed(id=f"index/alone, with {label}", program=TRAIN, prepare=prepare, expect="refused", names=("index",))


def _states() -> Iterator[Malformed]:
    yield from _json_file("state", "state/progress.json", TRAIN, _RESUME, 300)
    for label, data in _BYTES.items():
        yield changed("state", "state/optimizer.pt", label, TRAIN, _RESUME, lambda file, data=data: data, "refused", ("state",))
    for label, make in _OBJECTS.items():
        yield changed(
            "state", "state/optimizer.pt", f"is {label}", TRAIN, _RESUME, lambda file, make=make: pickled(make()), "refused", ("state",)
        )
    for key in ("optimizer", "scheduler", "torch_rng", "optimizer/state", "optimizer/param_groups", "optimizer/state/0",
                "optimizer/state/0/exp_avg",
                "optimizer/state/0/step", "optimizer/param_groups/0/lr", "optimizer/param_groups/0/params"):  # fmt: skip
        for label, make in _OBJECTS.items():
            yield changed("state", "state/optimizer.pt", f"{key} is {label}", TRAIN, _RESUME, _with_entry(key, make), "any", ("state",))
        yield changed("state", "state/optimizer.pt", f"{key} is missing", TRAIN, _RESUME, _with_entry(key, None), "any", ("state",))
    for name in ("network.safetensors", "optimizer.pt", "progress.json"):

        def missing(folder: Path, name: str = name) -> None:
            (folder / "state" / name).unlink()

        def is_folder(folder: Path, name: str = name) -> None:
            (folder / "state" / name).unlink()
            (folder / "state" / name).mkdir()

        for label, prepare in (("is missing", missing), ("is a folder", is_folder)):
            yield Malformed(id=f"state/{name} {label}", program=TRAIN, more=_RESUME, prepare=prepare, expect="refused", names=("state",))
    for label, words in (
        ("a file", "recipe.toml"),
        ("another folder", "clips"),
        ("nowhere", "nowhere"),
        ("a loop", "loop"),
        ("too long", "n" * 300),
    ):
        yield Malformed(id=f"state/--resume {label}", program=TRAIN, more=("--resume", words), expect="refused", names=(words, "resume"))


def _with_entry(way: str, make: Callable[[], object] | None) -> Callable[[bytes], bytes]:
    """A file of `torch.save` with another object at a place, keys parted by `/`."""

    def change(file: bytes) -> bytes:
        value = torch.load(BytesIO(file), weights_only=True)
        holder: Any = value
        *keys, last = (int(key) if key.isdigit() else key for key in way.split("/"))
        for key in keys:
            holder = holder[key]
        if make is None:
            del holder[last]
        else:
            holder[last] = make()
        return pickled(value)

    return change


def _encoders() -> Iterator[Malformed]:
    more = ("--no-skip_existing",)
    for name, most in (("config.json", 120), ("tokenizer.json", 60), ("tokenizer_config.json", 60)):
        for malformed in _json_file("encoder", f"models/gemma3/{name}", TEXT, more, most):
            yield malformed if name == "config.json" else _lenient(malformed)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):

        def prepare(folder: Path, name: str = name) -> None:
            (folder / "models" / "gemma3" / name).unlink()

        yield Malformed(id=f"encoder/{name} is missing", program=TEXT, more=more, prepare=prepare, expect="refused", names=("gemma3",))
    for words in (
        "recipe.toml",
        "clips",
        "nowhere",
        "loop",
        "",
        " ",
        "n" * 300,
        "a/b/c",
        "https://a.b",
        "..",
        "\udcff",
        "google/gemma-3-12b-it",
    ):
        shown = words if len(words) < 40 else "too long"
        yield Malformed(id=f"encoder/--text_encoder {shown!a}", program=TEXT, more=(*more, "--text_encoder", words), expect="refused")
        yield Malformed(id=f"encoder/--tokenizer {shown!a}", program=TEXT, more=(*more, "--tokenizer", words), expect="refused")


def _lenient(malformed: Malformed) -> Malformed:
    """Tokenizer files belong to another library, which has its own idea of what they may lack."""
    import dataclasses

    return dataclasses.replace(malformed, expect="any", names=())


def _precomputed() -> Iterator[Malformed]:
    files = {"latents": ("latents", "fps", "num_frames"), "audio_latents": ("latents", "duration"),
             "conditions": ("video_prompt_embeds", "audio_prompt_embeds", "prompt_attention_mask")}  # fmt: skip
    for kind, keys in files.items():
        pattern = f"precomputed/{kind}/clip_0.pt"
        for label, data in _BYTES.items():
            yield changed("precomputed", pattern, f"{kind} {label}", IMPORT, (), lambda file, data=data: data, "told", ("clip_0",))
        for label, make in _OBJECTS.items():
            yield changed(
                "precomputed", pattern, f"{kind} is {label}", IMPORT, (), lambda file, make=make: pickled(make()), "told", ("clip_0",)
            )
            for key in keys:
                yield changed("precomputed", pattern, f"{kind} {key} is {label}", IMPORT, (), _with_entry(key, make), "any", ("clip_0",))
        for key in keys:
            yield changed("precomputed", pattern, f"{kind} {key} is missing", IMPORT, (), _with_entry(key, None), "any", ("clip_0",))
        for stem in ("n" * 240, "\udcff", "a\nb", "..b", " ", "é", "clip_1.x"):

            def prepare(folder: Path, stem: str = stem) -> None:
                for other in files:
                    (folder / "precomputed" / other / "clip_0.pt").rename(folder / "precomputed" / other / f"{stem}.pt")

            if kind == "latents":
                yield Malformed(id=f"precomputed/a stem of {stem[:10]!a}", program=IMPORT, prepare=prepare)


def _captions() -> Iterator[Malformed]:
    captions = {"not UTF-8": b"\xff\xfe\xfd", "empty": b"", "blank": b" \n\t", "UTF-16": "A disc".encode("utf-16"), "NUL": b"a\0b",
                "mark": b"\xef\xbb\xbfA",
                "long": b"word " * 200_000, "one long word": b"w" * 100_000, "control": bytes(range(1, 32)),
                "emoji": "\U0001f9d1\u200d\U0001f680" .encode() * 50}  # fmt: skip
    for label, data in captions.items():
        for program, more in ((TEXT, DRY), (TEXT, ()), (TRAIN, ())):
            refused = label in ("not UTF-8", "empty", "blank") or label == "UTF-16"
            yield Malformed(
                id=f"captions/{label} in {program} {' '.join(more)}".strip(), program=program, more=more,
                prepare=writes("clips/clip_000.txt", data), expect="refused" if refused and program == TEXT else "any",
                names=("clip_000",) if refused else (),
            )  # fmt: skip


def _places() -> Iterator[Malformed]:
    """A folder for a file, a file for a folder, a link to itself."""
    for name in (
        "cache",
        "clips",
        "stills",
        "output",
        "imported",
        "clips/clip_000.mp4",
        "clips/clip_000.txt",
        "models/gemma3",
        "precomputed",
    ):
        for label in ("file", "folder", "loop"):

            def prepare(folder: Path, name: str = name, label: str = label) -> None:
                path = folder / name
                if path.exists():
                    path.rename(folder / "moved")
                if label == "file":
                    path.write_text("a file", encoding="utf-8")
                elif label == "folder":
                    path.mkdir()
                else:
                    path.symlink_to(path.name)

            for program, more in ((LATENTS, ()), (TEXT, ()), (TRAIN, ()), (IMPORT, ())):
                told = label == "loop" and name == "clips/clip_000.mp4" and program == LATENTS
                yield Malformed(
                    id=f"places/{name} is a {label} in {program}", program=program, more=more, prepare=prepare,
                    expect="told" if told else "any", names=("clip_000",) if told else (),
                )  # fmt: skip
