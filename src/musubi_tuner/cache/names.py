"""File names in a cache directory. They are for people; identity is in the metadata."""

import hashlib
from pathlib import Path

PROMPT_FOLDER = "ltxv2_prompts"
LATENTS_ENDING = "_ltxv2.safetensors"
AUDIO_ENDING = "_ltxv2_audio.safetensors"
REFERENCE_ENDING = "_ltxv2_ref.safetensors"
REFERENCE_AUDIO_ENDING = "_ltxv2_ref_audio.safetensors"
MASK_ENDING = "_ltxv2_mask.safetensors"
TEXT_ENDING = "_ltxv2_te.safetensors"
INDEX_ENDING = ".json"
ENDINGS = (LATENTS_ENDING, AUDIO_ENDING, REFERENCE_ENDING, REFERENCE_AUDIO_ENDING, MASK_ENDING, TEXT_ENDING, INDEX_ENDING)


def video_latent_name(stem: str, start: int, frames: int, width: int, height: int) -> str:
    return f"{stem}_{start:05d}-{frames:03d}_{width:04d}x{height:04d}{LATENTS_ENDING}"


def image_latent_name(stem: str, width: int, height: int) -> str:
    return f"{stem}_{width:04d}x{height:04d}{LATENTS_ENDING}"


def mirrored_name(latent_name: str) -> str:
    """Latents of the mirror image of a video or still."""
    return latent_name.removesuffix(LATENTS_ENDING) + "_mirrored" + LATENTS_ENDING


def audio_sidecar_name(latent_name: str) -> str:
    """The sidecar of a video latent file."""
    return latent_name.removesuffix(LATENTS_ENDING) + AUDIO_ENDING


def reference_sidecar_name(latent_name: str) -> str:
    """What is shown beside a video or still."""
    return latent_name.removesuffix(LATENTS_ENDING) + REFERENCE_ENDING


def mask_sidecar_name(latent_name: str) -> str:
    return latent_name.removesuffix(LATENTS_ENDING) + MASK_ENDING


def reference_audio_name(audio_name: str) -> str:
    """What is played beside a sound."""
    return audio_name.removesuffix(AUDIO_ENDING) + REFERENCE_AUDIO_ENDING


def audio_only_name(stem: str, start_ms: int, length_ms: int) -> str:
    return f"{stem}_{start_ms:08d}-{length_ms:06d}{AUDIO_ENDING}"


def text_name(stem: str) -> str:
    return f"{stem}{TEXT_ENDING}"


def prompt_path(cache_directory: Path, prompt: str) -> Path:
    """Where the context of a sample prompt lies."""
    digest = hashlib.sha256(prompt.encode("utf-8")).hexdigest()[:16]
    return cache_directory / PROMPT_FOLDER / text_name(digest)


def index_name(digest: str) -> str:
    return f"ltxv2_index_{digest}{INDEX_ENDING}"
