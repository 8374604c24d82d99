"""The best and the worst samples of a reward as files that play, with their scores in their names: `scores/REWARD_media`."""

import os
from pathlib import Path

from musubi_tuner.media.write import write_image, write_video
from musubi_tuner.reinforcement.decoding import Decoders, decoding
from musubi_tuner.reinforcement.rewards.base import RewardSample
from musubi_tuner.reinforcement.rollouts import SCORES, Rollouts
from musubi_tuner.reinforcement.scores import Scores
from musubi_tuner.runtime.disk import not_written, write_folder
from musubi_tuner.runtime.progress import Progress


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
    needs = {"video", "audio"} if rollouts.facts["mode"] == "av" else {"video"}
    folder = rollouts.folder / SCORES / f"{scores.reward}_media"

    def write(into: Path) -> None:
        with decoding(rollouts, needs, decoders) as decode, Progress(f"media: {scores.reward}", len(named), unit="sample") as bar:
            for kind, place, score, name in named:
                _write(into / f"{kind}_{place:02d}_{score:+.4f}_{name}", decode(samples[name]))
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
