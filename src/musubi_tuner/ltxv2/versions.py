"""Which model a checkpoint is, from its tensors' names and shapes first and its metadata second."""

from collections.abc import Collection

import torch

from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.runtime.errors import UserError

TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "")
"""Prefixes that transformer tensors occur under, in the order they are tried."""

CONNECTORS = ("video_embeddings_connector.", "audio_embeddings_connector.")
"""Text connectors: stored under the transformer's prefix, but part of the text side."""

_MARK = "patchify_proj.weight"
_AUDIO_MARK = "audio_patchify_proj.weight"


def transformer_prefix(names: Collection[str]) -> str | None:
    """The prefix that the transformer's tensors have, or None where there is no transformer."""
    names = set(names)
    for prefix in TRANSFORMER_PREFIXES:
        if f"{prefix}{_MARK}" in names or f"{prefix}{_AUDIO_MARK}" in names:
            return prefix
    return None


def transformer_names(checkpoint: Checkpoint) -> dict[str, str]:
    """{official name: full name} of the transformer's tensors, connectors left out.

    Raises:
        UserError: the file holds no LTX-2 transformer, or one of LTX-Video 0.9.
    """
    names = checkpoint.names()
    prefix = transformer_prefix(names)
    if prefix is None:
        raise UserError(
            f"{checkpoint.path}: holds no LTX-2 transformer (no '{_MARK}'). "
            "Give --ltxv2_model the full checkpoint, its transformer file, or the folder of a split pack."
        )
    found = checkpoint.with_prefix(prefix)
    found = {name: full for name, full in found.items() if not name.startswith(CONNECTORS)}
    if not prefix:
        others = ("vae.", "audio_vae.", "vocoder.", "text_embedding_projection.", "duration_head.", "encoder.", "decoder.", "per_channel_")
        found = {name: full for name, full in found.items() if not name.startswith(others)}
    if (
        not any("q_norm" in name for name in found)
        or "adaln_single.linear.weight" not in found
        and "audio_adaln_single.linear.weight" not in found
    ):
        raise UserError(f"{checkpoint.path}: the transformer's tensors are not those of LTX-2 (no q_norm or adaln_single).")
    if _AUDIO_MARK not in found and not _is_ltx2_video(checkpoint, found):
        raise UserError(
            f"{checkpoint.path}: a transformer of LTX-Video 0.9. This trainer is for LTX-2, 2.3 and 2.5, whose "
            "checkpoints hold video and sound."
        )
    return found


def detect_version(checkpoint: Checkpoint) -> str:
    """`2.0`, `2.3` or `2.5` of a checkpoint that holds a transformer (docs/explanation/model.md, "blocks")."""
    names = transformer_names(checkpoint)
    if any(name.startswith(("caption_projection.", "audio_caption_projection.")) for name in names):
        return "2.0"
    video_ff = [name for name in names if ".ff.net.0.proj." in name]
    if video_ff and not any(name.endswith(".bias") for name in video_ff):
        return "2.5"
    return "2.5" if "keyframes_abs_pos_embedding" in names else "2.3"


def looks_distilled(checkpoint: Checkpoint) -> bool:
    """Whether its name or its metadata call it distilled; tensors do not tell."""
    said = (checkpoint.path.name, *(f"{key} {value}" for key, value in checkpoint.metadata.items() if key != "config"))
    return any("distilled" in text.lower() for text in said)


def stored_in_8_bits(checkpoint: Checkpoint) -> bool:
    """Whether weights of the transformer are fp8 or int8."""
    codes = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
    return any(checkpoint.dtype(full) in codes for full in transformer_names(checkpoint).values())


def streams_of(names: Collection[str]) -> tuple[str, ...]:
    """Which streams a transformer's tensors serve."""
    return tuple(stream for stream, mark in (("video", _MARK), ("audio", _AUDIO_MARK)) if mark in names)


def _is_ltx2_video(checkpoint: Checkpoint, names: dict[str, str]) -> bool:
    """A video-only LTX-2 file, and not LTX-Video 0.9: by its config, or by what 0.9 never had."""
    section = checkpoint.config.get("transformer", {})
    if "audio_num_attention_heads" in section or checkpoint.model_version.startswith("2"):
        return True
    return any("to_gate_logits" in name or name.startswith("prompt_adaln_single") for name in names)
