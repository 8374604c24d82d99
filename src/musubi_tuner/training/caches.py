"""What a run can know of the caches it needs, from the files it was given; imports no encoder."""

from pathlib import Path
from typing import Literal

import torch

from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.dataset.verify import Wanted
from musubi_tuner.ltxv2.autoencoders.audio_vae import audio_vae_fingerprint
from musubi_tuner.ltxv2.autoencoders.video_vae import video_vae_fingerprint
from musubi_tuner.ltxv2.text.encoders import EncoderOptions, encoder_fingerprint, encoder_options
from musubi_tuner.ltxv2.text.pipeline import projection_fingerprint, text_widths
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.weights import Checkpoint, open_checkpoint
from musubi_tuner.runtime.program import quoted


def wanted_caches(config: TrainingConfig, checkpoint: Checkpoint, transformer: TransformerConfig) -> Wanted:
    """Fingerprints of every encoder that can be looked at: the VAEs where a file holds them, connectors and projection, the encoder's
    folder."""
    mode, model = config.ltx_mode, config.model
    vae = checkpoint if model.vae is None else open_checkpoint(model.vae)
    audio_vae = vae if model.audio_vae is None else open_checkpoint(model.audio_vae)
    latents = {"encoder_fingerprint": video_vae_fingerprint(vae)} if _holds(vae, "vae.encoder.", "encoder.down_blocks.") else {}
    audio = {"encoder_fingerprint": audio_vae_fingerprint(audio_vae)} if _holds(audio_vae, "audio_vae.encoder.") else {}
    text = {"stage": text_stage(config), "widths": "+".join(map(str, text_widths(transformer, mode)))}
    if model.text_encoder_backend is not None:
        text["backend"] = model.text_encoder_backend
    if model.max_length is not None:
        text["max_length"] = str(model.max_length)
    if model.text_encoder_backend != "t5" and _holds(checkpoint, "text_embedding_projection."):
        text["projection_fingerprint"] = projection_fingerprint(checkpoint)
    if checkpoint.model_version:
        text["model_version"] = checkpoint.model_version
    if model.text_encoder is not None and Path(model.text_encoder).is_dir():
        text["encoder_fingerprint"] = encoder_fingerprint(_encoder_options(config))
    return Wanted(latents=latents, audio=audio, text=text, arguments=_arguments(config))


def text_stage(config: TrainingConfig) -> Literal["context", "features"]:
    """Connectors that are trained read what comes before them."""
    return "features" if config.network.train_connectors else "context"


def _holds(checkpoint: Checkpoint, *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in checkpoint.names())


def _encoder_options(config: TrainingConfig) -> EncoderOptions:
    model = config.model
    return encoder_options(
        model.text_encoder,
        tokenizer=model.tokenizer,
        backend=model.text_encoder_backend or "gemma",
        device=torch.device("cpu"),
        max_length=model.max_length,
    )


def _arguments(config: TrainingConfig) -> dict[str, str]:
    """Arguments of the caching programs that go with this run."""
    model = config.model
    dataset = f"--dataset_config {quoted(config.mode.dataset_config)} --ltx_mode {config.ltx_mode}"
    vae = quoted(model.vae or model.ltxv2_model)
    encoder = quoted(model.text_encoder) if model.text_encoder else "ENCODER_FOLDER"
    text = f" --text_encoder_backend {model.text_encoder_backend}" if model.text_encoder_backend else ""
    text += f" --max_length {model.max_length}" if model.max_length else ""
    text += " --text_cache_stage features" if text_stage(config) == "features" else ""
    return {
        "ltxv2_cache_latents.py": f"{dataset} --vae {vae}",
        "ltxv2_cache_audio_latents.py": f"{dataset} --audio_vae {quoted(model.audio_vae) if model.audio_vae else vae}",
        "ltxv2_cache_text_encoder_outputs.py": f"{dataset} --ltxv2_model {quoted(model.ltxv2_model)} --text_encoder {encoder}{text}",
    }
