"""Decoded frames -> 8-bit R'G'B' of BT.709, whatever the source says of its colors.

Matrix and range are those that the frames are tagged with. Frames without a tag for the matrix are BT.601 up to 576 lines and BT.709 above
(or from 1280 columns on), as mpv takes them: ITU-R BT.601 is the standard of pictures with 480 and 576 lines, BT.709 of HD.

High dynamic range (HLG and PQ of ITU-R BT.2100) is mapped to standard range by its light in cd/m^2:

    signal -> light      HLG: inverse OETF, then the OOTF of a display of 1000 cd/m^2 (gamma 1.2); PQ: its EOTF (BT.2100)
    light -> SDR light   the EETF of BT.2390, section 5.4, on max(R, G, B), from 1000 cd/m^2 to 203 cd/m^2, which is
                         diffuse white in BT.2408; the three channels are scaled alike, so that hue stays
    BT.2020 -> BT.709    the matrix of BT.2087, clipped
    SDR light -> signal  the power 1/2.4 of light / 203, the inverse of BT.1886
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

_UNTAGGED = 2
_HD_LINES, _HD_COLUMNS = 576, 1280
_TRANSFERS: dict[int, Literal["", "PQ", "HLG"]] = {16: "PQ", 18: "HLG"}
"""Numbers of ITU-T H.273, which all containers use."""

_SOURCE_PEAK, _WHITE = 1000.0, 203.0
"""cd/m^2"""
_HLG_A, _HLG_B, _HLG_C = 0.17883277, 0.28466892, 0.55991073
_HLG_GAMMA = 1.2
_PQ_M1, _PQ_M2 = 2610 / 16384, 2523 / 4096 * 128
_PQ_C1, _PQ_C2, _PQ_C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
_PQ_PEAK = 10000.0
_LUMA_2020 = (0.2627, 0.6780, 0.0593)
_TO_709 = ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187))
_GAMMA = 2.4


@dataclass(frozen=True, slots=True)
class Colors:
    """How a video's frames are read where their tags alone do not say it."""

    hdr: Literal["", "PQ", "HLG"] = ""
    """Its transfer, where it has a high dynamic range."""
    matrix: Literal["", "ITU709", "BT2020"] = ""
    """The matrix of frames without a tag for it, where it is not BT.601, which the decoder assumes."""

    @property
    def rule(self) -> str:
        """By which its frames are read; nothing where it is their tags alone."""
        if self.hdr:
            return f"{self.hdr} to SDR by BT.2390, 1000 to 203 cd/m2"
        return "untagged HD as BT.709" if self.matrix else ""


def colors_of(frame: Any) -> Colors:
    """From the tags and the size of a decoded frame."""
    hdr: Literal["", "PQ", "HLG"] = _TRANSFERS.get(int(frame.color_trc), "")
    if int(frame.colorspace) != _UNTAGGED or frame.format.is_rgb or len(frame.format.components) < 3:
        return Colors(hdr=hdr)
    if hdr:
        return Colors(hdr=hdr, matrix="BT2020")
    return Colors(matrix="ITU709") if frame.height > _HD_LINES or frame.width >= _HD_COLUMNS else Colors()


def is_transparent(frame: Any) -> bool:
    """Whether any of a decoded frame lets through what is behind it."""
    if not any(part.is_alpha for part in frame.format.components):
        return False
    return bool((frame.to_ndarray(format="rgba")[..., 3] < 255).any())


def picture_of(frame: Any, colors: Colors) -> Tensor:
    """(H, W, 3) uint8 R'G'B' of a decoded frame; of one that is transparent, the colors that are stored there."""
    matrix = {"src_colorspace": colors.matrix} if colors.matrix else {}
    if not colors.hdr:
        return torch.from_numpy(frame.to_ndarray(format="rgb24", **matrix))
    return sdr_of(torch.from_numpy(frame.to_ndarray(format="rgb48le", **matrix).astype("int32")), colors.hdr)


def sdr_of(signal: Tensor, transfer: Literal["PQ", "HLG"]) -> Tensor:
    """Tone mapping (see the head of this file).

    Args:
        signal: (..., 3) integers, R'G'B' of BT.2020 from 0 to 65535.

    Returns:
        (..., 3) uint8 R'G'B' of BT.709
    """
    light = _light_of_signals(transfer)[signal.long()]
    if transfer == "HLG":
        scene = (light * torch.tensor(_LUMA_2020)).sum(-1, keepdim=True)
        light = _SOURCE_PEAK * light * scene.pow(_HLG_GAMMA - 1)
    brightest = light.amax(-1, keepdim=True)
    light = light * torch.where(brightest > 0, _eetf(brightest) / brightest.clamp(min=1e-6), 1.0)
    light = (light @ torch.tensor(_TO_709).T / _WHITE).clamp(0, 1)
    return (light.pow(1 / _GAMMA) * 255).round().to(torch.uint8)


@lru_cache
def _light_of_signals(transfer: Literal["PQ", "HLG"]) -> Tensor:
    """(65536,) of every signal: HLG's scene light from 0 to 1, PQ's display light in cd/m^2."""
    signal = torch.arange(65536, dtype=torch.float64) / 65535
    if transfer == "PQ":
        root = signal.pow(1 / _PQ_M2)
        return (_PQ_PEAK * ((root - _PQ_C1).clamp(min=0) / (_PQ_C2 - _PQ_C3 * root)).pow(1 / _PQ_M1)).float()
    return torch.where(signal <= 0.5, signal.square() / 3, (((signal - _HLG_C) / _HLG_A).exp() + _HLG_B) / 12).float()


def _pq_of(light: Tensor) -> Tensor:
    power = (light / _PQ_PEAK).pow(_PQ_M1)
    return ((_PQ_C1 + _PQ_C2 * power) / (1 + _PQ_C3 * power)).pow(_PQ_M2)


def _eetf(light: Tensor) -> Tensor:
    """Light in cd/m^2 -> what of it a display of `_WHITE` shows: the same up to the knee, then a Hermite spline (BT.2390, 5.4.1)."""
    source, target = (float(_pq_of(torch.tensor(peak, dtype=torch.float64))) for peak in (_SOURCE_PEAK, _WHITE))
    most = target / source
    knee = 1.5 * most - 0.5
    level = (_pq_of(light) / source).clamp(max=1)
    t = (level - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    root = (torch.where(level < knee, level, spline) * source).pow(1 / _PQ_M2)
    return _PQ_PEAK * ((root - _PQ_C1).clamp(min=0) / (_PQ_C2 - _PQ_C3 * root)).pow(1 / _PQ_M1)
