"""What `tools/import_precomputed.py` can be told."""

from typing import Literal

from pydantic import model_validator

from musubi_tuner.config.flags import flag
from musubi_tuner.config.model import Mode
from musubi_tuner.config.validation import AnyPath, FrameRate, options
from musubi_tuner.runtime.errors import UserError


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
    text_encoder: str | None = flag("encoder folder; needed where training is given one too", default=None)


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
