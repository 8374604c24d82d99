"""Items -> one batch: read, stack, pad the audio, draw noise."""

# What is stacked from what, for B items of one bucket (`Item.bucket`), which have pictures of one size and length:
#
#   of each item: its cache files, merged             of the batch
#   -------------------------------------             ------------
#   latents        (128, F, H, W)             ->      latents        (B, 128, F, H, W)    equal shapes, stacked
#   audio_latents  (8, t, 16)                 ->      audio_latents  (B, 8, T, 16)        zeros from t to T, the longest
#   audio_lengths  t                          ->      audio_lengths  (B,)
#   text           (S, W)                     ->      text           (B, S, W)            features: zeros behind the last token,
#   text_mask      (S,)                       ->      text_mask      (B, S)                 and marked so
#   ref_latents, ref_audio_latents            ->      conditions.*.reference              behind the tokens of the stream
#   keyframe_latents (128, k, H, W)           ->      conditions.video.keyframes          those drawn, zeros behind the last
#   video_mask     (F, H, W)                  ->      conditions.video.weight (B, F*H*W)  or a rule of the recipe
#   any other kind of sidecar                 ->      further[key]   (B, ...)
#   nothing: drawn                            ->      *_sigma (B,), *_noise (B, N, 128), dropout_seeds, conditions.*.clean (B, N)
#
# Why padded and masked: sounds of one bucket differ in length, since a stream may end before its clip does and sounds alone are bucketed
# by whole seconds. Padding is never learned: attention and loss see the first `audio_lengths` steps, and an item of length 0 has no
# audio at all. Where nobody in a batch has any, `audio_latents` is None and the video stream runs alone. With `--audio_dop_weight` an
# item without sound gets room for some, which the base model then imagines.
#
# Why drawn by name: each item's numbers come from generators named by (seed, purpose, epoch, item, repeat). So an item sees the same
# noise whatever else is in its batch, however many processes and loading workers there are, and wherever a run was resumed; and a
# further draw (a rule of the recipe, say) leaves all others as they were.

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.conditioning.conditions import Conditions, KeyframeLatents, Reference, StreamConditions
from musubi_tuner.conditioning.draw import ItemConditions
from musubi_tuner.dataset.batch import Batch, Preserved
from musubi_tuner.dataset.captions import stack_text
from musubi_tuner.dataset.draws import Drawn, DrawRules, draw_item, draw_item_conditions
from musubi_tuner.dataset.items import Draw, Item
from musubi_tuner.dataset.merge import merge_sources, stack_equal
from musubi_tuner.ltxv2.geometry import AUDIO_CHANNELS, AUDIO_MEL_BINS, LATENT_CHANNELS, audio_latent_steps
from musubi_tuner.runtime.errors import UserError

_LEAST_IMAGINED_STEPS = 25
"""A second: what a still gets where the base model makes its audio."""
_STACKED = ("latents", "audio", "reference", "mask", "keyframes", "reference_audio", "text")
"""Kinds of sidecars that have fields of a batch of their own; tensors of others are stacked as they are."""

Merged = Sequence[Mapping[str, Tensor]]
"""Tensors of each item, by stripped key."""


def make_batch(draws: Sequence[Draw], mode: str, rules: DrawRules) -> Batch:
    """Read and stack the items of one batch (on the CPU).

    Raises:
        UserError: a cache file that lacks a key, or shapes that do not stack.
    """
    items = [draw.item for draw in draws]
    merged = [_read(draw, rules) for draw in draws]
    if mode == "video":
        merged = _with_equal_texts(merged)
    latents = stack_equal(items, merged, "latents") if mode != "audio" else None
    text, text_mask = stack_text(items, merged, features=rules.text_features)
    real_steps, imagined_steps = _audio_steps(items, merged, mode, rules)
    lengths = [real or imagined for real, imagined in zip(real_steps, imagined_steps, strict=True)]
    audio = _stack_audio(merged, lengths)
    drawn = [draw_item(draw, latents, steps, rules) for draw, steps in zip(draws, lengths, strict=True)]
    found = [
        draw_item_conditions(draw, latents, steps, tensors, rules) for draw, steps, tensors in zip(draws, real_steps, merged, strict=True)
    ]
    conditions = Conditions(
        video=_video_conditions(items, merged, found, masks_weigh=rules.recipe.masks_weigh),
        audio=_audio_conditions(items, merged, found, 0 if audio is None else audio.shape[2]),
    )
    video_weight, audio_weight, preserved = _loss_weights(items, drawn, imagined_steps, rules)
    expected, supervised = _count_supervised(items, real_steps, conditions, mode, rules)
    audio_noises = [one.audio_noise for one in drawn if one.audio_noise is not None]
    return Batch(
        names=tuple(item.key for item in items),
        latents=latents,
        fps=torch.tensor([item.clip.fps for item in items], dtype=torch.float32),
        text=text,
        text_mask=text_mask,
        audio_latents=audio,
        audio_lengths=torch.tensor(lengths) if mode != "video" else None,
        audio_padded=audio is not None and min(lengths) < audio.shape[2],
        video_noise=None if latents is None else torch.stack([one.video_noise for one in drawn if one.video_noise is not None]),
        audio_noise=None if audio is None else pad_sequence(audio_noises, batch_first=True),
        video_sigma=torch.tensor([one.video_sigma for one in drawn], dtype=torch.float32),
        audio_sigma=torch.tensor([one.audio_sigma for one in drawn], dtype=torch.float32),
        video_weight=video_weight,
        audio_weight=audio_weight,
        preserved=preserved,
        conditions=conditions,
        audio_expected=expected,
        audio_supervised=supervised,
        dropout_seeds=tuple(one.dropout_seed for one in drawn),
        further={key: stack_equal(items, merged, key) for name in items[0].paths if name not in _STACKED for key in KINDS[name].keys},
    )


def _read(draw: Draw, rules: DrawRules) -> Mapping[str, Tensor]:
    """An item's tensors, its caption dropped where its lot says so.

    Raises:
        UserError: a file that lacks a key.
    """
    item = draw.item
    tensors = merge_sources(list(item.paths.values()))
    for kind in (KINDS[name] for name in item.paths):
        for key in kind.keys:
            if key not in tensors:
                raise UserError(
                    f"{item.key}: no '{key}' in {item.paths[kind.name].name} (folder {item.spec.cache_directory}). "
                    f"Run {kind.program} with the same --dataset_config."
                )
    if rules.dropped is None:
        return tensors
    return rules.dropped.apply(tensors, rules.generator(draw, "caption"), item.spec.caption_dropout_rate)


def _with_equal_texts(merged: Merged) -> Merged:
    """Texts (S, W) of the narrowest width: those that were cached with the sound's have the video's first."""
    width = min(tensors["text"].shape[1] for tensors in merged)
    return [tensors if tensors["text"].shape[1] == width else {**tensors, "text": tensors["text"][:, :width]} for tensors in merged]


def _audio_steps(items: Sequence[Item], merged: Merged, mode: str, rules: DrawRules) -> tuple[list[int], list[int]]:
    """Real steps of each item's audio, none for stills and silent clips; and steps that the base model is to imagine in their place."""
    if mode == "video":
        real = [0] * len(items)
    else:
        real = [int(tensors["audio_lengths"]) if "audio_lengths" in tensors else 0 for tensors in merged]
    imagined = [0] * len(items)
    if rules.audio_dop_weight:
        lengths = [max(_LEAST_IMAGINED_STEPS, audio_latent_steps(item.clip.frames, item.clip.fps)) for item in items]
        imagined = [0 if steps else length for steps, length in zip(real, lengths, strict=True)]
    return real, imagined


def _stack_audio(merged: Merged, lengths: Sequence[int]) -> Tensor | None:
    """(B, 8, T, 16) padded with zeros to the longest; None where none has any."""
    if not any(lengths):
        return None
    dtype = next((tensors["audio_latents"].dtype for tensors in merged if "audio_latents" in tensors), torch.float32)
    stacked = torch.zeros(len(merged), AUDIO_CHANNELS, max(lengths), AUDIO_MEL_BINS, dtype=dtype)
    for row, tensors in enumerate(merged):
        if "audio_latents" in tensors and (length := int(tensors["audio_lengths"])):
            stacked[row, :, :length] = tensors["audio_latents"][:, :length]
    return stacked


def _video_conditions(items: Sequence[Item], merged: Merged, found: Sequence[ItemConditions], *, masks_weigh: bool) -> StreamConditions:
    """Cells in the order of tokens.

    Args:
        masks_weigh: masks weigh the loss, as no rule of the recipe uses them.
    """
    clean = [one.video_clean.flatten() for one in found if one.video_clean is not None]
    weighs = masks_weigh and any("video_mask" in tensors for tensors in merged)
    reference = None
    chosen = [one.video_reference and "reference" in item.paths for item, one in zip(items, found, strict=True)]
    if any(chosen):
        reference = Reference(
            latents=stack_equal(items, merged, "ref_latents"),
            chosen=None if all(chosen) else torch.tensor(chosen),
            fps=torch.tensor([item.clip.fps for item in items], dtype=torch.float32),
            spatial_factor=items[0].spec.reference_downscale,
            temporal_factor=items[0].spec.reference_temporal_scale,
        )
    return StreamConditions(
        clean=torch.stack(clean) if clean else None,
        weight=stack_equal(items, merged, "video_mask").flatten(1) if weighs else None,
        reference=reference,
        keyframes=_keyframes(items, merged, found),
    )


def _keyframes(items: Sequence[Item], merged: Merged, found: Sequence[ItemConditions]) -> KeyframeLatents | None:
    """Those that were drawn, padded to the most of an item; None where nobody has any."""
    counts = [len(one.keyframes) for one in found]
    most = max(counts)
    if not most:
        return None
    _, _, height, width = next(tensors["keyframe_latents"] for tensors in merged if "keyframe_latents" in tensors).shape
    latents = torch.zeros(len(items), LATENT_CHANNELS, most, height, width)
    frames = torch.zeros(len(items), most, dtype=torch.int32)
    for row, (tensors, one) in enumerate(zip(merged, found, strict=True)):
        if one.keyframes:
            places = [tensors["keyframe_frames"].tolist().index(frame) for frame in one.keyframes]
            latents[row, :, : len(places)] = tensors["keyframe_latents"][:, places]
            frames[row, : len(places)] = tensors["keyframe_frames"][places]
    return KeyframeLatents(
        latents=latents,
        frames=frames,
        fps=torch.tensor([item.clip.fps for item in items], dtype=torch.float32),
        real=None if min(counts) == most else torch.arange(most)[None] < torch.tensor(counts)[:, None],
    )


def _audio_conditions(items: Sequence[Item], merged: Merged, found: Sequence[ItemConditions], steps: int) -> StreamConditions:
    """Padding is conditioning where all of the item's audio is, so that its stream counts as clean.

    Args:
        steps: of the batch's audio.
    """
    clean = None
    if any(one.audio_clean is not None for one in found):
        clean = torch.zeros(len(found), steps, dtype=torch.bool)
        for row, one in enumerate(found):
            if one.audio_clean is not None:
                clean[row, : len(one.audio_clean)] = one.audio_clean
                clean[row, len(one.audio_clean) :] = bool(one.audio_clean.all())
    reference = None
    chosen = [one.audio_reference and "reference_audio" in item.paths for item, one in zip(items, found, strict=True)]
    if any(chosen):
        lengths = [int(tensors["ref_audio_lengths"]) for tensors in merged]
        latents = torch.zeros(len(items), AUDIO_CHANNELS, max(lengths), AUDIO_MEL_BINS, dtype=merged[0]["ref_audio_latents"].dtype)
        for row, (tensors, length) in enumerate(zip(merged, lengths, strict=True)):
            latents[row, :, :length] = tensors["ref_audio_latents"]
        reference = Reference(
            latents=latents,
            chosen=None if all(chosen) else torch.tensor(chosen),
            lengths=None if min(lengths) == max(lengths) else torch.tensor(lengths),
        )
    return StreamConditions(clean=clean, reference=reference)


def _loss_weights(
    items: Sequence[Item], drawn: Sequence[Drawn], imagined_steps: Sequence[int], rules: DrawRules
) -> tuple[Tensor, Tensor, Preserved | None]:
    """(B,) weights of the losses of video and audio, 0 where an item learns from the base model instead; and what it learns from that."""
    video = _dataset_weights(items, "video_loss_weight", rules.video_loss_weight) * torch.tensor([one.video_weight for one in drawn])
    audio = _dataset_weights(items, "audio_loss_weight", rules.audio_loss_weight) * torch.tensor([one.audio_weight for one in drawn])
    preserves = torch.tensor([_preserves(item, rules) for item in items])
    imagined = torch.tensor([steps > 0 for steps in imagined_steps])
    if not (preserves.any() or imagined.any()):
        return video, audio, None
    preserved = Preserved(
        video=video * preserves,
        audio=torch.where(imagined, rules.audio_dop_weight, audio * preserves),
        imagined=imagined if imagined.any() else None,
    )
    return video * (preserved.video == 0), audio * (preserved.audio == 0), preserved


def _preserves(item: Item, rules: DrawRules) -> bool:
    return rules.preserves and item.spec.preserve_base


def _dataset_weights(items: Sequence[Item], key: str, default: float) -> Tensor:
    values = [getattr(item.spec, key) for item in items]
    return torch.tensor([default if value is None else value for value in values], dtype=torch.float32)


def _count_supervised(
    items: Sequence[Item], real_steps: Sequence[int], conditions: Conditions, mode: str, rules: DrawRules
) -> tuple[int, int]:
    """Items whose audio should be trained (clips whose audio is not all conditioning and weighs something), and those that have some."""
    if mode == "video":
        return 0, 0
    weights = _dataset_weights(items, "audio_loss_weight", rules.audio_loss_weight).tolist()
    whole = [False] * len(items) if conditions.audio.clean is None else conditions.audio.clean.all(1).tolist()
    wanted = [
        item.clip.kind != "image" and not clean and weight > 0 and not _preserves(item, rules)
        for item, clean, weight in zip(items, whole, weights, strict=True)
    ]
    return sum(wanted), sum(one and steps > 0 for one, steps in zip(wanted, real_steps, strict=True))
