"""Rewards of likeness to the user's own clips: of the picture, and of the voice; by any embedding model in a local transformers folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.media.audio import Waveform
from musubi_tuner.reinforcement.rewards.base import NoScore, Reward, RewardSample, Score
from musubi_tuner.reinforcement.rewards.local import (
    architectures,
    as_pictures,
    centroid,
    embedding,
    evenly,
    load,
    load_processor,
    model_files,
    mono,
    reference_frames,
    reference_sound,
    references,
)
from musubi_tuner.runtime.errors import UserError

_LEAST_SECONDS = 0.2


class PictureLikeness(Reward):
    """Mean cosine of `frames` frames' embeddings with the mean direction of those of the pictures and videos in the folder `clips`, each of
    which weighs the same. CLIP and SigLIP give their picture features, DINO and others their pooled output.
    """

    name, route, needs = "picture_likeness", "video", ("video",)
    indifferent = ("model", "clips")
    _named = "--reward_args picture_likeness.model="
    _remedy = "Give the folder of a CLIP, SigLIP or DINO model as it is published (config.json, preprocessor, *.safetensors)."
    _clips = "--reward_args picture_likeness.clips="

    def weight_files(self, model: Path, clips: Path, **other: Any) -> Sequence[Path]:
        return [*model_files(model, self._named, self._remedy), *references(clips, ("image", "video"), self._clips)]

    def setup(self, device: torch.device, model: Path, clips: Path, frames: int = 4) -> None:
        if frames < 1:
            raise UserError(f"--reward_args picture_likeness.frames={frames}: must be at least 1.")
        self._device, self._frames = device, frames
        self._processor = load_processor(model, "AutoImageProcessor", self._named, self._remedy)
        self._model = load(model, "AutoModel", self._named, self._remedy, device)
        paths = references(clips, ("image", "video"), self._clips)
        with torch.inference_mode():
            self._wanted = centroid(paths, lambda path: self._embed(reference_frames(path, frames)))

    def score(self, samples: Sequence[RewardSample]) -> list[float]:
        return [float((self._embed(evenly(one.frames, self._frames)) @ self._wanted).mean()) for one in samples]

    def _embed(self, frames: Tensor) -> Tensor:
        pixels = self._processor(images=as_pictures(frames), return_tensors="pt")["pixel_values"].to(self._device)
        run = getattr(self._model, "get_image_features", self._model)
        return embedding(run(pixel_values=pixels)).cpu()


class VoiceLikeness(Reward):
    """Cosine of the sound's embedding with the mean direction of those of the sounds and videos in the folder `clips`, each of which weighs
    the same, up to 30 s of it; without `clips`, with that of the prompt's own sound. A model for x-vectors (WavLM, wav2vec2) gives these,
    others the mean of their last hidden state over time.
    """

    name, route, needs = "voice_likeness", "audio", ("audio",)
    indifferent = ("model", "clips")
    _named = "--reward_args voice_likeness.model="
    _remedy = "Give the folder of a WavLM or wav2vec2 model as it is published (config.json, preprocessor_config.json, *.safetensors)."
    _clips = "--reward_args voice_likeness.clips="

    def weight_files(self, model: Path, clips: Path | None = None) -> Sequence[Path]:
        return [*model_files(model, self._named, self._remedy), *self._references(clips)]

    def setup(self, device: torch.device, model: Path, clips: Path | None = None) -> None:
        self._device = device
        self._extractor = load_processor(model, "AutoFeatureExtractor", self._named, self._remedy)
        self._by_speaker = any(one.endswith("ForXVector") for one in architectures(model))
        self._model = load(model, "AutoModelForAudioXVector" if self._by_speaker else "AutoModel", self._named, self._remedy, device)
        paths, self._of_prompts = self._references(clips), dict[Path, Tensor]()
        self._wanted = self._direction(paths) if paths else None

    def score(self, samples: Sequence[RewardSample]) -> list[Score]:
        found: list[Score] = []
        for one in samples:
            wanted = self._of_prompt(one) if self._wanted is None else self._wanted
            seconds = one.sound.samples.shape[1] / one.sound.rate
            long_enough = seconds >= _LEAST_SECONDS
            found.append(float(self._embed(one.sound)[0] @ wanted) if long_enough else NoScore(f"{seconds:.2f} s hold no voice"))
        return found

    def _references(self, clips: Path | None) -> list[Path]:
        return [] if clips is None else references(clips, ("audio", "video"), self._clips)

    def _of_prompt(self, sample: RewardSample) -> Tensor:
        if (path := sample.prompt_sound) is None:
            raise UserError(
                f"--reward_fn {self.name}: has nothing to compare with: the prompt '{sample.prompt:.60}' names no sound. Give a folder of "
                f'clips by {self._clips}FOLDER, or every prompt a sound ("audio" in .jsonl, --a in .txt) before the rollouts are made.'
            )
        if path not in self._of_prompts:
            self._of_prompts[path] = self._direction([path])
        return self._of_prompts[path]

    def _direction(self, paths: Sequence[Path]) -> Tensor:
        with torch.inference_mode():
            return centroid(paths, lambda path: self._embed(reference_sound(path)))

    def _embed(self, sound: Waveform) -> Tensor:
        rate = self._extractor.sampling_rate
        given = self._extractor(mono(sound, rate).numpy(), sampling_rate=rate, return_tensors="pt").to(self._device)
        found = self._model(**given)
        return embedding(found.embeddings if self._by_speaker else found.last_hidden_state.mean(1)).cpu()
