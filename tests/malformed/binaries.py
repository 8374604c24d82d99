"""safetensors files (checkpoints, LoRAs, cache sidecars, states) with a wrong header, or wrong tensors in a right one."""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from tests.malformed.base import ADOPT, DOCTOR, GENERATE, IMPORT, LATENTS, SOUND, TEXT, TRAIN, Malformed, put
from tests.malformed.structure import variants

USERS: Mapping[str, tuple[str, tuple[tuple[str, tuple[str, ...]], ...]]] = {
    "models/model.safetensors": ("checkpoint", ((TRAIN, ()), (TEXT, ("--no-skip_existing",)), (IMPORT, ()), (DOCTOR, ()), (GENERATE, ()))),
    "models/vae.safetensors": (
        "checkpoint",
        ((LATENTS, ("--no-skip_existing",)), (DOCTOR, ()), (TRAIN, ("--sample_prompts", "prompts.txt")), (GENERATE, ())),
    ),
    "models/audio_vae.safetensors": ("checkpoint", ((SOUND, ("--no-skip_existing",)), (TRAIN, ("--sample_prompts", "prompts.txt")))),
    "models/upsampler.safetensors": (
        "checkpoint",
        ((GENERATE, ("--pipeline", "distilled", "--spatial_upsampler_path", "models/upsampler.safetensors")),),
    ),
    "models/duration_head.safetensors": ("checkpoint", ((GENERATE, ("--duration_head", "models/duration_head.safetensors")),)),
    "lora.safetensors": (
        "lora",
        (
            (TRAIN, ("--network_weights", "lora.safetensors")),
            (TRAIN, ("--network_weights", "lora.safetensors", "--dim_from_weights")),
            (TRAIN, ("--base_weights", "lora.safetensors")),
            (DOCTOR, ("--network_weights", "lora.safetensors")),
            (GENERATE, ("--lora", "lora.safetensors")),
            (GENERATE, ("--lora", "lora.safetensors:0.5:1:0.2", "--merge_loras")),
        ),
    ),
    "cache/clip_000*_ltxv2.safetensors": ("cache", ((TRAIN, ()), (LATENTS, ()), (ADOPT, ()), (DOCTOR, ()))),
    "cache/clip_000*_audio.safetensors": ("cache", ((TRAIN, ()), (SOUND, ()), (ADOPT, ()))),
    "cache/clip_000_ltxv2_te.safetensors": ("cache", ((TRAIN, ()), (TEXT, ()), (ADOPT, ()))),
    "models/gemma3/model.safetensors": ("encoder", ((TEXT, ("--no-skip_existing",)),)),
    "state/network.safetensors": ("state", ((TRAIN, ("--resume", "state", "--max_train_steps", "3")),)),
}
"""By file (or the pattern of its name): the family, and (program, flags) that read it."""

Change = Callable[[bytes], bytes]
_READS_ALL = frozenset(
    {"empty", "one byte", "no header", "header of 0 bytes", "header beyond the file", "header of 2^63 bytes", "text", "git-lfs"}
)
_NO_TENSORS = frozenset(
    f"tensor at 0 {label}"
    for label in ("scalar", "of no element", "flat", "with an axis more", "whole numbers", "yes and no", "complex", "nan", "inf", "missing")
)


def systematic() -> Iterator[Malformed]:
    for pattern, (family, users) in USERS.items():
        changes = [*frames(), *((f"tensor {label}", change) for label, change in contents())]
        for program, more in users:
            for label, change in changes:
                yield changed(family, pattern, label, program, more, change, _expected(family, program, label))
        for place in range(400):
            program, more = users[place % len(users)]
            yield changed(family, pattern, f"header {place}", program, more, header_variant(place), "any")


def _expected(family: str, program: str, label: str) -> str:
    """`refused` where nobody could take it: of the tensors the first alone, which every program that is named reads."""
    is_read = program == TRAIN and family in ("cache", "lora", "state")
    return "refused" if label in _READS_ALL or is_read and label in _NO_TENSORS else "any"


def changed(
    family: str, pattern: str, label: str, program: str, more: tuple[str, ...], change: Change, expect: str, names: tuple[str, ...] = ()
) -> Malformed:
    """An input whose file, the first that fits the pattern, is changed; a message names the file, or what comes of it."""

    def prepare(folder: Path) -> None:
        path = min(folder.glob(pattern))
        put(folder, str(path.relative_to(folder)), change(path.read_bytes()))

    words = " ".join(more).replace("lora.safetensors", "").replace("--", "")
    short = f"{family}/{Path(pattern).name} {label} in {program} {words}".strip()
    stem = pattern.rpartition("/")[2].partition("*")[0]
    told = names or (Path(stem).stem[:8], "not finite", *(("state",) if family == "state" else ()))
    if family in ("cache", "index") and program != TRAIN:
        expect, told = "any", ()  # what is wrong with a file of the cache is made again
    if program == DOCTOR and expect == "refused":
        expect = "told"
    return Malformed(id=short, program=program, more=more, prepare=prepare, expect=expect, names=told)


def _joined(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def parts(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data."""
    length = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def frames() -> Iterator[tuple[str, Change]]:
    """What is around the header."""
    yield "empty", lambda file: b""
    yield "one byte", lambda file: b"\x01"
    yield "no header", lambda file: (5).to_bytes(8, "little")
    yield "header of 0 bytes", lambda file: bytes(8)
    yield "header beyond the file", lambda file: len(file).to_bytes(8, "little") + file[8:]
    yield "header of 2^63 bytes", lambda file: (2**63).to_bytes(8, "little") + file[8:]
    yield "text", lambda file: b"this is no model\n" * 100
    yield "git-lfs", lambda file: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    yield "half", lambda file: file[: len(file) // 2]
    yield "one byte short", lambda file: file[:-1]
    yield "one byte more", lambda file: file + b"\0"
    for label, header in (
        ("no object", b"[]"), ("a number", b"5"), ("null", b"null"), ("nothing in it", b"{}"), ("not UTF-8", b'{"\xff": 1}'),
        ("blank", b" " * 64),
        ("deep", b'{"a":' * 50_000), ("only metadata", b'{"__metadata__": {"a": "b"}}'), ("metadata of a number", b'{"__metadata__": 5}'),
        ("NaN", b'{"a": NaN}'), ("surrogate", b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'),
    ):  # fmt: skip
        yield f"header is {label}", lambda file, header=header: _joined(header, parts(file)[1])


def contents() -> Iterator[tuple[str, Change]]:
    """One tensor of a right file (the first, one in the middle, the last) is another one."""
    makes: Mapping[str, Callable[[Tensor], Tensor]] = {
        "scalar": lambda t: t.flatten()[:1].squeeze(),
        "of no element": lambda t: t[:0] if t.ndim else t.reshape(1)[:0],
        "flat": lambda t: t.flatten(),
        "with an axis more": lambda t: t[None],
        "one row": lambda t: t[:1] if t.ndim else t,
        "twice as long": lambda t: torch.cat([t, t]) if t.ndim else t.repeat(2),
        "transposed": lambda t: t.mT.contiguous() if t.ndim > 1 else t,
        "whole numbers": lambda t: t.to(torch.int32),
        "yes and no": lambda t: t.to(torch.bool),
        "complex": lambda t: t.to(torch.complex64),
        "eight bits": lambda t: t.to(torch.float8_e4m3fn),
        "double": lambda t: t.double(),
        "nan": lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
        "inf": lambda t: torch.full_like(t, float("inf")) if t.is_floating_point() else t,
        "huge": lambda t: torch.full_like(t, 3e38 if t.dtype in (torch.float32, torch.bfloat16) else 6e4) if t.is_floating_point() else t,
        "zeros": torch.zeros_like,
    }
    for which in (0.0, 0.5, 1.0):
        for label, make in makes.items():
            yield f"at {which:g} {label}", lambda file, which=which, make=make: _with_tensor(file, which, make)
        yield f"at {which:g} missing", lambda file, which=which: _with_tensor(file, which, None)
    yield "of an unknown name", lambda file: _saved(file, load(file) | {"no_such.tensor": torch.zeros(2)})
    yield "names of no text", lambda file: _saved(file, load(file) | {"": torch.zeros(2)})
    yield "names odd", lambda file: _saved(file, load(file) | {"a\n\x1b[31m\u202e.lora_A.weight": torch.zeros(2, 2)})


def _with_tensor(file: bytes, which: float, make: Callable[[Tensor], Tensor] | None) -> bytes:
    tensors = load(file)
    name = sorted(tensors)[round(which * (len(tensors) - 1))]
    tensor = tensors.pop(name)
    return _saved(file, tensors if make is None else tensors | {name: make(tensor).contiguous()})


def _saved(file: bytes, tensors: dict[str, Tensor]) -> bytes:
    return save(tensors, metadata=parts(file)[0].get("__metadata__"))


def header_variant(place: int) -> Change:
    """The variant of that number, of the header itself or of JSON within its metadata."""

    def change(file: bytes) -> bytes:
        header, data = parts(file)
        names = [name for name in header if name != "__metadata__"]
        few = {name: header[name] for name in (names[0], names[len(names) // 2], names[-1])}
        metadata = header.get("__metadata__", {})
        made = [text for _, text in variants({"__metadata__": metadata, **few}, most=12)]
        for key, text in metadata.items():
            if text.startswith(("{", "[")):
                made += [json.dumps({"__metadata__": metadata | {key: inner}, **few}) for _, inner in variants(json.loads(text), most=40)]
        text = made[place * 7919 % len(made)]
        return _joined(_with_the_others(text, header, few).encode("utf-8", "surrogatepass"), data)

    return change


def _with_the_others(text: str, header: Mapping[str, Any], few: Mapping[str, Any]) -> str:
    """The other tensors too, where the header is an object."""
    others = {name: entry for name, entry in header.items() if name not in few and name != "__metadata__"}
    if not text.startswith("{") or text == "{}" or not others:
        return text
    return json.dumps(others)[:-1] + ", " + text[1:]


def pickled(value: object) -> bytes:
    """What `torch.save` writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()
