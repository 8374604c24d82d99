"""From a checkpoint to a frozen transformer, tensor by tensor."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from musubi_tuner.ltxv2.filling import fill
from musubi_tuner.ltxv2.quantization import weight_of
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.ltxv2.versions import detect_version, streams_of, transformer_names
from musubi_tuner.ltxv2.weights import Checkpoint, building_from
from musubi_tuner.runtime.errors import UserError

STREAMS = {"video": ("video",), "av": ("video", "audio"), "audio": ("audio",)}
"""Streams that a training mode builds."""


def load_transformer(
    checkpoint: Checkpoint,
    *,
    mode: str,
    device: torch.device | str,
    dtype: torch.dtype,
    timestep_rule: str = "official",
    place: Callable[[str, Tensor], Tensor] | None = None,
) -> LTXModel:
    """Build the subset of the transformer that `mode` needs and fill it, frozen.

    Quantized weights are brought back to `dtype` (`quantization`).

    Args:
        mode: `video`, `av` or `audio`.
        place: called as `place(name, tensor)` instead of the plain move to `device`; None = that move.

    Raises:
        UserError: a stream that the checkpoint lacks, and what `fill` raises.
    """
    names = transformer_names(checkpoint)
    streams = STREAMS[mode]
    lacking = set(streams) - set(streams_of(names))
    if lacking:
        raise UserError(
            f"{checkpoint.path}: --ltx_mode {mode} needs the {' and '.join(sorted(lacking))} stream, which this file lacks. "
            "Give --ltxv2_model a checkpoint of the whole model."
        )
    config = read_config(checkpoint)
    with torch.device("meta"):
        model = LTXModel(config, streams, timestep_rule=timestep_rule)
        whole = set(model.state_dict()) if len(streams) == 2 else set(LTXModel(config).state_dict())
    unused = whole - set(model.state_dict())
    weights = {name: full for name, full in names.items() if weight_of(name) not in unused}
    fill(model, weights, checkpoint, device=device, dtype=dtype, place=place)
    return model.requires_grad_(False).eval()


def read_config(checkpoint: Checkpoint) -> TransformerConfig:
    """The transformer's shape from the metadata, or from tensor shapes where the file has none."""
    section = checkpoint.config.get("transformer")
    if section is not None:
        with building_from(checkpoint, "transformer"):
            return TransformerConfig.from_checkpoint_config(section)
    return _config_from_shapes(checkpoint, transformer_names(checkpoint), detect_version(checkpoint))


def _config_from_shapes(checkpoint: Checkpoint, names: Mapping[str, str], version: str) -> TransformerConfig:
    """What shapes tell, and the released constants for the rest (head count where there are no gates, RoPE of released models)."""

    def shape(name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        return checkpoint.shape(names[name]) if name in names else default

    video_dim = shape("patchify_proj.weight", (4096, 128))[0]
    audio_dim = shape("audio_patchify_proj.weight", (2048, 128))[0]
    gates = next((full for name, full in names.items() if name.endswith("to_gate_logits.weight")), None)
    heads = checkpoint.shape(gates)[0] if gates else 32
    return TransformerConfig(
        num_layers=1 + max(int(name.split(".")[1]) for name in names if name.startswith("transformer_blocks.")),
        num_attention_heads=heads,
        attention_head_dim=video_dim // heads,
        in_channels=shape("patchify_proj.weight", (video_dim, 128))[1],
        out_channels=shape("proj_out.weight", (128, video_dim))[0],
        cross_attention_dim=video_dim,
        caption_channels=shape("caption_projection.linear_1.weight", (video_dim, 3840))[1],
        audio_num_attention_heads=heads,
        audio_attention_head_dim=audio_dim // heads,
        audio_in_channels=shape("audio_patchify_proj.weight", (audio_dim, 128))[1],
        audio_out_channels=shape("audio_proj_out.weight", (128, audio_dim))[0],
        audio_cross_attention_dim=audio_dim,
        av_ca_timestep_scale_multiplier=1000.0,
        rope_type="split",
        frequencies_precision="float64",
        apply_gated_attention=gates is not None,
        cross_attention_adaln=any(name.endswith("prompt_scale_shift_table") for name in names),
        caption_proj_before_connector=version != "2.0",
        use_prompt_adaln_single=any("prompt_adaln_single." in name for name in names),
        ff_bias=any(name.endswith(".ff.net.0.proj.bias") and "audio_ff" not in name for name in names),
        audio_ff_bias=any(name.endswith(".audio_ff.net.0.proj.bias") for name in names),
        use_keyframes_abs_pos_embedding="keyframes_abs_pos_embedding" in names,
    )
