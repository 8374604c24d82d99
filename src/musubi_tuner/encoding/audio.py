"""Sound of planned clips -> audio latents.

Sound is supervised or it is absent. A clip gets exactly its own seconds. What a stream lacks at its end is padded with silence only
up to one frame (clips are seldom cut to the sample); where more is missing the latents are as long as the sound, and training masks
the rest.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from musubi_tuner.cache.clip import Clip
from musubi_tuner.cache.store import canonical
from musubi_tuner.encoding.plan import PlannedClip
from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE
from musubi_tuner.ltxv2.geometry import AUDIO_CHANNELS, AUDIO_LATENTS_PER_SECOND, AUDIO_MEL_BINS, AUDIO_SAMPLE_RATE
from musubi_tuner.media.audio import read_audio, resample
from musubi_tuner.media.probe import VideoInfo
from musubi_tuner.runtime.device import HostCopy, to_host
from musubi_tuner.runtime.errors import UserError

STORED_DTYPE = torch.bfloat16
AUDIO_ENCODING = canonical({"stored": str(STORED_DTYPE).removeprefix("torch."), "computed": "float32"})
_LEAST_SECONDS = 0.1
"""Less of a stream within a window counts as no sound."""


def decode_audio(planned: PlannedClip) -> Tensor:
    """(2, samples) at 16 kHz of the clip's seconds; (2, 0) where there is no sound in them."""
    clip, file = planned.clip, planned.files.get("audio", planned.media)
    info = file.video if isinstance(file.found, VideoInfo) else file.audio
    stream = info.audio if isinstance(info, VideoInfo) else info
    if stream is None:
        return torch.zeros(2, 0)
    heard = read_audio(file.path, stream, info.start + clip.start_seconds, info.start + clip.end_seconds)
    samples = resample(heard.samples, heard.rate, AUDIO_SAMPLE_RATE)
    wanted = round(clip.seconds * AUDIO_SAMPLE_RATE)
    samples = samples[:, :wanted]
    lacking = wanted - samples.shape[1]
    if lacking < AUDIO_SAMPLE_RATE / clip.fps:
        return torch.nn.functional.pad(samples, (0, lacking))
    return samples if samples.shape[1] >= _LEAST_SECONDS * AUDIO_SAMPLE_RATE else torch.zeros(2, 0)


def decode_reference_audio(planned: PlannedClip) -> Tensor:
    """(2, samples) at 16 kHz from the file's own beginning, as long as the clip at most.

    Raises:
        UserError: next to nothing is in it.
    """
    file = planned.files["reference_audio"]
    info = file.audio
    heard = read_audio(file.path, info, info.start, min(info.end, info.start + planned.clip.seconds))
    samples = resample(heard.samples, heard.rate, AUDIO_SAMPLE_RATE)
    if samples.shape[1] < _LEAST_SECONDS * AUDIO_SAMPLE_RATE:
        raise UserError(f"{file.path}: {samples.shape[1] / AUDIO_SAMPLE_RATE:.2f} s of sound; a reference has {_LEAST_SECONDS} s at least.")
    return samples


def audio_encoder(vae: AudioVAE) -> Callable[[Sequence[Tensor]], list[HostCopy]]:
    """(2, samples) of clips of one length -> their latents, on the way to the host."""

    def encode(waveforms: Sequence[Tensor]) -> list[HostCopy]:
        if waveforms[0].shape[1] == 0:
            return [to_host(torch.zeros(AUDIO_CHANNELS, 0, AUDIO_MEL_BINS, dtype=STORED_DTYPE)) for _ in waveforms]
        return [to_host(latents) for latents in vae.encode(torch.stack(list(waveforms))).to(STORED_DTYPE)]

    return encode


def audio_bytes(clip: Clip, kind: str) -> int:
    if not clip.has_audio:
        return 0
    return round(clip.seconds * AUDIO_LATENTS_PER_SECOND) * AUDIO_CHANNELS * AUDIO_MEL_BINS * STORED_DTYPE.itemsize
