"""What can be said about previews on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from musubi_tuner.config.flags import flag
from musubi_tuner.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewOptions:
    """Previews."""

    sample_prompts: Path | None = flag("prompt file (.txt, .toml or .json); without it there are no previews", default=None)
    sample_every_n_steps: int | None = flag("preview every N steps", default=None)
    sample_every_n_epochs: int | None = flag("preview every N epochs", default=None)
    sample_at_first: bool = flag("preview before the first step, which shows the base model", default=False)
    sample_sampling_preset: Literal["auto", "distilled"] = flag(
        "auto: steps and guidance of the model's version; distilled: eight fixed steps without guidance", default="auto"
    )
    sample_scheduler: Literal["ltx2", "flowmatch_discrete"] = flag("noise levels of a preview's steps", default="ltx2")
    discrete_flow_shift: float | None = flag("shift of flowmatch_discrete; default: the shift that ltx2 has, 7.77", default=None)
    sample_width: int = flag("width where a prompt names none", default=768)
    sample_height: int = flag("height where a prompt names none", default=512)
    sample_frames: int = flag("frames, 8n+1, where a prompt names none; 1 makes a still", default=121)
    sample_fps: float = flag("frame rate where a prompt names none", default=24.0)
    sample_steps: int | None = flag("steps where a prompt names none; default: by the model's version", default=None)
    video_cfg_scale: float | None = flag("CFG of the video; 1 is off; default: by the model's version", default=None)
    audio_cfg_scale: float | None = flag("CFG of the sound; 1 is off; default: by the model's version", default=None)
    stg_scale: float | None = flag("spatio-temporal guidance of both streams; 0 is off; default: by the model's version", default=None)
    stg_blocks: tuple[int, ...] = flag("blocks whose self-attention that guidance leaves out; default: by the model's version", default=())
    rescale_scale: float | None = flag("how far guidance is scaled back to the plain prediction's spread, 0 to 1", default=None)
    modality_scale: float | None = flag("guidance towards video and sound that fit each other; 1 is off", default=None)

    @property
    def wanted(self) -> str | None:
        """The first flag that asks for previews."""
        times = ("sample_at_first", "sample_every_n_steps", "sample_every_n_epochs")
        return next((f"--{name}" for name in times if getattr(self, name)), None)


def check_preview_options(options: PreviewOptions) -> None:
    """Ranges.

    Raises:
        UserError: the first value that is out of its range.
    """
    at_least_one = {
        "--sample_every_n_steps": options.sample_every_n_steps,
        "--sample_every_n_epochs": options.sample_every_n_epochs,
        "--sample_steps": options.sample_steps,
    }
    not_negative = {
        "--video_cfg_scale": options.video_cfg_scale,
        "--audio_cfg_scale": options.audio_cfg_scale,
        "--stg_scale": options.stg_scale,
        "--modality_scale": options.modality_scale,
    }
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: must be 1 at least.")
    for name, value in not_negative.items():
        if value is not None and value < 0:
            raise UserError(f"{name} {value}: must not be negative.")
    if options.rescale_scale is not None and not 0 <= options.rescale_scale <= 1:
        raise UserError(f"--rescale_scale {options.rescale_scale}: must be between 0 and 1.")
    if options.discrete_flow_shift is not None and options.discrete_flow_shift <= 0:
        raise UserError(f"--discrete_flow_shift {options.discrete_flow_shift}: must be positive; 1 is no shift.")
