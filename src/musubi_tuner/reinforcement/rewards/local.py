"""What rewards with a model of transformers share: loading from a folder of the user's, references, pictures and sound as models take them.

Nothing is downloaded, no pickle is read, and no code of a model's own is run.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from musubi_tuner.media.audio import Waveform, read_audio, resample
from musubi_tuner.media.picture import read_picture
from musubi_tuner.media.probe import probe_audio, probe_video
from musubi_tuner.media.video import read_frames
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.files import read_json
from musubi_tuner.runtime.local_models import first_line, model_type, quiet
from musubi_tuner.sources.listing import EXTENSIONS

_LONGEST = 30.0
"""Seconds of a reference, from its beginning."""


def model_files(folder: Path, named: str, remedy: str) -> list[Path]:
    """What a model's scores depend on.

    Raises:
        UserError: no folder of a model.
    """
    model_type(folder, named=named, remedy=remedy)
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".txt", ".model"))


def architectures(folder: Path) -> list[str]:
    """Of its config.json."""
    found = read_json(folder / "config.json").get("architectures")
    return [str(one) for one in found] if isinstance(found, list) else []


def load(folder: Path, kind: str, named: str, remedy: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """A model that is to be judged with, by a class of transformers.

    Args:
        kind: the class's name, such as `AutoModel`.

    Raises:
        UserError: it cannot be loaded, or lacks weights.
        TemporaryFailure: no memory for it.
    """
    import transformers

    try:
        with quiet():
            model, found = getattr(transformers, kind).from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True, dtype=dtype
            )
            if missing := sorted(found["missing_keys"]):
                raise UserError(f"{named}{folder}: its files lack {len(missing)} weights, first {missing[0]}. {remedy}")
            return model.requires_grad_(False).eval().to(device)
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise TemporaryFailure(f"{named}{folder}: {device} has too little memory for it. Give --device cpu, or a smaller model.") from error
    except Exception as error:  # transformers and safetensors have no narrower class for what is wrong with a folder
        raise UserError(f"{named}{folder}: cannot be loaded ({first_line(error)}). {remedy}") from error


def load_processor(folder: Path, kind: str, named: str, remedy: str) -> Any:
    """A processor, tokenizer or feature extractor.

    Raises:
        UserError: it cannot be loaded.
    """
    import transformers

    try:
        with quiet():
            return getattr(transformers, kind).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        raise UserError(f"{named}{folder}: its preprocessing cannot be loaded ({first_line(error)}). {remedy}") from error


def embedding(found: Any) -> Tensor:
    """(B, width) of length 1, of what a model gives: features, pooled or by token."""
    if not torch.is_tensor(found):
        pooled = getattr(found, "pooler_output", None)
        found = found.last_hidden_state.mean(1) if pooled is None else pooled
    return normalize(found.float(), dim=-1)


def evenly(frames: Tensor, count: int) -> Tensor:
    """At most `count` of (F, H, W, 3), from the middles of equal parts."""
    places = [(2 * part + 1) * len(frames) // (2 * count) for part in range(count)] if len(frames) > count else range(len(frames))
    return frames[list(places)]


def as_pictures(frames: Tensor) -> list[Any]:
    """Pillow's, as processors take them."""
    from PIL import Image

    return [Image.fromarray(frame.numpy()) for frame in frames]


def mono(sound: Waveform, rate: int) -> Tensor:
    """(n,) at `rate`."""
    return resample(sound.samples.mean(0), sound.rate, rate)


def references(folder: Path, kinds: Sequence[str], named: str) -> list[Path]:
    """The user's own media in a folder.

    Args:
        kinds: of `EXTENSIONS`.

    Raises:
        UserError: there are none.
    """
    endings = tuple(ending for kind in kinds for ending in EXTENSIONS[kind])
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in endings) if folder.is_dir() else []
    if not found:
        what = "holds none of the media that are compared with" if folder.is_dir() else "no such folder"
        raise UserError(f"{named}{folder}: {what}. Give a folder with {', '.join(endings)}.")
    return found


def reference_frames(path: Path, count: int) -> Tensor:
    """(F, H, W, 3) of a picture or a video, at most `count`."""
    if path.suffix.lower() in EXTENSIONS["image"]:
        return read_picture(path)[None]
    info = probe_video(path)
    total = len(info.times)
    places = [(2 * part + 1) * total // (2 * count) for part in range(count)] if total > count else list(range(total))
    return read_frames(info, places, info.width, info.height)


def reference_sound(path: Path) -> Waveform:
    """Of a sound or a video, from its beginning.

    Raises:
        UserError: it has none.
    """
    if path.suffix.lower() in EXTENSIONS["audio"]:
        info = probe_audio(path)
    else:
        info = probe_video(path).audio
        if info is None:
            raise UserError(f"{path}: has no sound to compare with. Give one that has, or take it out.")
    return read_audio(path, info, info.start, info.start + min(_LONGEST, info.end - info.start))


def centroid(paths: Sequence[Path], embed: Callable[[Path], Tensor]) -> Tensor:
    """(width,) of length 1: the mean direction of what `embed` gives of each file, (B, width)."""
    means = [normalize(embed(path).mean(0), dim=-1) for path in paths]
    return normalize(torch.stack(means).mean(0), dim=-1)
