"""The adapter around the LTX-2 transformer, and the network that is trained on it.

`--network_module` names this module; another one with the same `create_network` works in its place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from musubi_tuner.ltxv2.text.connectors import Connectors
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.modality import Modality, Perturbations, Velocity
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.networks.arguments import network_arguments
from musubi_tuner.networks.base import FrozenLinear
from musubi_tuner.networks.network import LoRANetwork
from musubi_tuner.networks.reading import NetworkFile
from musubi_tuner.networks.targets import choose_targets, linear_names
from musubi_tuner.networks.types import TYPES
from musubi_tuner.runtime.draws import generator_for
from musubi_tuner.runtime.errors import UserError

_ALWAYS_ALLOWED = 256
"""Rank that small linears take too, such as those of gates, so that one rank serves all of a network."""


class OfficialLTXV2Wrapper(nn.Module):
    """Hides the official interface: text is split by width, noise levels come in the chosen format.

    With `connectors` (which may be trained) the text is features before them, and contexts are made in the forward pass.
    """

    def __init__(self, transformer: LTXModel, timestep_format: str, connectors: Connectors | None = None) -> None:
        super().__init__()
        self.transformer = transformer
        self.connectors = connectors
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
        """Velocity of the streams that are present.

        Args:
            video, audio: inputs without context, from `conditioning.tokens.model_input`.
            text: (B, S, Cv) or (B, S, Cv + Ca) text contexts `[video, audio]`; features of these widths where there are connectors.
            text_mask: (B, S) bool, True = real; None where all are. Of features, the real ones come first.
        """
        return self.transformer(*self._with_text(video, audio, text, text_mask), perturbations)

    def passes(
        self, video: Modality | None, audio: Modality | None, texts: Sequence[tuple[Tensor, Tensor | None, Perturbations | None]]
    ) -> list[Velocity]:
        """`forward` of the same streams with several texts and perturbations, bit for bit; without gradients.

        Where weights are streamed, all passes go through a block before the next one does, so that it is copied once; elsewhere one
        pass follows the other, which needs less memory.
        """
        if not getattr(self.transformer.run_block, "streams_weights", False):
            return [self(video, audio, *one) for one in texts]
        return self.transformer.forward_together(
            [(*self._with_text(video, audio, text, mask), perturbations) for text, mask, perturbations in texts]
        )

    def _with_text(
        self, video: Modality | None, audio: Modality | None, text: Tensor, text_mask: Tensor | None
    ) -> tuple[Modality | None, Modality | None]:
        video_text, audio_text = self.split_text(text)
        if self.connectors is not None:
            video_text, audio_text = self._connect(self.connectors, video_text, audio_text, text_mask)
            text_mask = None
        if video is not None:
            video = replace(video, context=video_text, context_mask=text_mask)
        if audio is not None:
            audio = replace(audio, context=audio_text, context_mask=text_mask)
        return video, audio

    def _connect(
        self, connectors: Connectors, video: Tensor, audio: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Contexts (B, 1024, C) of the streams that the model has; every position of them is real."""
        lengths = torch.full(video.shape[:1], video.shape[1], device=video.device) if mask is None else mask.sum(1)
        contexts = {
            stream: connectors.get_submodule(f"{stream}_embeddings_connector")(features, lengths)
            for stream, features in (("video", video), ("audio", audio))
            if stream in self.streams
        }
        return contexts.get("video"), contexts.get("audio")

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


def create_network(
    transformer: nn.Module, *, dim: int, alpha: float, args: Mapping[str, str], seed: int, like: NetworkFile | None = None
) -> LoRANetwork:
    """Put adapters on the transformer's chosen linears, in place. The start is the base model exactly.

    Args:
        args: `--network_args` as key=value (docs/how-to/networks.md).
        like: take type, modules and shapes from this file, with a scale of 1, in place of `dim`, `alpha` and the targets
            (`--dim_from_weights`).

    Raises:
        UserError: an unknown argument, a value out of its range, or no target.
    """
    if like is not None and like.kind != "full":  # which needs no `include_patterns` where a file says what it is of
        args = {"type": like.kind, **args}
    arguments = network_arguments(args, dim=dim, alpha=alpha)
    kind = arguments.kind or ("lora" if like is None else like.kind)
    if like is not None and kind != like.kind:
        raise UserError(f"--network_args type={kind}: {like.path} is of type {like.kind}, which --dim_from_weights takes over.")
    layer_class = TYPES[kind]
    layers = {}
    if like is None:
        names = choose_targets(transformer, arguments.targets)
    else:
        names = [name for name in linear_names(transformer) if name in like.adapters]
    for name in names:
        if like is None:
            spec = arguments.spec(name)
        else:
            spec = replace(layer_class.spec_of(like.adapters[name].tensors), dropout=arguments.dropout)
        owner_name, _, leaf = name.rpartition(".")
        owner = transformer.get_submodule(owner_name)
        target = owner.get_submodule(leaf)
        assert isinstance(target, FrozenLinear), "targets are linears"
        if like is None:
            _check_rank(kind, name, spec.rank, target)
        layer = layer_class(target, spec, generator_for(seed, "lora", name))
        owner.add_module(leaf, layer)
        layers[name] = layer
    return LoRANetwork(layers, arguments, kind)


def _check_rank(kind: str, name: str, rank: int, linear: FrozenLinear) -> None:
    """A LoKr of a large rank keeps its second factor whole, whatever the number; the others hold matrices of that size.

    Raises:
        UserError: a rank beyond both sides of the linear and of any use.
    """
    most = max(linear.in_features, linear.out_features, _ALWAYS_ALLOWED)
    if kind in ("lora", "dora", "loha") and rank > most:
        raise UserError(
            f"--network_dim: a rank of {rank} for '{name}', whose weight is {linear.out_features} x {linear.in_features}: must be at most "
            f"{most}. 16 to 128 are usual."
        )
