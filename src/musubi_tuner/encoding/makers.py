"""How the sidecars of a clip are made: a decoder for each kind of `cache.sidecars.KINDS`, under the same name, and the frozen encoders.

media -> `Maker.decode` -> `Encoder.load` (where the kind has one) -> `SidecarKind.pack` -> file
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from musubi_tuner.cache import store
from musubi_tuner.cache.audit import NOTE
from musubi_tuner.cache.clip import Clip
from musubi_tuner.cache.looks import look_path
from musubi_tuner.cache.sidecars import SidecarKind
from musubi_tuner.encoding.audio import audio_bytes, decode_audio, decode_reference_audio, judge_audio
from musubi_tuner.encoding.jobs import Job, one_for_each_file
from musubi_tuner.encoding.looks import outline_of, picture_of
from musubi_tuner.encoding.pictures import (
    decode_frames,
    decode_keyframes,
    decode_mask,
    decode_reference,
    keyframe_bytes,
    keyframe_numbers,
    latent_bytes,
    mask_bytes,
)
from musubi_tuner.encoding.pipeline import Stages
from musubi_tuner.encoding.plan import DatasetPlan, PlannedClip
from musubi_tuner.runtime.device import HostCopy, settled, to_host

ClipJob = Job[PlannedClip]


@dataclass(frozen=True, kw_only=True, slots=True)
class Maker:
    """Of one kind."""

    decode: Callable[[PlannedClip], Tensor]
    """In a thread; a UserError fails this clip alone."""
    size: Callable[[Clip, str], int]
    """(clip, kind) -> about how many bytes the file has."""
    judge: Callable[[PlannedClip, Tensor], tuple[Tensor, str]] | None = None
    """(clip, decoded) -> what of it is encoded, and what people should know of it: the metadata entry `NOTE`, where there is anything."""
    described: Callable[[Tensor], Mapping[str, str]] = lambda encoded: {}
    """Metadata that only decoding tells."""
    look: Callable[[Tensor], bytes] | None = None
    """Decoded -> what people are shown of it, the content of `look_path`."""
    planned: Callable[[PlannedClip], tuple[Tensor, ...]] = lambda planned: ()
    """What of the plan `SidecarKind.pack` takes besides what is encoded."""


MAKERS: dict[str, Maker] = {
    "latents": Maker(decode=decode_frames, size=latent_bytes, look=picture_of),
    "reference": Maker(decode=decode_reference, size=latent_bytes),
    "mask": Maker(decode=decode_mask, size=mask_bytes),
    "keyframes": Maker(decode=decode_keyframes, size=keyframe_bytes, planned=keyframe_numbers),
    "audio": Maker(
        decode=decode_audio,
        judge=judge_audio,
        size=audio_bytes,
        look=outline_of,
        described=lambda latents: {"audio": "present" if latents.shape[1] else "absent"},
    ),
    "reference_audio": Maker(decode=decode_reference_audio, size=audio_bytes),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """A frozen encoder as a program hands it over."""

    model_version: str
    metadata: Callable[[Clip, str], Mapping[str, str]]
    """(clip, kind) -> its fingerprint, and what else shapes what it makes of them."""
    load: Callable[[Sequence[ClipJob], str], Callable[[Sequence[Tensor]], Sequence[HostCopy]]]
    """(jobs of this process, their kind) -> decoded values of one shape -> encoded ones, on the way to the host; called only where there
    are jobs."""


def sidecar_jobs(plans: Sequence[DatasetPlan], kind: SidecarKind, encoder: Encoder) -> list[ClipJob]:
    """Jobs for the clips that have such a sidecar, the largest first, so that memory that does not suffice shows at once.

    Raises:
        UserError: what `one_for_each_file` raises.
    """
    jobs = one_for_each_file(
        _job(plan, planned, kind, encoder) for plan in plans for planned in plan.clips if kind.name in planned.clip.sidecars
    )

    def order(job: ClipJob) -> tuple[float | str, ...]:
        clip = job.content.clip
        return -clip.width * clip.height * clip.frames, clip.width, clip.height, clip.frames, clip.seconds, str(job.target)

    return sorted(jobs, key=order)


def _job(plan: DatasetPlan, planned: PlannedClip, kind: SidecarKind, encoder: Encoder) -> ClipJob:
    clip = planned.clip
    made_by = {} if kind.encoder is None else encoder.metadata(clip, kind.name)
    size = {"original_size": f"{clip.original_width}x{clip.original_height}"} if clip.width else {}
    return Job(
        name=f"{plan.spec.label}/{clip.key}",
        target=plan.spec.cache_directory / clip.sidecars[kind.name].file,
        content=planned,
        expected={**kind.expected(clip), **made_by},
        people={"source": clip.source, "caption": planned.caption, "model_version": encoder.model_version, **size},
        size=MAKERS[kind.name].size(clip, kind.name),
        unwanted_note=kind.unwanted_note(planned.supervise_silence),
        settings={"supervise_silence": str(planned.supervise_silence).lower()} if kind.name == "audio" else {},
        forms=kind.forms(clip),
    )


def stages(
    kind: SidecarKind, encoder: Encoder, jobs: Sequence[ClipJob], notes: dict[Path, str]
) -> Stages[ClipJob, Tensor, HostCopy, Tensor]:
    """Decode, encode and write the sidecars of one kind; loads the encoder where the kind has one.

    Args:
        notes: is filled while decoding, by the jobs' files.
    """
    maker = MAKERS[kind.name]
    looks: dict[Path, bytes] = {}
    encode = encoder.load(jobs, kind.name) if kind.encoder is not None else lambda decoded: [to_host(value) for value in decoded]

    def decode(job: ClipJob) -> Tensor:
        value = maker.decode(job.content)
        if maker.judge is not None:
            value, note = maker.judge(job.content, value)
            if note:
                notes[job.target] = note
        if maker.look is not None:
            looks[job.target] = maker.look(value)
        return value

    def write(job: ClipJob, encoded: Tensor) -> None:
        note = {NOTE: notes[job.target]} if job.target in notes else {}
        tensors = kind.pack(encoded, *maker.planned(job.content))
        if maker.look is not None:  # before the file itself, whose being there says that the clip is done
            store.write_bytes(look_path(job.target, kind.name), looks.pop(job.target), lasting=False)
        store.write(job.target, tensors, {**job.expected, **job.people, **maker.described(encoded), **note}, job.forms)

    return Stages(decode=decode, shape=lambda value: value.shape, encode=encode, settle=settled, write=write)
