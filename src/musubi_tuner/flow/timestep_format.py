"""The three ways in which a noise level is written down; inside, sigma in 0..1 is the only one."""

from typing import Literal, get_args

from torch import Tensor

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
