"""Log mel spectrogram with torch alone (architecture sheet 4.3)."""

import math

import torch
from torch import Tensor

from musubi_tuner.ltxv2.geometry import AUDIO_HOP, AUDIO_SAMPLE_RATE

FFT_SIZE = 1024
MEL_BINS = 64
_FLOOR = 1e-5


def log_mel(waveform: Tensor) -> Tensor:
    """(B, C, samples) at 16 kHz -> (B, C, samples // 160 + 1, 64) natural log of Slaney mel magnitudes."""
    batch, channels, samples = waveform.shape
    flat = waveform.reshape(batch * channels, samples)
    window = torch.hann_window(FFT_SIZE, device=waveform.device)
    spectrum = torch.stft(flat, FFT_SIZE, AUDIO_HOP, FFT_SIZE, window, center=True, pad_mode="reflect", return_complex=True).abs()
    mel = mel_filters(waveform.device).T @ spectrum
    return mel.clamp(min=_FLOOR).log().view(batch, channels, MEL_BINS, -1).transpose(2, 3)


def mel_filters(device: torch.device | str = "cpu") -> Tensor:
    """(513, 64) triangular filters from 0 to 8000 Hz, spaced on the Slaney scale, each of unit area (Slaney norm)."""
    bins = torch.linspace(0, AUDIO_SAMPLE_RATE / 2, FFT_SIZE // 2 + 1, dtype=torch.float64)
    top = _to_mel(AUDIO_SAMPLE_RATE / 2)
    edges = torch.tensor([_to_hertz(top * i / (MEL_BINS + 1)) for i in range(MEL_BINS + 2)], dtype=torch.float64)
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins[:, None] - left) / (center - left)
    falling = (right - bins[:, None]) / (right - center)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * (2 / (right - left))).to(torch.float32).to(device)


_LINEAR_STEP = 200 / 3
_KNEE_HERTZ = 1000.0
_KNEE_MEL = _KNEE_HERTZ / _LINEAR_STEP
_LOG_STEP = math.log(6.4) / 27


def _to_mel(hertz: float) -> float:
    """Slaney: linear below 1000 Hz, logarithmic above."""
    return hertz / _LINEAR_STEP if hertz < _KNEE_HERTZ else _KNEE_MEL + math.log(hertz / _KNEE_HERTZ) / _LOG_STEP


def _to_hertz(mel: float) -> float:
    return mel * _LINEAR_STEP if mel < _KNEE_MEL else _KNEE_HERTZ * math.exp(_LOG_STEP * (mel - _KNEE_MEL))
