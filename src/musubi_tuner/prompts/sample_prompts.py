"""Sample prompts as musubi-tuner users write them: .txt with flags, .toml, .json, .jsonl.

A line of text is a prompt; flags begin after its first ` --` (a blank or a tab) and nowhere else, so that a prompt may begin with "I
walk". The same values have longer names in .toml, .json and .jsonl. Besides text a prompt may have conditioning inputs: pictures, a clip,
sound, references.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, model_validator

from musubi_tuner.config.names import PROMPT_FLAGS
from musubi_tuner.config.preview import Guidance, Steps
from musubi_tuner.config.validation import AnyPath, FrameRate, Frames, Seed, Share, Side, as_path, options, validated
from musubi_tuner.prompts.prompt import ConditioningInputs, PreviewPrompt, Rectangle, Span
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json, read_json_lines, read_text, read_toml

_LATENT_FRAME = 8
"""Frames, as in `ltxv2.geometry`, which needs torch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptDefaults:
    """What a prompt has where it names nothing else."""

    width: int = 768
    height: int = 512
    frames: int = 121
    fps: float = 24.0
    steps: int | None = None
    """None = by the model's version."""
    seed: int = 10
    longest: float | None = None
    """Seconds of prompts that name no frames, at most, in place of `frames`: a duration is predicted."""

    def frames_at(self, fps: float) -> int:
        """Of a prompt that names none."""
        return self.frames if self.longest is None else round(self.longest * fps) // 8 * 8 + 1


INPUT_FLAGS = {
    "i": "image_path",
    "is": "image_strength",
    "ei": "end_image_path",
    "k": "keyframes",
    "kp": "keyframes_in_place",
    "iv": "input_video_path",
    "vt": "generate_seconds",
    "box": "inpaint_box",
    "crop": "outpaint_crop",
    "a": "input_audio_path",
    "at": "generate_sound_seconds",
    "v": "reference_video_path",
    "vs": "reference_strength",
    "va": "reference_attention",
    "vm": "reference_mask_path",
    "ra": "reference_audio_path",
}
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
    **INPUT_FLAGS,
}
"""Flags of a line of text, and the keys of .toml and .json that mean the same."""
_SHORT = {"image": "image_path", "audio": "input_audio_path"}
"""Keys of .jsonl, and what they mean."""
_WHOLE = ("width", "height", "frame_count", "seed", "sample_steps")
_NUMBERS = ("frame_rate", "cfg_scale", "guidance_scale", "audio_cfg_scale", "image_strength", "reference_strength", "reference_attention")
_WITH_NUMBER = rf"({'|'.join(flag for flag, key in _FLAGS.items() if key in (*_WHOLE, *_NUMBERS))})\s+-?[\d.]"
_GLUED = re.compile(rf"(?<=\S)--{_WITH_NUMBER}")
"""A flag with its number and no blank before it, as in `A dog.--w 512`."""
_OTHER_DASH = re.compile(rf"(?<=\s)(-|[\u2010-\u2015\u2212]{{1,2}}){_WITH_NUMBER}")
"""A flag with its number after one dash, or after those that word processors make of two, as in `A dog. —w 512`."""
_MOST_CELLS = 2**20
"""Of a sample's latents; far beyond what any card samples."""


def _from_text(read: Callable[[str], Any]) -> BeforeValidator:
    def checked(value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError("must be text in quotes")
        return read(value)

    return BeforeValidator(checked)


def _read_keyframes(text: str) -> tuple[tuple[int, Path], ...]:
    pairs = [part.strip().partition("=") for part in text.split(";")]
    if not all(sign and re.fullmatch("[0-9]{1,9} *", number) for number, sign, _ in pairs):
        raise ValueError("must be FRAME=PICTURE, several parted by ';', such as 24=door.png;48=street.png")
    numbers = [int(number) for number, _, _ in pairs]
    if twice := [number for number in numbers if numbers.count(number) > 1]:
        raise ValueError(f"has two pictures of frame {twice[0]}; keep one")
    return tuple((number, as_path(name.strip())) for number, (_, _, name) in zip(numbers, pairs, strict=True))


def _read_span(text: str) -> Span:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)?\s*-\s*(\d+\.?\d*|\.\d+)?", text.strip(), re.ASCII)
    if match is None:
        raise ValueError("must be START-END in seconds; either may be left out, such as 1.5- or -2")
    span = Span(float(match[1] or 0), float(match[2] or "inf"))
    if span.start >= span.end:
        raise ValueError("ends before it starts")
    return span


def _read_rectangle(text: str) -> Rectangle:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise ValueError("must be LEFT,TOP,WIDTH,HEIGHT in pixels, such as 64,0,128,96")
    area = Rectangle(*map(int, parts))
    if any(int(part) % 32 for part in parts) or not area.width or not area.height:
        raise ValueError("must have multiples of 32, and a width and a height that are not 0")
    return area


@options
class _Entry:
    """A prompt as it is written, by the long names."""

    prompt: str
    width: Side | None = None
    height: Side | None = None
    frame_count: Frames | None = None
    seed: Seed | None = None
    sample_steps: Steps | None = None
    frame_rate: FrameRate | None = None
    negative_prompt: str = ""
    cfg_scale: Guidance | None = None
    guidance_scale: Guidance | None = None
    audio_cfg_scale: Guidance | None = None
    image_path: AnyPath | None = None
    image_strength: Share | None = None
    end_image_path: AnyPath | None = None
    keyframes: Annotated[tuple[tuple[int, Path], ...], _from_text(_read_keyframes)] = ()
    keyframes_in_place: Annotated[tuple[tuple[int, Path], ...], _from_text(_read_keyframes)] = ()
    input_video_path: AnyPath | None = None
    generate_seconds: Annotated[Span | None, _from_text(_read_span)] = None
    inpaint_box: Annotated[Rectangle | None, _from_text(_read_rectangle)] = None
    outpaint_crop: Annotated[Rectangle | None, _from_text(_read_rectangle)] = None
    input_audio_path: AnyPath | None = None
    generate_sound_seconds: Annotated[Span | None, _from_text(_read_span)] = None
    reference_video_path: AnyPath | None = None
    reference_strength: Share | None = None
    reference_attention: Share | None = None
    reference_mask_path: AnyPath | None = None
    reference_audio_path: AnyPath | None = None

    @model_validator(mode="after")
    def _check(self) -> "_Entry":
        if self.cfg_scale is not None and self.guidance_scale is not None:
            raise UserError("--l and --g both are the CFG scale; give one of them.")
        for flag, value, of, path in (
            ("--is", self.image_strength, "the picture of --i", self.image_path),
            ("--vs", self.reference_strength, "the reference of --v", self.reference_video_path),
        ):
            if value is not None and path is None:
                raise UserError(f"{flag} says how far {of} is kept; give that too.")
        for flag, value in (("--va", self.reference_attention), ("--vm", self.reference_mask_path)):
            if value is not None and self.reference_video_path is None:
                raise UserError(f"{flag} says how strongly a reference is attended to; give the reference by --v.")
        for flag, value in (("--vt", self.generate_seconds), ("--box", self.inpaint_box), ("--crop", self.outpaint_crop)):
            if value is not None and self.input_video_path is None:
                raise UserError(f"{flag} chooses what of a clip is generated; give the clip by --iv.")
        if self.generate_sound_seconds is not None and self.input_audio_path is None:
            raise UserError("--at chooses which seconds of a sound are generated; give the sound by --a.")
        if self.inpaint_box is not None and self.outpaint_crop is not None:
            raise UserError("--box (what is generated) and --crop (what is kept) exclude each other.")
        return self


def load_prompts(path: Path, defaults: PromptDefaults | None = None, named: str = "--sample_prompts") -> tuple[PreviewPrompt, ...]:
    """Every prompt of a file, checked.

    Args:
        named: the flag that gives the file, for messages.

    Raises:
        UserError: the file, line and value that cannot be used, and the values that can.
    """
    defaults = defaults or PromptDefaults()
    readers = {".txt": _text_entries, ".toml": _toml_entries, ".json": _json_entries, ".jsonl": _json_line_entries}
    if path.suffix.lower() not in readers:
        raise UserError(f"{named} {path}: a prompt file ends in .txt, .toml, .json or .jsonl.")
    entries = list(readers[path.suffix.lower()](path, named))
    if not entries:
        raise UserError(f"{named} {path}: holds no prompt. Write one a line.")
    return tuple(_to_prompt(index, where, entry, path.parent, defaults) for index, (where, entry) in enumerate(entries))


def prompts_of_lines(lines: Sequence[str], where: str, folder: Path, defaults: PromptDefaults) -> tuple[PreviewPrompt, ...]:
    """Prompts of a command line, each as a line of a .txt.

    Args:
        where: for messages; such as the flag.
        folder: that relative paths of conditioning files start from.

    Raises:
        UserError: what cannot be used.
    """
    return tuple(_to_prompt(index, where, _from_line(where, line), folder, defaults) for index, line in enumerate(lines))


def all_prompt_texts(prompts: Sequence[PreviewPrompt]) -> list[str]:
    """Every text that previews of `prompts` need encoded: prompts, negatives, and always the empty prompt; each once."""
    texts = [text for prompt in prompts for text in (prompt.prompt, prompt.negative)]
    return list(dict.fromkeys([*texts, ""]))


def _text_entries(path: Path, named: str) -> Iterator[tuple[str, _Entry]]:
    for number, line in enumerate(read_text(path, named=named).splitlines(), start=1):
        if line.strip() and not line.strip().startswith("#"):
            where = f"{path}, line {number}"
            yield where, _from_line(where, line)


def _toml_entries(path: Path, named: str) -> Iterator[tuple[str, _Entry]]:
    """`[prompt]` holds defaults, each `[[prompt.subset]]` one sample."""
    document = read_toml(path, named=named)
    shared = document.get("prompt")
    if not isinstance(shared, dict) or set(document) != {"prompt"} or not isinstance(entries := shared.get("subset"), list):
        raise UserError(f"{path}: must hold a table [prompt] with defaults and a [[prompt.subset]] for each sample, and nothing else.")
    common = {key: value for key, value in shared.items() if key != "subset"}
    for number, entry in enumerate(entries, start=1):
        where = f"{path}, [[prompt.subset]] number {number}"
        yield where, validated(_Entry, common | entry if isinstance(entry, dict) else entry, where=where)


def _json_entries(path: Path, named: str) -> Iterator[tuple[str, _Entry]]:
    """A list of objects, or of lines as in a .txt file."""
    document = read_json(path, named=named)
    if not isinstance(document, list):
        raise UserError(f"{path}: must hold a list of objects, each with a 'prompt'.")
    for number, entry in enumerate(document, start=1):
        where = f"{path}, entry {number}"
        yield where, _from_json(where, entry)


def _json_line_entries(path: Path, named: str) -> Iterator[tuple[str, _Entry]]:
    """An object a line, in which a picture and a sound may have the names that datasets use."""
    for where, entry in read_json_lines(path, named=named):
        if isinstance(entry, dict):
            if twice := next((short for short, key in _SHORT.items() if short in entry and key in entry), None):
                raise UserError(f"{where}: '{twice}' and '{_SHORT[twice]}' are the same; give one of them.")
            entry = {_SHORT.get(key, key): value for key, value in entry.items()}
        yield where, _from_json(where, entry)


def _from_json(where: str, entry: Any) -> _Entry:
    return _from_line(where, entry) if isinstance(entry, str) else validated(_Entry, entry, where=where)


def _from_line(where: str, line: str) -> _Entry:
    prompt, typed = split_line(where, line)
    values: dict[str, Any] = {"prompt": prompt}
    for key, text in typed.items():
        try:
            values[key] = int(text) if key in _WHOLE else float(text) if key in _NUMBERS else text
        except ValueError:
            values[key] = text  # which its type refuses
    flags = {key: flag for flag, key in _FLAGS.items()}
    return validated(_Entry, values, where=where, naming=lambda key, value: f"--{flags[key]} {typed[key]!r}")


def split_line(where: str, line: str) -> tuple[str, dict[str, str]]:
    """A line's prompt, and what follows each flag by its long name.

    Raises:
        UserError: a line that begins with a flag, a flag that is unknown, or one given twice.
    """
    prompt, *parts = re.split(r"\s--", line.strip())
    if prompt.startswith("--"):
        raise UserError(f"{where}: begins with a flag. The prompt comes first, then its flags, each after ' --'.")
    values: dict[str, str] = {}
    if glued := _GLUED.search(line):
        raise UserError(f"{where}: '--{glued[1]}' stands within the text. Put a blank before it; '{line.strip():.80}'.")
    if other := _OTHER_DASH.search(line):
        raise UserError(
            f"{where}: '{other[1]}{other[2]}' is no flag and would be part of the text. Flags begin with two plain dashes: --{other[2]}."
        )
    for part in parts:
        flag, value = (*part.split(maxsplit=1), "", "")[:2]
        if flag in PROMPT_FLAGS:
            raise UserError(f"{where}: --{flag} is not read here: {PROMPT_FLAGS[flag]}.")
        if flag not in _FLAGS:
            raise UserError(
                f"{where}: unknown flag '--{flag}'. Known are {', '.join('--' + name for name in _FLAGS)}. "
                "Text after the first ' --' is read as flags; write a dash within a prompt as '-' or '—'."
            )
        if _FLAGS[flag] in values:
            raise UserError(f"{where}: --{flag} is given twice.")
        values[_FLAGS[flag]] = value.strip()
    return prompt.strip(), values


def _to_prompt(index: int, where: str, entry: _Entry, folder: Path, defaults: PromptDefaults) -> PreviewPrompt:
    cfg = entry.guidance_scale if entry.cfg_scale is None else entry.cfg_scale
    fps = entry.frame_rate or defaults.fps
    frames = entry.frame_count or defaults.frames_at(fps)
    prompt = PreviewPrompt(
        index=index,
        prompt=entry.prompt.strip(),
        negative=entry.negative_prompt.strip(),
        width=entry.width or defaults.width,
        height=entry.height or defaults.height,
        frames=frames,
        fps=fps,
        seed=defaults.seed if entry.seed is None else entry.seed,
        steps=entry.sample_steps or defaults.steps,
        video_cfg=cfg,
        audio_cfg=cfg if entry.audio_cfg_scale is None else entry.audio_cfg_scale,
        where=where,
        inputs=_find_inputs(where, entry, folder, frames - 1),
        names_frames=entry.frame_count is not None or defaults.longest is None,
    )
    check_prompt(prompt)
    _check_places(prompt)
    return prompt


def check_prompt(prompt: PreviewPrompt) -> None:
    """
    Raises:
        UserError: a size beyond what is sampled, or areas and frames outside of it.
    """
    where = prompt.where
    for flag, area in (("--box", prompt.inputs.box), ("--crop", prompt.inputs.crop)):
        if area is not None and (area.left + area.width > prompt.width or area.top + area.height > prompt.height):
            corners = f"{area.left},{area.top},{area.width},{area.height}"
            raise UserError(f"{where}: {flag} {corners}: not within {prompt.width}x{prompt.height}.")
    cells = (prompt.width // 32) * (prompt.height // 32) * (1 + prompt.frames // 8)
    if cells > _MOST_CELLS:
        raise UserError(
            f"{where}: {prompt.width}x{prompt.height} with {prompt.frames} frames are {cells} latent cells; the most is {_MOST_CELLS}."
        )
    _check_pictures(where, prompt)


def _check_pictures(where: str, prompt: PreviewPrompt) -> None:
    inputs, last = prompt.inputs, prompt.frames - 1
    keyframes = {"--k": inputs.keyframes, "--kp": inputs.keyframes_in_place}
    given = [flag for flag, value in {"--i": inputs.image, "--ei": inputs.end_image, **keyframes}.items() if value]
    if prompt.frames == 1 and given:
        raise UserError(f"{where}: {given[0]} with 1 frame: the picture would be the whole sample. Raise --f, such as --f 49.")
    for flag, pictures in keyframes.items():
        if outside := [frame for frame, _ in pictures if frame > last]:
            raise UserError(f"{where}: {flag} {outside[0]}=...: the sample's frames are 0 to {last}.")
    if inputs.end_image is not None and last in dict(inputs.keyframes):
        raise UserError(f"{where}: --ei and --k {last}=... both give the last frame; keep one.")


def _check_places(prompt: PreviewPrompt) -> None:
    """Pictures in place each need a latent frame of their own; not of recipes, as clips were made before from the last of several."""
    inputs = prompt.inputs
    taken = {} if inputs.image is None else {0: "--i"}
    for frame, _ in inputs.keyframes_in_place:
        cell, named = -(-frame // _LATENT_FRAME), f"--kp {frame}=..."
        if cell in taken:
            frames = f"frames {(cell - 1) * _LATENT_FRAME + 1} to {cell * _LATENT_FRAME} are" if cell else "frame 0 is"
            raise UserError(
                f"{prompt.where}: {taken[cell]} and {named} are two pictures of one latent frame ({frames} one); keep one, or give it "
                "beside the clip by --k."
            )
        taken[cell] = named


def _split_strength(path: Path) -> tuple[Path, float | None]:
    """A picture's name and what follows its last @, where that is a number from 0 to 1: door.png@0.7."""
    name, at, number = str(path).rpartition("@")
    if not at or not name or not re.fullmatch(r"0|1|0?\.\d+|[01]\.0*", number):
        return path, None
    return Path(name), float(number)


def _find_inputs(where: str, entry: _Entry, folder: Path, last: int) -> ConditioningInputs:
    """The files of a prompt; a path counts from here, else from the prompt file's folder.

    Args:
        last: frame of the sample.
    """

    def find_file(flag: str, path: Path) -> Path:
        for candidate in (path, folder / path):
            if candidate.is_file():
                return candidate
        raise UserError(f"{where}: --{flag} '{path}': no such file, neither here nor in {folder}.")

    def find(flag: str, path: Path | None) -> Path | None:
        return None if path is None else find_file(flag, path)

    def find_pictures(flag: str, pictures: tuple[tuple[int, Path], ...]) -> tuple[tuple[tuple[int, Path], ...], dict[int, float]]:
        found, strengths = [], {}
        for frame, path in pictures:
            name, strength = _split_strength(path)
            if strength is not None:
                strengths[frame] = strength
            found.append((frame, find_file(f"{flag} {frame}=", name)))
        return tuple(found), strengths

    keyframes, of_beside = find_pictures("k", entry.keyframes)
    in_place, of_places = find_pictures("kp", entry.keyframes_in_place)
    beside = [*dict(keyframes), *([] if entry.end_image_path is None else [last])]
    both = {frame: of_beside.get(frame, 1.0) for frame in beside if frame in dict(in_place)}
    strengths = {frame: strength for frame, strength in of_beside.items() if frame not in both} | of_places
    return ConditioningInputs(
        image=find("i", entry.image_path),
        image_strength=1.0 if entry.image_strength is None else entry.image_strength,
        end_image=find("ei", entry.end_image_path),
        keyframes=keyframes,
        keyframes_in_place=in_place,
        strengths=tuple(sorted(strengths.items())),
        strengths_beside=tuple(sorted((frame, own) for frame, own in both.items() if own != strengths.get(frame, 1.0))),
        reference_strength=1.0 if entry.reference_strength is None else entry.reference_strength,
        video=find("iv", entry.input_video_path),
        video_span=entry.generate_seconds,
        box=entry.inpaint_box,
        crop=entry.outpaint_crop,
        audio=find("a", entry.input_audio_path),
        audio_span=entry.generate_sound_seconds,
        reference=find("v", entry.reference_video_path),
        reference_attention=1.0 if entry.reference_attention is None else entry.reference_attention,
        reference_mask=find("vm", entry.reference_mask_path),
        reference_audio=find("ra", entry.reference_audio_path),
    )
