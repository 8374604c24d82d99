"""Which linears get an adapter."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from musubi_tuner.networks.base import FrozenLinear, is_linear
from musubi_tuner.runtime.errors import UserError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("net.0.proj", "net.2")

_VIDEO = r"(attn1|attn2|ff)\."
_AUDIO = r"(audio_attn1|audio_attn2|audio_ff)\."
_CROSS = r"(audio_to_video_attn|video_to_audio_attn)\."
_INTO_AUDIO = re.compile(r"video_to_audio|v2a_gate|a2v_ca_audio$")
_IN_BLOCK = r"transformer_blocks\.\d+\."


@dataclass(frozen=True, slots=True)
class TargetChoice:
    """What `--network_args` says about targets."""

    preset: str = "attention"
    include: tuple[str, ...] = ()
    """Regular expressions over official module names, in place of the preset where there are any."""
    exclude: tuple[str, ...] = ()


PRESETS: Mapping[str, str] = {
    "attention": rf"{_IN_BLOCK}\w*attn\w*\.({'|'.join(map(re.escape, ATTENTION))})",
    "attention_ff": rf"{_IN_BLOCK}(\w*attn\w*\.({'|'.join(map(re.escape, ATTENTION))})|\w*ff\.({'|'.join(map(re.escape, FEED_FORWARD))}))",
    "video": rf"{_IN_BLOCK}{_VIDEO}({'|'.join(map(re.escape, ATTENTION + FEED_FORWARD))})",
    "audio": rf"{_IN_BLOCK}{_AUDIO}({'|'.join(map(re.escape, ATTENTION + FEED_FORWARD))})",
    "cross": rf"{_IN_BLOCK}{_CROSS}({'|'.join(map(re.escape, ATTENTION))})",
    "connectors": rf"\w+_embeddings_connector\.transformer_1d_blocks\.\d+\.attn1\.({'|'.join(map(re.escape, ATTENTION))})",
    "all": rf"{_IN_BLOCK}({_VIDEO}|{_AUDIO}|{_CROSS})({'|'.join(map(re.escape, ATTENTION + FEED_FORWARD))})",
}
"""Over the modules that the training mode built: `video` mode has no audio modules to adapt."""


def choose_targets(model: nn.Module, choice: TargetChoice) -> list[str]:
    """Official names of the linears to adapt, in the model's order.

    Gate logits and connectors are in no preset; an explicit include pattern can name gates.

    Raises:
        UserError: an unknown preset, a malformed pattern, or nothing that matches.
    """
    if choice.preset not in PRESETS:
        raise UserError(f"--network_args preset={choice.preset}: must be one of {', '.join(PRESETS)}.")
    include = [compile_pattern(pattern) for pattern in (choice.include or (PRESETS[choice.preset],))]
    exclude = [compile_pattern(pattern) for pattern in choice.exclude]
    search = re.Pattern.search if choice.include else re.Pattern.fullmatch
    names = [
        name
        for name, module in model.named_modules()
        if is_linear(module) and any(search(pattern, name) for pattern in include) and not any(pattern.search(name) for pattern in exclude)
    ]
    if not names:
        wanted = " ".join(choice.include) or f"preset={choice.preset}"
        raise UserError(
            f"--network_args {wanted}: no linear of this model matches. "
            "Names look like 'transformer_blocks.0.attn1.to_q'; in video mode there are no audio modules, in audio mode no video modules."
        )
    return names


def stream_of(name: str) -> str:
    """`video`, `audio` or `cross`: whose states an adapted linear works on."""
    if "audio_to_video" in name or "video_to_audio" in name:
        return "cross"
    return "audio" if "audio_" in name else "video"


def is_audio_side(name: str) -> bool:
    """Whether what a module makes goes into the audio: that stream's own layers, its attention to the video and the gate of that, and its
    table of the attention across, whose last row is added to that gate."""
    return bool(_INTO_AUDIO.search(name)) or ("audio_" in name and "audio_to_video" not in name)


def linear_names(model: nn.Module) -> list[str]:
    """Official names of all linears, before any adapter is put on them."""
    return [name for name, module in model.named_modules() if is_linear(module)]


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of each of them."""
    return {name: (module.out_features, module.in_features) for name, module in model.named_modules() if isinstance(module, FrozenLinear)}


def count_by_stream(names: Sequence[str]) -> dict[str, int]:
    counts = {"video": 0, "audio": 0, "cross": 0}
    for name in names:
        counts[stream_of(name)] += 1
    return counts


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """
    Raises:
        UserError: no regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"--network_args: {pattern!r} is no regular expression ({error}).") from error
