"""Rules that lay conditioning over a stream. A mode is a list of them; none is a branch of the training step."""

import dataclasses

import torch
from torch import Tensor

from musubi_tuner.conditioning.tokens import TokenStream


def keep_clean(stream: TokenStream, clean: Tensor) -> TokenStream:
    """Tokens where `clean` (B, N) is True become conditioning: shown as they are, at noise level 0, without loss."""
    noisy = ~clean if stream.noisy is None else stream.noisy & ~clean
    return dataclasses.replace(stream, noisy=noisy)


def first_frame(stream: TokenStream, tokens_per_frame: int, chosen: Tensor) -> TokenStream:
    """Image to video: the first latent frame is clean in the items that are `chosen` (B,) bool."""
    tokens = stream.clean.shape[1]
    in_first = torch.arange(tokens, device=stream.clean.device) < tokens_per_frame
    return keep_clean(stream, in_first[None] & chosen[:, None])
