"""The audio of a file, by the seconds of its container's clock, as stereo; and changing its sample rate."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musubi_tuner.media.container import check_is_file, reason_of
from musubi_tuner.media.probe import AudioInfo
from musubi_tuner.runtime.errors import UserError

_PREROLL_SECONDS = 2.0
"""Decoding begins so much early: coded blocks lean on the ones before."""
_SEEK_FROM_SECONDS = 20.0
_NO_SEEK = ("mp3", "aac", "adts", "loas")
"""Containers that guess the time of a place."""
_JUMP_SECONDS = 0.005
"""Stamps that are off by less are rounding, not gaps."""
_REMEDY = "Repair the stream, or remove it, so that the clip counts as one without audio."
_HIGHEST_RATE = 768_000
_SIDE = 0.707
_SURROUND = ("5.1", "7.1")
_ZERO_CROSSINGS = 6
_ROLLOFF = 0.99
_CHUNK = 65536
"""Output samples of `resample` at once."""


@dataclass(frozen=True, slots=True)
class Waveform:
    """Stereo audio."""

    samples: Tensor
    """(2, n) float32, about -1..1"""
    rate: int
    """samples per second"""


def read_audio(path: Path, sound: AudioInfo, start: float, end: float) -> Waveform:
    """Decode the seconds [start, end) of the container's clock.

    Where the stream begins later there is silence, as players have it; where it ends earlier the result is shorter.

    Raises:
        UserError: the file is gone, or the stream does not decode.
    """
    import av

    _check(path, sound)
    wanted = round((end - start) * sound.rate)
    parts: list[tuple[int, np.ndarray]] = []
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            for place, block in _blocks(path, container, sound, start, end):
                first, last = max(0, place), min(wanted, place + block.shape[1])
                if last > first:
                    parts.append((first, block[:, first - place : last - place]))
    except av.FFmpegError as error:
        raise UserError(f"{path}: its audio stream does not decode ({reason_of(error)}). {_REMEDY}") from error
    samples = np.zeros((2, max((first + block.shape[1] for first, block in parts), default=0)), dtype=np.float32)  # of what is there
    for first, block in parts:
        samples[:, first : first + block.shape[1]] = block
    return Waveform(_finite(path, samples), sound.rate)


def stream_audio(path: Path, sound: AudioInfo, start: float, end: float) -> Iterator[Waveform]:
    """As `read_audio`, in parts of a second or so that follow each other without a gap, decoded as they are asked for.

    Raises:
        UserError: as `read_audio`.
    """
    import av

    _check(path, sound)
    wanted, position, size = round((end - start) * sound.rate), 0, 0
    held: list[np.ndarray] = []
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            for place, block in _blocks(path, container, sound, start, end):
                first, last = max(position, place), min(wanted, place + block.shape[1])
                if last <= first:
                    continue
                while first > position:  # nothing is stored there
                    silence = min(first - position, sound.rate)
                    held.append(np.zeros((2, silence), dtype=np.float32))
                    position, size = position + silence, size + silence
                    if size >= sound.rate:
                        yield Waveform(_finite(path, np.concatenate(held, axis=1)), sound.rate)
                        held, size = [], 0
                held.append(block[:, first - place : last - place])
                position, size = last, size + last - first
                if size >= sound.rate:
                    yield Waveform(_finite(path, np.concatenate(held, axis=1)), sound.rate)
                    held, size = [], 0
    except av.FFmpegError as error:
        raise UserError(f"{path}: its audio stream does not decode ({reason_of(error)}). {_REMEDY}") from error
    if held:
        yield Waveform(_finite(path, np.concatenate(held, axis=1)), sound.rate)


def _check(path: Path, sound: AudioInfo) -> None:
    """
    Raises:
        UserError: no such file, or sound that is not read.
    """
    if not sound.rate:
        raise UserError(f"{path}: its audio stream holds nothing that decodes. {_REMEDY}")
    if sound.rate > _HIGHEST_RATE:
        raise UserError(f"{path}: its sound has {sound.rate} samples a second, at most {_HIGHEST_RATE} are read. Convert it to 48000.")
    check_is_file(path)


def _finite(path: Path, samples: np.ndarray) -> Tensor:
    if not np.isfinite(samples).all():
        raise UserError(f"{path}: its audio stream decodes to NaN or infinity. {_REMEDY}")
    return torch.from_numpy(np.ascontiguousarray(samples))


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Change the sample rate by band-limited interpolation; beyond its ends the audio counts as silent.

    Every output sample is the input weighted by a sinc whose band edge is `_ROLLOFF` of the lower rate's, under a Hann window of six zero
    crossings to each side, as torchaudio's default does (docs/explanation/model.md, "Mel"). With t the distance in zero
    crossings, |t| < 6:

        h(t) = sin(pi t) / (pi t) * cos(pi t / 12)^2 * edge / from_rate,    edge = 0.99 min(from_rate, to_rate)

    Args:
        waveform: (..., n) samples at `from_rate`.

    Returns:
        (..., ceil(n * to_rate / from_rate)) float32 at `to_rate`.
    """
    if from_rate == to_rate:
        return waveform.float()
    divisor = math.gcd(from_rate, to_rate)
    source, target = from_rate // divisor, to_rate // divisor
    edge = _ROLLOFF * min(source, target)
    reach = math.ceil(_ZERO_CROSSINGS * source / edge)
    padded = torch.nn.functional.pad(waveform.float(), (reach, reach + 1))
    length = math.ceil(waveform.shape[-1] * target / source)
    taps = torch.arange(-reach, reach + 2)
    chunks = []
    for start in range(0, length, _CHUNK):
        ticks = torch.arange(start, min(start + _CHUNK, length)) * source
        base = ticks // target
        fraction = (ticks % target).double() / target
        distance = (taps[None] - fraction[:, None]) * (edge / source)
        window = torch.cos(distance.clamp(-_ZERO_CROSSINGS, _ZERO_CROSSINGS) * (math.pi / 2 / _ZERO_CROSSINGS)).square()
        weights = (torch.sinc(distance) * window * (edge / source)).float()
        places = (base[:, None] + taps[None] + reach).clamp(max=padded.shape[-1] - 1)
        chunks.append((padded[..., places] * weights).sum(dim=-1))
    return torch.cat(chunks, dim=-1) if chunks else waveform.new_zeros(*waveform.shape[:-1], 0)


def _blocks(path: Path, container: Any, sound: AudioInfo, start: float, end: float) -> Iterator[tuple[int, np.ndarray]]:
    """Decoded blocks as (place of the first sample counted from `start`, (2, n) samples).

    Raises:
        UserError: a rate that changes, or samples that PyAV has no arrays for.
    """
    stream = container.streams.audio[0]
    if str(stream.codec_context.format and stream.codec_context.format.name).startswith("s64"):
        raise UserError(f"{path}: its samples are whole numbers of 64 bits, which cannot be read. Convert it to 16, 24 or 32 bits.")
    if start - sound.start > _SEEK_FROM_SECONDS and container.format.name not in _NO_SEEK:
        container.seek(int((start - _PREROLL_SECONDS) / stream.time_base), stream=stream)
    expected: int | None = None
    for frame in container.decode(stream):
        if frame.sample_rate != sound.rate:
            raise UserError(
                f"{path}: the sample rate changes from {sound.rate} to {frame.sample_rate} Hz within the file. Convert it to one rate."
            )
        place = expected
        if frame.pts is not None:
            stamped = round((float(frame.pts * frame.time_base) - start) * sound.rate)
            if expected is None or abs(stamped - expected) > _JUMP_SECONDS * sound.rate:
                place = stamped
        place = 0 if place is None else place
        if place >= (end - start) * sound.rate:
            return
        expected = place + frame.samples
        yield place, _stereo(_as_float(frame), frame.layout)


def _as_float(frame: Any) -> np.ndarray:
    """(channels, n) float32 of any sample format."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, len(frame.layout.channels)).T
    if values.dtype == np.uint8:
        return (values.astype(np.float32) - 128) / 128
    if np.issubdtype(values.dtype, np.integer):
        return (values / -float(np.iinfo(values.dtype).min)).astype(np.float32)
    return values.astype(np.float32)


def _stereo(channels: np.ndarray, layout: Any) -> np.ndarray:
    """5.1 and 7.1 are mixed down by weights that sum to 1, without the bass channel; other layouts are averaged
    (docs/explanation/model.md, "Mel")."""
    if channels.shape[0] <= 2:
        return np.broadcast_to(channels, (2, channels.shape[1]))
    names = [channel.name for channel in layout.channels]
    if not layout.name.startswith(_SURROUND):
        return np.broadcast_to(channels.mean(axis=0), (2, channels.shape[1]))
    sides = []
    for front, rest in (("FL", ("FC", "BL", "SL")), ("FR", ("FC", "BR", "SR"))):
        weights = np.array([1.0 if name == front else _SIDE if name in rest else 0.0 for name in names], dtype=np.float32)
        sides.append(weights / weights.sum() @ channels)
    return np.stack(sides)
