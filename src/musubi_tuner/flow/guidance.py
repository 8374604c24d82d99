"""Guidance: steering the clean prediction away from weaker predictions of the same moment (docs/explanation/model.md, "Sampling").

All of it happens on clean predictions (x0) in float32. Guiding velocities instead gives the same only without the
rescaling, because the spread of a velocity is not that of an x0.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidanceScales:
    """One stream's scales. The defaults are all off."""

    cfg: float = 1.0
    """Away from the negative prompt; on above 1."""
    stg: float = 0.0
    """Away from a pass whose self-attention is left out in some blocks; on above 0."""
    rescale: float = 0.0
    """0 leaves the guided prediction's spread as it is, 1 brings it back to the plain prediction's."""
    modality: float = 1.0
    """Away from a pass in which video and sound do not hear or see each other; on above 1."""

    @property
    def needs_negative(self) -> bool:
        return self.cfg > 1

    @property
    def needs_perturbed(self) -> bool:
        return self.stg > 0

    @property
    def needs_isolated(self) -> bool:
        return self.modality > 1


OFF = GuidanceScales()


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDefaults:
    """How a version of the model is sampled unless the user sets something else."""

    steps: int
    video: GuidanceScales
    audio: GuidanceScales
    stg_blocks: tuple[int, ...]
    """Blocks of the released depth (48)."""


_VIDEO = GuidanceScales(cfg=3.0, stg=1.0, rescale=0.7, modality=3.0)
_AUDIO = GuidanceScales(cfg=7.0, stg=1.0, rescale=0.7, modality=3.0)
_DEFAULTS = {
    "2.0": SamplingDefaults(steps=40, video=_VIDEO, audio=_AUDIO, stg_blocks=(29,)),
    "2.3": SamplingDefaults(steps=30, video=_VIDEO, audio=_AUDIO, stg_blocks=(28,)),
    "2.5": SamplingDefaults(steps=30, video=_VIDEO, audio=_AUDIO, stg_blocks=(28,)),
}


def defaults_for(version: str) -> SamplingDefaults:
    """The official settings of `2.0`, `2.3` or `2.5`."""
    return _DEFAULTS[version]


def guide(
    cond: Tensor,
    scales: GuidanceScales,
    *,
    negative: Tensor | None = None,
    perturbed: Tensor | None = None,
    isolated: Tensor | None = None,
) -> Tensor:
    """The guided clean prediction of one sample.

    p = c + (cfg - 1)(c - negative) + stg (c - perturbed) + (modality - 1)(c - isolated), then
    p (rescale std(c) / std(p) + 1 - rescale), the spread being taken over the whole tensor.

    Args:
        cond: (1, ...) float32 x0 of the prompt itself. One sample, or the spread would mix samples.
        negative, perturbed, isolated: x0 of the weaker passes, None where there is no such pass.
    """
    assert cond.shape[0] == 1, tuple(cond.shape)
    guided = cond
    for scale, other in ((scales.cfg - 1, negative), (scales.stg, perturbed), (scales.modality - 1, isolated)):
        if other is not None:
            guided = guided + scale * (cond - other)
    if scales.rescale != 0 and guided is not cond:
        guided = guided * (scales.rescale * (cond.std() / guided.std()) + (1 - scales.rescale))
    return guided
