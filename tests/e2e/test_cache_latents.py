"""The two latent caching programs, on real files through the tiny checkpoints."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

from musubi_tuner import ltxv2_cache_audio_latents, ltxv2_cache_latents
from musubi_tuner.cache import store
from musubi_tuner.cache.names import INDEX_ENDING, strip_key
from musubi_tuner.cache.record import RECORD_NAME
from musubi_tuner.encoding import audio as audio_module
from musubi_tuner.encoding import layout as layout_module
from musubi_tuner.encoding import pictures as pictures_module
from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.media.audio import Waveform
from musubi_tuner.media.write import write_wav
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import (
    ClipAudio,
    beep,
    break_audio,
    numbered_frames,
    tone_of,
    write_audio_files,
    write_clip,
    write_clips,
    write_stills,
)
from tests.e2e.test_processes import launch
from tests.training_parts import read_tensors

REPOSITORY = Path(__file__).resolve().parents[2]


def write_config(folder: Path, text: str) -> Path:
    path = folder / "dataset.toml"
    path.write_text("[general]\nresolution = [96, 64]\n" + text, encoding="utf-8")
    return path


VIDEOS = '[[datasets]]\nvideo_directory = "clips"\ncache_directory = "cache"\n'


def cache_video(config: Path, checkpoint: Path, *flags: str) -> int:
    return ltxv2_cache_latents.main(["--dataset_config", str(config), "--vae", str(checkpoint), "--device", "cpu", *flags])


def cache_sound(config: Path, checkpoint: Path, *flags: str) -> int:
    return ltxv2_cache_audio_latents.main(["--dataset_config", str(config), "--vae", str(checkpoint), "--device", "cpu", *flags])


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the record of when each was last looked at."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RECORD_NAME}


def one(folder: Path, pattern: str) -> tuple[dict[str, torch.Tensor], dict[str, str], list[str]]:
    (path,) = folder.glob(pattern)
    tensors = store.read(path)
    return {strip_key(key): value for key, value in tensors.items()}, store.read_metadata(path), list(tensors)


def test_video_latents_have_the_contracts_names_keys_and_metadata(tmp_path: Path, tiny_family) -> None:
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "Szene 1.mp4", numbered_frames(60), fps=30)
    (tmp_path / "clips" / "Szene 1.txt").write_text("numbers", encoding="utf-8")
    assert cache_video(write_config(tmp_path, VIDEOS + "target_frames = [49]"), tiny_family.ltx23) == 0
    tensors, metadata, keys = one(tmp_path / "cache", "Szene 1_00000-049_0096x0064_ltxv2.safetensors")
    assert keys == ["latents_7x2x3_bfloat16"]
    assert tuple(tensors["latents"].shape) == (128, 7, 2, 3)
    assert metadata["kind"] == "video_latents" and metadata["caption"] == "numbers" and metadata["original_size"] == "96x64"
    assert json.loads(metadata["window"]) == {
        "kind": "video",
        "start": 0.0,
        "end": 49 / 30,
        "fps": 30.0,
        "frames": 49,
        "width": 96,
        "height": 64,
    }
    expected = {"ltxv2_cache", "model_version", "source", "source_fingerprint", "encoder_fingerprint", "encoding"}
    assert expected <= metadata.keys()
    frames = numbered_frames(49).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    reference = VideoVAE.load(open_checkpoint(tiny_family.ltx23), device="cpu", dtype=torch.float32, parts=("encoder",)).encode(frames)[0]
    correlation = torch.corrcoef(torch.stack([reference.flatten(), tensors["latents"].float().flatten()]))[0, 1]
    assert correlation > 0.98  # the clip went through H.264


def test_a_second_run_decodes_nothing_and_touches_nothing(tmp_path: Path, tiny_family, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clips(tmp_path / "clips", count=2, frames=25)
    write_stills(tmp_path / "stills", count=1)
    config = write_config(tmp_path, VIDEOS + 'target_frames = [9]\n[[datasets]]\nimage_directory = "stills"\ncache_directory = "cache"')
    assert cache_video(config, tiny_family.ltx23) == cache_sound(config, tiny_family.ltx23) == 0
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "cache").iterdir()}

    def forbidden(*arguments: object) -> None:
        raise AssertionError("decoded though everything is there")

    for module, name in ((pictures_module, "read_frames"), (pictures_module, "read_picture"), (audio_module, "read_audio")):
        monkeypatch.setattr(module, name, forbidden)
    assert cache_video(config, tiny_family.ltx23) == cache_sound(config, tiny_family.ltx23) == 0
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "cache").iterdir()} == before
    with pytest.raises(AssertionError):
        cache_video(config, tiny_family.ltx23, "--no-skip_existing")


def test_what_changed_is_rebuilt_and_listed_with_the_reason(tmp_path: Path, tiny_family, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_clips(tmp_path / "clips", count=2, frames=25)
    config = write_config(tmp_path, VIDEOS + "target_frames = [9]")
    cache_video(config, tiny_family.ltx23)
    before = contents(tmp_path / "cache")
    name = "clip_000_00000-009_0096x0064_ltxv2.safetensors"

    def rerun(words: str, rebuilt: int, checkpoint: Path = tiny_family.ltx23) -> None:
        caplog.clear()
        assert cache_video(config, checkpoint) == 0
        assert words in caplog.text
        assert f"Video latent caching: {rebuilt} encoded, 0 failed" in caplog.text

    (tmp_path / "cache" / name).write_bytes(before[name][:-7])
    rerun("damaged or truncated", 1)
    assert contents(tmp_path / "cache") == before
    write_clip(tmp_path / "clips" / "clip_000.mp4", numbered_frames(25))
    rerun("the source file has changed", 1)
    rerun("it was made with another encoder", 2, tiny_family.ltx20)
    write_config(tmp_path, VIDEOS + "target_frames = [9]\nsource_fps = 12")
    rerun("the dataset asks for another window", 2, tiny_family.ltx20)
    write_config(tmp_path, VIDEOS + "target_frames = [17]")
    rerun("2 file(s) belong to no planned clip", 2, tiny_family.ltx20)
    assert (tmp_path / "cache" / name).is_file()


def test_the_memory_layout_changes_rounding_alone_and_nothing_is_encoded_again(
    tmp_path: Path, tiny_family, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    write_clips(tmp_path / "clips", count=2, frames=25)
    config = write_config(tmp_path, VIDEOS + "target_frames = [9, 17]")
    assert cache_video(config, tiny_family.ltx23) == 0
    assert "memory layout" not in caplog.text, "on the CPU nothing is measured"
    usual = {path.name: (read_tensors(path), store.read_metadata(path)) for path in (tmp_path / "cache").glob("*.safetensors")}

    def choose(vae: VideoVAE, sizes: list[layout_module.ClipSize], batch_size: int) -> layout_module.LayoutTimes:
        times = layout_module.measure_layouts(vae, max(sizes, key=lambda size: size.pixels), batch_size)
        chosen.append(sizes)
        vae.use_layout("channels_last_3d")
        return times

    chosen: list[list[layout_module.ClipSize]] = []
    monkeypatch.setattr("musubi_tuner.encoding.layout.use_fastest_layout", choose)
    assert cache_video(config, tiny_family.ltx23) == 0 and not chosen, "everything is kept"
    assert cache_video(config, tiny_family.ltx23, "--no-skip_existing") == 0
    assert [(size.frames, size.height, size.width) for size in chosen[0]] == [(17, 64, 96)] * 2 + [(9, 64, 96)] * 2
    assert caplog.text.count("memory layout of the video VAE: ") == 1 and "for a clip of 96x64x17" in caplog.text
    assert len(usual) == 4
    for name, (tensors, metadata) in usual.items():
        path = tmp_path / "cache" / name
        assert store.read_metadata(path) == metadata
        for key, value in store.read(path).items():
            torch.testing.assert_close(value.float(), tensors[key].float(), rtol=2**-7, atol=1e-4)
    assert cache_video(config, tiny_family.ltx23) == 0 and len(chosen) == 1


def test_renaming_the_checkpoint_rebuilds_nothing(tmp_path: Path, tiny_family, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_clips(tmp_path / "clips", count=1, frames=9)
    config = write_config(tmp_path, VIDEOS + "target_frames = [9]")
    copy = tmp_path / "other name.safetensors"
    copy.write_bytes(tiny_family.ltx23.read_bytes())
    cache_video(config, tiny_family.ltx23)
    caplog.clear()
    cache_video(config, copy)
    assert "Video latent caching: 0 encoded, 0 failed" in caplog.text


@pytest.mark.parametrize(
    "values",
    ['frame_extraction = "chunk"', 'frame_extraction = "uniform"\nframe_sample = 3', 'frame_extraction = "head"', "target_fps = 16"],
)
def test_a_beep_lands_at_its_latent_step_in_every_mode(tmp_path: Path, tiny_family, values: str) -> None:
    """The sidecar differs from that of the same clip without the beep first at the step of the beep."""
    at = 0.9
    folders = {}
    for name, level in (("with", 1.0), ("without", 0.0)):
        folder = tmp_path / name
        (folder / "clips").mkdir(parents=True)
        noise = 0.01 * torch.randn(2, 48000 * 4, generator=torch.Generator().manual_seed(0))
        write_clip(folder / "clips" / "a.mov", numbered_frames(80), fps=24, audio=ClipAudio(samples=noise + level * beep(4.0, at)))
        config = write_config(folder, VIDEOS + "target_frames = [33]\n" + values)
        assert cache_sound(config, tiny_family.ltx23) == 0
        folders[name] = folder / "cache"
    heard = 0
    for path in sorted(folders["with"].glob("*_audio.safetensors")):
        window = json.loads(store.read_metadata(path)["window"])
        tensors = {strip_key(key): value for key, value in store.read(path).items()}
        other = {strip_key(key): value for key, value in store.read(folders["without"] / path.name).items()}
        difference = (tensors["audio_latents"].float() - other["audio_latents"].float()).abs().amax(dim=(0, 2))
        changed = (difference > 0.2 * difference.max()).nonzero()[:, 0]
        seconds = window["end"] - window["start"]
        samples = round(seconds * 16000)
        assert int(tensors["audio_lengths"]) == tensors["audio_latents"].shape[1] == (samples // 160) // 4 + 1
        if window["start"] <= at < window["end"] - 0.1:
            heard += 1
            assert abs(int(changed[0]) - (at - window["start"]) * 25) <= 1.5
        elif window["end"] < at or window["start"] > at + 0.2:
            assert difference.max() == 0
    assert heard


def test_clips_without_a_stream_get_an_empty_sidecar(tmp_path: Path, tiny_family) -> None:
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "silent.mp4", numbered_frames(9))
    config = write_config(tmp_path, VIDEOS + "target_frames = [9]")
    assert cache_sound(config, tiny_family.ltx23) == 0
    tensors, metadata, keys = one(tmp_path / "cache", "*_audio.safetensors")
    assert sorted(keys) == ["audio_latents_0x1x1_bfloat16", "audio_lengths_int32"]
    assert tuple(tensors["audio_latents"].shape) == (8, 0, 16) and int(tensors["audio_lengths"]) == 0
    assert metadata["audio"] == "absent"


def test_digital_silence_counts_as_no_sound_unless_it_is_asked_for(tmp_path: Path, tiny_family, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_clips(tmp_path / "clips", count=1, frames=25)
    quiet = torch.zeros(2, 50000)
    quiet[:, :960] = 0.01  # 20 ms, as a codec leaves of the scene before a cut
    write_clip(tmp_path / "clips" / "quiet.mp4", numbered_frames(25), audio=ClipAudio(samples=quiet))

    def cached(extra: str) -> tuple[int, str, str]:
        caplog.clear()
        assert cache_sound(write_config(tmp_path, VIDEOS + f"target_frames = [25]\n{extra}"), tiny_family.ltx23) == 0
        tensors, metadata, _ = one(tmp_path / "cache", "quiet*_audio.safetensors")
        return int(tensors["audio_lengths"]), metadata["audio"], caplog.text

    steps, audio, said = cached("")
    assert (steps, audio) == (0, "absent") and "datasets[0]/quiet.mp4:00000-025  silent (under -80 dBFS), not learned from" in said
    assert "clip_000" not in said.split("its sound")[1], "nothing is said of sound that is whole"
    heard = store.read_metadata(next((tmp_path / "cache").glob("clip_000*_audio.safetensors")))
    assert "note" not in heard, "and its file is what it always was"
    assert "silent" in cached("")[2], "a file that is kept is reported too"
    steps, audio, said = cached("supervise_silence = true")
    assert (steps, audio) == (27, "present") and "Audio latent caching: 1 encoded" in said and "learned from as the dataset asks" in said
    assert cached("")[:2] == (0, "absent")


def test_the_table_at_the_end_names_what_is_amiss_with_sound(tmp_path: Path, tiny_family, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clips = tmp_path / "clips"
    write_clips(clips, count=1, frames=25)
    square = torch.sign(torch.sin(torch.arange(60000) * 0.05)).expand(2, -1).contiguous()
    sounds = {
        "clipped.mov": ClipAudio(samples=square),
        "early.mov": ClipAudio(samples=beep(0.5, 0.1)),
        "late.mov": ClipAudio(samples=beep(1.0, 0.0), start=0.5),
        "padded.mov": ClipAudio(samples=beep(25 / 24 - 0.03, 0.1)),
        "none.mp4": None,
        "silent.mov": ClipAudio(samples=torch.full((2, 60000), 5e-5)),
    }
    for name, sound in sounds.items():
        write_clip(clips / name, numbered_frames(25), audio=sound)
    config = write_config(tmp_path, VIDEOS + "target_frames = [25]")
    assert cache_sound(config, tiny_family.ltx23) == 0
    expected = {
        "clipped.mov": "clipped (",
        "early.mov": "ends early (0.54 s, not learned from)",
        "late.mov": "starts late (0.50 s of silence first)",
        "none.mp4": "no audio track",
        "padded.mov": "padded (30 ms of silence at its end)",
        "silent.mov": "silent (under -80 dBFS), not learned from",
    }
    for said in (caplog.text, (caplog.clear(), cache_sound(config, tiny_family.ltx23), caplog.text)[2]):
        table = said.split("its sound\n")[1]
        for name, words in expected.items():
            assert f"datasets[0]/{name}:00000-025" in table and words in table, name
        assert "clip_000" not in table and "no audio track  1" in said
    assert "Audio latent caching: 0 encoded, 0 failed" in said, "the second time all are kept"


@pytest.mark.parametrize(("kind", "program", "words"), [("audio", "cache_video", "sound files, which have no pictures"),
                                                        ("image", "cache_sound", "images, which have no sound")])  # fmt: skip
def test_the_wrong_program_for_a_dataset_says_so(
    tmp_path: Path, tiny_family, caplog: pytest.LogCaptureFixture, kind: str, program: str, words: str
) -> None:
    caplog.set_level(logging.INFO)
    write_audio_files(tmp_path / "media", count=1) if kind == "audio" else write_stills(tmp_path / "media", count=1)
    config = write_config(tmp_path, f'[[datasets]]\n{kind}_directory = "media"\ncache_directory = "cache"\nresolution = [96, 64]')
    assert globals()[program](config, tiny_family.ltx23) == 0
    assert f"WARNING: nothing was encoded: the datasets hold {words}" in caplog.text and "ltxv2_cache_" in caplog.text
    assert "0 encoded" not in caplog.text


def test_sound_that_ends_early_is_cut_and_sound_that_never_comes_is_absent(tmp_path: Path, tiny_family) -> None:
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "short.mov", numbered_frames(50), fps=25, audio=ClipAudio(samples=tone_of([0.5] * 15, 25)))
    assert cache_sound(write_config(tmp_path, VIDEOS + 'target_frames = [25]\nframe_extraction = "chunk"'), tiny_family.ltx23) == 0
    first, metadata, _ = one(tmp_path / "cache", "short_00000*_audio.safetensors")
    assert int(first["audio_lengths"]) == 16 and metadata["audio"] == "present"  # 0.6 s: 9600 samples, 61 mels
    second, metadata, _ = one(tmp_path / "cache", "short_00025*_audio.safetensors")
    assert int(second["audio_lengths"]) == 0 and metadata["audio"] == "absent"


def test_a_broken_stream_fails_alone_and_by_name(tmp_path: Path, tiny_family, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_clips(tmp_path / "clips", count=2, frames=25)
    break_audio(tmp_path / "clips" / "clip_001.mp4")
    config = write_config(tmp_path, VIDEOS + "target_frames = [25]")
    assert cache_sound(config, tiny_family.ltx23) == 1
    assert "Audio latent caching: 1 encoded, 1 failed" in caplog.text
    assert "clip_001.mp4: its audio stream does not decode" in caplog.text
    assert [path.name for path in (tmp_path / "cache").glob("*_audio.safetensors")] == [
        "clip_000_00000-025_0096x0064_ltxv2_audio.safetensors"
    ]
    assert cache_video(config, tiny_family.ltx23) == 0  # the pictures are good


def test_one_damaged_clip_fails_the_run_and_not_the_others(tmp_path: Path, tiny_family, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_clips(tmp_path / "clips", count=2, frames=25)
    (tmp_path / "clips" / "clip_000.mp4").write_bytes(b"\0" * 5000)
    config = write_config(tmp_path, VIDEOS + "target_frames = [25]")
    assert cache_video(config, tiny_family.ltx23) == 1
    assert "Video latent caching: 1 encoded, 1 failed" in caplog.text and "clip_000.mp4" in caplog.text
    assert cache_video(config, tiny_family.ltx23) == 1  # still not complete


def test_sound_files_get_caches_of_their_own(tmp_path: Path, tiny_family) -> None:
    write_audio_files(tmp_path / "sounds", count=1, seconds=1.5)
    write_wav(tmp_path / "sounds" / "mono.wav", Waveform(samples=tone_of([0.5] * 36, 24)[:1], rate=22050))
    config = write_config(tmp_path, '[[datasets]]\naudio_directory = "sounds"\ncache_directory = "cache"\ntarget_seconds = 1.2')
    assert cache_sound(config, tiny_family.ltx23) == 0
    tensors, metadata, _ = one(tmp_path / "cache", "sound_000_00000000-001200_ltxv2_audio.safetensors")
    assert tuple(tensors["audio_latents"].shape) == (8, 31, 16) and metadata["audio"] == "present"
    assert (tmp_path / "cache" / "mono_00000000-001200_ltxv2_audio.safetensors").is_file()


def test_a_dry_run_forecasts_and_writes_nothing(tmp_path: Path, tiny_family, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_clips(tmp_path / "clips", count=2, frames=25)
    config = write_config(tmp_path, VIDEOS + "target_frames = [9, 25]")
    assert cache_video(config, tiny_family.ltx23, "--dry_run") == 0
    assert not (tmp_path / "cache").exists()
    for words in ("96x64", "4 file(s) would be encoded", "to be written", "free"):
        assert words in caplog.text


def test_ignored_sound_is_said_aloud(tmp_path: Path, tiny_family, caplog: pytest.LogCaptureFixture) -> None:
    write_clips(tmp_path / "clips", count=2, frames=9)
    config = write_config(tmp_path, VIDEOS + "target_frames = [9]")
    cache_video(config, tiny_family.ltx23)
    assert "2 clip(s) have sound" in caplog.text and "--ltx_mode av" in caplog.text
    caplog.clear()
    cache_video(config, tiny_family.ltx23, "--ltx_mode", "av")
    cache_video(config, tiny_family.ltx23, "--ltxv2_audio_video")
    assert "have sound" not in caplog.text


def test_a_full_disk_ends_the_run_and_a_rerun_completes_it(tmp_path: Path, tiny_family, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clips(tmp_path / "clips", count=4, frames=9)
    config = write_config(tmp_path, VIDEOS + "target_frames = [9]")
    cache_video(config, tiny_family.ltx23)
    whole = contents(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    written = []
    real = os.fsync

    def full_after_three(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_three)
    with pytest.raises(UserError, match="disk is full"):
        cache_video(config, tiny_family.ltx23)
    monkeypatch.undo()
    left = contents(tmp_path / "cache")
    assert left.items() <= whole.items() and sum(name.endswith(("safetensors", INDEX_ENDING)) for name in left) == 3
    assert cache_video(config, tiny_family.ltx23) == 0
    assert contents(tmp_path / "cache") == whole


def test_two_cuts_that_would_share_a_file_are_refused(tmp_path: Path, tiny_family) -> None:
    write_clips(tmp_path / "clips", count=1, frames=33)
    config = write_config(tmp_path, VIDEOS + "target_frames = [9]\n" + VIDEOS + "target_frames = [9]\ntarget_fps = 12\n")
    with pytest.raises(UserError, match=r"datasets\[0\].*datasets\[1\].*they differ .window: .*cache_directory"):
        cache_video(config, tiny_family.ltx23)


def test_a_missing_checkpoint_flag_names_the_flags(tmp_path: Path) -> None:
    write_clips(tmp_path / "clips", count=1, frames=9)
    config = write_config(tmp_path, VIDEOS + "target_frames = [9]")
    with pytest.raises(UserError, match="--vae, --ltxv2_model"):
        ltxv2_cache_latents.main(["--dataset_config", str(config)])
    with pytest.raises(UserError, match="--audio_vae, --vae, --ltxv2_model"):
        ltxv2_cache_audio_latents.main(["--dataset_config", str(config)])


def test_batches_give_the_same_latents_as_single_clips(tmp_path: Path, tiny_family) -> None:
    write_clips(tmp_path / "clips", count=3, frames=9)
    config = write_config(tmp_path, VIDEOS + "target_frames = [9]")
    read = {}
    for size in ("1", "3"):
        assert cache_video(config, tiny_family.ltx23, "--batch_size", size, "--no-skip_existing") == 0
        assert cache_sound(config, tiny_family.ltx23, "--batch_size", size, "--no-skip_existing") == 0
        read[size] = {path.name: read_tensors(path) for path in (tmp_path / "cache").glob("*.safetensors")}
    for name, tensors in read["1"].items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(read["3"][name][key].float(), tensor.float(), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("run", "program", "summary"),
    [
        (cache_video, ltxv2_cache_latents, "Video latent caching: 12 encoded, 0 failed"),
        (cache_sound, ltxv2_cache_audio_latents, "Audio latent caching: 10 encoded, 0 failed"),
    ],
)
def test_two_processes_leave_the_same_files_as_one(tmp_path: Path, tiny_family, run, program: ModuleType, summary: str) -> None:
    write_clips(tmp_path / "clips", count=5, frames=25)
    write_stills(tmp_path / "stills", count=2)
    config = write_config(tmp_path, VIDEOS + 'target_frames = [9, 17]\n[[datasets]]\nimage_directory = "stills"\ncache_directory = "cache"')
    assert run(config, tiny_family.ltx23) == 0
    alone = contents(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    done = launch(2, program.__name__, "--dataset_config", str(config), "--vae", str(tiny_family.ltx23), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(summary) == 1
    assert contents(tmp_path / "cache") == alone
