"""Update rules: from what the policy, the one that made the samples (`old`) and the base model (`reference`) predict to a loss.

Everything is of one stream and one sample: (B,) tensors of means over tokens and channels, so that the sound, which has a fiftieth of the
tokens, weighs as its weight says. v is a velocity, its true value noise - clean. Sources: DiffusionNFT (NFT), Flow-GRPO and GRPO-Guard,
advantage-weighted matching (AWM), reward-weighted regression (RWR), Diffusion-DPO.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_DISTANCE = 1e-5
"""Of NFT's normalizer."""


def clipped(advantage: Tensor, log_ratio: Tensor, width: float) -> Tensor:
    """PPO's clipped objective as a loss: max(-A r, -A clip(r, 1 - width, 1 + width)), r = exp(log_ratio)."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - width, 1 + width))


def at_bound(loss: Tensor, advantage: Tensor, width: float) -> Tensor:
    """(B,) bool: samples whose ratio has passed its bound in the direction of their advantage, so that nothing more is learned from them.

    Args:
        loss: of `clipped`.
    """
    bound = torch.where(advantage > 0, 1 + width, 1 - width)
    return (loss == -advantage * bound) & (advantage != 0)


def nft(target: Tensor, new: Tensor, old: Tensor, advantage: Tensor, sigma: Tensor, weight: Tensor, *, mix: float, most: float) -> Tensor:
    """Pull towards the sample where it is better than its group, push away where it is worse, each measured from `old`.

    r = clip(A / (2 most) + 1/2, 0, 1); v+ = mix v + (1 - mix) v_old, v- = (1 + mix) v_old - mix v; d the mean distance of the clean clip
    that each names from the sample, which is not learned through: loss (most / mix) (r <e+^2> / d+ + (1 - r) <e-^2> / d-).

    Args:
        target, new, old: (B, N, C) float32 velocities: the true one, the policy's, that of the policy that made the samples.
        advantage, sigma: (B,).
        weight: (B, N) of tokens; conditioning weighs nothing.
    """
    share = (advantage / (2 * most) + 0.5).clamp(0, 1)
    parts = []
    for velocity in (mix * new + (1 - mix) * old, (1 + mix) * old - mix * new):
        error = sigma[:, None, None] * (velocity - target)  # of the clean clip: x0 = x - sigma v
        distance = mean(error.abs(), weight).clamp(min=LEAST_DISTANCE).detach()
        parts.append(mean(error.square(), weight) / distance)
    return most / mix * (share * parts[0] + (1 - share) * parts[1])


def grpo(advantage: Tensor, log_new: Tensor, log_old: Tensor, *, width: float) -> Tensor:
    """By the ratio of probabilities of a step that was taken.

    Args:
        log_new, log_old: (B,) mean log density over the stream.
    """
    return clipped(advantage, log_new - log_old, width)


def grpo_guard(
    advantage: Tensor, log_new: Tensor, log_old: Tensor, moved: Tensor, std: Tensor, *, kind: Literal["cps", "flow_sde"], width: float
) -> Tensor:
    """The same with the ratio's mean brought to 1 and its size to that of other steps, so that clipping guards all steps alike.

    With h = std: Flow-SDE log r = (log_new - log_old) h + <(mean - mean_old)^2> / (2 h); CPS, whose log density lacks 1 / (2 h^2),
    (log_new - log_old + <(mean - mean_old)^2>) / (2 h).

    Args:
        moved: (B,) <(mean - mean_old)^2>.
        std: (B,).
    """
    difference = log_new - log_old
    log_ratio = (difference + moved) / (2 * std) if kind == "cps" else difference * std + moved / (2 * std)
    return clipped(advantage, log_ratio, width)


def awm(advantage: Tensor, error_new: Tensor, error_old: Tensor, sigma_weight: Tensor, *, width: float) -> Tensor:
    """By how much better than `old` the policy predicts the sample: the likelihood is -w(s) <(v - target)^2>.

    Args:
        error_new, error_old: (B,) mean squared errors.
        sigma_weight: (B,) w.
    """
    return clipped(advantage, sigma_weight * (error_old - error_new), width)


def rwr(share: Tensor, error_new: Tensor) -> Tensor:
    """Supervised learning in which better samples weigh more; `share` (B,) of `advantages.group_softmax`."""
    return share * error_new


def dpo(chosen_new: Tensor, chosen_reference: Tensor, rejected_new: Tensor, rejected_reference: Tensor, *, beta: float) -> Tensor:
    """-log sigmoid(-(beta / 2) (D_chosen - D_rejected)), D = error - error of the base model, at the same noise and level; all (B,)."""
    return -F.logsigmoid(-beta / 2 * ((chosen_new - chosen_reference) - (rejected_new - rejected_reference)))


def mean(values: Tensor, weight: Tensor) -> Tensor:
    """(B,) of (B, N, C) over channels and (B, N) weighted tokens; 0 for a sample whose tokens all weigh nothing."""
    total = weight.sum(1)
    return (values.mean(-1) * weight).sum(1) / total.clamp(min=1e-8) * (total > 0)
