"""Laying conditioning over a stream. Training and preview both pass through `condition`; no mode has a branch of its own."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from musubi_tuner.conditioning.conditions import Conditions, KeyframeLatents, Reference, StreamConditions
from musubi_tuner.conditioning.tokens import NoiseShare, TokenStream, audio_stream, video_keyframes, video_reference
from musubi_tuner.ltxv2.transformer.modality import ReferenceAttention


def condition(streams: Mapping[str, TokenStream], conditions: Conditions) -> dict[str, TokenStream]:
    """The streams with their conditioning laid over them, and their keyframes and references behind them.

    Args:
        streams: `video` and `audio`, or one of them.
    """
    found = {}
    for name, stream in streams.items():
        own, tokens = getattr(conditions, name), stream.clean.shape[1]
        strengths = [_strength_of_own(stream, own)]
        if own.weight is not None:
            stream = dataclasses.replace(stream, weight=own.weight if stream.weight is None else stream.weight * own.weight)
        if own.clean is not None:
            stream = keep_clean(stream, own.clean)
        if (keyframes := own.keyframes) is not None:
            beside = video_keyframes(keyframes.latents, keyframes.frames, keyframes.fps, keyframes.real)
            stream = append_clean(stream, beside, chosen=None)
            strengths.append(_strength_of_keyframes(keyframes))
        if own.reference is not None:
            beside, before = _reference_stream(name, own.reference), stream.clean.shape[1]
            stream = append_clean(stream, beside, own.reference.chosen)
            if own.reference.attention is not None:
                stream = dataclasses.replace(stream, attention=ReferenceAttention(own.reference.attention, tokens, before - tokens))
            strengths.append(torch.full_like(beside.clean[..., 0], own.reference.strength))
        found[name] = _in_part(stream, torch.cat(strengths, dim=1))
    return found


def _strength_of_own(stream: TokenStream, own: StreamConditions) -> Tensor:
    """(B, N) of the clip's own tokens."""
    if own.clean is None:
        return torch.zeros_like(stream.clean[..., 0])
    return own.clean.float() if own.strength is None else own.clean * own.strength


def _strength_of_keyframes(keyframes: KeyframeLatents) -> Tensor:
    """(B, K h w)"""
    batch, _, count, height, width = keyframes.latents.shape
    whole = torch.ones(batch, count, device=keyframes.latents.device)
    return (whole if keyframes.strengths is None else keyframes.strengths).repeat_interleave(height * width, dim=1)


def _in_part(stream: TokenStream, strength: Tensor) -> TokenStream:
    """Conditioning tokens whose strength is below 1 are noisy, at the level that the strength leaves."""
    if stream.noisy is None or not bool((~stream.noisy & (strength < 1)).any()):
        return stream
    shares, index = torch.unique(1 - strength, return_inverse=True)
    return dataclasses.replace(stream, noisy=strength < 1, share=NoiseShare(shares, index))


def keep_clean(stream: TokenStream, clean: Tensor) -> TokenStream:
    """Tokens where `clean` (B, N) is True become conditioning: shown as they are, at noise level 0, without loss."""
    noisy = ~clean if stream.noisy is None else stream.noisy & ~clean
    return dataclasses.replace(stream, noisy=noisy)


def append_clean(stream: TokenStream, other: TokenStream, chosen: Tensor | None) -> TokenStream:
    """The tokens of `other` behind those of `stream`: clean, without loss, at positions of their own, without keyframe marker.

    Args:
        chosen: (B,) bool items that see them, None = all; the others have padding there.
    """
    batch, tokens, _ = stream.clean.shape
    added = other.clean.shape[1]

    def behind(own: Tensor | None, default: float, theirs: Tensor | float) -> Tensor:
        """(B, N + M); `default` where the stream has no values of its own."""
        dtype = torch.tensor(default).dtype
        first = torch.full((batch, tokens), default, dtype=dtype, device=stream.clean.device) if own is None else own
        second = theirs if isinstance(theirs, Tensor) else torch.full((batch, added), theirs, dtype=first.dtype, device=first.device)
        return torch.cat([first, second.to(first.dtype)], dim=1)

    visible = other.token_mask
    if chosen is not None:
        seen = chosen[:, None].expand(batch, added)
        visible = seen if visible is None else visible & seen
    masked = stream.token_mask is not None or visible is not None
    return dataclasses.replace(
        stream,
        clean=torch.cat([stream.clean, other.clean], dim=1),
        positions=torch.cat([stream.positions, other.positions], dim=2),
        noisy=behind(stream.noisy, True, False),
        weight=behind(stream.weight, 1.0, 0.0),
        token_mask=behind(stream.token_mask, True, True if visible is None else visible) if masked else None,
        keyframe_marker=None if stream.keyframe_marker is None else behind(stream.keyframe_marker, False, False),
    )


def _reference_stream(name: str, reference: Reference) -> TokenStream:
    if name == "audio":
        return audio_stream(reference.latents, reference.lengths)
    assert reference.fps is not None
    return video_reference(
        reference.latents, reference.fps, spatial_factor=reference.spatial_factor, temporal_factor=reference.temporal_factor
    )
