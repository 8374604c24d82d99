"""The table of sidecar kinds: what can lie in the cache for a clip, and what each such file must be.

      media file(s)  --encoding: decode, encode-->  one file a clip and kind  --dataset: merge, stack-->  batch
                            ^                          ^                               ^
                            '------------------ one row of KINDS ---------------------'

A new kind is a row here and its decoder in `encoding.makers.MAKERS`, under the same name. What the row says is used by listing (which
files belong to a source), planning (which clips have it), caching (what is written, what is stale), the index, verification
(what is missing, and which program makes it) and batches (where no other rule stacks it, as it is, under its keys).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from musubi_tuner.cache.clip import Clip, Sidecar
from musubi_tuner.cache.forms import INTEGERS, Forms, TensorForm, audio_forms, latent_form, mask_form, text_forms
from musubi_tuner.cache.names import AUDIO_ENDING, LATENTS_ENDING, TEXT_ENDING, TEXT_MASK_KEY, audio_latents_key, latents_key, text_key
from musubi_tuner.cache.store import canonical

LATENT_PROGRAM = "ltxv2_cache_latents.py"
AUDIO_PROGRAM = "ltxv2_cache_audio_latents.py"
TEXT_PROGRAM = "ltxv2_cache_text_encoder_outputs.py"

SILENT, SILENT_SOUND = "silent (under -80 dBFS), not learned from", "silent (under -80 dBFS), learned from as the dataset asks"
"""Notes of files of sound."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnFiles:
    """Files that belong to sources, by stem or named in a jsonl."""

    directory: str | None
    """Key of a dataset for their folder; None = they are named in a jsonl alone."""
    path: str
    """Field of a jsonl line."""
    media: Literal["pictures", "sounds"]
    """Videos and pictures, or what has sound."""
    of: tuple[str, ...]
    """Kinds of datasets whose sources may have them."""
    what: str
    """For people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SidecarKind:
    """One row."""

    name: str
    """Key of `Clip.sidecars`, `Item.paths` and `Source.files`."""
    title: str
    """Of its caching."""
    ending: str
    """Of its file's name."""
    beside: Literal["latents", "audio"] | None = None
    """The kind whose file it lies beside, with the same name but for the ending; a clip without that has no such sidecar. None: it has a
    name of its own."""
    keys: tuple[str, ...]
    """Stripped tensor keys that its file holds."""
    pack: Callable[..., dict[str, Tensor]]
    """Its tensors -> with their keys in the file."""
    modes: tuple[str, ...]
    """Values of --ltx_mode in which training reads it."""
    program: str
    """That makes it."""
    encoder: Literal["video_vae", "audio_vae", "text"] | None = None
    """Whose fingerprint its metadata carries; None: nothing learned makes it."""
    recorded: Callable[[Clip], str]
    """Metadata entry `kind`."""
    window: Callable[[Clip, Sidecar], Mapping[str, Any]] | None = None
    """What the dataset decided about it, for the metadata entry `window`; None: it is not of a window."""
    tensors: Callable[[Clip, Sidecar, Mapping[str, str]], Mapping[str, TensorForm]] | None = None
    """(clip, sidecar, metadata of the file) -> what its tensors must be, by stripped key; None: anything."""
    files: OwnFiles | None = None
    """What it is made from, where that is not the clip's own source."""
    older_index_fields: Mapping[str, str] | None = None
    """{field of Sidecar: its name in the index}, of kinds that the index lists for every clip; None: `index_fields` says."""

    @property
    def own_files(self) -> OwnFiles:
        """`files` of a kind that has some."""
        assert self.files is not None
        return self.files

    @property
    def index_fields(self) -> Mapping[str, str]:
        own = {field.name: f"{self.name}_{field.name}" for field in fields(Sidecar)} | {"file": self.name}
        return own if self.older_index_fields is None else self.older_index_fields

    def expected(self, clip: Clip) -> dict[str, str]:
        """Metadata that its file must have, as far as the plan of the clip decides it."""
        entries = {"kind": self.recorded(clip)}
        if self.window is not None:
            sidecar = clip.sidecars[self.name]
            entries["source_fingerprint"] = sidecar.fingerprint or clip.source_fingerprint
            entries["window"] = canonical(self.window(clip, sidecar))
            if colors := clip.colors if self.files is None else sidecar.colors:  # no entry otherwise, so that caches of before stay valid
                entries["colors"] = colors
        return entries

    def unwanted_note(self, supervise_silence: bool) -> str:
        """What its file may not be noted as in a dataset (`cache.audit.NOTE`): silence that was taken the other way; empty: nothing."""
        return (SILENT if supervise_silence else SILENT_SOUND) if self.name == "audio" else ""

    def forms(self, clip: Clip) -> Forms:
        """What the tensors of its file must be, where the kind says so."""
        return _FormsOf(self.name, clip)

    def name_beside(self, other: str) -> str:
        """Its file's name beside a file of the kind `beside`."""
        assert self.beside is not None
        return other.removesuffix(KINDS[self.beside].ending) + self.ending


@dataclass(frozen=True, slots=True)
class _FormsOf:
    """The forms of a clip's file of a kind; goes from process to process."""

    kind: str
    clip: Clip

    def __call__(self, metadata: Mapping[str, str]) -> Mapping[str, TensorForm]:
        tensors = KINDS[self.kind].tensors
        return {} if tensors is None else tensors(self.clip, self.clip.sidecars[self.kind], metadata)


def _later_entries(clip: Clip) -> dict[str, Any]:
    """What decides about the frames of some clips alone; nothing for the others, so that their files stay valid."""
    return ({"mirrored": True} if clip.mirrored else {}) | ({"source_fps": clip.source_fps} if clip.source_fps else {})


def clip_window(clip: Clip, sidecar: Sidecar) -> dict[str, Any]:
    """Pictures of the clip's own size and time."""
    window: dict[str, Any] = {"kind": clip.kind, "width": clip.width, "height": clip.height}
    if clip.kind == "video":
        window |= {"start": clip.start_seconds, "end": clip.end_seconds, "fps": clip.fps, "frames": clip.frames}
    return window | _later_entries(clip)


def _audio_window(clip: Clip, sidecar: Sidecar) -> dict[str, Any]:
    """Its seconds; the rate says how much may be padded at a stream's end."""
    window = {"start": clip.start_seconds, "end": clip.end_seconds, "fps": clip.fps}
    return window | ({"from": "first frame"} if sidecar.from_pictures else {})


def _reference_window(clip: Clip, sidecar: Sidecar) -> dict[str, Any]:
    """The same seconds, at a size and rate of its own."""
    window = {"width": sidecar.width, "height": sidecar.height, "frames": sidecar.frames}
    return window | {"start": clip.start_seconds, "fps": sidecar.fps} | _later_entries(clip)


def _keyframes_window(clip: Clip, sidecar: Sidecar) -> dict[str, Any]:
    """The clip's window, and which of its frames."""
    return clip_window(clip, sidecar) | {"keyframes": list(sidecar.at)}


def _keyframes_forms(clip: Clip, sidecar: Sidecar, metadata: Mapping[str, str]) -> dict[str, TensorForm]:
    return {
        "keyframe_latents": latent_form(8 * len(sidecar.at) - 7, clip.height, clip.width),  # a cell in time for each of them
        "keyframe_frames": TensorForm(shape=(len(sidecar.at),), dtypes=INTEGERS, limits=(0, clip.frames - 1)),
    }


def _latents(latents: Tensor) -> dict[str, Tensor]:
    _, frames, height, width = latents.shape
    return {latents_key(frames, height, width, latents.dtype): latents}


def _audio(latents: Tensor) -> dict[str, Tensor]:
    steps = latents.shape[1]
    return {audio_latents_key(steps, latents.dtype): latents, "audio_lengths_int32": torch.tensor(steps, dtype=torch.int32)}


def _keyframes(latents: Tensor, frames: Tensor) -> dict[str, Tensor]:
    return {f"keyframe_{key}": tensor for key, tensor in _latents(latents).items()} | {"keyframe_frames_int32": frames}


def _reference(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"ref_{key}": tensor for key, tensor in tensors.items()}


def _index_fields(file: str, prefix: str, *names: str) -> dict[str, str]:
    return {"file": file} | {name: f"{prefix}_{name}" for name in names}


KINDS: dict[str, SidecarKind] = {
    kind.name: kind
    for kind in (
        SidecarKind(
            name="latents",
            title="Video latent caching",
            ending=LATENTS_ENDING,
            keys=("latents",),
            pack=_latents,
            modes=("video", "av"),
            program=LATENT_PROGRAM,
            encoder="video_vae",
            recorded=lambda clip: f"{clip.kind}_latents",
            window=clip_window,
            tensors=lambda clip, sidecar, metadata: {"latents": latent_form(clip.frames, clip.height, clip.width)},
            older_index_fields={"file": "latents"},
        ),
        SidecarKind(
            name="audio",
            title="Audio latent caching",
            ending=AUDIO_ENDING,
            beside="latents",
            keys=("audio_latents", "audio_lengths"),
            pack=_audio,
            modes=("av", "audio"),
            program=AUDIO_PROGRAM,
            encoder="audio_vae",
            recorded=lambda clip: "audio_latents",
            # The entry `audio` is not expected: it is `absent` too where a stream ends before the window begins, which decoding tells.
            window=_audio_window,
            tensors=lambda clip, sidecar, metadata: audio_forms("", clip.seconds),
            files=OwnFiles(directory="separate_audio_directory", path="audio_path", media="sounds", of=("video",), what="sound file"),
            older_index_fields=_index_fields("audio", "sound", "source", "fingerprint", "from_pictures"),
        ),
        SidecarKind(
            name="reference",
            title="Reference latent caching",
            ending="_ltxv2_ref.safetensors",
            beside="latents",
            keys=("ref_latents",),
            pack=lambda latents: _reference(_latents(latents)),
            modes=("video", "av"),
            program=LATENT_PROGRAM,
            encoder="video_vae",
            recorded=lambda clip: "reference_latents",
            window=_reference_window,
            tensors=lambda clip, sidecar, metadata: {"ref_latents": latent_form(sidecar.frames, sidecar.height, sidecar.width)},
            files=OwnFiles(
                directory="reference_directory", path="reference_path", media="pictures", of=("video", "image"), what="reference"
            ),
            older_index_fields=_index_fields(
                "reference", "reference", "source", "fingerprint", "frames", "fps", "width", "height", "colors"
            ),
        ),
        SidecarKind(
            name="mask",
            title="Mask caching",
            ending="_ltxv2_mask.safetensors",
            beside="latents",
            keys=("video_mask",),
            pack=lambda cells: {"video_mask": cells},
            modes=("video", "av"),
            program=LATENT_PROGRAM,
            recorded=lambda clip: "mask",
            window=clip_window,
            tensors=lambda clip, sidecar, metadata: {"video_mask": mask_form(clip.frames, clip.height, clip.width)},
            files=OwnFiles(directory="mask_directory", path="mask_path", media="pictures", of=("video", "image"), what="mask"),
            older_index_fields=_index_fields("mask", "mask", "source", "fingerprint"),
        ),
        SidecarKind(
            name="keyframes",
            title="Keyframe caching",
            ending="_ltxv2_keyframes.safetensors",
            beside="latents",
            keys=("keyframe_latents", "keyframe_frames"),
            pack=_keyframes,
            modes=("video", "av"),
            program=LATENT_PROGRAM,
            encoder="video_vae",
            recorded=lambda clip: "keyframe_latents",
            window=_keyframes_window,
            tensors=_keyframes_forms,
        ),
        SidecarKind(
            name="reference_audio",
            title="Reference audio caching",
            ending="_ltxv2_ref_audio.safetensors",
            beside="audio",
            keys=("ref_audio_latents", "ref_audio_lengths"),
            pack=lambda latents: _reference(_audio(latents)),
            modes=("av", "audio"),
            program=AUDIO_PROGRAM,
            encoder="audio_vae",
            recorded=lambda clip: "reference_audio_latents",
            tensors=lambda clip, sidecar, metadata: audio_forms("ref_", clip.seconds),
            window=lambda clip, sidecar: {"longest": clip.seconds},  # from its own beginning, as long as the clip at most
            files=OwnFiles(
                directory="reference_audio_directory",
                path="reference_audio_path",
                media="sounds",
                of=("video", "audio"),
                what="reference audio",
            ),
            older_index_fields=_index_fields("reference_sound", "reference_sound", "source", "fingerprint"),
        ),
        SidecarKind(
            name="text",
            title="Text caching",
            ending=TEXT_ENDING,
            keys=("text",),
            pack=lambda text, mask: {text_key(text.dtype): text, TEXT_MASK_KEY: mask},
            modes=("video", "av", "audio"),
            program=TEXT_PROGRAM,
            encoder="text",
            recorded=lambda clip: "text",
            tensors=lambda clip, sidecar, metadata: text_forms(metadata),
            older_index_fields={"file": "text"},
        ),
    )
}
"""In the order in which they are cached and checked."""
