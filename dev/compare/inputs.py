"""The inputs of all cases, made once: the checkpoints and clips of the older tree's own generators, and what is derived from them."""

import shutil
import wave
from pathlib import Path

import numpy as np

FRAME_OF_STILLS = 12


def make_inputs(generated: Path, media: Path | None, folder: Path) -> None:
    """Fill `folder`.

    Args:
        generated: checkpoints in `models`, clips with captions in `clips` and `held_out_clips`.
        media: real clips with captions.
    """
    for name in ("models", "clips", "held_out_clips"):
        shutil.copytree(generated / name, folder / name)
    if media is not None:
        shutil.copytree(media, folder / "media", ignore=shutil.ignore_patterns("*.md"), copy_function=shutil.copyfile)
    for name in ("references", "stills", "masks", "sounds"):
        (folder / name).mkdir()
    clips = sorted((folder / "clips").glob("*.mp4"))
    for clip, next_clip in zip(clips, [*clips[1:], clips[0]], strict=True):
        shutil.copyfile(next_clip, folder / "references" / clip.name)
        _write_still(clip, folder / "stills" / f"still_{clip.stem[-3:]}.png")
        _write_mask(folder / "masks" / f"{clip.stem}.png")
        _write_audio(clip, folder / "sounds" / f"{clip.stem}.wav")


def _write_still(clip: Path, path: Path) -> None:
    import av

    with av.open(str(clip)) as container:
        frames = list(container.decode(video=0))
    frames[FRAME_OF_STILLS].to_image().save(path)
    shutil.copyfile(clip.with_suffix(".txt"), path.with_suffix(".txt"))


def _write_mask(path: Path) -> None:
    """The left third white, the middle gray, the right black."""
    from PIL import Image

    picture = Image.new("L", (192, 128))
    picture.paste(255, (0, 0, 64, 128))
    picture.paste(51, (64, 0, 128, 128))
    picture.save(path)


def _write_audio(clip: Path, path: Path) -> None:
    import av

    with av.open(str(clip)) as container:
        stream = container.streams.audio[0]
        samples = np.concatenate([frame.to_ndarray() for frame in container.decode(stream)], axis=1)
        rate = stream.rate
    with wave.open(str(path), "wb") as file:
        file.setparams((samples.shape[0], 2, rate, 0, "NONE", ""))
        file.writeframes((samples.clip(-1, 1) * 32767).round().astype("<i2").T.tobytes())
    shutil.copyfile(clip.with_suffix(".txt"), path.with_suffix(".txt"))
