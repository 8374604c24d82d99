"""Whether a checkpoint is whole: each component's names and shapes against its config, every number, and the hashes of its files."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from musubi_tuner.conversion.checkpoint.components import TEXT, TRANSFORMER, components_of
from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE
from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE
from musubi_tuner.ltxv2.autoencoders.vocoder import Vocoder
from musubi_tuner.ltxv2.quantization import read_quantization
from musubi_tuner.ltxv2.text.connectors import load_connectors
from musubi_tuner.ltxv2.text.duration import DurationHead
from musubi_tuner.ltxv2.text.features import PREFIX, load_feature_extractor
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.ltxv2.versions import CONNECTORS, streams_of, transformer_names
from musubi_tuner.ltxv2.weights import SECTIONS, Checkpoint
from musubi_tuner.runtime.errors import UserError

_PIECE = 2**24


@dataclass(slots=True)
class Verified:
    """What was found."""

    problems: list[str] = field(default_factory=list)
    """Everything that is wrong with it, a line each."""
    components: dict[str, str] = field(default_factory=dict)
    """What was held against what, in words, by component."""


def verify(checkpoint: Checkpoint, advance: Callable[[int], object]) -> Verified:
    """Hold names and shapes against what its config describes, and look for NaN and infinity.

    A component by itself is as good as a whole checkpoint; tensors of none of them are looked at for their numbers alone.

    Args:
        advance: called with the bytes that were looked at.
    """
    found = Verified()
    for component, names in components_of(checkpoint).items():
        if component == "vae" and "vae" not in checkpoint.config and "audio_vae" in checkpoint.config:
            component = "audio_vae"  # in a file of its own, whose names have no prefix
        check = _CHECKS.get(component)
        if check is None:
            found.components[component] = f"names and shapes not checked: {len(names):,} tensor(s) of no component that is known here"
            continue
        try:
            problems = check(checkpoint)
        except UserError as error:
            problems = [str(error).removeprefix(f"{checkpoint.path}: ")]
        found.problems += problems
        found.components[component] = "names and shapes differ, see above" if problems else "names and shapes fit"
    for section in SECTIONS:
        if section in checkpoint.config and section not in found.components:
            found.components[section] = "not in this file, though its config describes it"
    if not checkpoint.entries:
        found.problems.append("holds no tensors.")
    with checkpoint.tensors(checkpoint.names()) as tensors:
        for name, tensor in zip(checkpoint.names(), tensors, strict=True):
            if tensor.is_floating_point() and tensor.numel() and not bool(torch.stack(torch.aminmax(tensor.float())).isfinite().all()):
                found.problems.append(f"'{name}' holds NaN or infinity.")
            advance(checkpoint.entries[name].size)
    return found


def _transformer(checkpoint: Checkpoint) -> list[str]:
    names = read_quantization(checkpoint, transformer_names(checkpoint)).weights
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in LTXModel(read_config(checkpoint), streams_of(names)).state_dict().items()}
    problems = [f"lacks '{name}'." for name in expected if name not in names]
    problems += [f"has '{full}', which the model lacks." for name, full in names.items() if name not in expected]
    for name, full in names.items():
        if name in expected and checkpoint.shape(full) != expected[name]:
            problems.append(f"'{full}' has the shape {checkpoint.shape(full)}; its config says {expected[name]}.")
    return problems


def _text(checkpoint: Checkpoint) -> list[str]:
    """The projection, whose shapes follow from one another, and the connectors: each where there is one."""
    names = components_of(checkpoint)[TEXT]
    problems = []
    if any(name.startswith(PREFIX) for name in names):
        problems += _raised(lambda: load_feature_extractor(checkpoint, 1, device="meta", dtype=torch.float32), checkpoint)
    if any(connector in name for name in names for connector in CONNECTORS):
        problems += _raised(lambda: load_connectors(checkpoint, device="meta", dtype=torch.float32), checkpoint)
    return problems


def _loaded(load: Callable[[Checkpoint], object]) -> Callable[[Checkpoint], list[str]]:
    return lambda checkpoint: _raised(lambda: load(checkpoint), checkpoint)


def _raised(load: Callable[[], object], checkpoint: Checkpoint) -> list[str]:
    try:
        load()
    except UserError as error:
        return [str(error).removeprefix(f"{checkpoint.path}: ")]
    return []


_CHECKS: Mapping[str, Callable[[Checkpoint], list[str]]] = {
    TRANSFORMER: _transformer,
    TEXT: _text,
    "vae": _loaded(lambda checkpoint: VideoVAE.load(checkpoint, device="meta", dtype=torch.float32)),
    "audio_vae": _loaded(lambda checkpoint: AudioVAE.load(checkpoint, device="meta")),
    "vocoder": _loaded(lambda checkpoint: Vocoder.load(checkpoint, device="meta")),
    "duration_head": _loaded(lambda checkpoint: DurationHead.load(checkpoint, "meta")),
}


def file_hashes(checkpoint: Checkpoint, advance: Callable[[int], object]) -> dict[Path, str]:
    """SHA-256 of each of its files, as download pages show it.

    Args:
        advance: called with the bytes that were read.
    """
    found = {}
    for path in sorted({entry.file for entry in checkpoint.entries.values()}):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
                advance(len(piece))
        found[path] = digest.hexdigest()
    return found
