"""Sound of planned clips -> audio latents in cache files.

Sound is supervised or it is absent. A clip gets exactly its own seconds. What a stream lacks at its end is padded with silence only
up to one frame (clips are seldom cut to the sample); where more is missing the latents are as long as the sound, and training masks
the rest.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from musubi_tuner.cache import store
from musubi_tuner.cache.fingerprint import canonical
from musubi_tuner.cache.index import Clip
from musubi_tuner.cache.keys import AUDIO_LENGTHS_KEY, REFERENCE_AUDIO_LENGTHS_KEY, audio_latents_key, reference_audio_latents_key
from musubi_tuner.cache.sidecars import audio_of, reference_audio_of
from musubi_tuner.encoding.jobs import Job, list_jobs
from musubi_tuner.encoding.pipeline import Stages
from musubi_tuner.encoding.plan import DatasetPlan
from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE
from musubi_tuner.ltxv2.geometry import AUDIO_CHANNELS, AUDIO_LATENTS_PER_SECOND, AUDIO_MEL_BINS, AUDIO_SAMPLE_RATE
from musubi_tuner.media.audio import read_audio, resample
from musubi_tuner.media.probe import VideoInfo
from musubi_tuner.runtime.device import HostCopy, settled, to_host
from musubi_tuner.runtime.errors import UserError

STORED_DTYPE = torch.bfloat16
_ENCODING = canonical({"stored": str(STORED_DTYPE).removeprefix("torch."), "computed": "float32"})
_LEAST_SECONDS = 0.1
"""Less of a stream within a window counts as no sound."""


def audio_jobs(plans: Sequence[DatasetPlan], *, encoder: str, model_version: str) -> tuple[Job, ...]:
    """Jobs for all clips but stills.

    Args:
        encoder: fingerprint of the audio VAE.
    """

    def expected(clip: Clip) -> dict[str, str]:
        return audio_of(clip) | {"encoder_fingerprint": encoder, "encoding": _ENCODING}

    return list_jobs(plans, name_of=lambda clip: clip.audio, expected_of=expected, size_of=_size_of, model_version=model_version)


def reference_audio_jobs(plans: Sequence[DatasetPlan], *, encoder: str, model_version: str) -> tuple[Job, ...]:
    """Jobs for what is played beside clips' sound; arguments as for `audio_jobs`."""

    def expected(clip: Clip) -> dict[str, str]:
        return reference_audio_of(clip) | {"encoder_fingerprint": encoder, "encoding": _ENCODING}

    return list_jobs(plans, name_of=lambda clip: clip.reference_sound, expected_of=expected, size_of=_size_of, model_version=model_version)


def reference_audio_stages(vae: AudioVAE) -> Stages[Job, Tensor, HostCopy, Tensor]:
    """As `audio_stages`, of what is played beside them."""
    return dataclasses.replace(audio_stages(vae), decode=_decode_reference, write=_write_reference)


def audio_stages(vae: AudioVAE) -> Stages[Job, Tensor, HostCopy, Tensor]:
    """Decode sound, encode it with the VAE, write latents."""

    def encode(sounds: Sequence[Tensor]) -> list[HostCopy]:
        if sounds[0].shape[1] == 0:
            return [to_host(torch.zeros(AUDIO_CHANNELS, 0, AUDIO_MEL_BINS, dtype=STORED_DTYPE)) for _ in sounds]
        return [to_host(latents) for latents in vae.encode(torch.stack(list(sounds))).to(STORED_DTYPE)]

    return Stages(decode=decode_sound, shape=lambda sound: sound.shape, encode=encode, settle=settled, write=_write)


def decode_sound(job: Job) -> Tensor:
    """(2, samples) at 16 kHz of the clip's seconds; (2, 0) where there is no sound in them."""
    clip, found = job.planned.clip, job.planned.found
    path, sound = job.planned.source.path, found.sound if isinstance(found, VideoInfo) else found
    if sound is None and job.planned.beside.sound is None:
        return torch.zeros(2, 0)
    origin = found.start
    if job.planned.beside.sound is not None:
        path, sound = job.planned.source.sound, job.planned.beside.sound
        origin = sound.start
    heard = read_audio(path, sound, origin + clip.start_seconds, origin + clip.end_seconds)
    samples = resample(heard.samples, heard.rate, AUDIO_SAMPLE_RATE)
    wanted = round((clip.end_seconds - clip.start_seconds) * AUDIO_SAMPLE_RATE)
    samples = samples[:, :wanted]
    lacking = wanted - samples.shape[1]
    if lacking < AUDIO_SAMPLE_RATE / clip.fps:
        return torch.nn.functional.pad(samples, (0, lacking))
    return samples if samples.shape[1] >= _LEAST_SECONDS * AUDIO_SAMPLE_RATE else torch.zeros(2, 0)


def _decode_reference(job: Job) -> Tensor:
    """(2, samples) at 16 kHz from the sound's own beginning, as long as the clip at most."""
    clip, sound, path = job.planned.clip, job.planned.beside.reference_sound, job.planned.source.reference_sound
    heard = read_audio(path, sound, sound.start, min(sound.end, sound.start + clip.end_seconds - clip.start_seconds))
    samples = resample(heard.samples, heard.rate, AUDIO_SAMPLE_RATE)
    if samples.shape[1] < _LEAST_SECONDS * AUDIO_SAMPLE_RATE:
        raise UserError(f"{path}: {samples.shape[1] / AUDIO_SAMPLE_RATE:.2f} s of sound; a reference has {_LEAST_SECONDS} s at least.")
    return samples


def _write_reference(job: Job, latents: Tensor) -> None:
    steps = latents.shape[1]
    key = reference_audio_latents_key(steps, latents.dtype)
    store.write(
        job.target, {key: latents, REFERENCE_AUDIO_LENGTHS_KEY: torch.tensor(steps, dtype=torch.int32)}, {**job.expected, **job.people}
    )


def _write(job: Job, latents: Tensor) -> None:
    steps = latents.shape[1]
    tensors = {audio_latents_key(steps, latents.dtype): latents, AUDIO_LENGTHS_KEY: torch.tensor(steps, dtype=torch.int32)}
    store.write(job.target, tensors, {**job.expected, **job.people, "audio": "present" if steps else "absent"})


def _size_of(clip: Clip) -> int:
    if not clip.has_audio:
        return 0
    steps = (clip.end_seconds - clip.start_seconds) * AUDIO_LATENTS_PER_SECOND
    return round(steps) * AUDIO_CHANNELS * AUDIO_MEL_BINS * STORED_DTYPE.itemsize
