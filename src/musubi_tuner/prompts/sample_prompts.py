"""Sample prompts as musubi-tuner users write them: .txt with flags, .toml, .json.

A line of text is a prompt; flags begin after its first ` --` and nowhere else, so that a prompt may begin with "I walk".
"""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.ltxv2.geometry import latent_frames, latent_size
from musubi_tuner.prompts.files import GIVEN_FLAGS, GivenFiles, check_given, read_given_files
from musubi_tuner.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptDefaults:
    """What a prompt has that does not say otherwise."""

    width: int = 768
    height: int = 512
    frames: int = 121
    fps: float = 24.0
    steps: int | None = None
    """None = by the model's version."""
    seed: int = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewPrompt:
    """One sample to make."""

    index: int
    """Place in the file, from 0; part of the file names."""
    prompt: str
    negative: str
    width: int
    """pixels, a multiple of 32"""
    height: int
    frames: int
    """8n+1; 1 makes a still"""
    fps: float
    seed: int
    steps: int | None
    video_cfg: float | None
    """None = by the command line, else by the model's version."""
    audio_cfg: float | None
    where: str
    """File and line or entry, for messages."""
    given: GivenFiles = GivenFiles()
    """Pictures, clips and sound to start from."""

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


_FLAGS = {
    "w": "width",
    "h": "height",
    "f": "frame_count",
    "d": "seed",
    "s": "sample_steps",
    "fr": "frame_rate",
    "n": "negative_prompt",
    "l": "cfg_scale",
    "g": "guidance_scale",
    "al": "audio_cfg_scale",
    **GIVEN_FLAGS,
}
"""Flags of a line of text, and the keys of .toml and .json that mean the same."""

_KINDS: dict[str, type] = {
    "prompt": str,
    "width": int,
    "height": int,
    "frame_count": int,
    "seed": int,
    "sample_steps": int,
    "frame_rate": float,
    "negative_prompt": str,
    "cfg_scale": float,
    "guidance_scale": float,
    "audio_cfg_scale": float,
    **dict.fromkeys(GIVEN_FLAGS.values(), str),
}


def load_prompts(path: Path, defaults: PromptDefaults | None = None) -> tuple[PreviewPrompt, ...]:
    """Every prompt of a file, checked.

    Raises:
        UserError: the file, line and value that cannot be used, and the values that can.
    """
    defaults = defaults or PromptDefaults()
    entries = list(_read_entries(path))
    if not entries:
        raise UserError(f"{path}: holds no prompt. Write one a line, or leave --sample_prompts out.")
    return tuple(_to_prompt(index, where, values, path.parent, defaults) for index, (where, values) in enumerate(entries))


def all_prompt_texts(prompts: Sequence[PreviewPrompt]) -> list[str]:
    """Every text that previews of `prompts` need encoded: prompts, negatives, and always the empty prompt; each once."""
    texts = [text for prompt in prompts for text in (prompt.prompt, prompt.negative)]
    return list(dict.fromkeys([*texts, ""]))


def _read_entries(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """(where, values by their long names) of each entry."""
    readers = {".txt": _read_text, ".toml": _read_toml, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: a prompt file ends in .txt, .toml or .json.")
    if not path.is_file():
        raise UserError(f"--sample_prompts {path}: no such file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}). Save it as UTF-8.") from error
    return readers[path.suffix.lower()](path, text)


def _read_text(path: Path, text: str) -> Iterable[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if line and not line.startswith("#"):
            where = f"{path}, line {number}"
            yield where, _parse_line(where, line)


def _parse_line(where: str, line: str) -> dict[str, Any]:
    """A prompt and its flags. Values are converted here, so that a message can quote them as they were typed."""
    if line.startswith("--"):
        raise UserError(f"{where}: begins with a flag. The prompt comes first, then its flags, each after ' --'.")
    prompt, *parts = line.split(" --")
    values: dict[str, Any] = {"prompt": prompt.strip()}
    for part in parts:
        flag, _, value = part.strip().partition(" ")
        if flag not in _FLAGS:
            raise UserError(
                f"{where}: unknown flag '--{flag}'. Known are {', '.join('--' + name for name in _FLAGS)}. "
                "Text after the first ' --' is read as flags; write a dash within a prompt as '-' or '—'."
            )
        key = _FLAGS[flag]
        if key in values:
            raise UserError(f"{where}: --{flag} is given twice.")
        values[key] = _converted(where, f"--{flag}", value.strip(), _KINDS[key])
    return values


def _converted(where: str, name: str, value: str, kind: type) -> Any:
    try:
        return kind(value)
    except ValueError as error:
        raise UserError(f"{where}: {name} {value!r}: must be {_in_words(kind)}.") from error


def _read_toml(path: Path, text: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """`[prompt]` holds defaults, each `[[prompt.subset]]` one sample."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}.") from error
    shared = document.get("prompt")
    if not isinstance(shared, dict) or set(document) != {"prompt"} or not isinstance(shared.get("subset"), list):
        raise UserError(f"{path}: must hold a table [prompt] with defaults and a [[prompt.subset]] for each sample, and nothing else.")
    common = {key: value for key, value in shared.items() if key != "subset"}
    for number, entry in enumerate(shared["subset"], start=1):
        yield f"{path}, [[prompt.subset]] number {number}", common | entry


def _read_json(path: Path, text: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """A list of objects, or of lines as in a .txt file."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}.") from error
    if not isinstance(document, list):
        raise UserError(f"{path}: must hold a list of objects, each with a 'prompt'.")
    for number, entry in enumerate(document, start=1):
        where = f"{path}, entry {number}"
        if isinstance(entry, str):
            entry = _parse_line(where, entry.strip())
        if not isinstance(entry, dict):
            raise UserError(f"{where}: must be an object or a line of text, not {entry!r}.")
        yield where, entry


def _to_prompt(index: int, where: str, values: Mapping[str, Any], folder: Path, defaults: PromptDefaults) -> PreviewPrompt:
    _check_types(where, values)
    if "cfg_scale" in values and "guidance_scale" in values:
        raise UserError(f"{where}: --l and --g both are the CFG scale; give one of them.")
    prompt = PreviewPrompt(
        index=index,
        prompt=values["prompt"].strip(),
        negative=values.get("negative_prompt", "").strip(),
        width=values.get("width", defaults.width),
        height=values.get("height", defaults.height),
        frames=values.get("frame_count", defaults.frames),
        fps=float(values.get("frame_rate", defaults.fps)),
        seed=values.get("seed", defaults.seed),
        steps=values.get("sample_steps", defaults.steps),
        video_cfg=values.get("cfg_scale", values.get("guidance_scale")),
        audio_cfg=values.get("audio_cfg_scale", values.get("cfg_scale", values.get("guidance_scale"))),
        where=where,
        given=read_given_files(where, values, folder),
    )
    _check_ranges(prompt)
    return prompt


def _check_types(where: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if key not in _KINDS:
            close = difflib.get_close_matches(key, _KINDS, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else f" Known are {', '.join(_KINDS)}."
            raise UserError(f"{where}: unknown key '{key}'.{hint}")
        accepted = (int, float) if _KINDS[key] is float else _KINDS[key]
        if not isinstance(value, accepted) or isinstance(value, bool):
            raise UserError(f"{where}: {key} = {value!r}: must be {_in_words(_KINDS[key])}.")
    if "prompt" not in values:
        raise UserError(f"{where}: has no 'prompt'.")


def _check_ranges(prompt: PreviewPrompt) -> None:
    try:
        latent_size(prompt.width, prompt.height)
        latent_frames(prompt.frames)
    except UserError as error:
        raise UserError(f"{prompt.where}: {error}") from error
    if not 0 < prompt.fps < float("inf"):
        raise UserError(f"{prompt.where}: frame rate {prompt.fps}: must be positive.")
    check_given(prompt.where, prompt.given, width=prompt.width, height=prompt.height, frames=prompt.frames)
    if prompt.steps is not None and prompt.steps < 1:
        raise UserError(f"{prompt.where}: {prompt.steps} steps: 1 at least.")
    for name, scale in (("CFG scale", prompt.video_cfg), ("audio CFG scale", prompt.audio_cfg)):
        if scale is not None and not 0 <= scale < float("inf"):
            raise UserError(f"{prompt.where}: {name} {scale}: must not be negative; 1 is off.")


def _in_words(kind: type) -> str:
    return {str: "text", int: "a whole number", float: "a number"}[kind]
