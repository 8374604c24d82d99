"""Rewards of what the prompt says: its words as they are spoken (Whisper), its sound (CLAP), its picture (CLIP, SigLIP, PickScore)."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from musubi_tuner.reinforcement.rewards.base import NoScore, Reward, RewardSample, Score
from musubi_tuner.reinforcement.rewards.local import as_pictures, embedding, evenly, load, load_processor, model_files, mono
from musubi_tuner.runtime.errors import UserError

_QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|«([^»]+)»|„([^“”]+)[“”]|「([^」]+)」|『([^』]+)』")
_WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\W_぀-ヿ㐀-鿿]+(?:['’][^\W_]+)*")
"""A word, or a letter of scripts without blanks."""


class WordError(Reward):
    """How well the speech is understood: -(words that Whisper hears wrong, misses or adds / words of the prompt's quoted speech).

    Quoted speech stands in "", “”, «», „“ or 「」; prompts without it have no score. Whisper hears 30 s.
    """

    name, route, needs = "word_error", "audio", ("audio",)
    indifferent = ("model",)
    _named = "--reward_args word_error.model="
    _remedy = "Give the folder of a Whisper model as it is published (config.json, preprocessor, tokenizer, *.safetensors)."

    def weight_files(self, model: Path, **other: Any) -> Sequence[Path]:
        return model_files(model, self._named, self._remedy)

    def setup(self, device: torch.device, model: Path, language: str | None = None) -> None:
        self._device, self._language = device, language
        self._processor = load_processor(model, "WhisperProcessor", self._named, self._remedy)
        self._model = load(model, "WhisperForConditionalGeneration", self._named, self._remedy, device)

    def score(self, samples: Sequence[RewardSample]) -> list[Score]:
        return [self._score(one) for one in samples]

    def _score(self, sample: RewardSample) -> Score:
        wanted = words_of(" ".join(quoted_speech(sample.prompt)))
        if not wanted:
            return NoScore("its prompt quotes no speech")
        return -distance(wanted, words_of(self.heard(sample))) / len(wanted)

    def heard(self, sample: RewardSample) -> str:
        """What Whisper writes down."""
        rate = self._processor.feature_extractor.sampling_rate
        given = self._processor.feature_extractor(mono(sample.sound, rate).numpy(), sampling_rate=rate, return_tensors="pt")
        language = {} if self._language is None else {"language": self._language}
        try:
            tokens = self._model.generate(given["input_features"].to(self._device), do_sample=False, num_beams=1, **language)
        except ValueError as error:
            raise UserError(f"--reward_args word_error.language={self._language}: this Whisper does not take it ({error}).") from error
        return self._processor.tokenizer.decode(tokens[0], skip_special_tokens=True)


class Clap(Reward):
    """Cosine of CLAP's embeddings of sound and prompt, in float32; a sound that is longer than the model hears is the mean of its parts."""

    name, route, needs = "clap", "audio", ("audio",)
    indifferent = ("model",)
    _named = "--reward_args clap.model="
    _remedy = "Give the folder of a CLAP model as it is published (config.json, preprocessor, tokenizer, *.safetensors)."

    def weight_files(self, model: Path) -> Sequence[Path]:
        return model_files(model, self._named, self._remedy)

    def setup(self, device: torch.device, model: Path) -> None:
        self._device = device
        self._extractor = load_processor(model, "AutoFeatureExtractor", self._named, self._remedy)
        self._tokenizer = load_processor(model, "AutoTokenizer", self._named, self._remedy)
        self._model = load(model, "ClapModel", self._named, self._remedy, device)

    def score(self, samples: Sequence[RewardSample]) -> list[float]:
        return [float(self._of_sound(one) @ self._of_text(one.prompt)) for one in samples]

    def _of_sound(self, sample: RewardSample) -> Tensor:
        rate = self._extractor.sampling_rate
        parts = mono(sample.sound, rate).split(self._extractor.nb_max_samples)  # by itself it cuts a random piece out
        given = self._extractor([part.numpy() for part in parts], sampling_rate=rate, return_tensors="pt").to(self._device)
        return normalize(embedding(self._model.get_audio_features(**given)).mean(0), dim=-1).cpu()

    def _of_text(self, prompt: str) -> Tensor:
        most = self._model.config.text_config.max_position_embeddings - 2  # the first two places are no tokens'
        given = self._tokenizer([prompt], truncation=True, max_length=most, return_tensors="pt").to(self._device)
        return embedding(self._model.get_text_features(**given))[0].cpu()


class Clip(Reward):
    """Mean cosine of the embeddings of `frames` frames with that of the prompt, by CLIP, SigLIP or PickScore (a CLIP that learned what
    people prefer), whose tokenizers take the beginning of a long prompt: 77 or 64 tokens.
    """

    name, route, needs = "clip", "video", ("video",)
    indifferent = ("model",)
    _named = "--reward_args clip.model="
    _remedy = "Give the folder of a CLIP, SigLIP or PickScore model as it is published (config.json, preprocessor, tokenizer, weights)."

    def weight_files(self, model: Path, **other: Any) -> Sequence[Path]:
        return model_files(model, self._named, self._remedy)

    def setup(self, device: torch.device, model: Path, frames: int = 4) -> None:
        if frames < 1:
            raise UserError(f"--reward_args clip.frames={frames}: must be at least 1.")
        self._device, self._frames = device, frames
        self._pictures = load_processor(model, "AutoImageProcessor", self._named, self._remedy)
        self._tokenizer = load_processor(model, "AutoTokenizer", self._named, self._remedy)
        self._model = load(model, "AutoModel", self._named, self._remedy, device)
        if not hasattr(self._model, "get_text_features"):
            raise UserError(f"{self._named}{model}: it knows no texts. {self._remedy}")

    def score(self, samples: Sequence[RewardSample]) -> list[float]:
        return [float((self._of_pictures(one.frames) @ self._of_text(one.prompt)).mean()) for one in samples]

    def _of_pictures(self, frames: Tensor) -> Tensor:
        pixels = self._pictures(images=as_pictures(evenly(frames, self._frames)), return_tensors="pt")["pixel_values"]
        return embedding(self._model.get_image_features(pixel_values=pixels.to(self._device))).cpu()

    def _of_text(self, prompt: str) -> Tensor:
        most = self._model.config.text_config.max_position_embeddings
        given = self._tokenizer([prompt], padding="max_length", truncation=True, max_length=most, return_tensors="pt")
        asked = {"input_ids": given["input_ids"].to(self._device)}
        if self._model.config.model_type == "clip":  # SigLIP was trained on padding as on words
            asked["attention_mask"] = given["attention_mask"].to(self._device)
        return embedding(self._model.get_text_features(**asked))[0].cpu()


def quoted_speech(prompt: str) -> list[str]:
    """What stands in quotation marks."""
    return [next(part for part in parts if part) for parts in _QUOTED.findall(prompt)]


def words_of(text: str) -> list[str]:
    """Without punctuation and case."""
    return [word.replace("’", "'") for word in _WORD.findall(text.casefold())]


def distance(wanted: Sequence[str], heard: Sequence[str]) -> int:
    """Words to replace, insert and leave out, at least (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for count, word in enumerate(wanted, 1):
        before, row[0] = row[0], count
        for place, other in enumerate(heard, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (word != other))
    return row[-1]
