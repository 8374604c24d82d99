"""Which model is trained, on what."""

from typing import Annotated, Literal, Protocol

from pydantic import Field

from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import AnyPath, Wording, options

Mode = Literal["video", "av", "audio"]
TextTokens = Annotated[int, Field(ge=1, le=1024), Wording("a whole number between 1 and 1024, the model's context")]
Dtype = Literal["bfloat16", "float16", "float32"]


@options
class ModelOptions:
    """Model files."""

    ltxv2_model: AnyPath = flag(
        "transformer file, full checkpoint, or folder of a split pack", aliases=("--ltx2_checkpoint", "--dit"), common=True
    )
    vae: AnyPath | None = flag("video VAE for previews; default: --ltxv2_model", default=None)
    audio_vae: AnyPath | None = flag("audio VAE and vocoder for previews; default: --vae", default=None)
    text_encoder: str | None = flag(
        "encoder folder (or a hub id in the local cache), for prompts that were not cached", default=None, common=True
    )
    text_encoder_backend: Literal["gemma", "t5"] | None = flag("must agree with the cached captions", default=None)
    tokenizer: str | None = flag("tokenizer folder; default: --text_encoder", default=None)
    max_length: TextTokens | None = flag("cuts captions to this many tokens; must agree with the cache", default=None)
    ltxv2_backend: Literal["official"] = flag("implementation of the model", default="official")
    device: str | None = flag("device, such as cuda:0 or cpu; default: the best there is", default=None)


@options
class ModeOptions:
    """What is trained."""

    dataset_config: AnyPath = flag("dataset TOML", common=True)
    ltx_mode: Mode | None = flag(
        "video alone, video with sound, or sound alone; default: video", default=None, aliases=("--ltx2_mode",), common=True
    )
    ltxv2_audio_video: bool = flag("older way to say --ltx_mode av", default=False)
    ltxv2_timestep_format: Literal["flowmatch_1_1000", "legacy_0_1000", "sd3_0_1"] = flag(
        "how noise levels are written down, which differs between tools: t = 1 + 999 sigma (musubi-tuner's habit; take it if unsure), "
        "t = 1000 sigma, or t = sigma",
        common=True,
    )


class _ChoosesMode(Protocol):
    ltx_mode: Mode | None
    ltxv2_audio_video: bool


def chosen_mode(section: _ChoosesMode) -> Mode:
    """`video`, `av` or `audio`: `--ltx_mode` wins over the older flag."""
    return section.ltx_mode or ("av" if section.ltxv2_audio_video else "video")
