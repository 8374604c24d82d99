"""Waveform of real files: on time, to the sample, in stereo."""

import json
import math
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from musubi_tuner.cache.index import read_index, write_index
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.encoding.audio import decode_audio
from musubi_tuner.encoding.plan import plan_datasets
from musubi_tuner.generation.encode import _read_audio
from musubi_tuner.media.audio import Waveform, read_audio, resample
from musubi_tuner.media.probe import probe_audio, probe_video
from musubi_tuner.media.write import write_wav
from musubi_tuner.prompts.sample_prompts import load_prompts
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import Processes
from musubi_tuner.tiny.clips import ClipAudio, beep, break_audio, numbered_frames, write_clip


def clip(path: Path, sound: ClipAudio | None, *, frames: int = 48, fps: float = 24) -> Path:
    write_clip(path, numbered_frames(frames), fps=fps, audio=sound)
    return path


def onset(samples: torch.Tensor) -> int:
    return int((samples[0].abs() > 0.1).float().argmax())


@pytest.mark.parametrize("ending", [".mov", ".mkv", ".mp4", ".avi"])
@pytest.mark.parametrize("start", [0.0, 0.25, 0.9])
def test_a_beep_is_found_at_its_time(tmp_path: Path, ending: str, start: float) -> None:
    path = clip(tmp_path / f"beep{ending}", ClipAudio(samples=beep(2.0, 1.0)))
    info = probe_video(path)
    heard = read_audio(path, info.audio, info.start + start, info.start + start + 0.5)
    expected = round((1.0 - start) * heard.rate)
    if expected < 0.5 * heard.rate:
        assert abs(onset(heard.samples) - expected) < 0.002 * heard.rate
    else:
        assert heard.samples.abs().max() < 0.1
    assert heard.samples.shape == (2, round(0.5 * heard.rate))


def test_decoding_late_windows_gives_the_same_samples_as_decoding_all(tmp_path: Path) -> None:
    noise = torch.rand(2, 48000 * 30, generator=torch.Generator().manual_seed(0)) - 0.5
    for ending in (".mov", ".mp4"):
        path = clip(tmp_path / f"long{ending}", ClipAudio(samples=noise), frames=30, fps=1)
        info = probe_video(path)
        whole = read_audio(path, info.audio, 0.0, 30.0).samples
        late = read_audio(path, info.audio, 25.0, 26.0).samples
        torch.testing.assert_close(late, whole[:, 25 * 48000 : 26 * 48000])


def test_samples_are_exact_without_a_lossy_codec(tmp_path: Path) -> None:
    ramp = torch.linspace(-0.9, 0.9, 96000).expand(2, -1).contiguous()
    path = clip(tmp_path / "ramp.mov", ClipAudio(samples=ramp))
    heard = read_audio(path, probe_video(path).audio, 0.5, 1.0).samples
    torch.testing.assert_close(heard, ramp[:, 24000:48000], atol=1 / 30000, rtol=0)


@pytest.mark.parametrize("ending", [".mov", ".mkv", ".mp4"])
def test_sound_that_starts_late_is_preceded_by_silence(tmp_path: Path, ending: str) -> None:
    sound = ClipAudio(samples=beep(1.5, 0.0, length=0.2), start=0.5)
    path = clip(tmp_path / f"late{ending}", sound)
    info = probe_video(path)
    heard = read_audio(path, info.audio, info.start, info.start + 1.0)
    assert abs(onset(heard.samples) - 0.5 * heard.rate) < 0.003 * heard.rate
    assert heard.samples[:, : int(0.45 * heard.rate)].abs().max() < 0.02


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_the_sound_of_a_film_is_taken_from_its_first_frame_on(tmp_path: Path, start: float) -> None:
    film = clip(tmp_path / "film.mov", ClipAudio(samples=beep(2.0 - start, 1.0 - start), start=start))
    (tmp_path / "clips").mkdir()
    path = clip(tmp_path / "clips" / "film.mp4", None)
    (tmp_path / "d.toml").write_text('[[datasets]]\nvideo_directory="clips"\ntarget_frames=[25]\nseparate_audio_directory="."\n')
    (dataset,) = plan_datasets(load_dataset_config(tmp_path / "d.toml"), Processes(index=0, count=1), workers=1)
    (planned,) = dataset.clips
    assert planned.files["audio"].path == film and planned.media.path == path
    assert abs(onset(decode_audio(planned)) - 16000) < 0.003 * 16000
    window = json.loads(KINDS["audio"].expected(planned.clip)["window"])
    assert window.get("from") == ("first frame" if start else None), "files of before that are right stay so"
    write_index(dataset.spec, dataset.index)
    assert read_index(dataset.spec, tmp_path / "d.toml") == dataset.index
    (tmp_path / "prompts.txt").write_text("x --w 96 --h 64 --f 41 --a film.mov\n")
    (prompt,) = load_prompts(tmp_path / "prompts.txt")
    assert abs(onset(_read_audio(prompt, film, beside_pictures=True)) - 16000) < 0.003 * 16000
    assert abs(onset(_read_audio(prompt, film, beside_pictures=False)) - round((1 - start) * 16000)) < 0.003 * 16000


def test_sound_that_ends_early_comes_out_shorter(tmp_path: Path) -> None:
    path = clip(tmp_path / "short.mov", ClipAudio(samples=beep(1.0, 0.5)))
    info = probe_video(path)
    assert read_audio(path, info.audio, 0.0, 2.0).samples.shape == (2, 48000)
    assert read_audio(path, info.audio, 1.5, 2.0).samples.shape == (2, 0)


def test_mono_goes_to_both_sides(tmp_path: Path) -> None:
    path = clip(tmp_path / "mono.mov", ClipAudio(samples=beep(1.0, 0.2, channels=1), layout="mono"))
    heard = read_audio(path, probe_video(path).audio, 0.0, 1.0).samples
    assert heard.abs().max() > 0.5
    torch.testing.assert_close(heard[0], heard[1])


@pytest.mark.parametrize(
    ("layout", "levels", "expected"),
    [
        ("5.1", [0.5, 0.0, 0.3, 0.9, 0.2, 0.0], [(0.5 + 0.707 * 0.3 + 0.707 * 0.2) / 2.414, 0.707 * 0.3 / 2.414]),
        ("7.1", [0.5, 0.1, 0.3, 0.9, 0.2, 0.0, 0.4, 0.0], [(0.5 + 0.707 * 0.9) / 3.121, (0.1 + 0.707 * 0.3) / 3.121]),
        ("quad", [0.4, 0.2, 0.1, 0.1], [0.2, 0.2]),
        ("stereo", [0.4, 0.2], [0.4, 0.2]),
    ],
)
def test_layouts_are_mixed_down_by_weights_that_sum_to_one(tmp_path: Path, layout: str, levels: list[float], expected: list[float]) -> None:
    samples = torch.tensor(levels)[:, None].expand(-1, 24000).contiguous()
    path = clip(tmp_path / "surround.mov", ClipAudio(samples=samples, layout=layout))
    heard = read_audio(path, probe_video(path).audio, 0.1, 0.4).samples
    torch.testing.assert_close(heard.mean(dim=1), torch.tensor(expected), atol=1e-3, rtol=0)


def test_no_stream_and_a_broken_stream_are_different_things(tmp_path: Path) -> None:
    assert probe_video(clip(tmp_path / "silent.mp4", None)).audio is None
    broken = clip(tmp_path / "broken.mp4", ClipAudio(samples=beep(2.0, 0.5)))
    break_audio(broken)
    info = probe_video(broken)
    assert info.audio is not None
    with pytest.raises(UserError, match=r"broken\.mp4: its audio stream does not decode"):
        read_audio(broken, info.audio, 0.0, 2.0)


def test_wav_files_are_read_to_the_sample(tmp_path: Path) -> None:
    ramp = torch.linspace(-0.5, 0.5, 16000).expand(2, -1).contiguous()
    write_wav(tmp_path / "ramp.wav", Waveform(samples=ramp, rate=16000))
    info = probe_audio(tmp_path / "ramp.wav")
    assert (info.start, info.end, info.rate) == (0.0, 1.0, 16000)
    torch.testing.assert_close(read_audio(tmp_path / "ramp.wav", info, 0.25, 0.5).samples, ramp[:, 4000:8000], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="no audio stream"):
        probe_audio(clip(tmp_path / "silent.mp4", None))


@pytest.mark.parametrize(
    ("ending", "codec"), [(".wav", "pcm_s16le"), (".mp3", "libmp3lame"), (".m4a", "aac"), (".mka", "aac"), (".mka", "libopus")]
)
def test_a_file_of_sound_alone_begins_where_its_sound_does_without_the_encoders_delay(tmp_path: Path, ending: str, codec: str) -> None:
    path, sound = tmp_path / f"a{ending}", beep(1.0, 0.25)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=48000, layout="stereo")
        form = "s16" if codec in ("pcm_s16le", "libopus") else "fltp"
        data = (sound * 32767).short().T.reshape(1, -1) if form == "s16" else sound
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(data.numpy()), format=form, layout="stereo")
        frame.sample_rate, frame.pts = 48000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    info = probe_audio(path)
    heard = read_audio(path, info, info.start, info.start + 1.0)
    assert onset(heard.samples) / heard.rate == pytest.approx(0.25, abs=0.003)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000, 44099])
def test_resampling_keeps_tones_in_place(rate: int) -> None:
    time = torch.arange(rate, dtype=torch.float64) / rate
    tone = torch.sin(2 * math.pi * 1000 * time).float().expand(2, -1)
    out = resample(tone, rate, 16000)
    assert out.shape == (2, 16000)
    expected = torch.sin(2 * math.pi * 1000 * torch.arange(16000, dtype=torch.float64) / 16000).float()
    assert (out[0, 100:-100] - expected[100:-100]).abs().max() < 2e-3


def test_whole_numbers_of_64_bits_are_refused_in_words(tmp_path: Path) -> None:
    path, data = tmp_path / "a.wav", bytes(16 * 4800)
    head = struct.pack("<HHIIHH", 1, 2, 48000, 48000 * 16, 16, 64)
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    with pytest.raises(UserError, match=r"a\.wav: its samples are whole numbers of 64 bits.*Convert it to 16, 24 or 32 bits"):
        read_audio(path, probe_audio(path), 0.0, 0.1)


def test_resampling_removes_what_the_new_rate_cannot_hold() -> None:
    time = torch.arange(48000) / 48000
    out = resample(torch.sin(2 * math.pi * 12000 * time)[None], 48000, 16000)
    assert out[:, 200:-200].abs().max() < 5e-3


def test_resampling_matches_a_polyphase_sinc_written_out() -> None:
    """The same filter as a strided convolution with one kernel for each output phase (docs/explanation/model.md, "mel")."""
    signal = torch.rand(1, 4410, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
    source, target = 441, 160
    edge = 0.99 * target
    width = math.ceil(6 * source / edge)
    taps = torch.arange(-width, width + source, dtype=torch.float64) / source
    phases = -torch.arange(target, dtype=torch.float64)[:, None] / target
    distance = ((taps + phases) * edge).clamp(-6, 6)
    kernels = torch.sinc(distance) * torch.cos(distance * math.pi / 12) ** 2 * edge / source
    padded = torch.nn.functional.pad(signal, (width, width + source))
    expected = torch.nn.functional.conv1d(padded[:, None], kernels[:, None], stride=source).transpose(1, 2).reshape(1, -1)[:, :1600]
    torch.testing.assert_close(resample(signal.float(), 44100, 16000), expected.float(), atol=1e-6, rtol=0)
