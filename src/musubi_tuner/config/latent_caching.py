"""What the two latent caching programs can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from musubi_tuner.config.flags import flag
from musubi_tuner.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """Data."""

    dataset_config: Path = flag("dataset TOML")
    ltx_mode: Literal["video", "av", "audio"] | None = flag("what will be trained; default: video", default=None, aliases=("--ltx2_mode",))
    ltxv2_audio_video: bool = flag("older way to say --ltx_mode av", default=False)
    skip_existing: bool = flag("keep files that are right; off = make all anew", default=True)
    keep_cache: bool = flag("accepted for older scripts: files that belong to no clip are always left where they are", default=True)
    dry_run: bool = flag("say what would be done, and encode nothing", default=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoVaeOptions:
    """Video VAE."""

    vae: Path | None = flag("full checkpoint or video VAE file; default: --ltxv2_model", default=None)
    ltxv2_model: Path | None = flag("full checkpoint, where --vae is not given", default=None)
    vae_dtype: Literal["bfloat16", "float16", "float32"] | None = flag(
        "compute dtype; default: bfloat16 on a GPU, float32 on the CPU", default=None
    )
    vae_spatial_tile_size: int = flag("frames with a longer side are encoded in tiles of this many pixels", default=1280)
    vae_temporal_tile_size: int = flag("longer clips are encoded so many frames at a time; the latents are the same", default=32)


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioVaeOptions:
    """Audio VAE."""

    audio_vae: Path | None = flag("full checkpoint or audio VAE file; default: --vae", default=None)
    vae: Path | None = flag("full checkpoint, where --audio_vae is not given", default=None)
    ltxv2_model: Path | None = flag("full checkpoint, where neither is given", default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkOptions:
    """Work."""

    device: str | None = flag("device, such as cuda:0 or cpu; default: the best there is", default=None)
    batch_size: int = flag("clips of one size encoded together", default=1)
    num_workers: int = flag("threads that decode ahead", default=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentCachingConfig:
    """All sections."""

    data: DataOptions
    vae: VideoVaeOptions
    work: WorkOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioCachingConfig:
    """All sections."""

    data: DataOptions
    audio_vae: AudioVaeOptions
    work: WorkOptions


def caching_mode(data: DataOptions, default: str = "video") -> str:
    """`video`, `av` or `audio`."""
    return data.ltx_mode or ("av" if data.ltxv2_audio_video else default)


def check_work(work: WorkOptions) -> None:
    """Ranges.

    Raises:
        UserError: a number below 1.
    """
    for name in ("batch_size", "num_workers"):
        if getattr(work, name) < 1:
            raise UserError(f"--{name} {getattr(work, name)}: must be 1 at least.")


def check_video_vae(vae: VideoVaeOptions) -> None:
    """Tiles must be larger than their overlap and fall on latent cells, parts of a clip too.

    Raises:
        UserError: they do not.
    """
    for name, least, step in (("vae_spatial_tile_size", 256, 32), ("vae_temporal_tile_size", 8, 8)):
        value = getattr(vae, name)
        if value < least or value % step:
            raise UserError(f"--{name} {value}: must be a multiple of {step} and {least} at least.")


def first_given(*candidates: tuple[str, Path | None]) -> Path:
    """The first flag's path that was given.

    Raises:
        UserError: none was.
    """
    for _, path in candidates:
        if path is not None:
            return path
    raise UserError(f"none of {', '.join(name for name, _ in candidates)} was given. Point one at the checkpoint.")
