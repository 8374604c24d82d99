"""Options of the programs that write caches: the three caching programs, and those in `tools/` that take caches over."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from musubi_tuner.config.flags import flag
from musubi_tuner.config.model import Dtype, Mode, TextTokens, chosen_mode
from musubi_tuner.config.validation import AnyPath, Count, FrameRate, Text, Wording, options
from musubi_tuner.runtime.errors import UserError

SpatialTile = Annotated[int, Field(ge=256, le=2**16, multiple_of=32), Wording("a multiple of 32, at least 256")]
"""In pixels: larger than the overlap of tiles, and whole latent cells."""
TemporalTile = Annotated[int, Field(ge=8, le=2**16, multiple_of=8), Wording("a multiple of 8, at least 8")]
"""In frames: whole latent cells."""


TEXT_BATCH = 8
"""Captions, where nothing else is asked for."""


@options
class DataOptions:
    """Data."""

    dataset_config: AnyPath = flag("dataset TOML")
    ltx_mode: Mode | None = flag("what will be trained; default: video", default=None)
    ltxv2_audio_video: bool = flag("older form of --ltx_mode av", default=False)
    skip_existing: bool = flag("keep files that are right; off = make all of them again", default=True)
    keep_cache: bool = flag("accepted for older scripts: files that belong to no clip are always left where they are", default=True)
    dry_run: bool = flag("report what would be done, and encode nothing", default=False)


@options
class VideoVaeOptions:
    """Video VAE."""

    vae: AnyPath | None = flag("full checkpoint or video VAE file; default: --ltxv2_model", default=None)
    ltxv2_model: AnyPath | None = flag("full checkpoint, where --vae is not given", default=None)
    vae_dtype: Dtype | None = flag("compute dtype; default: bfloat16 on a GPU, float32 on the CPU", default=None)
    vae_spatial_tile_size: SpatialTile = flag("frames with a longer side are encoded in tiles of this many pixels", default=1280)
    vae_temporal_tile_size: TemporalTile = flag("longer clips are encoded so many frames at a time; the latents are the same", default=32)


@options
class AudioVaeOptions:
    """Audio VAE."""

    audio_vae: AnyPath | None = flag("full checkpoint or audio VAE file; default: --vae", default=None)
    vae: AnyPath | None = flag("full checkpoint, where --audio_vae is not given", default=None)
    ltxv2_model: AnyPath | None = flag("full checkpoint, where neither is given", default=None)


@options
class WorkOptions:
    """Work."""

    device: str | None = flag("device, such as cuda:0 or cpu; default: the best there is", default=None)
    batch_size: Count = flag("clips of one size encoded together", default=1)
    num_workers: Count = flag("threads that decode ahead", default=2)


@options
class LatentCachingConfig:
    """All sections."""

    data: DataOptions
    vae: VideoVaeOptions
    work: WorkOptions


@options
class AudioCachingConfig:
    """All sections."""

    data: DataOptions
    audio_vae: AudioVaeOptions
    work: WorkOptions


@options
class TextDataOptions:
    """Data."""

    dataset_config: AnyPath = flag("dataset TOML")
    sample_prompts: AnyPath | None = flag("prompt file whose texts are cached too, so that training needs no encoder", default=None)
    dop_prompt: Text | None = flag("prompt of training's --dop_prompt, cached too", default=None, may_be_empty=True)
    ltx_mode: Mode | None = flag("what will be trained; default: video", default=None)
    ltxv2_audio_video: bool = flag("older form of --ltx_mode av", default=False)
    text_cache_stage: Literal["context", "features"] = flag(
        "context: what the transformer reads; features: before the connectors, smaller, to train them", default="context"
    )
    skip_existing: bool = flag("keep files that are right; off = make all of them again", default=True)
    keep_cache: bool = flag("accepted; files that belong to no caption are always left where they are", default=True)
    dry_run: bool = flag("report what would be done, and encode nothing", default=False)


@options
class TextModelOptions:
    """Models."""

    ltxv2_model: AnyPath = flag("full checkpoint, or transformer file with connectors and text projection")
    text_encoder: str = flag("encoder folder, the one file of LTX-2.5's, or a hub id that is in the local cache")
    text_encoder_backend: Literal["gemma", "t5"] = flag("kind of encoder; released models take gemma", default="gemma")
    tokenizer: str | None = flag("tokenizer folder; default: --text_encoder", default=None)
    max_length: TextTokens = flag("captions are cut to this many tokens; the context stays 1024", default=1024)
    text_dtype: Dtype | None = flag("compute dtype; default: bfloat16 on a GPU, float32 on the CPU", default=None)
    gemma_load_in_8bit: bool = flag("load the encoder in 8 bits (bitsandbytes)", default=False)
    gemma_load_in_4bit: bool = flag("load the encoder in 4 bits (bitsandbytes)", default=False)

    @model_validator(mode="after")
    def _check(self) -> "TextModelOptions":
        if self.gemma_load_in_8bit and self.gemma_load_in_4bit:
            raise UserError("--gemma_load_in_8bit and --gemma_load_in_4bit exclude each other.")
        return self


@options
class TextWorkOptions:
    """Work."""

    device: str | None = flag("device, such as cuda:0 or cpu; default: the best there is", default=None)
    batch_size: Count = flag("captions of similar length encoded together", default=TEXT_BATCH)


@options
class TextCachingConfig:
    """All sections."""

    data: TextDataOptions
    model: TextModelOptions
    work: TextWorkOptions

    @property
    def ltx_mode(self) -> Mode:
        """`video`, `av` or `audio`."""
        return chosen_mode(self.data)

    @model_validator(mode="after")
    def _check(self) -> "TextCachingConfig":
        if self.model.text_encoder_backend == "t5":
            if self.ltx_mode != "video":
                raise UserError(f"--text_encoder_backend t5 gives one stream of text; --ltx_mode {self.ltx_mode} needs two. Use gemma.")
            if self.data.text_cache_stage == "features":
                raise UserError("--text_cache_stage features: T5 has no connectors after it; leave it at context.")
        return self


@options
class AllFilesOptions(TextModelOptions):
    """Models."""

    vae: AnyPath | None = flag("full checkpoint or video VAE file; default: --ltxv2_model", default=None)
    audio_vae: AnyPath | None = flag("full checkpoint or audio VAE file; default: --vae", default=None)
    vae_dtype: Dtype | None = flag("compute dtype of the video VAE; default: bfloat16 on a GPU, float32 on the CPU", default=None)


@options
class AllWorkOptions(WorkOptions):
    """Work."""

    text_batch_size: Count = flag("captions of similar length encoded together", default=TEXT_BATCH)


@options
class CacheAllConfig:
    """All sections."""

    data: TextDataOptions
    model: AllFilesOptions
    work: AllWorkOptions

    @property
    def ltx_mode(self) -> Mode:
        """`video`, `av` or `audio`."""
        return chosen_mode(self.data)


@options
class ImportDataOptions:
    """Data."""

    precomputed_directory: AnyPath = flag("the official trainer's .precomputed folder, or the folder it lies in")
    output_dir: AnyPath = flag("where dataset.toml and the folder cache are written")
    ltx_mode: Mode = flag("what will be trained", default="video")
    text_cache_stage: Literal["context", "features"] = flag(
        "context: run the connectors, for training as usual; features: as they are, for --train_connectors", default="context"
    )
    sample_prompts: AnyPath | None = flag("prompt file whose texts are cached too, with the empty one; needs --text_encoder", default=None)
    source_fps: FrameRate | None = flag("frame rate of clips whose files tell none", default=None)


@options
class ImportModelOptions:
    """Models.

    Those that the data were made with: they are recorded in the caches, which training compares with its own.
    """

    ltxv2_model: AnyPath = flag("full checkpoint, or transformer file with connectors and text projection")
    vae: AnyPath | None = flag("full checkpoint or video VAE file; default: --ltxv2_model", default=None)
    audio_vae: AnyPath | None = flag("full checkpoint or audio VAE file; default: --vae", default=None)
    text_encoder: str | None = flag("encoder folder or file; needed where training is given one too", default=None)


@options
class ImportWorkOptions:
    """Work."""

    device: str | None = flag("device that runs the connectors; default: the best there is", default=None)


@options
class ImportConfig:
    """All sections."""

    data: ImportDataOptions
    model: ImportModelOptions
    work: ImportWorkOptions

    @model_validator(mode="after")
    def _check(self) -> "ImportConfig":
        prompts = self.data.sample_prompts
        if prompts is not None and self.model.text_encoder is None:
            raise UserError(f"--sample_prompts {prompts}: prompts are not in the tree; give --text_encoder, which encodes them.")
        return self


@options
class AdoptDataOptions:
    """Data."""

    dataset_config: AnyPath = flag("dataset TOML, whose cache directories hold the files")
    ltx_mode: Mode = flag("what will be trained", default="video")
    text_cache_stage: Literal["context", "features"] = flag(
        "what the texts are: contexts, or features before connectors", default="context"
    )
    source_fps: FrameRate | None = flag("frame rate of clips whose media are gone, where the dataset gives none", default=None)
    dry_run: bool = flag("check and report, and write nothing", default=False)


@options
class AdoptModelOptions:
    """Models.

    Those that the files were made with: nothing in the files tells, and training compares what is recorded with its own.
    """

    ltxv2_model: AnyPath = flag("full checkpoint, or transformer file with connectors and text projection")
    vae: AnyPath | None = flag("full checkpoint or video VAE file; default: --ltxv2_model", default=None)
    audio_vae: AnyPath | None = flag("full checkpoint or audio VAE file; default: --vae", default=None)
    text_encoder: str | None = flag("encoder folder or file; needed where training is given one too", default=None)
    text_encoder_backend: Literal["gemma", "t5"] = flag("kind of encoder", default="gemma")
    max_length: TextTokens | None = flag("captions were cut to this many tokens; default: 1024", default=None)


@options
class AdoptWorkOptions:
    """Work."""

    num_workers: Count = flag("threads that look into media", default=2)


@options
class AdoptConfig:
    """All sections."""

    data: AdoptDataOptions
    model: AdoptModelOptions
    work: AdoptWorkOptions


def first_given(*candidates: tuple[str, Path | None]) -> Path:
    """The first flag's path that was given.

    Raises:
        UserError: none was.
    """
    for _, path in candidates:
        if path is not None:
            return path
    raise UserError(f"none of {', '.join(name for name, _ in candidates)} was given. Point one at the checkpoint.")
