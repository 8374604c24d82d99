"""The model of a run: its files, what of it is trained on what, and how it fits into memory."""

from typing import Annotated, Literal, Protocol

from pydantic import Field, model_validator

from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import AnyPath, Positive, Whole, Wording, options
from musubi_tuner.runtime.errors import UserError

Mode = Literal["video", "av", "audio"]
TextTokens = Annotated[int, Field(ge=1, le=1024), Wording("a whole number between 1 and 1024, the model's context")]
Dtype = Literal["bfloat16", "float16", "float32"]


@options
class ModelOptions:
    """Model files."""

    ltxv2_model: AnyPath = flag("transformer file, full checkpoint, or folder of a split pack", common=True)
    vae: AnyPath | None = flag("video VAE for previews; default: --ltxv2_model", default=None)
    audio_vae: AnyPath | None = flag("audio VAE and vocoder for previews; default: --vae", default=None)
    text_encoder: str | None = flag(
        "encoder folder, file of LTX-2.5's, or hub id in the local cache, for prompts that were not cached", default=None, common=True
    )
    text_encoder_backend: Literal["gemma", "t5"] | None = flag("must agree with the cached captions", default=None)
    tokenizer: str | None = flag("tokenizer folder; default: --text_encoder", default=None)
    max_length: TextTokens | None = flag("cuts captions to this many tokens; must cut them where the cache does", default=None)
    ltxv2_backend: Literal["official"] = flag("implementation of the model", default="official")
    device: str | None = flag("device, such as cuda:0 or cpu; default: the best there is", default=None)


@options
class ModeOptions:
    """What is trained."""

    dataset_config: AnyPath = flag("dataset TOML", common=True)
    ltx_mode: Mode | None = flag("video alone, video with sound, or sound alone; default: video", default=None, common=True)
    ltxv2_audio_video: bool = flag("older form of --ltx_mode av", default=False)
    ltxv2_timestep_format: Literal["flowmatch_1_1000", "legacy_0_1000", "sd3_0_1"] = flag(
        "how noise levels are written down, which differs between tools: t = 1 + 999 sigma (musubi-tuner's habit; take it if unsure), "
        "t = 1000 sigma, or t = sigma",
        common=True,
    )


class _ChoosesMode(Protocol):
    @property
    def ltx_mode(self) -> Mode | None: ...

    @property
    def ltxv2_audio_video(self) -> bool: ...


def chosen_mode(section: _ChoosesMode) -> Mode:
    """`video`, `av` or `audio`: `--ltx_mode` wins over the older flag."""
    return section.ltx_mode or ("av" if section.ltxv2_audio_video else "video")


@options
class MemoryOptions:
    """Memory and speed (a plan decides all of it; see docs/explanation/memory.md)."""

    vram_gb: Positive | None = flag("use no more device memory than this; default: what is free", default=None, common=True)
    ram_gb: Positive | None = flag("use no more host memory than this; default: what is free", default=None)
    weight_format: Literal["auto", "bf16", "fp8", "int8", "nf4"] = flag("how the frozen linears of the blocks are stored", default="auto")
    fp8_base: bool = flag("the same as --weight_format fp8", default=False)
    fp8_scaled: bool = flag("the same as --weight_format fp8: its codes are always scaled", default=False)
    blocks_to_swap: Whole | None = flag("blocks whose weights are streamed from host memory; default: as planned", default=None)
    gradient_checkpointing: bool | None = flag(
        "recompute whole blocks in the backward pass (activation checkpointing); default: as planned", default=None
    )
    compile: bool | None = flag("compile the blocks; default: on a GPU", default=None)
    attn_mode: Literal["auto", "cudnn", "flash", "efficient", "math"] = flag(
        "attention kernel; auto measures them on the largest clip", default="auto"
    )

    @property
    def wanted_format(self) -> str:
        """`auto` or the one format that was asked for."""
        return "fp8" if self.fp8_base or self.fp8_scaled else self.weight_format

    @model_validator(mode="after")
    def _check(self) -> "MemoryOptions":
        if (self.fp8_base or self.fp8_scaled) and self.weight_format not in ("auto", "fp8"):
            raise UserError(f"--fp8_base and --weight_format {self.weight_format} contradict each other; give one of them.")
        return self
