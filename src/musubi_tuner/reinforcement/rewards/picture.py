"""Rewards of the pictures alone, measured on their pixels: sharpness, motion, saturation."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from musubi_tuner.reinforcement.rewards.base import Reward, RewardSample
from musubi_tuner.runtime.errors import UserError

_LUMA = (0.2126, 0.7152, 0.0722)
_SPREAD = 2.5
"""Pixels, of the window in which gradients are compared."""
_COHERENT = 0.6
_FLAT = 1e-3
"""Of luma: the contrast of a picture without any."""
_CELL = 8
"""Pixels of a side."""


class Sharpness(Reward):
    """Energy of gradients along edges, relative to contrast; noise counts for nothing.

    In a Gaussian window of 2.5 pixels around each pixel the gradients' structure tensor has the eigenvalues l1 >= l2. Their coherence c =
    (l1 - l2) / (l1 + l2) is near 1 on an edge, however fine, and low in noise, whose gradients point everywhere. With luma in 0..1:

        sharpness = 100 mean over pixels and frames of relu((c - 0.6) / 0.4) (sqrt(l1) - sqrt(l2))^2 / (variance of luma + 0.001)
    """

    name, route, needs, has_model = "sharpness", "video", ("video",), False

    def score(self, samples: Sequence[RewardSample]) -> list[float]:
        return [sharpness(one.frames) for one in samples]


class Motion(Reward):
    """How much moves, from frame to frame, in cells of 8 x 8 pixels; noise of single pixels counts for little.

    A frame is first given the mean and the contrast of the next one, so that neither flicker nor a fade is motion. With m the mean change
    of luma (0..1) in a cell, and v its variance within the cell, noise alone would have m^2 around v / 64. So the motion of a cell is
    sqrt(relu(m^2 - 4 v / 64)), and

        motion = 100 mean over cells and frames

    With `most`: more than that counts as that.
    """

    name, route, needs, has_model = "motion", "video", ("video",), False

    def setup(self, device: torch.device, most: float | None = None) -> None:
        if most is not None and most <= 0:
            raise UserError(f"--reward_args motion.most={most:g}: must be above 0.")
        self._most = most

    def score(self, samples: Sequence[RewardSample]) -> list[float]:
        found = [100 * float(changes(one.frames).mean()) if len(one.frames) > 1 else 0.0 for one in samples]
        return [value if self._most is None else min(value, self._most) for value in found]


class Saturation(Reward):
    """How colorful: the mean of max(R, G, B) - min(R, G, B), in 0..1. With `target`: -|mean - target|."""

    name, route, needs, has_model = "saturation", "video", ("video",), False

    def setup(self, device: torch.device, target: float | None = None) -> None:
        self._target = target

    def score(self, samples: Sequence[RewardSample]) -> list[float]:
        found = [_mean(_chroma(frame) for frame in one.frames) for one in samples]
        return [value if self._target is None else -abs(value - self._target) for value in found]


def sharpness(frames: Tensor) -> float:
    """(F, H, W, 3) uint8 -> as in `Sharpness`."""
    return 100 * _mean(_edges(luma(frame[None])[0]) for frame in frames)


def luma(frames: Tensor) -> Tensor:
    """(F, H, W, 3) uint8 -> (F, H, W) in 0..1."""
    return frames.float() @ torch.tensor(_LUMA) / 255


def changes(frames: Tensor) -> Tensor:
    """(F, H, W, 3) uint8 -> (F - 1,) mean motion of cells from each frame to the next, as in `Motion`, without its 100."""
    cell = min(_CELL, *frames.shape[1:3])
    found, before = [], luma(frames[:1])
    for number in range(1, len(frames)):
        after = luma(frames[number : number + 1])
        spreads = [float(one.std(correction=0)) for one in (before, after)]
        gain = spreads[1] / spreads[0] if spreads[0] > _FLAT else 1.0
        change = (after - after.mean()) - gain * (before - before.mean())
        mean, square = functional.avg_pool2d(change, cell), functional.avg_pool2d(change.square(), cell)
        found.append((mean.square() - 4 * (square - mean.square()) / cell**2).clamp(min=0).sqrt().mean())
        before = after
    return torch.stack(found)


def _edges(picture: Tensor) -> float:
    """Of one (H, W) picture; gradients are those between four pixels."""
    rows, columns = picture[:, 1:] - picture[:, :-1], picture[1:] - picture[:-1]
    across, down = (rows[1:] + rows[:-1]) / 2, (columns[:, 1:] + columns[:, :-1]) / 2
    xx, yy, xy = _smoothed(torch.stack([across * across, down * down, across * down]))
    apart = ((xx - yy).square() + 4 * xy.square()).sqrt()
    large, small = (xx + yy + apart) / 2, ((xx + yy - apart) / 2).clamp(min=0)
    coherence = apart / (xx + yy + 1e-8)
    kept = ((coherence - _COHERENT) / (1 - _COHERENT)).clamp(min=0) * (large.sqrt() - small.sqrt()).square()
    return float(kept.mean() / (picture.var(correction=0) + 1e-3))


def _smoothed(planes: Tensor) -> Tensor:
    """(C, H, W) by a Gaussian."""
    reach = round(3 * _SPREAD)
    weights = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * _SPREAD**2))
    weights = weights / weights.sum()
    held = planes[:, None]
    for kernel, padding in ((weights[None, None, None], (reach, reach, 0, 0)), (weights[None, None, :, None], (0, 0, reach, reach))):
        held = functional.conv2d(functional.pad(held, padding, mode="replicate"), kernel)
    return held[:, 0]


def _chroma(frame: Tensor) -> float:
    values = frame.float() / 255
    return float((values.amax(-1) - values.amin(-1)).mean())


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
