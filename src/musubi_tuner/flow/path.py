"""The straight line from clean (sigma 0) to noise (sigma 1), the velocity along it, and the ways in which sigma is written down.

x_t = (1 - sigma) x_0 + sigma noise,  v = noise - x_0,  x_0 = x_t - sigma v.
All in float32; `sigma` broadcasts against the tensors. Inside, sigma in 0..1 is the only form of a noise level.
"""

from typing import Literal, get_args

from torch import Tensor


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return (1 - sigma) * clean + sigma * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    return noise - clean


def velocity_to_x0(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    return x - sigma * velocity


def x0_to_velocity(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Undefined at sigma 0, where a token is clean and needs no velocity."""
    return (x - x0) / sigma


TimestepFormat = Literal["flowmatch_1_1000", "legacy_0_1000", "sd3_0_1"]
TIMESTEP_FORMATS: tuple[str, ...] = get_args(TimestepFormat)


def to_timestep(sigma: Tensor, name: str) -> Tensor:
    """Sigma (float32, 0..1) in the format `name`."""
    if name == "flowmatch_1_1000":
        return 1 + 999 * sigma
    if name == "legacy_0_1000":
        return 1000 * sigma
    if name == "sd3_0_1":
        return sigma
    raise ValueError(f"timestep format {name!r}: one of {', '.join(TIMESTEP_FORMATS)}")


def to_sigma(timestep: Tensor, name: str) -> Tensor:
    """The inverse of `to_timestep`, in float32, clamped to 0..1."""
    timestep = timestep.float()
    if name == "flowmatch_1_1000":
        sigma = (timestep - 1) / 999
    elif name == "legacy_0_1000":
        sigma = timestep / 1000
    elif name == "sd3_0_1":
        sigma = timestep
    else:
        raise ValueError(f"timestep format {name!r}: one of {', '.join(TIMESTEP_FORMATS)}")
    return sigma.clamp(0, 1)


def model_sigma(sigma: Tensor, name: str) -> Tensor:
    """The sigma that both the noising and the model use, after one trip through the format. Training and preview call this."""
    return to_sigma(to_timestep(sigma.float(), name), name)
