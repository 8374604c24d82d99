"""The same tiny transformer three times: ours, ltx-core's and diffusers', with one set of random weights."""

import math

import torch

from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.modality import Modality, levels_of
from musubi_tuner.ltxv2.transformer.model import LTXModel
from tests.parity.name_maps import to_diffusers

HEADS, VIDEO_HEAD, AUDIO_HEAD, LAYERS, CAPTION, CHANNELS = 4, 16, 8, 3, 24, 12
BATCH, FRAMES, HEIGHT, WIDTH, FPS, STEPS, TEXT = 2, 3, 2, 4, 25.0, 11, 9
VIDEO_TOKENS = FRAMES * HEIGHT * WIDTH


def config_section(style: str, rope: str = "split") -> dict:
    section = {
        "dropout": 0.0, "attention_bias": True, "num_vector_embeds": None, "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000, "use_linear_projection": False, "only_cross_attention": False, "cross_attention_norm": True,
        "double_self_attention": False, "upcast_attention": False, "standardization_norm": "rms_norm", "norm_elementwise_affine": False,
        "qk_norm": "rms_norm", "positional_embedding_type": "rope", "use_audio_video_cross_attention": True, "share_ff": False,
        "av_cross_ada_norm": True, "use_middle_indices_grid": True, "num_attention_heads": HEADS, "attention_head_dim": VIDEO_HEAD,
        "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": LAYERS, "cross_attention_dim": HEADS * VIDEO_HEAD,
        "norm_eps": 1e-6, "caption_channels": CAPTION, "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": [20, 2048, 2048], "timestep_scale_multiplier": 1000, "av_ca_timestep_scale_multiplier": 1000,
        "audio_num_attention_heads": HEADS, "audio_attention_head_dim": AUDIO_HEAD, "audio_in_channels": CHANNELS,
        "audio_out_channels": CHANNELS, "audio_cross_attention_dim": HEADS * AUDIO_HEAD, "audio_positional_embedding_max_pos": [20],
        "rope_type": rope, "frequencies_precision": "float64",
    }  # fmt: skip
    if style != "2.0":
        section |= {"apply_gated_attention": True, "cross_attention_adaln": True, "caption_proj_before_connector": True}
    if style == "2.5":
        section |= {"ff_bias": False, "audio_ff_bias": True, "use_prompt_adaln_single": True, "use_keyframes_abs_pos_embedding": True}
    if style == "kv":
        section |= {"use_prompt_adaln_single": False}
    return section


def randomize(model: torch.nn.Module, seed: int = 7) -> None:
    """Every parameter gets a value that matters, tables and biases included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if name.endswith("_norm.weight"):
            value = 1 + 0.2 * value
        elif parameter.ndim == 1:
            value = 0.1 * value
        elif "table" in name:
            value = 0.3 * value
        else:
            value = value / math.sqrt(parameter.shape[-1])
        parameter.data = value


def ours(style: str, rope: str = "split", *, rule: str = "official", streams: tuple[str, ...] = ("video", "audio")) -> LTXModel:
    whole = LTXModel(TransformerConfig.from_checkpoint_config(config_section(style, rope)), timestep_rule=rule)
    randomize(whole)
    if len(streams) == 2:
        return whole.eval()
    part = LTXModel(whole.config, streams, timestep_rule=rule)
    part.load_state_dict({name: value for name, value in whole.state_dict().items() if name in part.state_dict()})
    return part.eval()


def official(model: LTXModel, style: str, rope: str = "split") -> torch.nn.Module:
    """ltx-core 1.0.0 with the weights of `model`."""
    from ltx_core.model.transformer.model_configurator import LTXModelConfigurator

    reference = LTXModelConfigurator.from_config({"transformer": config_section(style, rope)}).to_empty(device="cpu")
    reference.load_state_dict(model.state_dict(), strict=True)
    return reference.eval()


def diffusers_model(model: LTXModel, style: str, rope: str = "split") -> torch.nn.Module:
    """diffusers' transformer with the weights of `model`."""
    from diffusers import LTX2VideoTransformer3DModel

    new = style != "2.0"
    reference = LTX2VideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, attention_head_dim=VIDEO_HEAD,
        cross_attention_dim=HEADS * VIDEO_HEAD, audio_in_channels=CHANNELS, audio_out_channels=CHANNELS, audio_num_attention_heads=HEADS,
        audio_attention_head_dim=AUDIO_HEAD, audio_cross_attention_dim=HEADS * AUDIO_HEAD, num_layers=LAYERS, caption_channels=CAPTION,
        rope_type=rope, rope_double_precision=True, timestep_scale_multiplier=1000, cross_attn_timestep_scale_multiplier=1000,
        gated_attn=new, audio_gated_attn=new, cross_attn_mod=new, audio_cross_attn_mod=new, use_prompt_embeddings=not new,
        perturbed_attn=True, use_prompt_adaln_single=style != "kv", ff_bias=style != "2.5", use_keyframes_abs_pos_embedding=style == "2.5",
    )  # fmt: skip
    reference.load_state_dict({to_diffusers(name): value for name, value in model.state_dict().items()}, strict=True)
    return reference.eval()


def inputs(style: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    video_width, audio_width = (CAPTION, CAPTION) if style == "2.0" else (HEADS * VIDEO_HEAD, HEADS * AUDIO_HEAD)
    data = {"video": random(BATCH, VIDEO_TOKENS, CHANNELS), "audio": random(BATCH, STEPS, CHANNELS)}
    data |= {"video_context": random(BATCH, TEXT, video_width), "audio_context": random(BATCH, TEXT, audio_width)}
    mask = torch.ones(BATCH, TEXT, dtype=torch.bool)
    mask[0, 6:] = False
    mask[1, 8:] = False
    data["mask"] = mask
    data["video_sigma"], data["audio_sigma"] = torch.tensor([0.73, 0.41]), torch.tensor([0.22, 0.95])
    keep = torch.ones(BATCH, VIDEO_TOKENS)
    keep[0, : HEIGHT * WIDTH] = 0
    data["video_timesteps"] = keep * data["video_sigma"][:, None]
    data["audio_timesteps"] = data["audio_sigma"][:, None].expand(BATCH, STEPS).clone()
    return data


def uniform(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with one sigma for all tokens of both streams."""
    sigma = torch.tensor([0.6, 0.3])
    timesteps = {"video_timesteps": sigma[:, None].expand(BATCH, VIDEO_TOKENS), "audio_timesteps": sigma[:, None].expand(BATCH, STEPS)}
    return {**data, "video_sigma": sigma, "audio_sigma": sigma, **timesteps}


def modalities(data: dict[str, torch.Tensor], **video_extra: object) -> tuple[Modality, Modality]:
    from musubi_tuner.ltxv2.geometry import audio_positions, video_positions

    video_levels, video_index = levels_of(data["video_timesteps"])
    audio_levels, audio_index = levels_of(data["audio_timesteps"])
    video = Modality(
        latent=data["video"], sigma=data["video_sigma"], levels=video_levels, level_index=video_index,
        positions=video_positions(FRAMES, HEIGHT, WIDTH, torch.full((BATCH,), FPS)), context=data["video_context"],
        context_mask=data["mask"], **video_extra,
    )  # fmt: skip
    audio = Modality(
        latent=data["audio"], sigma=data["audio_sigma"], levels=audio_levels, level_index=audio_index,
        positions=audio_positions(STEPS, BATCH), context=data["audio_context"], context_mask=data["mask"],
    )  # fmt: skip
    return video, audio


def run_official(
    reference: torch.nn.Module,
    data: dict[str, torch.Tensor],
    perturbations: object = None,
    self_mask: torch.Tensor | None = None,
    enabled: tuple[bool, bool] = (True, True),
) -> tuple:
    """ltx-core, with positions from its own code."""
    from ltx_core.components.patchifiers import AudioPatchifier, VideoLatentPatchifier, get_pixel_coords
    from ltx_core.guidance.perturbations import BatchedPerturbationConfig
    from ltx_core.model.transformer.modality import Modality as OfficialModality
    from ltx_core.types import AudioLatentShape, SpatioTemporalScaleFactors, VideoLatentShape

    grid = VideoLatentPatchifier(1).get_patch_grid_bounds(
        VideoLatentShape(batch=BATCH, channels=CHANNELS, frames=FRAMES, height=HEIGHT, width=WIDTH)
    )
    video_positions = get_pixel_coords(grid, SpatioTemporalScaleFactors.default(), causal_fix=True).float()
    video_positions[:, 0] /= FPS
    audio_positions = AudioPatchifier(1).get_patch_grid_bounds(AudioLatentShape(batch=BATCH, channels=8, frames=STEPS, mel_bins=16))
    mask = data["mask"].long()
    video = OfficialModality(latent=data["video"], sigma=data["video_sigma"], timesteps=data["video_timesteps"], positions=video_positions,
                             context=data["video_context"], context_mask=mask, enabled=enabled[0], attention_mask=self_mask)  # fmt: skip
    audio = OfficialModality(latent=data["audio"], sigma=data["audio_sigma"], timesteps=data["audio_timesteps"], positions=audio_positions,
                             context=data["audio_context"], context_mask=mask, enabled=enabled[1])  # fmt: skip
    return reference(video, audio, perturbations or BatchedPerturbationConfig.empty(BATCH))


def run_diffusers(reference: torch.nn.Module, data: dict[str, torch.Tensor], *, cross_timestep: bool = True, **extra: object) -> tuple:
    mask = data["mask"].long()
    return reference(
        hidden_states=data["video"], audio_hidden_states=data["audio"], encoder_hidden_states=data["video_context"],
        audio_encoder_hidden_states=data["audio_context"], timestep=data["video_timesteps"] * 1000,
        audio_timestep=data["audio_timesteps"] * 1000, sigma=data["video_sigma"] * 1000, audio_sigma=data["audio_sigma"] * 1000,
        encoder_attention_mask=mask, audio_encoder_attention_mask=mask, num_frames=FRAMES, height=HEIGHT, width=WIDTH, fps=FPS,
        audio_num_frames=STEPS, use_cross_timestep=cross_timestep, return_dict=False, **extra,
    )  # fmt: skip


class GateFromOther(torch.nn.Module):
    """Wraps a gate AdaLN of diffusers so that it hears 1000 * sigma of the other stream (the v1.2.0 rule)."""

    def __init__(self, inner: torch.nn.Module, sigma: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.sigma = inner, sigma

    def forward(self, timestep: torch.Tensor, *args: object, **kwargs: object) -> object:
        per_sample = timestep.numel() // self.sigma.numel()
        return self.inner((self.sigma * 1000).repeat_interleave(per_sample), *args, **kwargs)


def run_diffusers_hybrid(reference: torch.nn.Module, data: dict[str, torch.Tensor], **extra: object) -> tuple:
    a2v, v2a = reference.av_cross_attn_video_a2v_gate, reference.av_cross_attn_audio_v2a_gate
    reference.av_cross_attn_video_a2v_gate = GateFromOther(a2v, data["audio_sigma"])
    reference.av_cross_attn_audio_v2a_gate = GateFromOther(v2a, data["video_sigma"])
    try:
        return run_diffusers(reference, data, cross_timestep=False, **extra)
    finally:
        reference.av_cross_attn_video_a2v_gate, reference.av_cross_attn_audio_v2a_gate = a2v, v2a


def difference(left: tuple, right: tuple) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))
