"""A look at model files: what a checkpoint holds, whether the encoder fits it. Headers and configs alone are read."""

import collections
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from musubi_tuner.config.model import Mode, ModelOptions
from musubi_tuner.doctor.findings import Finding, Note, look
from musubi_tuner.ltxv2.autoencoders.audio_vae import audio_vae_fingerprint
from musubi_tuner.ltxv2.autoencoders.video_vae import video_vae_fingerprint
from musubi_tuner.ltxv2.text.encoders import encoder_options
from musubi_tuner.ltxv2.text.pipeline import TextRecipe
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.versions import detect_version, streams_of, transformer_names
from musubi_tuner.ltxv2.weights import Checkpoint, open_checkpoint
from musubi_tuner.memory.card import GIB
from musubi_tuner.runtime.errors import UserError


def look_at_files(model: ModelOptions, mode: Mode) -> tuple[list[Finding], Checkpoint | None]:
    """The findings, and the transformer's checkpoint where it can be used."""
    opened: list[Checkpoint] = []

    def transformer() -> str:
        checkpoint = open_checkpoint(model.ltxv2_model)
        says = _transformer(checkpoint, mode)
        opened.append(checkpoint)
        return says

    findings = [look("transformer", transformer)]
    if not opened:
        return findings, None
    checkpoint = opened[0]
    findings.append(look("video VAE", lambda: _vae(model.vae or model.ltxv2_model, video_vae_fingerprint, "--vae")))
    if mode != "video":
        path = model.audio_vae or model.vae or model.ltxv2_model
        findings.append(look("audio VAE", lambda: _vae(path, audio_vae_fingerprint, "--audio_vae")))
    findings += _text(model, mode, checkpoint)
    return findings, checkpoint


def _transformer(checkpoint: Checkpoint, mode: Mode) -> str:
    names = transformer_names(checkpoint)
    config = read_config(checkpoint)
    missing = {"video", "audio"} - set(streams_of(names)) if mode == "av" else {mode} - set(streams_of(names))
    if missing:
        raise UserError(f"{checkpoint.path}: has no {' and no '.join(sorted(missing))} stream, which --ltx_mode {mode} trains.")
    size = sum(checkpoint.entries[name].size for name in names.values())
    kinds = collections.Counter(str(checkpoint.dtype(name)).removeprefix("torch.") for name in names.values())
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in kinds.most_common())
    return (
        f"{checkpoint.path}: LTX-{detect_version(checkpoint)}, {config.num_layers} blocks, {size / GIB:.2f} GiB, "
        f"streams {', '.join(streams_of(names))}; tensors: {dtypes}"
    )


def _vae(path: Path, fingerprint: Callable[[Checkpoint], str], flag: str) -> str | Note:
    try:
        return f"{path} ({fingerprint(open_checkpoint(path))[:8]})"
    except UserError as error:  # training alone does not need it: caching does, and previews
        return Note(f"{error} Training reads caches alone; caching and previews need {flag}.")


def _text(model: ModelOptions, mode: Mode, checkpoint: Checkpoint) -> Iterator[Finding]:
    if model.text_encoder is None:
        yield Finding("text encoder", "skipped", "--text_encoder is not given; it is needed for captions and prompts that are not cached")
        return

    def encoder() -> str:
        backend = model.text_encoder_backend or "gemma"
        options = encoder_options(
            str(model.text_encoder), tokenizer=model.tokenizer, backend=backend, device=torch.device("cpu"), max_length=model.max_length
        )
        TextRecipe(checkpoint=checkpoint, config=read_config(checkpoint), options=options, mode=mode, stage="context").check()
        return f"{model.text_encoder}: fits {checkpoint.path.name}"

    yield look("text encoder", encoder)
