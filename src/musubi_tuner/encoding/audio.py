"""Sound of planned clips -> audio latents.

Sound is supervised or it is absent. A clip gets exactly its own seconds. What a stream lacks at its end is padded with silence only
up to one frame (clips are seldom cut to the sample); where more is missing the latents are as long as the sound, and training masks
the rest. Silence, below -80 dBFS all along, counts as no sound unless the dataset says `supervise_silence`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.cache.clip import Clip
from musubi_tuner.cache.sidecars import SILENT, SILENT_SOUND
from musubi_tuner.cache.store import canonical
from musubi_tuner.encoding.plan import PlannedClip
from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE
from musubi_tuner.ltxv2.geometry import AUDIO_CHANNELS, AUDIO_LATENTS_PER_SECOND, AUDIO_MEL_BINS, AUDIO_SAMPLE_RATE
from musubi_tuner.media.audio import read_audio, resample
from musubi_tuner.media.probe import AudioInfo, VideoInfo
from musubi_tuner.runtime.device import HostCopy, to_host
from musubi_tuner.runtime.errors import UserError

STORED_DTYPE = torch.bfloat16
AUDIO_ENCODING = canonical({"stored": str(STORED_DTYPE).removeprefix("torch."), "computed": "float32"})
_LEAST_SECONDS = 0.1
"""Less of a stream within a window counts as no sound."""
_LEAST_SAMPLES = 513
"""At 16 kHz: the first mel frame reflects half of its 1024 samples at the clip's start."""
_SILENCE = 1e-4
"""Peak, of 1: -80 dBFS."""
_EDGE = 0.05
"""Seconds at each end that do not count for that: AAC and its kin smear the sound before a cut some 20 ms beyond it."""
_NOTED_PADDING = 0.01
"""Seconds: encoders of sound round lengths by less."""
_FULL_SCALE, _MOST_AT_FULL_SCALE = 0.999, 1e-3
"""More of the samples at full scale count as clipped."""


def decode_audio(planned: PlannedClip) -> Tensor:
    """(2, samples) at 16 kHz of the clip's seconds; (2, 0) where there is no sound in them.

    Raises:
        UserError: a clip that is too short for the encoder, or what `read_audio` raises.
    """
    clip, (path, origin, stream) = planned.clip, _sound_of(planned)
    if stream is None:
        return torch.zeros(2, 0)
    wanted = round(clip.seconds * AUDIO_SAMPLE_RATE)
    if wanted < _LEAST_SAMPLES:
        least = _LEAST_SAMPLES / AUDIO_SAMPLE_RATE
        raise UserError(
            f"{path}: clips of {clip.seconds * 1000:.3g} ms; the sound of less than {least * 1000:.0f} ms cannot be encoded. "
            "Ask for longer clips, or give their true frame rate (source_fps)."
        )
    heard = read_audio(path, stream, origin + clip.start_seconds, origin + clip.end_seconds)
    samples = resample(heard.samples, heard.rate, AUDIO_SAMPLE_RATE)
    samples = samples[:, :wanted]
    lacking = wanted - samples.shape[1]
    if lacking < AUDIO_SAMPLE_RATE / clip.fps:
        return torch.nn.functional.pad(samples, (0, lacking))
    return samples if samples.shape[1] >= _LEAST_SECONDS * AUDIO_SAMPLE_RATE else torch.zeros(2, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundFacts:
    """What is to be known of a clip's sound, as it was decoded."""

    peak: float
    """Of all but its first and last `_EDGE` seconds; 0 where there is none in its seconds."""
    at_full_scale: float
    """Share of the samples."""
    late: float
    """Seconds by which the stream begins after the clip; below 0: before."""
    early: float
    """Seconds by which it ends before the clip."""

    @property
    def is_silent(self) -> bool:
        return self.peak < _SILENCE

    @property
    def is_clipped(self) -> bool:
        return self.at_full_scale > _MOST_AT_FULL_SCALE


def sound_facts(planned: PlannedClip, samples: Tensor) -> SoundFacts | None:
    """
    Args:
        samples: what `decode_audio` gave.

    Returns:
        None where there is no stream.
    """
    clip, (_, origin, stream) = planned.clip, _sound_of(planned)
    if stream is None:
        return None
    peaks, edge = samples.abs(), round(_EDGE * AUDIO_SAMPLE_RATE)
    inner = peaks[:, edge:-edge] if peaks.shape[1] > 4 * edge else peaks
    return SoundFacts(
        peak=float(inner.max()) if samples.shape[1] else 0.0,
        at_full_scale=float((peaks >= _FULL_SCALE).float().mean()) if samples.shape[1] else 0.0,
        late=stream.start - origin - clip.start_seconds,
        early=origin + clip.end_seconds - stream.end,
    )


def judge_audio(planned: PlannedClip, samples: Tensor) -> tuple[Tensor, str]:
    """What of a clip's decoded sound is encoded, and what is to be said of it; nothing of sound that is whole."""
    clip, facts = planned.clip, sound_facts(planned, samples)
    if facts is None:
        return samples, "no audio track"
    if not samples.shape[1]:
        return samples, "no sound in its seconds"
    if facts.is_silent:
        return (samples, SILENT_SOUND) if planned.supervise_silence else (samples[:, :0], SILENT)
    notes = []
    if facts.is_clipped:
        notes.append(f"clipped ({facts.at_full_scale:.1%} of its samples at full scale)")
    if facts.late > 1 / clip.fps:
        notes.append(f"starts late ({facts.late:.2f} s of silence first)")
    if facts.early > 1 / clip.fps:
        notes.append(f"ends early ({facts.early:.2f} s, not learned from)")
    elif facts.early > _NOTED_PADDING:
        notes.append(f"padded ({facts.early * 1000:.0f} ms of silence at its end)")
    return samples, "; ".join(notes)


def _sound_of(planned: PlannedClip) -> tuple[Path, float, AudioInfo | None]:
    """The file of a clip's sound, where the clip's own time begins on its clock, and its stream if there is one."""
    if separate := planned.files.get("audio"):
        return separate.path, separate.audio.origin, separate.audio
    file = planned.media
    info = file.video if isinstance(file.found, VideoInfo) else file.audio
    return file.path, info.start, info.audio if isinstance(info, VideoInfo) else info


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
