"""Grids, as words and as TOML, recipes in clips, which another machine may have written, and prompt files as clips are made from them."""

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from musubi_tuner.generation.axes import AXES
from musubi_tuner.generation.recipe import KEY, recipe_path
from tests.malformed import documents
from tests.malformed.base import ARGUMENTS, GENERATE, Malformed, writes
from tests.malformed.documents import NO_DOCUMENTS
from tests.malformed.mutations import mutate

_NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "five",
    "1e999",
    "1" * 5000,
    "true",
    "[1]",
    "1/2",
    "1,,2",
    ",",
    "",
    " ",
    "1,1",
    "\udcff",
    "0x10",
    "\u0661",
    "1;2",
)
_REFUSED = (
    "", "=", "seed", "seed=", "=1", "no_such=1", "SEED=1", "seed =1", "lora=nowhere.safetensors", "lora=*.none", "lora=", "lora=none,",
    "lora=[",
    "lora=**/[", "lora=recipe.toml", "lora=clips", "lora=loop", "lora=lora.safetensors:nan", "lora=lora.safetensors:1:2", "lora=\udcff",
    f"lora={'n' * 300}", f"lora={'n/' * 3000}", f"lora={'*' * 3000}", "lora=a\0b", "prompt=1", "prompt=-1", "prompt=all,0", "prompt=none",
    "prompt=99999999999999999999", "seed=1.5", "seed=99999999999999999999", "steps=0", "steps=1001", "steps=1.5", "strength=0.5",
    "strength=101", "video_cfg_scale=-1", "audio_cfg_scale=1e4", "rescale_scale=1.1", "discrete_flow_shift=1",
    f"seed={','.join(map(str, range(20000)))}",
)  # fmt: skip
_TAKEN = (
    "seed=7",
    "seed=-1",
    "prompt=all",
    "prompt=0",
    "video_cfg_scale=0",
    "lora=none",
    "lora=lora.safetensors,none",
    "lora=lora.safetensors:0",
)
_TOML = (
    "a = 1", "seed = 1.5", "seed = [[1]]", "seed = {a = 1}", "seed = true", "seed = []", "seed = [1, 1]", "seed = 2026-11-26", "seed = nan",
    "[seed]\na = 1", "[[seed]]\na = 1", "lora = [1]", 'lora = "a\\u0000b"', 'lora = [""]', "strength = [0]", 'prompt = "none"',
    "prompt = [7]", "steps = [0]",
)  # fmt: skip
_PROMPT = {"prompt": "a dog", "negative": "", "width": 64, "height": 64, "frames": 1, "fps": 24.0, "seed": 1, "steps": 1}
_RECIPE: dict[str, Any] = {
    "prompt": _PROMPT, "inputs": {}, "model": {"name": "model", "fingerprint": "0"}, "mode": "av", "timestep_format": "sd3_0_1",
    "weight_format": "auto", "pipeline": "one_stage", "distilled_lora_strength": None, "guidance": {},
    "windows": [None, None], "loras": [], "versions": {},
}  # fmt: skip
_FILE = {"name": "a", "size": 5, "sha256": "0" * 64}
_ODD: tuple[Any, ...] = (None, 5, -1, 1.5, True, "", "five", [], {}, [5], {"a": 1}, "n" * 5000, 10**15, "../a", "/etc/passwd")


def systematic() -> Iterator[Malformed]:
    yield from _words()
    yield from _recipes()
    yield from _containers()
    yield from _prompts()


def _prompts() -> Iterator[Malformed]:
    """Those of training's previews, one in three."""
    for one in islice(documents.prompt_files(), 0, None, 3):
        name = next(word for word in one.more if word.startswith("prompts."))
        yield dataclasses.replace(
            one, id=f"{one.id} in {GENERATE}", program=GENERATE, base=_without_prompt("--sample_prompts", name), more=(),
        )  # fmt: skip


def _without_prompt(*instead: str) -> tuple[str, ...]:
    words = ARGUMENTS[GENERATE]
    place = words.index("--prompt")
    return (*words[:place], *words[place + 2 :], *instead)


def _containers() -> Iterator[Malformed]:
    """Clips with a right recipe, of every kind, that are damaged, and recipes that are none in clips that are whole."""
    right = json.dumps({KEY: 1, **_RECIPE})
    for ending in ("mp4", "png", "wav"):
        name = f"a.{ending}"
        texts = ("", "null", "{", "[]", f'{{"{KEY}": 2}}', "[" * 5000, '"\\ud800"', "n" * 100_000)
        changes = [("as it is", right, None), *((f"{text[:12]!a} of {len(text)}", text, None) for text in texts)]
        changes += [(f"damage {number}", right, number) for number in range(60)]
        for label, text, damage in changes:
            yield Malformed(
                id=f"flags/recipe in {name}, {label}", program=GENERATE, base=_without_prompt("--recreate", name),
                prepare=_clip(name, text, damage), expect="any" if damage is not None else "accepted" if text == right else "refused",
                names=(name,) if damage is None and text != right else (),
            )  # fmt: skip


def _clip(name: str, text: str, damage: int | None) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        from musubi_tuner.media.audio import Waveform
        from musubi_tuner.media.write import write_image, write_video, write_wav

        path, frames = folder / name, torch.zeros(9, 32, 32, 3, dtype=torch.uint8)
        sound = Waveform(samples=torch.zeros(2, 4800), rate=16000)
        if path.suffix == ".mp4":
            write_video(path, frames, 24.0, sound, comment=text)
        elif path.suffix == ".png":
            write_image(path, frames[0], {KEY: text})
        else:
            write_wav(path, sound)
            recipe_path(path).write_text(text, encoding="utf-8")
        if damage is not None:
            of_wav = path.suffix == ".wav" and damage % 2
            target = recipe_path(path) if of_wav else path
            target.write_bytes(mutate(target.read_bytes(), random.Random(f"{name} {damage}")))

    return prepare


def _words() -> Iterator[Malformed]:
    def made(text: str, expect: str) -> Malformed:
        label = text if len(text) < 40 else f"{text[:12]} x {len(text)}"
        return Malformed(
            id=f"flags/grid {label!a}",
            program=GENERATE,
            more=(f"--grid={text}",),
            expect=expect,
            names=("grid", "lora", "recipe.toml") if expect == "refused" else (),
        )

    yield from (made(text, "refused") for text in _REFUSED)
    yield from (made(text, "accepted") for text in _TAKEN)
    yield from (made(f"{axis}={word}", "refused") for axis in AXES if axis != "lora" for word in _NUMBERS)
    yield made("seed=1\0", "refused")
    for label, data in (*NO_DOCUMENTS.items(), *((text, text.encode()) for text in _TOML)):
        yield Malformed(
            id=f"flags/grid file, {label}", program=GENERATE, more=("--grid_file", "grid.toml"), prepare=writes("grid.toml", data),
            expect="refused", names=("grid",),
        )  # fmt: skip


def _recipes() -> Iterator[Malformed]:
    """Each value of a recipe in its turn, and files of no known hash."""

    def made(label: str, text: str, expect: str = "refused") -> Malformed:
        return Malformed(
            id=f"flags/recipe, {label}", program=GENERATE, base=_without_prompt("--recreate", "a.png"),
            prepare=_picture(text), expect=expect, names=("a.png",) if expect == "refused" else (),
        )  # fmt: skip

    def changed(label: str, expect: str = "refused", **values: Any) -> Malformed:
        return made(label, json.dumps({KEY: 1, **_RECIPE, **values}), expect)

    yield changed("as it is", "accepted")
    for text in ("", "null", "5", "[]", "{}", "{", '{"a": NaN}', f'{{"{KEY}": 2}}', "[" * 100_000, f'{{"{KEY}": 1}}', '"\\ud800"'):
        yield made(f"{text[:20]!a} of {len(text)}", text)
    for key in _RECIPE:
        yield from (changed(f"{key} = {_shown(value)}", "any", **{key: value}) for value in _ODD)
        yield made(f"without {key}", json.dumps({KEY: 1, **{name: value for name, value in _RECIPE.items() if name != key}}), "any")
    for key in _PROMPT:
        yield from (changed(f"prompt, {key} = {_shown(value)}", "any", prompt=_PROMPT | {key: value}) for value in _ODD if value != 10**15)
    for key in ("image", "keyframes", "video", "video_span", "box", "crop", "strengths", "image_strength", "audio", "reference",
                "reference_attention", "reference_mask", "no_such"):  # fmt: skip
        yield from (changed(f"inputs, {key} = {_shown(value)}", inputs={key: value}) for value in (*_ODD, _FILE) if value != [])
    for key in (*_FILE, "video", "audio"):
        lora = _FILE | {"video": 1.0, "audio": 1.0}
        yield from (changed(f"lora, {key} = {_shown(value)}", loras=[lora | {key: value}]) for value in _ODD)


def _shown(value: Any) -> str:
    return ascii(value)[:20]


def _picture(text: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        from PIL import Image, PngImagePlugin

        info = PngImagePlugin.PngInfo()
        info.add_itxt(KEY, text)
        Image.new("RGB", (8, 8)).save(folder / "a.png", pnginfo=info)

    return prepare
