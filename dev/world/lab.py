"""What trials of recipes for a LoRA share: a lesson's clips as latents, the model, samples of many prompts at once, and what they show.

The model, noise levels and schedule are the product's; a caption is its tokens and one register that counts for all
(`dev/world/transformer.py`), and clips are encoded as they are drawn, without a media file between.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dev.world.cached import Captions, encode_captions
from dev.world.evaluate import Decoders
from dev.world.fit_video_encoder import to_pixels
from dev.world.transformer import AUDIO_TOKENS, CHANNELS, VIDEO_TOKENS, WorldModel
from musubi_tuner.flow.path import velocity_to_x0
from musubi_tuner.flow.schedule import euler_step, ltx2_sigmas
from musubi_tuner.ltxv2.autoencoders.audio_vae import log_mel
from musubi_tuner.ltxv2.geometry import patchify_audio, patchify_video
from musubi_tuner.runtime.draws import generator_for
from musubi_tuner.tiny.world.audio_encoder import AudioEncoder
from musubi_tuner.tiny.world.checkpoint import DATA, write_world_checkpoint
from musubi_tuner.tiny.world.scenes import draw_scenes, scene_of
from musubi_tuner.tiny.world.scorer import base_scores, character_scores
from musubi_tuner.tiny.world.sounds import draw_sounds, sound_of
from musubi_tuner.tiny.world.subjects import CharacterSubject, Subject
from musubi_tuner.tiny.world.video_encoder import VideoEncoder

SAMPLING_STEPS = 12
_TOGETHER = 16
"""Prompts that are sampled at once."""

Scores = Mapping[str, Mapping[str, float]]
"""Shares of the clips in which each thing is right: `character`, `base`, and `voices` of the base world."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Clips with their captions."""

    video: Tensor
    """(N, 27, 128)"""
    audio: Tensor
    """(N, 18, 128)"""
    captions: Sequence[str]


class Lab:
    """What all trials share: encoders, decoders, captions, the base model's weights."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        parts = {name: load_file(DATA / f"{name}.safetensors") for name in ("video", "audio")}
        encoders = {name: {key: value for key, value in one.items() if key.startswith("encoder.")} for name, one in parts.items()}
        named = {name: {key.removeprefix("encoder."): value for key, value in one.items()} for name, one in encoders.items()}
        self._video, self._audio = VideoEncoder(**named["video"]), AudioEncoder(**named["audio"])
        self._statistics = {name: (one["mean"], one["std"]) for name, one in parts.items()}
        self._weights = {name: tensor.bfloat16().float() for name, tensor in load_file(DATA / "transformer.safetensors").items()}
        self._states: dict[str, tuple[Tensor, int]] = {}
        self._examples: dict[tuple[str, int, int], Examples] = {}

    @cached_property
    def decoders(self) -> Decoders:
        """Of the checkpoint, which is written where it is not there."""
        path = self._folder / "world.safetensors"
        if not path.exists():
            write_world_checkpoint(path)
        return Decoders(path, torch.device("cpu"))

    def model(self) -> WorldModel:
        """A fresh base model, as the checkpoint holds it."""
        model = WorldModel()
        model.load_state_dict(self._weights)
        return model.requires_grad_(False).eval()

    def text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, 15, 128) hidden states and (B,) lengths."""
        new = sorted(set(captions) - set(self._states))
        if new:
            made: Captions = encode_captions(self._folder, new)
            self._states |= {caption: (made.states[place].float(), int(made.lengths[place])) for place, caption in enumerate(new)}
        found = [self._states[caption] for caption in captions]
        return torch.stack([states for states, _ in found]), torch.tensor([length for _, length in found])

    def examples(self, kind: str, subjects: Sequence[Subject] | Sequence[CharacterSubject], seed: int) -> Examples:
        """The clips that `lesson.write_lesson` draws."""
        key = (kind, len(subjects), seed)
        if key not in self._examples:
            videos, audios = [], []
            for number, subject in enumerate(subjects):
                rng = random.Random(f"{seed}|{number}")
                frames = draw_scenes([scene_of(subject, rng)])
                wave = draw_sounds([sound_of(subject, rng)])
                videos.append(patchify_video(self._video.encode(to_pixels(frames))))
                audios.append(patchify_audio(self._audio.encode(log_mel(wave[:, None].expand(-1, 2, -1)))))
            (mean, std), (audio_mean, audio_std) = self._statistics["video"], self._statistics["audio"]
            self._examples[key] = Examples(
                video=((torch.cat(videos) - mean) / std).half().float(),
                audio=((torch.cat(audios) - audio_mean) / audio_std).half().float(),
                captions=[one.caption for one in subjects],
            )
        return self._examples[key]

    @torch.no_grad()
    def read(
        self, model: WorldModel, characters: Sequence[CharacterSubject], others: Sequence[Subject], guidance: float
    ) -> dict[str, dict[str, float]]:
        """Scores of samples of these prompts, each from the noise that the product's previews of them start with."""
        subjects = [*characters, *others]
        tokens = [sample(model, self, subjects[start : start + _TOGETHER], start, guidance) for start in range(0, len(subjects), _TOGETHER)]
        reading = self.decoders.read(torch.cat([video for video, _ in tokens]), torch.cat([audio for _, audio in tokens]))
        count = len(characters)
        by_voice: dict[str, list[bool]] = {}
        for subject, heard in zip(others, reading.from_sound[count:], strict=True):
            by_voice.setdefault(subject.voice, []).append(heard.voice == subject.voice)
        return {
            "character": character_scores(characters, reading.sights[:count], reading.from_sound[:count]),
            "base": base_scores(others, reading.sights[count:], reading.from_sound[count:]),
            "seen": {
                f"{one.shape if isinstance(one, Subject) else 'star'}>{sight.shape}": sight.overlap
                for one, sight in zip(subjects, reading.sights)
            },
            "voices": {voice: sum(values) / len(values) for voice, values in by_voice.items()},
        }


def sample(
    model: WorldModel, lab: Lab, subjects: Sequence[Subject | CharacterSubject], start: int, guidance: float
) -> tuple[Tensor, Tensor]:
    """Tokens (B, 27, 128) and (B, 18, 128) of prompts, the first of which is line `start` of the prompt file."""
    seeds = [start + place + 1 for place in range(len(subjects))]
    video, audio = (
        torch.stack([torch.randn((1, count, CHANNELS), generator=generator_for(seed, "preview", name))[0] for seed in seeds])
        for name, count in (("video", VIDEO_TOKENS), ("audio", AUDIO_TOKENS))
    )
    contexts = [lab.text([one.caption for one in subjects]), lab.text([""] * len(subjects))]
    sigmas = ltx2_sigmas(SAMPLING_STEPS)
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        level = sigma.expand(len(subjects))
        both = [model(video, audio, level, level, states, lengths) for states, lengths in contexts]
        clean = [[velocity_to_x0(x, v, sigma) for x, v in zip((video, audio), one, strict=True) if v is not None] for one in both]
        guided = [own + (guidance - 1) * (own - empty) for own, empty in zip(*clean, strict=True)]
        video, audio = euler_step(video, guided[0], sigma, following), euler_step(audio, guided[1], sigma, following)
    return video, audio
