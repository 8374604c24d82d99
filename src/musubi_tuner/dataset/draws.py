"""What is drawn for each item: noise levels, noise, what the network drops, and which cells are conditioning."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.conditioning.draw import ItemConditions, draw_conditions
from musubi_tuner.conditioning.recipe import ItemShape, Recipe
from musubi_tuner.dataset.captions import CaptionDropout
from musubi_tuner.dataset.items import Draw
from musubi_tuner.flow.sigma import STRATA, SigmaSettings, draw_sigma, loss_weight
from musubi_tuner.ltxv2.geometry import AUDIO_CHANNELS, AUDIO_MEL_BINS
from musubi_tuner.runtime.draws import generator_for


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawRules:
    """How noise levels are drawn, and what losses weigh where the dataset does not say."""

    seed: int
    purpose: str
    """`train` or `validation`: their draws never coincide."""
    sigma: SigmaSettings = SigmaSettings()
    independent_audio_timestep: bool
    weighting_scheme: str = "none"
    """Weight of the loss by noise level."""
    noise_offset: float = 0.0
    """Strength of an offset of the video's noise that all cells of a channel share."""
    dropped: CaptionDropout | None = None
    """None: every item keeps its caption."""
    text_features: bool = False
    """Texts are features before the connectors: of unequal length, padded and masked."""
    video_loss_weight: float
    audio_loss_weight: float
    recipe: Recipe = Recipe()
    """What of the items is conditioning."""
    preserves: bool = False
    """Whether datasets with `preserve_base` learn from the base model."""
    audio_dop_weight: float = 0.0
    """Above 0, items without sound are to keep the base model's, with this weight."""

    def generator(self, draw: Draw, *names: object) -> torch.Generator:
        """Of one appearance of an item: depends on the seed, the purpose, the item, epoch, repeat and the names alone."""
        return generator_for(self.seed, self.purpose, draw.epoch, draw.item.key, draw.repeat, *names)


@dataclass(frozen=True, slots=True)
class Drawn:
    """One item's random draws."""

    video_sigma: float
    audio_sigma: float
    video_noise: Tensor | None
    """(N, 128)"""
    audio_noise: Tensor | None
    """(T, 128)"""
    dropout_seed: int
    video_weight: float
    audio_weight: float
    """Of the losses, by noise level."""


def draw_item(draw: Draw, latents: Tensor | None, audio_steps: int, rules: DrawRules) -> Drawn:
    """
    Args:
        latents: (B, 128, F, H, W) of its batch, for the shape of the noise; None in audio mode.
        audio_steps: of its audio; 0 = none.
    """
    generator = rules.generator(draw)
    video_tokens = 0 if latents is None else latents[0, 0].numel()
    video_sigma = draw_sigma(rules.sigma, video_tokens or audio_steps, generator, _stratum(draw, "video", rules))
    audio_sigma = draw_sigma(rules.sigma, audio_steps, generator, _stratum(draw, "audio", rules))
    if not rules.independent_audio_timestep or not audio_steps:
        audio_sigma = video_sigma
    video_noise = torch.randn(video_tokens, latents.shape[1], generator=generator) if latents is not None else None
    audio_noise = torch.randn(audio_steps, AUDIO_CHANNELS * AUDIO_MEL_BINS, generator=generator)
    dropout_seed = int(torch.randint(2**62, (), generator=generator))
    if rules.noise_offset and video_noise is not None:
        own = rules.generator(draw, "noise offset")
        video_noise = video_noise + rules.noise_offset * torch.randn(1, video_noise.shape[1], generator=own)
    drawn_by = audio_steps if rules.independent_audio_timestep else video_tokens or audio_steps
    weights = (
        loss_weight(rules.weighting_scheme, sigma, rules.sigma, tokens)
        for sigma, tokens in ((video_sigma, video_tokens or audio_steps), (audio_sigma, drawn_by))
    )
    return Drawn(video_sigma, audio_sigma, video_noise, audio_noise, dropout_seed, *weights)


def _stratum(draw: Draw, stream: str, rules: DrawRules) -> int | None:
    """Eight turns of an item visit each stratum once, in an order that is drawn anew for these eight turns, this item and this stream: so
    an epoch has all of them, and the levels of picture and sound do not go together."""
    if rules.sigma.kind != "stratified":
        return None
    cycle, place = divmod(draw.epoch * draw.item.spec.num_repeats + draw.repeat, STRATA)
    order = torch.randperm(STRATA, generator=generator_for(rules.seed, rules.purpose, draw.item.key, "strata", stream, cycle))
    return int(order[place])


def draw_item_conditions(
    draw: Draw, latents: Tensor | None, audio_steps: int, tensors: Mapping[str, Tensor], rules: DrawRules
) -> ItemConditions:
    """
    Args:
        tensors: the item's own, by stripped key, of which its mask and the numbers of its keyframes are used.
    """
    video = None if latents is None else (latents.shape[2], latents.shape[3], latents.shape[4])
    keyframes = tuple(tensors["keyframe_frames"].tolist()) if "keyframe_frames" in tensors else ()
    shape = ItemShape(video=video, audio_steps=audio_steps, mask=tensors.get("video_mask"), keyframes=keyframes)
    return draw_conditions(rules.recipe, shape, lambda *names: rules.generator(draw, "conditioning", *names))
