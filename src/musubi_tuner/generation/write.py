"""Where previews go, and in which form: mp4 for clips, png for stills, wav for sound alone."""

from pathlib import Path

from torch import Tensor

from musubi_tuner.media.write import Sound, fit_sound, write_image, write_video, write_wav
from musubi_tuner.prompts.sample_prompts import PreviewPrompt

FOLDER = "sample"


def preview_path(folder: Path, name: str, step: int, prompt: PreviewPrompt, suffix: str) -> Path:
    """`{name}_s{step}_{index}_{seed}`: sorted by name, a prompt's clips stand in the order of training."""
    return folder / f"{name}_s{step:08d}_{prompt.index:02d}_{prompt.seed}{suffix}"


def write_preview(folder: Path, name: str, step: int, prompt: PreviewPrompt, frames: Tensor | None, sound: Sound | None) -> Path:
    """Write one sample and return its path.

    Args:
        frames: (F, H, W, 3) uint8, or None for sound alone.
        sound: cut or padded to the length of the clip here; None for a silent one.
    """
    if frames is None:
        assert sound is not None
        path = preview_path(folder, name, step, prompt, ".wav")
        write_wav(path, fit_sound(sound, prompt.seconds))
    elif frames.shape[0] == 1:
        path = preview_path(folder, name, step, prompt, ".png")
        write_image(path, frames[0])
    else:
        path = preview_path(folder, name, step, prompt, ".mp4")
        write_video(path, frames, prompt.fps, sound)
    return path
