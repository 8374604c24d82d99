"""Flow matching: the straight line from clean (sigma 0) to noise (sigma 1), and the velocity along it.

x_t = (1 - sigma) x_0 + sigma noise,  v = noise - x_0,  x_0 = x_t - sigma v.
All in float32; `sigma` broadcasts against the tensors.
"""

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
