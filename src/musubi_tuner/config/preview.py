"""Options of previews."""

from typing import Annotated, Literal

from pydantic import Field

from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import AnyPath, Count, FrameRate, Frames, List, Share, Side, Whole, Wording, options

FlowShift = Annotated[float, Field(gt=0, le=1000), Wording("a number above 0, at most 1000; 1 is no shift")]
Steps = Annotated[int, Field(ge=1, le=1000)]
Guidance = Annotated[float, Field(ge=0, le=1000)]
"""A scale of CFG or its kin."""


@options
class GuidanceOptions:
    """Size, noise levels and guidance."""

    sample_scheduler: Literal["ltx2", "ltx2_by_size", "flowmatch_discrete"] = flag(
        "noise levels of the steps: the official ones, whose shift is that of 4096 tokens; the same with the shift of the clip's own size, "
        "as ComfyUI and diffusers have them; or those of musubi-tuner's other models",
        default="ltx2",
    )
    discrete_flow_shift: FlowShift | None = flag("shift of flowmatch_discrete; default: the shift that ltx2 has, 7.77", default=None)
    sample_width: Side = flag("width where a prompt names none", default=768)
    sample_height: Side = flag("height where a prompt names none", default=512)
    sample_frames: Frames = flag("frames, 8n+1, where a prompt names none; 1 makes a still", default=121)
    sample_fps: FrameRate = flag("frame rate where a prompt names none", default=24.0)
    sample_steps: Steps | None = flag("steps where a prompt names none; default: by the model's version", default=None)
    video_cfg_scale: Guidance | None = flag("CFG of the video; 1 is off; default: by the model's version", default=None)
    audio_cfg_scale: Guidance | None = flag("CFG of the sound; 1 is off; default: by the model's version", default=None)
    stg_scale: Guidance | None = flag("spatio-temporal guidance of both streams; 0 is off; default: by the model's version", default=None)
    audio_stg_scale: Guidance | None = flag("the sound's own; default: as --stg_scale", default=None)
    stg_blocks: Annotated[tuple[Whole, ...], List] = flag(
        "blocks whose self-attention that guidance leaves out; default: by the model's version", default=()
    )
    rescale_scale: Share | None = flag("how far guidance is scaled back to the plain prediction's spread, 0 to 1", default=None)
    audio_rescale_scale: Share | None = flag("the sound's own; default: as --rescale_scale", default=None)
    modality_scale: Guidance | None = flag("guidance towards video and sound that fit each other; 1 is off", default=None)
    audio_modality_scale: Guidance | None = flag("the sound's own; default: as --modality_scale", default=None)


@options
class PreviewOptions(GuidanceOptions):
    """Previews."""

    sample_prompts: AnyPath | None = flag(
        "prompt file (.txt, .toml, .json or .jsonl); without it there are no previews, without the next three flags one at the end",
        default=None,
        common=True,
    )
    sample_every_n_steps: Count | None = flag("preview every N steps", default=None, common=True)
    sample_every_n_epochs: Count | None = flag("preview every N epochs", default=None)
    sample_at_first: bool = flag("preview before the first step, which shows the base model", default=False, common=True)
    sample_sampling_preset: Literal["auto", "distilled"] = flag(
        "auto: steps and guidance of the model's version; distilled: eight fixed steps without guidance", default="auto"
    )

    @property
    def wanted(self) -> str | None:
        """The first flag that says when previews are made; without any they are made once, at the end of the run."""
        times = ("sample_at_first", "sample_every_n_steps", "sample_every_n_epochs")
        return next((f"--{name}" for name in times if getattr(self, name)), None)
