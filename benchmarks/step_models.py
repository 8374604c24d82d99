"""One training step's forward pass in several implementations, on the same weights, the same LoRA and the same noised clip."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.ltxv2.filling import set_tensor
from musubi_tuner.ltxv2.geometry import audio_positions, video_positions
from musubi_tuner.ltxv2.transformer.block import sequence_axes
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.modality import Modality
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.memory.checkpointing import Recompute
from musubi_tuner.memory.engine import BlockEngine
from musubi_tuner.memory.quantized import LowBitPlacer
from musubi_tuner.memory.streaming import BlockStreamer, spread
from musubi_tuner.networks.lora import adds_everywhere, group_projections
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, create_network
from musubi_tuner.training.optimizer import clip, make_optimizer
from tests.parity.name_maps import to_diffusers

FPS = 24.0
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A noised clip with sound, its text, and the velocities to predict. One noise level for all tokens of both streams."""

    grid: tuple[int, int, int]
    """Latent frames, rows, columns."""
    video: Tensor
    audio: Tensor
    video_context: Tensor
    audio_context: Tensor
    sigma: Tensor
    video_target: Tensor
    audio_target: Tensor

    def loss(self, video: Tensor, audio: Tensor) -> Tensor:
        return (video.float() - self.video_target).pow(2).mean() + (audio.float() - self.audio_target).pow(2).mean()


@dataclass(frozen=True, slots=True)
class Implementation:
    """Something that can be timed."""

    name: str
    forward: Callable[[Sample], Tensor]
    """Returns the loss."""
    adapters: Mapping[str, nn.Parameter]
    """{official name.lora_A or lora_B: parameter}."""
    network: LoRANetwork | None = None
    """Ours."""


def updater(implementation: Implementation) -> Callable[[], None]:
    """Clips the gradients, takes a step of AdamW and drops them: ours as in training, others with torch's own."""
    parameters = list(implementation.adapters.values())
    ours, on_card = implementation.network is not None, parameters[0].is_cuda
    if ours:
        optimizer = make_optimizer("AdamW", [{"params": parameters, "lr": 1e-6}], 1e-6, {})
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=on_card)

    def update() -> None:
        (clip if ours else torch.nn.utils.clip_grad_norm_)(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def make_sample(config: TransformerConfig, shape: Sequence[int], text_tokens: int, device: torch.device, dtype: torch.dtype) -> Sample:
    frames, rows, columns, steps = shape
    generator = torch.Generator().manual_seed(1)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    tokens = frames * rows * columns
    return Sample(
        (frames, rows, columns),
        random(1, tokens, config.in_channels).to(dtype),
        random(1, steps, config.audio_in_channels).to(dtype),
        random(1, text_tokens, config.video_context_width).to(dtype),
        random(1, text_tokens, config.audio_context_width).to(dtype),
        torch.full((1,), 0.6, device=device),
        random(1, tokens, config.out_channels),
        random(1, steps, config.audio_out_channels),
    )


def make_weights(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights under official names: zeros would flatter every timing."""
    with torch.device("meta"):
        model = LTXModel(config)
    generator = torch.Generator(device).manual_seed(2)
    weights = {}
    for name, parameter in model.named_parameters():
        spread_ = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        value = torch.randn(parameter.shape, generator=generator, device=device) * spread_
        weights[name] = (1 + value if name.endswith("_norm.weight") else value).to(dtype)
    return weights


def make_adapters(config: TransformerConfig, rank: int) -> dict[str, Tensor]:
    """Random A and non-zero B of every attention linear."""
    with torch.device("meta"):
        model = LTXModel(config)
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "attn" in name and name.startswith("transformer_blocks") and name.endswith(tuple(TARGETS)):
            tensors[f"{name}.lora_A"] = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
            tensors[f"{name}.lora_B"] = torch.randn(module.out_features, rank, generator=generator) * 0.1
    return tensors


def in_few_bits(name: str, weight: Tensor) -> bool:
    """Whether a weight is one of those that a weight format concerns."""
    return weight.ndim == 2 and name.startswith("transformer_blocks") and "gate" not in name and "table" not in name


def ours(
    name: str,
    config: TransformerConfig,
    weights: Mapping[str, Tensor],
    adapters: Mapping[str, Tensor],
    *,
    level: Recompute | None,
    compiled: bool,
    weight_format: str | None = None,
    streamed: int = 0,
    inputs_on_host: bool = False,
    network_type: str = "lora",
) -> Implementation:
    """The production engine on a pinned recompute level.

    Args:
        network_type: other types than `lora` start as they do in training, at the rank of `adapters`.
    """
    first = next(iter(weights.values()))
    with torch.device("meta"):
        model = LTXModel(config, timestep_rule="cross")
    placer = LowBitPlacer(
        device=first.device,
        dtype=first.dtype,
        weight_format=weight_format,
        low_bit=lambda key: in_few_bits(key, weights[key]),
    )
    for key, value in weights.items():
        set_tensor(model, key, placer(key, value) if weight_format else value)
    model.requires_grad_(False)
    placer.swap_linears(model)
    rank = next(value.shape[0] for key, value in adapters.items() if key.endswith("lora_A"))
    network = create_network(model, dim=rank, alpha=rank, args={"type": network_type}, seed=0)
    if network_type == "lora":
        _copy(network.named_parameters(), adapters, first.device)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(first.device)
    group_projections(model)
    blocks = model.transformer_blocks
    chosen = [blocks[index] for index in spread(len(blocks), streamed)]
    streamer = BlockStreamer(chosen, first.device) if chosen else None
    model.run_block = BlockEngine(
        blocks,
        [level] * len(blocks),
        max_rank=network.max_rank,
        keeps_sums=adds_everywhere(blocks),
        compiled=compiled,
        sequence_axes=sequence_axes,
        streamer=streamer,
        inputs_on_host=inputs_on_host,
    )

    def forward(sample: Sample) -> Tensor:
        velocity = model(*modalities(sample))
        return sample.loss(velocity.video, velocity.audio)

    return Implementation(name, forward, network.named_parameters(), network)


def diffusers_peft(
    config: TransformerConfig, weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], *, checkpointed: bool
) -> Implementation:
    """diffusers' transformer with peft, everything in the weights' dtype and no text mask: its best settings."""
    from diffusers import LTX2VideoTransformer3DModel
    from peft import LoraConfig, inject_adapter_in_model

    first = next(iter(weights.values()))
    new = config.cross_attention_adaln
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(
            in_channels=config.in_channels, out_channels=config.out_channels, num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim, cross_attention_dim=config.cross_attention_dim,
            audio_in_channels=config.audio_in_channels, audio_out_channels=config.audio_out_channels,
            audio_num_attention_heads=config.audio_num_attention_heads, audio_attention_head_dim=config.audio_attention_head_dim,
            audio_cross_attention_dim=config.audio_cross_attention_dim, num_layers=config.num_layers,
            caption_channels=config.caption_channels, rope_type=config.rope_type, rope_double_precision=True,
            timestep_scale_multiplier=1000, cross_attn_timestep_scale_multiplier=1000, gated_attn=new, audio_gated_attn=new,
            cross_attn_mod=new, audio_cross_attn_mod=new, use_prompt_embeddings=not new, perturbed_attn=True,
        )  # fmt: skip
    model.load_state_dict({to_diffusers(name): value for name, value in weights.items()}, strict=True, assign=True)
    model.requires_grad_(False)
    rank = next(value.shape[0] for key, value in adapters.items() if key.endswith("lora_A"))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), model)
    found = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    named = {key: found[f"{to_diffusers(key.rpartition('.')[0] + '.')}{key.rpartition('.')[2]}.default.weight"] for key in adapters}
    _copy(named, adapters, first.device, first.dtype)
    model.train()
    if checkpointed:
        model.enable_gradient_checkpointing()

    def forward(sample: Sample) -> Tensor:
        frames, rows, columns = sample.grid
        timestep = 1000 * sample.sigma[:, None]
        video, audio = model(
            hidden_states=sample.video, audio_hidden_states=sample.audio, encoder_hidden_states=sample.video_context,
            audio_encoder_hidden_states=sample.audio_context, timestep=timestep.expand(-1, sample.video.shape[1]),
            audio_timestep=timestep.expand(-1, sample.audio.shape[1]), sigma=1000 * sample.sigma, audio_sigma=1000 * sample.sigma,
            num_frames=frames, height=rows, width=columns, fps=FPS, audio_num_frames=sample.audio.shape[1],
            use_cross_timestep=True, return_dict=False,
        )  # fmt: skip
        return sample.loss(video, audio)

    return Implementation("diffusers + peft" + (", checkpointed" if checkpointed else ""), forward, named)


def ltx_core_peft(
    section: Mapping[str, Any], weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], *, checkpointed: bool
) -> Implementation:
    """ltx-core's transformer with peft as the official trainer runs it: bf16 autocast, float32 adapters, a text mask of ones."""
    from ltx_core.guidance.perturbations import BatchedPerturbationConfig
    from ltx_core.model.transformer.modality import Modality as OfficialModality
    from ltx_core.model.transformer.model_configurator import LTXModelConfigurator
    from peft import LoraConfig, inject_adapter_in_model

    first = next(iter(weights.values()))
    with torch.device("meta"):
        model = LTXModelConfigurator.from_config({"transformer": dict(section)})
    model.load_state_dict(dict(weights), strict=True, assign=True)
    model.requires_grad_(False)
    rank = next(value.shape[0] for key, value in adapters.items() if key.endswith("lora_A"))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), model)
    found = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    named = {key: found[f"{key}.default.weight"] for key in adapters}
    _copy(named, adapters, first.device)
    model.set_gradient_checkpointing(checkpointed)
    model.train()

    def modality(latent: Tensor, positions: Tensor, context: Tensor, sample: Sample) -> OfficialModality:
        mask = torch.ones(context.shape[:2], dtype=torch.long, device=context.device)
        timesteps = sample.sigma[:, None].expand(-1, latent.shape[1])
        return OfficialModality(
            latent=latent, sigma=sample.sigma, timesteps=timesteps, positions=positions, context=context, context_mask=mask, enabled=True
        )

    def forward(sample: Sample) -> Tensor:
        autocast = contextlib.nullcontext() if first.dtype == torch.float32 else torch.autocast(first.device.type, first.dtype)
        video_places, audio_places = _positions(sample)
        with autocast:
            video, audio = model(
                modality(sample.video, video_places, sample.video_context, sample),
                modality(sample.audio, audio_places, sample.audio_context, sample),
                BatchedPerturbationConfig.empty(1),
            )
        return sample.loss(video, audio)

    return Implementation("ltx-core + peft" + (", checkpointed" if checkpointed else ""), forward, named)


def _positions(sample: Sample) -> tuple[Tensor, Tensor]:
    device = sample.video.device
    fps = torch.full((1,), FPS, device=device)
    return video_positions(*sample.grid, fps), audio_positions(sample.audio.shape[1], 1, device)


def modalities(sample: Sample) -> tuple[Modality, Modality]:
    places = _positions(sample)
    streams = []
    for latent, positions, context in zip((sample.video, sample.audio), places, (sample.video_context, sample.audio_context), strict=True):
        levels = sample.sigma[:, None]
        streams.append(Modality(latent=latent, sigma=sample.sigma, levels=levels, level_index=None, positions=positions, context=context))
    return streams[0], streams[1]


def _copy(
    parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    assert parameters.keys() == values.keys(), "the same linears are adapted"
    for name, parameter in parameters.items():
        parameter.data = values[name].to(device=device, dtype=dtype, copy=True)
