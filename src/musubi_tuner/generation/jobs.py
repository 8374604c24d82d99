"""The clips that are to be made: a prompt and the networks it is made with."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.config.generation import GenerateConfig, LoraOptions
from musubi_tuner.config.preview import GuidanceOptions
from musubi_tuner.config.validation import shortened
from musubi_tuner.ltxv2.text.duration import LONGEST
from musubi_tuner.networks.reading import network_metadata, newest_file
from musubi_tuner.networks.stack import Strength
from musubi_tuner.prompts.prompt import ConditioningInputs, PreviewPrompt
from musubi_tuner.prompts.sample_prompts import PromptDefaults, load_prompts, prompts_of_lines
from musubi_tuner.runtime.errors import UserError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_LARGEST_STRENGTH = 100
_FACTORS = (
    ("reference_downscale_factor", "reference_spatial_scale_factor"),
    ("reference_temporal_scale_factor",),
)
"""Metadata of an IC-LoRA: how many times smaller, and slower, than the clip its references are."""


@dataclass(frozen=True, slots=True)
class LoraUse:
    """A network's file at a strength."""

    path: Path
    strength: Strength


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One clip."""

    stem: str
    """Its file's name without ending."""
    prompt: PreviewPrompt
    loras: tuple[LoraUse, ...]
    guidance: GuidanceOptions
    """What of it the prompt does not name itself."""


def parse_lora(text: str, named: str = "--lora") -> LoraUse:
    """FILE, FILE:STRENGTH or FILE:STRENGTH:VIDEO:AUDIO, read from the right: a colon that no number follows belongs to the file, as in
    C:\\a.safetensors:0.8.

    Args:
        named: where it is given, for messages.

    Raises:
        UserError: two numbers, or four and more, behind the file, or what is no strength; a file that is not there.
    """
    path, numbers = split_lora(text, named)
    strength, video, audio = (*numbers, 1.0, 1.0)[:3] if len(numbers) == 1 else numbers or (1.0, 1.0, 1.0)
    found = Strength(video, audio) * strength
    if max(abs(found.video), abs(found.audio)) > _LARGEST_STRENGTH:
        raise UserError(
            f"{named} {shortened(text)}: a strength must be between -{_LARGEST_STRENGTH} and {_LARGEST_STRENGTH}; 1 is as trained."
        )
    return LoraUse(_existing(Path(path), named), found)


def split_lora(text: str, named: str = "--lora") -> tuple[str, list[float]]:
    """The file of a --lora, and the numbers behind it: none, one or three.

    Raises:
        UserError: another count of numbers, or a file that is there with something else behind it.
    """
    path, numbers = text, []
    while len(numbers) < 4 and ":" in path and not is_there(Path(path)):
        before, _, last = path.rpartition(":")
        if not before or not _NUMBER.fullmatch(last):
            break
        path, numbers = before, [float(last), *numbers]
    if not is_there(Path(path)):
        _refuse_other_words(text, named)
    if len(numbers) not in (0, 1, 3):
        raise UserError(f"{named} {text}: {len(numbers)} numbers behind the file. Give FILE:STRENGTH, or FILE:STRENGTH:VIDEO:AUDIO.")
    return path, numbers


def _refuse_other_words(text: str, named: str) -> None:
    file, _, behind = text.rpartition(":")
    while file:
        if is_there(Path(file)):
            raise UserError(
                f"{named} {shortened(text)}: what is behind the colon, '{shortened(behind)}', is no strength. Give FILE:STRENGTH, such as "
                "FILE:0.8, or FILE:STRENGTH:VIDEO:AUDIO."
            )
        file, _, more = file.rpartition(":")
        behind = f"{more}:{behind}"


def chosen_loras(options: LoraOptions) -> tuple[LoraUse, ...]:
    """Of the command line, in its order.

    Raises:
        UserError: what `parse_lora` raises.
    """
    multipliers = options.lora_multiplier + (1.0,) * (len(options.lora_weight) - len(options.lora_multiplier))
    plain = [
        LoraUse(_existing(path, "--lora_weight"), Strength(value, value))
        for path, value in zip(options.lora_weight, multipliers, strict=True)
    ]
    return (*map(parse_lora, options.lora), *plain)


def read_prompts(config: GenerateConfig, named: str = "--sample_prompts") -> tuple[PreviewPrompt, ...]:
    """Of --prompt or --sample_prompts, with what the command line adds to those that name nothing of the kind.

    Args:
        named: the flag that gives the prompt file, for messages.

    Raises:
        UserError: what the readers of prompts raise.
    """
    clips, guidance = config.clips, config.guidance
    defaults = PromptDefaults(
        width=guidance.sample_width,
        height=guidance.sample_height,
        frames=guidance.sample_frames,
        fps=guidance.sample_fps,
        steps=guidance.sample_steps,
        seed=PromptDefaults().seed if clips.seed is None else clips.seed,
        longest=None if config.model.duration_head is None else LONGEST,
    )
    if clips.sample_prompts is not None:
        prompts = load_prompts(clips.sample_prompts, defaults, named)
    else:
        prompts = prompts_of_lines(clips.prompt, "--prompt", Path(), defaults)
    return tuple(_with_inputs(prompt, config) for prompt in prompts)


def _with_inputs(prompt: PreviewPrompt, config: GenerateConfig) -> PreviewPrompt:
    inputs, clips = prompt.inputs, config.clips
    for name, path in (("image", clips.image), ("reference_video", clips.reference_video), ("audio", clips.audio)):
        if path is not None and not path.is_file():
            raise UserError(f"--{name} {path}: not found.")
    first_in_place = any(frame == 0 for frame, _ in inputs.keyframes_in_place)
    inputs = dataclasses.replace(
        inputs,
        image=inputs.image or (None if first_in_place else clips.image),
        reference=inputs.reference or clips.reference_video,
        audio=inputs.audio or clips.audio,
    )
    if config.pipeline.pipeline == "keyframes":
        _check_frames(prompt, inputs)
    return dataclasses.replace(prompt, negative=prompt.negative or clips.negative_prompt or "", inputs=inputs)


def _check_frames(prompt: PreviewPrompt, inputs: ConditioningInputs) -> None:
    """Each picture has a frame of its own where all of them are beside the clip."""
    ends = (("--i", 0, inputs.image), ("--ei", prompt.frames - 1, inputs.end_image))
    taken = {frame: flag for flag, frame, path in ends if path is not None}
    for flag, pictures in (("--k", inputs.keyframes), ("--kp", inputs.keyframes_in_place)):
        for frame, _ in pictures:
            if frame in taken:
                raise UserError(
                    f"{prompt.where}: --pipeline keyframes lays every picture beside the clip, and {taken[frame]} and {flag} {frame}=... "
                    "are both of that frame; keep one."
                )
            taken[frame] = f"{flag} {frame}=..."


def make_jobs(config: GenerateConfig, prompts: Sequence[PreviewPrompt], loras: tuple[LoraUse, ...]) -> tuple[Job, ...]:
    """One clip of each prompt."""
    name = config.clips.output_name
    if config.clips.recreate is not None:
        return tuple(Job(stem=name, prompt=prompt, loras=loras, guidance=config.guidance) for prompt in prompts)
    return tuple(
        Job(stem=f"{name}_{prompt.index:02d}_{prompt.seed}", prompt=prompt, loras=loras, guidance=config.guidance) for prompt in prompts
    )


def reference_factors(uses: Iterable[LoraUse]) -> tuple[int, int]:
    """How many times smaller and slower than a clip its reference is: what the networks say that were trained on references.

    Args:
        uses: of all clips of a run, so that its base, which has no network, is shown what the others are.

    Raises:
        UserError: two networks that say different things, or one that says nothing that can be read.
    """
    found = {factors: use.path for use in uses if (factors := _factors_of(use.path)) is not None}
    if len(found) > 1:
        (first, one), (second, other), *_ = found.items()
        raise UserError(
            f"{one} was trained on references at 1/{first[0]} of the size, {other} at 1/{second[0]}: use one of them at a time."
        )
    return next(iter(found), (1, 1))


@functools.lru_cache(maxsize=1024)
def _factors_of(path: Path) -> tuple[int, int] | None:
    metadata = network_metadata(path)
    said = [next((metadata[key] for key in keys if key in metadata), None) for keys in _FACTORS]
    if all(value is None for value in said):
        return None
    try:
        space, time = (1 if value is None else int(float(value)) for value in said)
    except ValueError as error:
        raise UserError(f"{path}: its metadata '{_FACTORS[0][0]}' is no number ({error}).") from error
    return space, time


def _existing(path: Path, flag: str) -> Path:
    if not is_there(path):
        raise UserError(f"{flag} {shortened(str(path))}: not found.")
    return newest_file(path)


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder; not where the system takes no such path."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
