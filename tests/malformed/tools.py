"""Programs with subcommands (`ltxv2 lora`, `checkpoint`, `dataset`): their flags, their first word, and every file that they read; and the
scores of rollouts, which training and scoring read.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from musubi_tuner.config.flags import describe
from tests.malformed import binaries, documents, flags, media
from tests.malformed.base import ROLLOUTS, SCORE, SUBCOMMANDS, TRAIN_RL, Malformed, put
from tests.malformed.structure import variants

User = tuple[str, tuple[str, ...]]
LORA, CHECKPOINT, DATASET, SCORES = "lora_tools", "checkpoint_tools", "dataset_tools", "scores"
FAMILIES = {"lora": LORA, "checkpoint": CHECKPOINT, "dataset": DATASET}
_LORAS = [name for name in SUBCOMMANDS if name.startswith("lora ") and name not in ("lora extract", "lora publish")]
_CHECKPOINTS = [name for name in SUBCOMMANDS if name.startswith("checkpoint ")]
_MEDIA = ("dataset trim", "dataset crop", "dataset references", "dataset split-scenes", "dataset audit")
_SCORED = ("--rl_rollout_cache", "scored", "--reward_fn", "loudness")
_OF_ROLLOUTS: tuple[User, ...] = ((SCORE, _SCORED), (TRAIN_RL, (*_SCORED, "--rl_loss", "grpo")), (ROLLOUTS, _SCORED[:2]))
BINARIES: Mapping[str, tuple[str, tuple[User, ...]]] = {
    "lora.safetensors": (LORA, tuple((name, ()) for name in (*_LORAS, "checkpoint bake"))),
    "models/model.safetensors": (
        CHECKPOINT,
        (*((name, ()) for name in _CHECKPOINTS), ("lora extract", ()), ("lora inspect", ("--base", "models/model.safetensors"))),
    ),
    "models/vae.safetensors": (CHECKPOINT, (("checkpoint verify", ("--checkpoint", "models/vae.safetensors")), ("dataset decode", ()))),
    "tree/vae/diffusion_pytorch_model.safetensors": (
        CHECKPOINT,
        (("checkpoint convert", ()), ("checkpoint compare", ("--checkpoints", "tree", "models"))),
    ),
    "cache/clip_000*_ltxv2.safetensors": (DATASET, (("dataset decode", ()), ("dataset audit", ()), ("dataset pack", ()))),
    "scored/g0000_k00_ltxv2.safetensors": (SCORES, _OF_ROLLOUTS),
    "scored/g0000_k00_ltxv2_audio.safetensors": (SCORES, _OF_ROLLOUTS),
    "scored/g0000_k00_ltxv2_steps.safetensors": (SCORES, _OF_ROLLOUTS[1:]),
    "scored/p0000_ltxv2_te.safetensors": (SCORES, _OF_ROLLOUTS[1:]),
}
"""As `binaries.USERS`."""
DOCUMENTS: Mapping[str, tuple[str, tuple[User, ...]]] = {
    "packed/ltxv2_pack.json": (DATASET, (("dataset unpack", ()), ("dataset unpack", ("--check",)))),
    "cache/ltxv2_index_*.json": (DATASET, (("dataset decode", ()), ("dataset audit", ()), ("dataset pack", ()))),
    "edges/ltxv2_references.json": (DATASET, (("dataset references", ()),)),
    "scenes/clip_000_scenes.jsonl": (DATASET, (("dataset split-scenes", ("--output_dir", "scenes")),)),
    "tree/model_index.json": (CHECKPOINT, (("checkpoint convert", ()),)),
    "tree/ltxv2_source/source.json": (CHECKPOINT, (("checkpoint convert", ()),)),
    "scored/scores/loudness.json": (SCORES, ((SCORE, _SCORED), (TRAIN_RL, _SCORED))),
    "scored/rollouts.json": (SCORES, ((SCORE, _SCORED), (TRAIN_RL, _SCORED))),
}
"""JSON files, by the pattern of their names: the family, and (program, flags) that read them."""
_FIRST_WORDS = (
    "", " ", "--", "-x", "no such file", "n" * 5000, "a\nb", "\udcff", "loop", "/dev/null", "clips", "recipe.toml", ":", "*", "[", "**",
)  # fmt: skip
_EVERY = 60
"""Variants of each document."""


def files() -> Mapping[str, list[tuple[str, User]]]:
    """For `mutations`: by family, (pattern of a file, who reads it)."""
    found: dict[str, list[tuple[str, User]]] = {family: [] for family in (LORA, CHECKPOINT, DATASET, SCORES)}
    for pattern, (family, users) in {**BINARIES, **DOCUMENTS}.items():
        found[family] += [(pattern, user) for user in users]
    found[DATASET] += [("clips/clip_000.mp4", (name, ())) for name in _MEDIA] + [("pack.tar", ("dataset unpack", ("--pack", "pack.tar")))]
    return found


def systematic() -> Iterator[Malformed]:
    for name in SUBCOMMANDS:
        yield from _words(name)
    for pattern, (family, users) in BINARIES.items():
        changes = [*binaries.frames(), *((f"tensor {label}", change) for label, change in binaries.contents())]
        for place, (program, more) in enumerate(users):
            for label, change in changes:
                yield _of_file(family, pattern, label, program, more, change)
            for number in range(40):
                yield _of_file(family, pattern, f"header {number}", program, more, binaries.header_variant(place + number * len(users)))
    for pattern, (family, users) in DOCUMENTS.items():
        for program, more in users:
            for label, data in documents.NO_DOCUMENTS.items():
                yield _of_file(family, pattern, label, program, more, lambda file, data=data: data)
            for number in range(_EVERY):
                yield _of_file(family, pattern, f"variant {number}", program, more, _variant(number))
    for name in _MEDIA:
        for label, make in media.any_file("clips/clip_000.mp4").items():
            yield Malformed(
                id=f"{DATASET}/clip_000.mp4 {label} in {name}", program=name,
                prepare=lambda folder, make=make: put(folder, "clips/clip_000.mp4", make(folder)),
            )  # fmt: skip
    yield from _captions_of_models()


def _words(name: str) -> Iterator[Malformed]:
    """Flags by their types, and words that stand for the first flag."""
    family = FAMILIES[name.partition(" ")[0]]
    yield Malformed(
        id=f"{family}/{name} as it is", program=name, expect="any" if name in ("lora publish", "dataset caption") else "accepted"
    )
    for flag in describe(SUBCOMMANDS[name].config):
        for one in flags.as_words(name, flag):
            yield replace(one, id=f"{family}/{one.id.partition('/')[2]}")
    for word in (
        "",
        " ",
        "--",
        "-x",
        "no such file",
        "n" * 5000,
        "a\nb",
        "\udcff",
        "loop",
        "/dev/null",
        "clips",
        "recipe.toml",
        ":",
        "*",
        "[",
        "**",
    ):
        shown = word if len(word) < 40 else f"{word[:10]} x {len(word)}"
        yield Malformed(id=f"{family}/{name} begins with {shown!a}", program=name, base=(word, "--output", "made.safetensors"))


def _of_file(family: str, pattern: str, label: str, program: str, more: tuple[str, ...], change: Callable[[bytes], bytes]) -> Malformed:
    def prepare(folder: Path) -> None:
        path = min(folder.glob(pattern))
        put(folder, str(path.relative_to(folder)), change(path.read_bytes()))

    words = " ".join(word for word in more if not word.endswith(".safetensors"))
    return Malformed(id=f"{family}/{Path(pattern).name} {label} in {program} {words}".strip(), program=program, more=more, prepare=prepare)


def _variant(number: int) -> Callable[[bytes], bytes]:
    def change(file: bytes) -> bytes:
        first, _, rest = file.partition(b"\n") if file.count(b"\n{") else (file, b"", b"")
        made = list(variants(json.loads(first), most=60))
        text = made[number * 7919 % len(made)][1].encode("utf-8", "surrogatepass")
        return text + b"\n" + rest if rest else text

    return change


def _captions_of_models() -> Iterator[Malformed]:
    """Folders that are no model, for `dataset caption`."""
    for place in ("models", "clips", "models/gemma3", "cache", "recipe.toml", "lora.safetensors", "loop"):
        yield Malformed(
            id=f"{DATASET}/captions by {place}", program="dataset caption", base=("--media", "clips", "--model", place), expect="refused"
        )
