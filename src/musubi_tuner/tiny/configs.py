"""`config` metadata of the tiny checkpoints: the released keys at toy width (docs/explanation/model.md, "Configuration")."""

from collections.abc import Sequence
from typing import Any

HEADS, VIDEO_HEAD, AUDIO_HEAD, LAYERS = 4, 32, 16, 2
VIDEO_WIDTH, AUDIO_WIDTH = HEADS * VIDEO_HEAD, HEADS * AUDIO_HEAD
CAPTION_CHANNELS = 48
GEMMA_WIDTH, GEMMA_LAYERS = 32, 3
GEMMA4_VERSION = "gemma4-12b-ltx-v1"
"""Release of LTX-2.5's text encoder, which its config and the transformer's metadata name."""
REGISTERS = 128
MODEL_VERSIONS = {"2.0": "2.0.0", "2.3": "2.3.0", "2.5": "2.5.1"}

_CONSTANTS: dict[str, Any] = {
    "dropout": 0.0,
    "attention_bias": True,
    "num_vector_embeds": None,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "upcast_attention": False,
    "standardization_norm": "rms_norm",
    "norm_elementwise_affine": False,
    "qk_norm": "rms_norm",
    "positional_embedding_type": "rope",
    "use_audio_video_cross_attention": True,
    "share_ff": False,
    "av_cross_ada_norm": True,
    "use_middle_indices_grid": True,
    "attention_type": "default",
}


def transformer_section(version: str) -> dict[str, Any]:
    """`transformer` of `2.0`, `2.3` or `2.5` style."""
    section = _CONSTANTS | {
        "norm_eps": 1e-6,
        "num_layers": LAYERS,
        "num_attention_heads": HEADS,
        "attention_head_dim": VIDEO_HEAD,
        "in_channels": 128,
        "out_channels": 128,
        "cross_attention_dim": VIDEO_WIDTH,
        "caption_channels": CAPTION_CHANNELS,
        "audio_num_attention_heads": HEADS,
        "audio_attention_head_dim": AUDIO_HEAD,
        "audio_in_channels": 128,
        "audio_out_channels": 128,
        "audio_cross_attention_dim": AUDIO_WIDTH,
        "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": [20, 2048, 2048],
        "audio_positional_embedding_max_pos": [20],
        "timestep_scale_multiplier": 1000,
        "av_ca_timestep_scale_multiplier": 1000,
        "rope_type": "split",
        "frequencies_precision": "float64",
        "connector_positional_embedding_max_pos": [4096],
    }
    if version == "2.0":
        return section | {
            "connector_num_attention_heads": HEADS,
            "connector_attention_head_dim": CAPTION_CHANNELS // HEADS,
            "connector_num_layers": 1,
        }
    section |= {
        "connector_num_attention_heads": HEADS,
        "connector_attention_head_dim": VIDEO_HEAD,
        "connector_num_layers": 2,
        "connector_apply_gated_attention": True,
        "audio_connector_num_attention_heads": HEADS,
        "audio_connector_attention_head_dim": AUDIO_HEAD,
        "audio_connector_num_layers": 2,
        "apply_gated_attention": True,
        "cross_attention_adaln": True,
        "caption_proj_before_connector": True,
        "caption_projection_first_linear": False,
        "caption_proj_input_norm": False,
        "caption_projection_second_linear": False,
    }
    if version == "2.5":
        section |= {"ff_bias": False, "audio_ff_bias": True, "use_prompt_adaln_single": True, "use_keyframes_abs_pos_embedding": True}
    return section


def vae_section(version: str) -> dict[str, Any]:
    """`vae`: multiplier 1 and no residual units at the finest levels, so that a window is encoded in seconds on a CPU."""
    section: dict[str, Any] = {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 128,
        "patch_size": 4,
        "norm_layer": "pixel_norm",
        "latent_log_var": "uniform",
        "causal_decoder": False,
        "timestep_conditioning": False,
        "decoder_base_channels": 8,
    }
    if version == "2.0":
        encoder = [(0, "all"), (0, "all"), (1, "all"), (1, None)]
        decoder = [(0, "all"), (0, "all"), (1, "all"), (1, None)]
        return section | {
            "encoder_blocks": blocks(encoder, "_res", (1, 1, 1)),
            "decoder_blocks": blocks(decoder, "", (2, 2, 2), residual=True),
        }
    encoder = [(0, "all"), (0, "all"), (1, "space"), (1, "time"), (1, None)]
    decoder = [(0, "all"), (0, "all"), (1, "space"), (1, "time"), (1, None)]
    return section | {
        "spatial_padding_mode": "zeros",
        "encoder_blocks": blocks(encoder, "_res", (1, 1, 1, 1)),
        "decoder_blocks": blocks(decoder, "", (2, 2, 1, 2)),
    }


def diffusion_vae_section() -> dict[str, Any]:
    """`vae` of 2.5 with the diffusion decoder: the encoder of the other file under keys of its own."""
    flat = vae_section("2.5")
    encoder = {
        "_class_name": "Encoder",
        "dims": 3,
        "in_channels": 3,
        "out_channels": 128,
        "blocks": flat["encoder_blocks"],
        "patch_size": 4,
        "latent_log_var": "constant",
        "norm_layer": "pixel_norm",
        "base_channels": 128,
        "spatial_padding_mode": "zeros",
    }
    decoder = {
        "_class_name": "NADiffusionDecoder",
        "in_channels": 128,
        "out_channels": 3,
        "patch_size": 4,
        "head_dim": 16,
        "stage_channels": [64, 32, 16, 16, 16],
        "stage_depths": [1, 1, 1, 1, 2],
        "stage_kernels": [[3, 3, 3]] * 5,
        "upsamples": [[[1, 2, 2], 2], [[2, 1, 1], 2], [[2, 2, 2], 1], [[2, 2, 2], 1]],
        "spatial_padding_mode": "zeros",
        "resampler_kind": "linear",
        "stage5_kernel": [3, 5, 5],
        "t_emb_dim": 32,
        "timestep_scale_multiplier": 1000.0,
        "default_num_inference_steps": 1,
    }
    return {"_class_name": "CausalDiffusionVAE", "dims": 3, "encoder": encoder, "decoder": decoder, "model_output_type": "x0"}


def audio_vae_section() -> dict[str, Any]:
    """`audio_vae`: 128 base channels, as the statistics are that long, and one unit a level."""
    network = {
        "ch": 128,
        "out_ch": 2,
        "in_channels": 2,
        "ch_mult": [1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "resolution": 256,
        "z_channels": 8,
        "double_z": True,
        "norm_type": "pixel",
        "causality_axis": "height",
        "dropout": 0.0,
        "mid_block_add_attention": False,
        "mel_bins": 64,
    }
    return {
        "model": {"params": {"sampling_rate": 16000, "ddconfig": network}},
        "preprocessing": {"stft": {"filter_length": 1024, "hop_length": 160, "causal": True}, "mel": {"n_mel_channels": 64}},
    }


def vocoder_section(version: str) -> dict[str, Any]:
    """`vocoder`: HiFi-GAN at 24 kHz for 2.0, two stages to 48 kHz from 2.3 on."""
    if version == "2.0":
        return {
            "resblock_kernel_sizes": [3, 7, 11],
            "resblock_dilation_sizes": [[1, 3, 5]] * 3,
            "stereo": True,
            "resblock": "1",
            "upsample_rates": [6, 5, 2, 2, 2],
            "upsample_kernel_sizes": [16, 15, 8, 4, 4],
            "upsample_initial_channel": 32,
            "output_sampling_rate": 24000,
        }
    stage = {
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3, 5]],
        "stereo": True,
        "resblock": "AMP1",
        "activation": "snakebeta",
        "use_tanh_at_final": False,
        "use_bias_at_final": False,
    }
    main = stage | {"upsample_rates": [5, 2, 2, 2, 2, 2], "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4], "upsample_initial_channel": 64}
    second = stage | {"upsample_rates": [6, 5, 2, 2, 2], "upsample_kernel_sizes": [12, 11, 4, 4, 4], "upsample_initial_channel": 32}
    second |= {
        "apply_final_activation": False,
        "n_fft": 512,
        "hop_length": 80,
        "num_mels": 64,
        "input_sampling_rate": 16000,
        "output_sampling_rate": 48000,
    }
    return {"vocoder": main, "bwe": second}


def blocks(levels: Sequence[tuple[int, str | None]], suffix: str, multipliers: tuple[int, ...], *, residual: bool = False) -> list[Any]:
    """(residual units, kind of the compression after them) of each level -> the official list."""
    blocks: list[Any] = []
    for place, (units, kind) in enumerate(levels):
        blocks.append(["res_x", {"num_layers": units}])
        if kind is not None:
            options: dict[str, Any] = {"multiplier": multipliers[place]}
            if residual:
                options["residual"] = True
            blocks.append([f"compress_{kind}{suffix}", options])
    return blocks
