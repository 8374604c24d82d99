"""What the text caching program can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from musubi_tuner.config.flags import flag
from musubi_tuner.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class TextDataOptions:
    """Data."""

    dataset_config: Path = flag("dataset TOML")
    sample_prompts: Path | None = flag("prompt file whose texts are cached too, so that training needs no encoder", default=None)
    dop_prompt: str | None = flag("prompt of training's --dop_prompt, cached too", default=None)
    ltx_mode: Literal["video", "av", "audio"] | None = flag("what will be trained; default: video", default=None, aliases=("--ltx2_mode",))
    ltxv2_audio_video: bool = flag("older way to say --ltx_mode av", default=False)
    text_cache_stage: Literal["context", "features"] = flag(
        "context: what the transformer reads; features: before the connectors, smaller, to train them", default="context"
    )
    skip_existing: bool = flag("keep files that are right; off = make all anew", default=True)
    keep_cache: bool = flag("accepted; files that belong to no caption are always left where they are", default=True)
    dry_run: bool = flag("say what would be done, and encode nothing", default=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextModelOptions:
    """Models."""

    ltxv2_model: Path = flag(
        "full checkpoint, or transformer file with connectors and text projection", aliases=("--ltx2_checkpoint", "--dit")
    )
    text_encoder: str = flag("encoder folder, or a hub id that is in the local cache", aliases=("--gemma_root",))
    text_encoder_backend: Literal["gemma", "t5"] = flag("kind of encoder; released models take gemma", default="gemma")
    tokenizer: str | None = flag("tokenizer folder; default: --text_encoder", default=None)
    max_length: int = flag("captions are cut to this many tokens; the context stays 1024", default=1024)
    text_dtype: Literal["bfloat16", "float16", "float32"] | None = flag(
        "compute dtype; default: bfloat16 on a GPU, float32 on the CPU", default=None
    )
    gemma_load_in_8bit: bool = flag("load the encoder in 8 bits (bitsandbytes)", default=False)
    gemma_load_in_4bit: bool = flag("load the encoder in 4 bits (bitsandbytes)", default=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextWorkOptions:
    """Work."""

    device: str | None = flag("device, such as cuda:0 or cpu; default: the best there is", default=None)
    batch_size: int = flag("captions of similar length encoded together", default=8)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextCachingConfig:
    """All sections."""

    data: TextDataOptions
    model: TextModelOptions
    work: TextWorkOptions

    @property
    def ltx_mode(self) -> str:
        """`video`, `av` or `audio`."""
        return self.data.ltx_mode or ("av" if self.data.ltxv2_audio_video else "video")


def check_text_caching(config: TextCachingConfig) -> None:
    """Ranges, and rules over several flags.

    Raises:
        UserError: the first rule that is broken.
    """
    model = config.model
    if not 1 <= model.max_length <= 1024:
        raise UserError(f"--max_length {model.max_length}: must be between 1 and 1024, the model's context.")
    if config.work.batch_size < 1:
        raise UserError(f"--batch_size {config.work.batch_size}: must be 1 at least.")
    if model.gemma_load_in_8bit and model.gemma_load_in_4bit:
        raise UserError("--gemma_load_in_8bit and --gemma_load_in_4bit exclude each other.")
    if model.text_encoder_backend == "t5":
        if config.ltx_mode != "video":
            raise UserError(f"--text_encoder_backend t5 gives one stream of text; --ltx_mode {config.ltx_mode} needs two. Use gemma.")
        if config.data.text_cache_stage == "features":
            raise UserError("--text_cache_stage features: T5 has no connectors after it; leave it at context.")
