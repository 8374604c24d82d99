"""Items -> one batch: read, stack, pad the sound, draw noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.conditioning.conditions import Conditions, Reference, StreamConditions
from musubi_tuner.conditioning.recipe import ItemConditions, ItemShape, Mask, Recipe, draw_conditions
from musubi_tuner.dataset.batch import Batch, Taught
from musubi_tuner.dataset.items import Item
from musubi_tuner.dataset.merge import merge_sources
from musubi_tuner.dataset.sampler import Draw
from musubi_tuner.flow.sigma import SigmaSettings, draw_sigma, loss_weight
from musubi_tuner.ltxv2.geometry import audio_latent_steps
from musubi_tuner.runtime.draws import generator_for
from musubi_tuner.runtime.errors import UserError

AUDIO_CHANNELS, AUDIO_BINS = 8, 16
_STACKED = ("latents", "audio", "reference", "mask", "reference_audio", "text")
"""Kinds of sidecars that have fields of a batch of their own; tensors of others are stacked as they are."""
_LEAST_IMAGINED_STEPS = 25
"""A second: what a still is given where the base model makes its sound."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionDropout:
    """Shares of items whose text is replaced by the empty prompt's, in both streams or in one."""

    both: float
    video: float
    audio: float
    empty: Path
    """Cache file of the empty prompt."""
    video_width: int
    """Of the video's part of a text."""

    def apply(self, tensors: dict[str, Tensor], generator: torch.Generator, own_share: float | None) -> dict[str, Tensor]:
        """An item's tensors, with its `text` (S, W) replaced, and `text_mask` (S,) where the whole text is.

        Args:
            own_share: of the item's dataset, in place of `both`.
        """
        text = tensors["text"]
        shares = (self.both if own_share is None else own_share, self.video, self.audio)
        both, video, audio = (share > lot for share, lot in zip(shares, _lots(generator, 3), strict=True))
        if not (both or video or audio):
            return tensors
        found = merge_sources([self.empty])
        empty = found["text"].to(text.dtype)
        alone = text.shape[1] <= self.video_width
        if both or (video and (audio or alone)):
            masks = {"text_mask": found["text_mask"]} if "text_mask" in tensors and "text_mask" in found else {}
            return tensors | {"text": empty} | masks
        parts = (empty, text) if video else (text, empty)
        return tensors | {"text": torch.cat([parts[0][:, : self.video_width], parts[1][:, self.video_width :]], dim=-1)}


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
    """What of the items is given."""
    preserves: bool = False
    """Whether datasets with `preserve_base` learn from the base model."""
    audio_dop_weight: float = 0.0
    """Above 0, items without sound are to keep the base model's, with this weight."""


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


def make_batch(draws: Sequence[Draw], mode: str, rules: DrawRules) -> Batch:
    """Read and stack the items of one batch (on the CPU).

    Raises:
        UserError: a cache file that lacks a key, or shapes that do not stack.
    """
    merged = [merge_sources(list(draw.item.paths.values())) for draw in draws]
    items = [draw.item for draw in draws]
    for item, tensors in zip(items, merged, strict=True):
        _require(item, tensors)
    merged = [_with_captions_dropped(draw, tensors, rules) for draw, tensors in zip(draws, merged, strict=True)]
    latents = _stack(items, merged, "latents") if mode != "audio" else None
    real_steps = _sound_lengths(merged) if mode != "video" else [0] * len(items)
    imagined = [_imagined_steps(item, rules) if steps == 0 else 0 for item, steps in zip(items, real_steps, strict=True)]
    lengths = [real or made for real, made in zip(real_steps, imagined, strict=True)]
    audio = _stack_audio(merged, lengths) if any(lengths) else None  # nobody to hear: the video stream runs alone
    drawn = [_draw(draw, latents, steps, rules) for draw, steps in zip(draws, lengths, strict=True)]
    text, text_mask = _stack_text(items, merged, features=rules.text_features)
    found = [
        _draw_conditions(draw, latents, steps, tensors.get("video_mask"), rules)
        for draw, steps, tensors in zip(draws, real_steps, merged, strict=True)
    ]
    conditions = _stack_conditions(
        items, merged, found, 0 if audio is None else audio.shape[2], weighs=not rules.recipe.probability("video", Mask)
    )
    by_level = (torch.tensor([one.video_weight for one in drawn]), torch.tensor([one.audio_weight for one in drawn]))
    own_weights = [_weights(items, key, getattr(rules, key)) for key in ("video_loss_weight", "audio_loss_weight")]
    video_weight, audio_weight = (own * level for own, level in zip(own_weights, by_level, strict=True))
    taught = _taught(items, imagined, video_weight, audio_weight, rules)
    learned = [0.0 if rules.preserves and item.spec.preserve_base else float(own) for item, own in zip(items, own_weights[1], strict=True)]
    expected, supervised = _count_sound(items, real_steps, learned, conditions, mode)
    return Batch(
        names=tuple(item.key for item in items),
        latents=latents,
        fps=torch.tensor([item.clip.fps for item in items], dtype=torch.float32),
        text=text,
        text_mask=text_mask,
        audio_latents=audio,
        audio_lengths=torch.tensor(lengths) if mode != "video" else None,
        audio_padded=audio is not None and min(lengths) < audio.shape[2],
        video_noise=None if latents is None else torch.stack([one.video_noise for one in drawn]),
        audio_noise=None if audio is None else torch.stack([_pad(one.audio_noise, audio.shape[2]) for one in drawn]),
        video_sigma=torch.tensor([one.video_sigma for one in drawn], dtype=torch.float32),
        audio_sigma=torch.tensor([one.audio_sigma for one in drawn], dtype=torch.float32),
        video_weight=video_weight if taught is None else video_weight * (taught.video == 0),
        audio_weight=audio_weight if taught is None else audio_weight * (taught.audio == 0),
        taught=taught,
        conditions=conditions,
        audio_expected=expected,
        audio_supervised=supervised,
        dropout_seeds=tuple(one.dropout_seed for one in drawn),
        further={key: _stack(items, merged, key) for name in items[0].paths if name not in _STACKED for key in KINDS[name].keys},
    )


def _draw(draw: Draw, latents: Tensor | None, audio_steps: int, rules: DrawRules) -> Drawn:
    names = (draw.epoch, draw.item.key, draw.repeat)
    generator = generator_for(rules.seed, rules.purpose, *names)
    turn = draw.epoch * draw.item.spec.num_repeats + draw.repeat
    video_tokens = 0 if latents is None else latents[0, 0].numel()
    video_sigma = draw_sigma(rules.sigma, video_tokens or audio_steps, generator, turn)
    audio_sigma = draw_sigma(rules.sigma, audio_steps, generator, turn)
    if not rules.independent_audio_timestep or not audio_steps:
        audio_sigma = video_sigma
    video_noise = torch.randn(video_tokens, latents.shape[1], generator=generator) if latents is not None else None
    audio_noise = torch.randn(audio_steps, AUDIO_CHANNELS * AUDIO_BINS, generator=generator)
    dropout_seed = int(torch.randint(2**62, (), generator=generator))
    if rules.noise_offset and video_noise is not None:
        own = generator_for(rules.seed, rules.purpose, *names, "noise offset")
        video_noise = video_noise + rules.noise_offset * torch.randn(1, video_noise.shape[1], generator=own)
    drawn_by = audio_steps if rules.independent_audio_timestep else video_tokens or audio_steps
    weights = (
        loss_weight(rules.weighting_scheme, sigma, rules.sigma, tokens)
        for sigma, tokens in ((video_sigma, video_tokens or audio_steps), (audio_sigma, drawn_by))
    )
    return Drawn(video_sigma, audio_sigma, video_noise, audio_noise, dropout_seed, *weights)


def _with_captions_dropped(draw: Draw, tensors: dict[str, Tensor], rules: DrawRules) -> dict[str, Tensor]:
    if rules.dropped is None:
        return tensors
    generator = generator_for(rules.seed, rules.purpose, draw.epoch, draw.item.key, draw.repeat, "caption")
    return rules.dropped.apply(tensors, generator, draw.item.spec.caption_dropout_rate)


def _lots(generator: torch.Generator, count: int) -> list[float]:
    return torch.rand(count, generator=generator, dtype=torch.float64).tolist()


def _count_sound(
    items: Sequence[Item], lengths: Sequence[int], weights: Sequence[float], conditions: Conditions, mode: str
) -> tuple[int, int]:
    """Items whose sound should be trained (clips whose sound is not given and weighs something), and those of them that have some."""
    if mode == "video":
        return 0, 0
    given = [False] * len(items) if conditions.audio.clean is None else conditions.audio.clean.all(1).tolist()
    wanted = [item.clip.kind != "image" and not whole and weight > 0 for item, whole, weight in zip(items, given, weights, strict=True)]
    return sum(wanted), sum(one and length > 0 for one, length in zip(wanted, lengths, strict=True))


def _draw_conditions(draw: Draw, latents: Tensor | None, audio_steps: int, mask: Tensor | None, rules: DrawRules) -> ItemConditions:
    def generators(*names: object) -> torch.Generator:
        return generator_for(rules.seed, rules.purpose, draw.epoch, draw.item.key, draw.repeat, "conditioning", *names)

    video = None if latents is None else (latents.shape[2], latents.shape[3], latents.shape[4])
    return draw_conditions(rules.recipe, ItemShape(video=video, audio_steps=audio_steps, mask=mask), generators)


def _stack_conditions(
    items: Sequence[Item], merged: Sequence[Mapping[str, Tensor]], found: Sequence[ItemConditions], audio_steps: int, *, weighs: bool
) -> Conditions:
    """Cells in the order of tokens. Masks weigh the loss where no rule uses them.

    Padding of sound is given where all of the item's sound is, so that its stream counts as clean.
    """
    weight = None
    if weighs and any("video_mask" in tensors for tensors in merged):
        weight = _stack(items, merged, "video_mask").flatten(1)
    video = [one.video_clean.flatten() for one in found if one.video_clean is not None]
    audio = None
    if any(one.audio_clean is not None for one in found):
        audio = torch.zeros(len(found), audio_steps, dtype=torch.bool)
        for row, one in enumerate(found):
            if one.audio_clean is not None:
                audio[row, : len(one.audio_clean)] = one.audio_clean
                audio[row, len(one.audio_clean) :] = bool(one.audio_clean.all())
    return Conditions(
        video=StreamConditions(
            clean=torch.stack(video) if video else None, weight=weight, reference=_stack_references(items, merged, found)
        ),
        audio=StreamConditions(clean=audio, reference=_stack_reference_sounds(items, merged, found)),
    )


def _stack_reference_sounds(
    items: Sequence[Item], merged: Sequence[Mapping[str, Tensor]], found: Sequence[ItemConditions]
) -> Reference | None:
    """What is played beside the items that hear theirs, padded with zeros to the longest; None where no item does."""
    chosen = [one.audio_reference and "reference_audio" in item.paths for item, one in zip(items, found, strict=True)]
    if not any(chosen):
        return None
    lengths = [int(tensors["ref_audio_lengths"]) for tensors in merged]
    stacked = torch.zeros(len(items), AUDIO_CHANNELS, max(lengths), AUDIO_BINS, dtype=merged[0]["ref_audio_latents"].dtype)
    for row, (tensors, length) in enumerate(zip(merged, lengths, strict=True)):
        stacked[row, :, :length] = tensors["ref_audio_latents"]
    return Reference(
        latents=stacked,
        chosen=None if all(chosen) else torch.tensor(chosen),
        lengths=None if min(lengths) == max(lengths) else torch.tensor(lengths),
    )


def _stack_references(items: Sequence[Item], merged: Sequence[Mapping[str, Tensor]], found: Sequence[ItemConditions]) -> Reference | None:
    """What is shown beside the items that see theirs; None where no item does."""
    chosen = [one.video_reference and "reference" in item.paths for item, one in zip(items, found, strict=True)]
    if not any(chosen):
        return None
    return Reference(
        latents=_stack(items, merged, "ref_latents"),
        chosen=None if all(chosen) else torch.tensor(chosen),
        fps=torch.tensor([item.clip.fps for item in items], dtype=torch.float32),
        spatial_factor=items[0].spec.reference_downscale,
        temporal_factor=items[0].spec.reference_temporal_scale,
    )


def _require(item: Item, tensors: Mapping[str, Tensor]) -> None:
    for kind in (KINDS[name] for name in item.paths):
        for key in kind.keys:
            if key not in tensors:
                raise UserError(
                    f"{item.key}: no '{key}' in {item.paths[kind.name].name} (folder {item.spec.cache_directory}). "
                    f"Run {kind.program} with the same --dataset_config."
                )


def _stack(items: Sequence[Item], merged: Sequence[Mapping[str, Tensor]], key: str) -> Tensor:
    shapes = {tuple(tensors[key].shape) for tensors in merged}
    if len(shapes) > 1:
        listed = ", ".join(f"{item.key} {tuple(tensors[key].shape)}" for item, tensors in zip(items, merged, strict=True))
        raise UserError(
            f"'{key}' of one batch differ in shape: {listed}. The caches were made with different settings; run the caching programs again."
        )
    return torch.stack([tensors[key] for tensors in merged])


def _stack_text(items: Sequence[Item], merged: Sequence[Mapping[str, Tensor]], *, features: bool) -> tuple[Tensor, Tensor | None]:
    if features:
        texts = [tensors["text"] for tensors in merged]
        lengths = torch.tensor([text.shape[0] for text in texts])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        return pad_sequence(texts, batch_first=True), None if bool(mask.all()) else mask
    text = _stack(items, merged, "text")
    if not all("text_mask" in tensors for tensors in merged):
        return text, None
    mask = _stack(items, merged, "text_mask").bool()
    return text, None if bool(mask.all()) else mask


def _sound_lengths(merged: Sequence[Mapping[str, Tensor]]) -> list[int]:
    """Real steps; an item without a sidecar (a still) or with an empty one has none."""
    return [int(tensors["audio_lengths"]) if "audio_lengths" in tensors else 0 for tensors in merged]


def _imagined_steps(item: Item, rules: DrawRules) -> int:
    """Length of the sound that the base model makes for an item without any."""
    return max(_LEAST_IMAGINED_STEPS, audio_latent_steps(item.clip.frames, item.clip.fps)) if rules.audio_dop_weight else 0


def _stack_audio(merged: Sequence[Mapping[str, Tensor]], lengths: Sequence[int]) -> Tensor:
    """Sound padded with zeros to the longest; zeros where there is none."""
    dtype = next((tensors["audio_latents"].dtype for tensors in merged if "audio_latents" in tensors), torch.float32)
    stacked = torch.zeros(len(merged), AUDIO_CHANNELS, max(lengths), AUDIO_BINS, dtype=dtype)
    for row, tensors in enumerate(merged):
        if "audio_latents" in tensors and (length := int(tensors["audio_lengths"])):
            stacked[row, :, :length] = tensors["audio_latents"][:, :length]
    return stacked


def _taught(items: Sequence[Item], imagined: Sequence[int], video_weight: Tensor, audio_weight: Tensor, rules: DrawRules) -> Taught | None:
    """Which items learn from the base model; None where none does."""
    preserved = torch.tensor([rules.preserves and item.spec.preserve_base for item in items])
    made = torch.tensor([steps > 0 for steps in imagined])
    if not (preserved.any() or made.any()):
        return None
    return Taught(
        video=video_weight * preserved,
        audio=torch.where(made, rules.audio_dop_weight, audio_weight * preserved),
        imagined=made if made.any() else None,
    )


def _pad(noise: Tensor, steps: int) -> Tensor:
    return torch.nn.functional.pad(noise, (0, 0, 0, steps - noise.shape[0]))


def _weights(items: Sequence[Item], key: str, default: float) -> Tensor:
    values = [getattr(item.spec, key) for item in items]
    return torch.tensor([default if value is None else value for value in values], dtype=torch.float32)
