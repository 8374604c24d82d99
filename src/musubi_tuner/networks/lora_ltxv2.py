"""The adapter around the LTX-2 transformer, and the LoRA network that is trained on it.

`--network_module` names this module; another one with the same `create_network` works in its place.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from musubi_tuner.conditioning.noising import model_input
from musubi_tuner.conditioning.tokens import audio_stream, video_stream
from musubi_tuner.flow.draws import generator_for
from musubi_tuner.flow.timestep_format import to_sigma
from musubi_tuner.ltxv2 import geometry
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.modality import Modality, Perturbations, Velocity
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.networks.formats import Factors
from musubi_tuner.networks.layers import LoRALinear
from musubi_tuner.networks.targets import TargetChoice, choose_targets, count_by_stream
from musubi_tuner.runtime.errors import UserError

_ARGS = ("preset", "include_patterns", "exclude_patterns")


class OfficialLTXV2Wrapper(nn.Module):
    """Hides the official interface: text is split by width, noise levels come in the chosen format."""

    def __init__(self, transformer: LTXModel, timestep_format: str) -> None:
        super().__init__()
        self.transformer = transformer
        self.timestep_format = timestep_format

    @property
    def config(self) -> TransformerConfig:
        return self.transformer.config

    @property
    def streams(self) -> tuple[str, ...]:
        return self.transformer.streams

    def forward(
        self,
        video: Modality | None,
        audio: Modality | None,
        text: Tensor,
        text_mask: Tensor | None = None,
        perturbations: Perturbations | None = None,
    ) -> Velocity:
        """Velocity of the streams that are given.

        Args:
            video, audio: inputs without context, from `conditioning.noising.model_input`.
            text: (B, S, Cv) or (B, S, Cv + Ca) text contexts `[video, audio]`.
            text_mask: (B, S) bool, True = real; None where all are.
        """
        video_text, audio_text = self.split_text(text)
        if video is not None:
            video = replace(video, context=video_text, context_mask=text_mask)
        if audio is not None:
            audio = replace(audio, context=audio_text, context_mask=text_mask)
        return self.transformer(video, audio, perturbations)

    def split_text(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """Each stream's context, split by the configured widths and never by halves.

        Raises:
            UserError: a width that fits neither one stream nor both.
        """
        video_width, audio_width = self.config.video_context_width, self.config.audio_context_width
        width = text.shape[-1]
        if width == video_width + audio_width:
            return text[..., :video_width], text[..., video_width:]
        if width == video_width and "audio" not in self.streams:
            return text, None
        raise UserError(
            f"the cached text is {width} wide; this model takes {video_width} (video) or {video_width} + {audio_width} (video and audio). "
            "Either another text encoder backend was used for caching, or the captions were cached without '--ltx_mode av'. "
            "Run ltxv2_cache_text_encoder_outputs.py with the same --ltxv2_model, --text_encoder_backend and --ltx_mode as training."
        )

    def predict_latents(
        self,
        latents: Tensor | None,
        timesteps: Tensor,
        text: Tensor,
        *,
        fps: Tensor | float = 24.0,
        audio_latents: Tensor | None = None,
        audio_timesteps: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Latent-shaped velocities, in the manner of musubi-tuner.

        Args:
            latents: (B, 128, F, H, W) noised video latents.
            timesteps: (), (1,) or (B,) in this wrapper's timestep format; of the audio too where `audio_timesteps` is None.
            audio_latents: (B, 8, T, 16) noised audio latents.

        Raises:
            ValueError: timesteps of another shape.
        """
        given = latents if latents is not None else audio_latents
        assert given is not None
        batch = given.shape[0]
        video_input = audio_input = None
        if latents is not None:
            rates = torch.as_tensor(fps, dtype=torch.float32, device=latents.device).expand(batch)
            stream = video_stream(latents, rates)
            video_input = model_input(stream, stream.clean, self._sigma(timesteps, batch))
        if audio_latents is not None:
            stream = audio_stream(audio_latents, audio_lengths)
            audio_sigma = self._sigma(timesteps if audio_timesteps is None else audio_timesteps, batch)
            audio_input = model_input(stream, stream.clean, audio_sigma)
        velocity = self(video_input, audio_input, text, text_mask)
        video = None if velocity.video is None else geometry.unpatchify_video(velocity.video, *latents.shape[2:])
        audio = None if velocity.audio is None else geometry.unpatchify_audio(velocity.audio)
        return video, audio

    def _sigma(self, timesteps: Tensor, batch: int) -> Tensor:
        if timesteps.ndim > 1 or timesteps.numel() not in (1, batch):
            raise ValueError(f"timesteps of shape {tuple(timesteps.shape)}: (), (1,) or ({batch},) expected")
        return to_sigma(timesteps.reshape(-1), self.timestep_format).expand(batch)


class LoRANetwork:
    """The adapters of one model: what is trained, saved and switched off."""

    def __init__(self, layers: Mapping[str, LoRALinear], dim: int, alpha: float) -> None:
        self.layers = dict(layers)
        self.dim = dim
        self.alpha = alpha

    @property
    def names(self) -> list[str]:
        return list(self.layers)

    def parameters(self) -> list[nn.Parameter]:
        """A and B of every layer, in a fixed order."""
        return [parameter for layer in self.layers.values() for parameter in (layer.lora_A, layer.lora_B)]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {f"{name}.{leaf}": getattr(layer, leaf) for name, layer in self.layers.items() for leaf in ("lora_A", "lora_B")}

    def count_by_stream(self) -> dict[str, int]:
        return count_by_stream(self.names)

    def factors(self) -> Factors:
        """A, and B with alpha / rank folded in, under official names."""
        return {name: (layer.lora_A.detach(), layer.lora_B.detach() * layer.scale) for name, layer in self.layers.items()}

    def load_factors(self, factors: Factors) -> None:
        """Start from a LoRA that was read by `formats.read_lora`.

        Raises:
            UserError: a rank that differs, or modules that this network does not adapt.
        """
        foreign = sorted(set(factors) - set(self.layers))
        if foreign:
            raise UserError(
                f"--network_weights adapts {len(foreign)} module(s) that this network does not, first '{foreign[0]}'. "
                "Choose the same targets with --network_args."
            )
        for name, (down, up) in factors.items():
            layer = self.layers[name]
            if down.shape[0] != layer.rank:
                raise UserError(
                    f"--network_weights has rank {down.shape[0]} at '{name}', --network_dim is {layer.rank}. Give "
                    f"--network_dim {down.shape[0]}."
                )
            with torch.no_grad():
                layer.lora_A.copy_(down)
                layer.lora_B.copy_(up / layer.scale)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, for as long as the context lasts."""
        before = {name: layer.enabled for name, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                layer.enabled = before[name]


def create_network(transformer: nn.Module, *, dim: int, alpha: float, args: Mapping[str, str], seed: int) -> LoRANetwork:
    """Put adapters on the transformer's chosen linears, in place.

    Args:
        args: `--network_args` as key=value: `preset` (attention, attention_ff, video, audio, cross), `include_patterns` and
            `exclude_patterns` (regular expressions over official names, separated by commas).

    Raises:
        UserError: an unknown argument, a rank below 1, or no target.
    """
    for key in args:
        if key not in _ARGS:
            raise UserError(f"--network_args {key}=...: unknown; known are {', '.join(_ARGS)}.")
    if dim < 1:
        raise UserError(f"--network_dim {dim}: a rank of 1 at least.")
    choice = TargetChoice(
        preset=args.get("preset", "attention"),
        include=tuple(filter(None, args.get("include_patterns", "").split(","))),
        exclude=tuple(filter(None, args.get("exclude_patterns", "").split(","))),
    )
    layers = {}
    for name in choose_targets(transformer, choice):
        owner_name, _, leaf = name.rpartition(".")
        owner = transformer.get_submodule(owner_name)
        layer = LoRALinear(owner.get_submodule(leaf), dim, alpha, generator_for(seed, "lora", name))
        owner.add_module(leaf, layer)
        layers[name] = layer
    return LoRANetwork(layers, dim, alpha)
