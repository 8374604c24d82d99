"""What `tools/import_precomputed.py` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from musubi_tuner.config.flags import flag
from musubi_tuner.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportDataOptions:
    """Data."""

    precomputed_directory: Path = flag("the official trainer's .precomputed folder, or the folder it lies in")
    output_dir: Path = flag("where dataset.toml and the folder cache are written")
    ltx_mode: Literal["video", "av", "audio"] = flag("what will be trained", default="video")
    text_cache_stage: Literal["context", "features"] = flag(
        "context: run the connectors, for training as usual; features: as they are, for --train_connectors", default="context"
    )
    sample_prompts: Path | None = flag("prompt file whose texts are cached too, with the empty one; needs --text_encoder", default=None)
    source_fps: float | None = flag("frame rate of clips whose files tell none", default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportModelOptions:
    """Models.

    Those that the data were made with: they are recorded in the caches, which training compares with its own.
    """

    ltxv2_model: Path = flag("full checkpoint, or transformer file with connectors and text projection")
    vae: Path | None = flag("full checkpoint or video VAE file; default: --ltxv2_model", default=None)
    audio_vae: Path | None = flag("full checkpoint or audio VAE file; default: --vae", default=None)
    text_encoder: str | None = flag("encoder folder; needed where training is given one too", default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportWorkOptions:
    """Work."""

    device: str | None = flag("device that runs the connectors; default: the best there is", default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """All sections."""

    data: ImportDataOptions
    model: ImportModelOptions
    work: ImportWorkOptions


def check_import(config: ImportConfig) -> None:
    """Ranges, and rules over several flags.

    Raises:
        UserError: the first rule that is broken.
    """
    data = config.data
    if data.sample_prompts is not None and config.model.text_encoder is None:
        raise UserError(f"--sample_prompts {data.sample_prompts}: prompts are not in the tree; give --text_encoder, which encodes them.")
    if data.source_fps is not None and data.source_fps <= 0:
        raise UserError(f"--source_fps {data.source_fps:g}: must be above 0.")
