"""`config` metadata of the world's checkpoint: the official keys of 2.3 at the widths of a model that is trained in minutes."""

from typing import Any

from musubi_tuner.tiny import configs

HEADS, VIDEO_HEAD, AUDIO_HEAD, LAYERS = 4, 40, 20, 6
VIDEO_WIDTH, AUDIO_WIDTH = HEADS * VIDEO_HEAD, HEADS * AUDIO_HEAD
VERSION = "2.3"
_ENCODER = ((0, "all"), (0, "all"), (0, "space"), (0, "time"), (0, None))
_DECODER = ((1, "all"), (1, "all"), (1, "space"), (1, "time"), (1, None))
"""(residual units, compression after them) of each level, as the files list them: the decoder's are read from the end."""


def full_config() -> dict[str, Any]:
    """All sections of the file."""
    return {
        "transformer": transformer_section(),
        "vae": vae_section(),
        "audio_vae": audio_vae_section(),
        "vocoder": vocoder_section(),
    }


def transformer_section() -> dict[str, Any]:
    """`transformer`: 6 blocks, 160 wide for video and 80 for sound."""
    return configs.transformer_section(VERSION) | {
        "num_layers": LAYERS,
        "num_attention_heads": HEADS,
        "attention_head_dim": VIDEO_HEAD,
        "cross_attention_dim": VIDEO_WIDTH,
        "audio_num_attention_heads": HEADS,
        "audio_attention_head_dim": AUDIO_HEAD,
        "audio_cross_attention_dim": AUDIO_WIDTH,
        "connector_num_attention_heads": HEADS,
        "connector_attention_head_dim": VIDEO_HEAD,
        "audio_connector_num_attention_heads": HEADS,
        "audio_connector_attention_head_dim": AUDIO_HEAD,
    }


def vae_section() -> dict[str, Any]:
    """`vae`: an encoder without residual units, so that it can be linear, and a decoder with one at each level."""
    return configs.vae_section(VERSION) | {
        "decoder_base_channels": 16,
        "encoder_blocks": configs.blocks(_ENCODER, "_res", (1, 1, 1, 2)),
        "decoder_blocks": configs.blocks(_DECODER, "", (2, 2, 1, 2)),
    }


def audio_vae_section() -> dict[str, Any]:
    """`audio_vae` without residual units below the middle."""
    section = configs.audio_vae_section()
    section["model"]["params"]["ddconfig"]["num_res_blocks"] = 0
    return section


def vocoder_section() -> dict[str, Any]:
    """`vocoder`: a first stage with four upsamplings instead of six."""
    section = configs.vocoder_section(VERSION)
    section["vocoder"] |= {"upsample_rates": [5, 4, 4, 2], "upsample_kernel_sizes": [11, 8, 8, 4], "upsample_initial_channel": 128}
    return section
