"""Grids, as words and as TOML, and recipes in clips, which another machine may have written."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from musubi_tuner.generation.axes import AXES
from musubi_tuner.generation.recipe import KEY
from tests.malformed.base import ARGUMENTS, GENERATE, Malformed, writes
from tests.malformed.documents import NO_DOCUMENTS

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
        words = ARGUMENTS[GENERATE]
        place = words.index("--prompt")
        return Malformed(
            id=f"flags/recipe, {label}", program=GENERATE, base=(*words[:place], *words[place + 2 :], "--recreate", "a.png"),
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
    for key in ("image", "keyframes", "video", "video_span", "box", "crop", "strengths", "image_strength", "audio", "reference", "no_such"):
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
