"""Clips of the small world as media files, and what the scorer reads from media files."""

import random
from collections.abc import Sequence
from pathlib import Path

from musubi_tuner.media.audio import read_audio, resample
from musubi_tuner.media.probe import probe_video
from musubi_tuner.media.video import choose_frames, read_frames
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import SOUND_RATE, ClipAudio, write_clip
from musubi_tuner.tiny.world.scenes import FPS, FRAMES, SIZE, draw_scenes, scene_of
from musubi_tuner.tiny.world.scorer import Hearing, Sight, hear, see
from musubi_tuner.tiny.world.sounds import RATE, draw_sounds, sound_of
from musubi_tuner.tiny.world.subjects import CharacterSubject, Subject


def write_world_clips(folder: Path, subjects: Sequence[Subject] | Sequence[CharacterSubject], *, seed: int) -> tuple[Path, ...]:
    """An mp4 file with sound for each subject, and its caption beside it; the same seed draws the same clips."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, subject in enumerate(subjects):
        rng = random.Random(f"{seed}|{number}")
        frames = draw_scenes([scene_of(subject, rng)])[0]
        wave = resample(draw_sounds([sound_of(subject, rng)]), RATE, SOUND_RATE)
        path = folder / f"clip_{number:03d}.mp4"
        write_clip(path, frames, fps=FPS, audio=ClipAudio(samples=wave.expand(2, -1).contiguous()))
        path.with_suffix(".txt").write_text(subject.caption + "\n", encoding="utf-8")
        paths.append(path)
    return tuple(paths)


def read_world_clip(path: Path) -> tuple[Sight, Hearing | None]:
    """What is seen in a file's first 17 frames and heard beside them; None where it has no sound.

    Raises:
        UserError: no video, one that is shorter than that, or one that does not decode.
    """
    info = probe_video(path)
    places = choose_frames(info, FPS, 0, FRAMES)
    if len(set(places)) < FRAMES:
        raise UserError(f"{path}: has {len(set(places))} frames at {FPS} a second; clips of the small world have {FRAMES}.")
    sight = see(read_frames(info, places, SIZE, SIZE))
    if info.audio is None:
        return sight, None
    wave = read_audio(path, info.audio, info.start, info.start + FRAMES / FPS)
    return sight, hear(resample(wave.samples, wave.rate, RATE))
