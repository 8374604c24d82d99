"""Written media, opened again with the real decoders."""

import errno
import math
import os
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from musubi_tuner.cache.store import write_bytes
from musubi_tuner.media.audio import Waveform
from musubi_tuner.media.write import fit_audio, write_image, write_video, write_wav
from musubi_tuner.runtime.errors import TemporaryFailure, UserError

AAC_BLOCK = 1024


def frames(count: int, height: int = 64, width: int = 96) -> torch.Tensor:
    """A gray ramp over time, so that frames can be told apart after the codec."""
    levels = torch.linspace(30, 220, count).round().to(torch.uint8)
    return levels[:, None, None, None].expand(count, height, width, 3).contiguous()


def tone(seconds: float, rate: int = 48000) -> Waveform:
    time = torch.arange(round(seconds * rate)) / rate
    return Waveform(samples=0.5 * torch.sin(2 * math.pi * 440 * time).expand(2, -1).contiguous(), rate=rate)


def decode(path: Path) -> tuple[list[np.ndarray], np.ndarray | None]:
    pictures, heard = [], []
    with av.open(str(path)) as container:
        for frame in container.decode(*container.streams):
            if isinstance(frame, av.VideoFrame):
                pictures.append(frame.to_ndarray(format="rgb24"))
            else:
                heard.append(frame.to_ndarray())
    return pictures, np.concatenate(heard, axis=1) if heard else None


@pytest.mark.parametrize("seconds", [0.5, 25 / 24, 2.0], ids=["shorter", "equal", "longer"])
@pytest.mark.parametrize("rate", [24000, 48000])
def test_sound_is_as_long_as_the_video(tmp_path: Path, seconds: float, rate: int) -> None:
    path = tmp_path / "Vorschau é 1.mp4"
    write_video(path, frames(25), 24.0, tone(seconds, rate))
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt, audio.codec_context.name) == ("h264", "yuv420p", "aac")
        assert (audio.codec_context.sample_rate, audio.codec_context.layout.name) == (rate, "stereo")
        video_seconds, audio_seconds = (float(stream.duration * stream.time_base) for stream in (video, audio))
        assert abs(video_seconds - audio_seconds) <= 1 / 24
    pictures, heard = decode(path)
    assert len(pictures) == 25
    assert abs(heard.shape[1] - 25 / 24 * rate) <= rate / 24 + AAC_BLOCK


def test_frames_keep_their_order_and_values(tmp_path: Path) -> None:
    path = tmp_path / "ramp.mp4"
    written = frames(17)
    write_video(path, written, 16.0)
    pictures, heard = decode(path)
    assert heard is None
    means = [picture.mean() for picture in pictures]
    assert np.abs(np.array(means) - written[:, 0, 0, 0].numpy()).max() < 3


@pytest.mark.parametrize(
    ("fps", "exact"), [(24.0, Fraction(24)), (23.976, Fraction(24000, 1001)), (29.97, Fraction(30000, 1001)), (12.5, Fraction(25, 2))]
)
def test_frame_rates_are_exact(tmp_path: Path, fps: float, exact: Fraction) -> None:
    path = tmp_path / "rate.mp4"
    write_video(path, frames(9), fps)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == exact


def test_silence_fills_the_end_and_nothing_is_stretched() -> None:
    short = fit_audio(tone(0.25, 16000), 1.0)
    assert short.samples.shape == (2, 16000)
    assert torch.equal(short.samples[:, :4000], tone(0.25, 16000).samples) and not short.samples[:, 4000:].any()
    assert torch.equal(fit_audio(tone(1.0, 16000), 0.5).samples, tone(0.5, 16000).samples)


def test_png_holds_the_frame_exactly(tmp_path: Path) -> None:
    from PIL import Image

    frame = torch.randint(0, 256, (32, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_image(tmp_path / "still.png", frame)
    with Image.open(tmp_path / "still.png") as image:
        assert np.array_equal(np.asarray(image), frame.numpy())


def test_wav_holds_the_samples(tmp_path: Path) -> None:
    sound = tone(0.5, 24000)
    write_wav(tmp_path / "tone.wav", sound)
    with wave.open(str(tmp_path / "tone.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 24000, 12000)
        data = np.frombuffer(file.readframes(12000), dtype="<i2").reshape(-1, 2)
    assert np.abs(data[:, 0] / 32767 - sound.samples[0].numpy()).max() < 1e-4


def test_odd_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="63x64"):
        write_video(tmp_path / "odd.mp4", frames(9, 64, 63), 24.0)


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, frames(9), 24.0)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="numpy array"):
        write_video(path, frames(9)[..., :1].expand(-1, -1, -1, 2), 24.0)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize(
    ("number", "kind", "says"),
    [
        (errno.ENOSPC, TemporaryFailure, "the disk is full.*[Mm]ake room and run the same command again"),
        (errno.EFBIG, UserError, "takes no file of that size. Write to another disk, or raise the limit"),
        (errno.EACCES, UserError, "cannot be written"),
    ],
)
def test_a_disk_that_takes_no_file_is_told_with_a_remedy(tmp_path, monkeypatch, number, kind, says):
    def fails(self, target):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "replace", fails)
    for write in (lambda path: write_image(path, torch.zeros(8, 8, 3, dtype=torch.uint8)), lambda path: write_bytes(path, b"latents")):
        with pytest.raises(UserError, match=rf"a.png: .*{says}") as error:
            write(tmp_path / "a.png")
        assert isinstance(error.value, TemporaryFailure) == (kind is TemporaryFailure) and not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_folder_that_is_a_link_to_itself_is_told(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"a\.png: cannot be written"):
        write_image(tmp_path / "loop" / "a.png", torch.zeros(8, 8, 3, dtype=torch.uint8))
