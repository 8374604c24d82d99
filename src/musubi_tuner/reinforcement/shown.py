"""Samples as files that play: the best and the worst of a reward, with their scores in their names (`scores/REWARD_media`), and the first
of each prompt (`scores/first`)."""

import os
from collections.abc import Mapping
from pathlib import Path

from musubi_tuner.media.write import write_image, write_video
from musubi_tuner.reinforcement.decoding import Decoders, decoding
from musubi_tuner.reinforcement.rewards.base import RewardSample
from musubi_tuner.reinforcement.rollouts import SCORES, Rollouts, Sample
from musubi_tuner.reinforcement.scores import Scores
from musubi_tuner.runtime.disk import not_written, write_folder
from musubi_tuner.runtime.progress import Progress

FIRST = "first"


def save_media(scores: Scores, rollouts: Rollouts, decoders: Decoders, count: int) -> Path | None:
    """Replace the folder of this reward's media; None where no sample has a score.

    Args:
        count: so many of the best, and so many of the others from the worst on.

    Raises:
        UserError: it cannot be written.
    """
    ranked = sorted(((score, name) for name, score in scores.scores.items() if score is not None), reverse=True)
    best, worst = ranked[:count], ranked[count:][-count:][::-1]
    if not best:
        return None
    named = [("best", place, *one) for place, one in enumerate(best, 1)] + [("worst", place, *one) for place, one in enumerate(worst, 1)]
    samples = {one.name: one for one in rollouts.samples}
    stems = {f"{kind}_{place:02d}_{score:+.4f}_{name}": samples[name] for kind, place, score, name in named}
    return _save(rollouts.folder / SCORES / f"{scores.reward}_media", stems, rollouts, decoders)


def save_first(rollouts: Rollouts, decoders: Decoders, count: int) -> Path:
    """The first samples of each prompt under their names, so many; kept where they are there.

    Raises:
        UserError: they cannot be written.
    """
    folder = rollouts.folder / SCORES / FIRST
    stems = {one.name: one for one in rollouts.samples if one.k < count}
    there = {path.stem for path in folder.iterdir()} if folder.is_dir() else set()
    return folder if there == stems.keys() else _save(folder, stems, rollouts, decoders)


def _save(folder: Path, stems: Mapping[str, Sample], rollouts: Rollouts, decoders: Decoders) -> Path:
    """Replace the folder by these samples, decoded."""
    needs = {"video", "audio"} if rollouts.facts["mode"] == "av" else {"video"}

    def write(into: Path) -> None:
        with decoding(rollouts, needs, decoders) as decode, Progress(f"media: {folder.name}", len(stems), unit="sample") as bar:
            for stem, sample in stems.items():
                _write(into / stem, decode(sample))
                bar.advance()

    try:
        write_folder(folder, folder.with_name(f".{folder.name}.{os.getpid()}.tmp"), write)
    except OSError as error:
        raise not_written(folder, error) from error
    return folder


def _write(stem: Path, sample: RewardSample) -> None:
    if len(sample.frames) == 1:
        write_image(stem.with_name(f"{stem.name}.png"), sample.frames[0])
    else:
        write_video(stem.with_name(f"{stem.name}.mp4"), sample.frames, sample.fps, sample.decoded_sound)
