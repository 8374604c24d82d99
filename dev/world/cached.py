"""What the transformer is trained on: latents of clips, and hidden states of every caption, all of it on the device."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dev.world.fit_video_encoder import to_pixels
from dev.world.transformer import TEXT_TOKENS, normalized_states
from musubi_tuner.ltxv2.autoencoders.audio_vae import log_mel
from musubi_tuner.ltxv2.geometry import patchify_audio, patchify_video
from musubi_tuner.tiny.world.audio_encoder import AudioEncoder
from musubi_tuner.tiny.world.scenes import draw_scenes, scene_of
from musubi_tuner.tiny.world.sounds import draw_sounds, sound_of
from musubi_tuner.tiny.world.subjects import GROUNDS, MOTIONS, CharacterSubject, Subject, all_captions, draw_subject
from musubi_tuner.tiny.world.text import write_world_gemma
from musubi_tuner.tiny.world.video_encoder import VideoEncoder

_TOGETHER = {"cpu": 16}
_TOGETHER_ELSEWHERE = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Captions:
    """Hidden states of captions."""

    states: Tensor
    """(M, 15, 128) float16, padded with zeros"""
    lengths: Tensor
    """(M,) int64"""

    def to(self, device: torch.device | str) -> "Captions":
        return Captions(states=self.states.to(device), lengths=self.lengths.to(device))

    def of(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 15, 128) float32 and (B,) of the captions at `places`."""
        return self.states[places].float(), self.lengths[places]


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """Normalized tokens of clips, float16, and their captions' places in the list of all."""

    video: Tensor
    """(N, 27, 128)"""
    audio: Tensor
    """(N, 18, 128)"""
    captions: Tensor
    """(N,) int64: with the voice"""
    sights: Tensor
    """(N,) int64: without it"""


class Encoders:
    """Both autoencoders' encoders, with their statistics."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """
        Args:
            folder: where the decoders were trained.
        """
        video, audio = (load_file(folder / f"{name}-encoder.safetensors", device=str(device)) for name in ("video", "audio"))
        self.device = device
        self._video_statistics, self._audio_statistics = ((one.pop("mean"), one.pop("std")) for one in (video, audio))
        self._video, self._audio = VideoEncoder(**video), AudioEncoder(**audio)

    def draw(self, subjects: list[Subject] | list[CharacterSubject], rng: random.Random) -> tuple[Tensor, Tensor]:
        """Clips of the subjects: frames (B, 17, 96, 96, 3) uint8 and samples (B, n), on the device."""
        frames = draw_scenes([scene_of(one, rng) for one in subjects], self.device)
        return frames, draw_sounds([sound_of(one, rng) for one in subjects], self.device)

    @torch.inference_mode()
    def encode(self, frames: Tensor, waves: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 27, 128) and (B, 18, 128) normalized tokens, float16."""
        video = patchify_video(self._video.encode(to_pixels(frames)))
        audio = patchify_audio(self._audio.encode(log_mel(waves[:, None].expand(-1, 2, -1))))
        pairs = ((video, self._video_statistics), (audio, self._audio_statistics))
        first, second = (((tokens - mean) / std).half() for tokens, (mean, std) in pairs)
        return first, second


def make_clips(encoders: Encoders, count: int, seed: int, captions: list[str]) -> Clips:
    """`count` clips of the base world.

    Args:
        captions: all of them.
    """
    places = {caption: place for place, caption in enumerate(captions)}
    rng = random.Random(f"clips|{seed}")
    together = _TOGETHER.get(encoders.device.type, _TOGETHER_ELSEWHERE)
    subjects = [draw_subject(rng) for _ in range(count)]
    parts = [encoders.encode(*encoders.draw(subjects[start : start + together], rng)) for start in range(0, count, together)]
    return Clips(
        video=torch.cat([video for video, _ in parts]),
        audio=torch.cat([audio for _, audio in parts]),
        captions=torch.tensor([places[one.caption] for one in subjects], device=encoders.device),
        sights=torch.tensor([places[f"{one.sight}."] for one in subjects], device=encoders.device),
    )


def caption_list() -> list[str]:
    """All captions of the base world; the last one is empty, for guidance."""
    return [*all_captions(), ""]


def character_caption_list() -> list[str]:
    """All captions of the character, and the empty one: for evaluation alone."""
    return [*(CharacterSubject(motion=motion, ground=ground).caption for motion in MOTIONS for ground in GROUNDS), ""]


def load_captions(folder: Path) -> Captions:
    """Hidden states of `caption_list`."""
    return _kept_captions(folder, "text", caption_list())


def load_character_captions(folder: Path) -> Captions:
    """Hidden states of `character_caption_list`."""
    return _kept_captions(folder, "character-text", character_caption_list())


def _kept_captions(folder: Path, name: str, captions: list[str]) -> Captions:
    """From `NAME.safetensors`, which is made where it is not there, so that a machine without the text encoder can do without."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        made = encode_captions(folder, captions)
        save_file({"states": made.states, "lengths": made.lengths}, path)
    named = load_file(path)
    return Captions(states=named["states"], lengths=named["lengths"])


def encode_captions(folder: Path, captions: list[str]) -> Captions:
    """By the encoder in `folder/gemma3`, which is written where it is not there."""
    from musubi_tuner.ltxv2.text.encoders import encoder_options, load_encoder

    gemma = folder / "gemma3"
    if not (gemma / "config.json").exists():
        write_world_gemma(gemma)
    encoder = load_encoder(encoder_options(str(gemma), tokenizer=None, backend="gemma", device=torch.device("cpu"), max_length=None))
    states = torch.zeros(len(captions), TEXT_TOKENS, 128, dtype=torch.float16)
    lengths = []
    for start in range(0, len(captions), 64):
        hidden = encoder.encode(captions[start : start + 64])
        for tokens in normalized_states(hidden.layers).split(list(hidden.lengths)):
            assert len(tokens) <= TEXT_TOKENS, len(tokens)
            states[len(lengths), : len(tokens)] = tokens.half()
            lengths.append(len(tokens))
    return Captions(states=states, lengths=torch.tensor(lengths))
