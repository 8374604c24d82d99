"""A folder of rollouts: samples of a policy as ordinary cache files, with a dataset's TOML and index, so that training reads them as clips.

    rollouts.json                      what they were made with, the prompts, the samples with their seeds
    dataset.toml, ltxv2_index_*.json   the samples as a dataset
    g0003_k02_ltxv2.safetensors, g0003_k02_ltxv2_audio.safetensors         latents of sample 2 of prompt 3
    g0003_k02_ltxv2_steps.safetensors  its stochastic steps, where it has any: values before and after each
    p0003_ltxv2_te.safetensors         the prompt's context, once for all its samples
    p0003_sound.wav                    a sound of the prompt's, for rewards that compare with it
    scores/REWARD.json                 what rewards say, added later

Sources: docs/explanation/reinforcement_learning.md.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.cache.clip import Clip, Sidecar
from musubi_tuner.cache.forms import header_fault
from musubi_tuner.cache.index import DatasetIndex, write_index
from musubi_tuner.cache.names import AUDIO_ENDING, LATENTS_ENDING, text_name, training_key
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.cache.store import canonical, read, read_header, text_fingerprint, write, write_bytes
from musubi_tuner.config.dataset import DatasetConfig, load_dataset_config
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json
from musubi_tuner.runtime.tables import names_of

ROLLOUTS, DATASET, SCORES = "rollouts.json", "dataset.toml", "scores"
STEPS_ENDING = "_ltxv2_steps.safetensors"
FORMAT = 1
_STORED = torch.bfloat16
_WIDTH = 128
"""Of a token, in either stream."""
_NAME = re.compile(r"g\d{4,9}_k\d{2,9}", re.ASCII)
_DRAWN = (["video", "audio"], ["video"], ["audio"], [])
_SOUND_NAME = re.compile(r"p\d{4,9}_sound\.[a-z0-9]{1,5}", re.ASCII)
_FACTS = (
    "seed", "round", "mode", "timestep_format", "width", "height", "frames", "fps", "first_frame", "policy", "frozen", "model", "sampling",
    "prompts", "samples",
)  # fmt: skip
_SECTIONS = {"policy": ("name", "sha256"), "model": ("name", "fingerprint"), "sampling": ("guided", "stochastic")}
"""What is read of those facts that hold several."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One rollout."""

    name: str
    prompt: int
    """Number of its prompt, which is its group."""
    k: int
    """Place within the group."""
    seed: int


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What a folder holds, or is to hold."""

    folder: Path
    facts: Mapping[str, Any]
    """As in rollouts.json."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(Sample(**one) for one in self.facts["samples"])

    @property
    def groups(self) -> dict[int, tuple[str, ...]]:
        """Names of samples by prompt."""
        found: dict[int, list[str]] = {}
        for one in self.samples:
            found.setdefault(one.prompt, []).append(one.name)
        return {prompt: tuple(names) for prompt, names in found.items()}

    @property
    def stochastic(self) -> Mapping[str, Any] | None:
        """How steps were drawn: `kind`, `level`, `streams`; None where none was."""
        return self.facts["sampling"]["stochastic"]

    def write(self) -> None:
        """The description, and the samples as a dataset."""
        write_bytes(self.folder / ROLLOUTS, (json.dumps({"format": FORMAT, **self.facts}, indent=1, ensure_ascii=False) + "\n").encode())
        self.write_dataset()

    def write_dataset(self) -> None:
        """The samples as a dataset alone."""
        write_bytes(self.folder / DATASET, _toml(self.facts).encode())
        spec = self.dataset.datasets[0]
        write_index(spec, DatasetIndex(settings=spec.settings(), clips=tuple(map(self.clip_of, self.samples))))

    @property
    def dataset(self) -> DatasetConfig:
        return load_dataset_config(self.folder / DATASET)

    def clip_of(self, sample: Sample) -> Clip:
        """As the index has it."""
        facts, sound = self.facts, self.facts["mode"] == "av"
        sidecars = {"latents": Sidecar(file=f"{sample.name}{LATENTS_ENDING}"), "text": Sidecar(file=context_name(sample.prompt))}
        if sound:
            sidecars["audio"] = Sidecar(file=f"{sample.name}{AUDIO_ENDING}")
        return Clip(
            key=sample.name,
            kind="video" if facts["frames"] > 1 else "image",
            source=source_name(sample.prompt),
            stem=sample.name,
            source_fingerprint=text_fingerprint(canonical({"policy": facts["policy"], "model": facts["model"], "seed": sample.seed})),
            start_seconds=0.0,
            end_seconds=facts["frames"] / facts["fps"],
            fps=facts["fps"],
            frames=facts["frames"],
            width=facts["width"],
            height=facts["height"],
            original_width=facts["width"],
            original_height=facts["height"],
            has_audio=sound,
            sidecars=sidecars,
        )

    def sound_of(self, prompt: int) -> Path | None:
        """What rewards may compare the prompt's samples with."""
        sound = self.facts["prompts"][prompt].get("audio")
        return None if sound is None else self.folder / sound["file"]

    def fault_of(self, sample: Sample, *, steps: bool) -> str | None:
        """What is wrong with a sample's files, by their headers; None where they are whole. The latents are written last.

        Args:
            steps: whether its stochastic steps are looked at too, where it has any.
        """
        clip = self.clip_of(sample)
        shapes: dict[str, tuple[int, ...]] = {}
        for kind in ("latents", *(("audio",) if self.facts["mode"] == "av" else ())):
            file = clip.sidecars[kind].file
            if (fault := self._fault_of(file, "source_fingerprint", clip.source_fingerprint)) is not None:
                return fault
            metadata, found = read_header(self.folder / file)
            headers = {training_key(key): one for key, one in found.items()}
            if ("latents" if kind == "latents" else "audio_latents") not in headers:
                return f"{file} holds no latents"
            if (fault := header_fault(headers, KINDS[kind].forms(clip)(metadata))) is not None:
                return f"{file}: {fault}"
            shapes |= {key: one.shape for key, one in headers.items()}
        if not steps or self.stochastic is None:
            return None
        file = f"{sample.name}{STEPS_ENDING}"
        if (fault := self._fault_of(file, "source", sample.name)) is not None:
            return fault
        steps_of = {key: one.shape for key, one in read_header(self.folder / file)[1].items()}
        count = (steps_of.get("levels") or (0,))[0]
        tokens = {"video": math.prod(shapes["latents"][1:])} | ({"audio": shapes["audio_latents"][1]} if "audio_latents" in shapes else {})
        wanted: dict[str, tuple[int, ...]] = {"levels": (count, 2), "second": ()}
        wanted |= {f"{stream}_before": (count, tokens[stream], _WIDTH) for stream in tokens}
        wanted |= {f"{stream}_after": wanted[f"{stream}_before"] for stream in self.stochastic["streams"] if stream in tokens}
        return None if count and steps_of == wanted else f"{file} holds other steps than its sample has"

    def _fault_of(self, file: str, key: str, value: str) -> str | None:
        path = self.folder / file
        if not path.is_file():
            return f"{file} is missing"
        try:
            metadata, _ = read_header(path)
        except UserError:
            return f"{file} is damaged"
        return None if metadata.get(key) == value else f"{file} is of another sample"

    def check_whole(self, *, steps: bool) -> None:
        """
        Args:
            steps: whether stochastic steps are needed.

        Raises:
            UserError: files of samples are missing or damaged.
        """
        faults = [fault for one in self.samples if (fault := self.fault_of(one, steps=steps)) is not None]
        faults += [f"{name} is missing or damaged" for prompt in self.groups if not is_sound(self.folder / (name := context_name(prompt)))]
        if faults:
            raise UserError(
                f"{self.folder}: {len(faults)} of its files cannot be used ({names_of(faults, 3)}). Run ltxv2_cache_rollouts.py again, "
                "with the flags of the first time: it makes those again."
            )

    def write_sample(
        self, sample: Sample, video: Tensor, audio: Tensor | None, steps: Mapping[str, Tensor], encoders: Mapping[str, str]
    ) -> None:
        """
        Args:
            video: (128, F, h, w) latents.
            audio: (8, T, 16); None in video mode.
            steps: of `sampling.Recorder`; empty where none was drawn.
            encoders: fingerprints of the autoencoders, by kind of sidecar.
        """
        clip = self.clip_of(sample)
        if steps:
            write(self.folder / f"{sample.name}{STEPS_ENDING}", steps, {"kind": "rollout_steps", "source": sample.name})
        if audio is not None:
            self._write(
                clip, "audio", KINDS["audio"].pack(audio.to(_STORED)), {"encoder_fingerprint": encoders["audio"], "audio": "present"}
            )
        self._write(clip, "latents", KINDS["latents"].pack(video.to(_STORED)), {"encoder_fingerprint": encoders["latents"]})

    def _write(self, clip: Clip, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        kind = KINDS[name]
        common = {"source": clip.source, "encoding": canonical({"rollout": True, "stored": str(_STORED).removeprefix("torch.")})}
        path = self.folder / clip.sidecars[name].file
        write(path, tensors, {**common, **kind.expected(clip), **metadata}, kind.forms(clip))

    def steps_of(self, name: str) -> dict[str, Tensor]:
        """A sample's stochastic steps.

        Raises:
            UserError: it has none.
        """
        path = self.folder / f"{name}{STEPS_ENDING}"
        if not path.is_file():
            raise UserError(
                f"{path}: not found. Rollouts with stochastic steps have one for each sample: run ltxv2_cache_rollouts.py again."
            )
        return read(path)


def is_sound(path: Path) -> bool:
    """Whether it is there, and a cache file by its header."""
    try:
        read_header(path)
    except UserError:
        return False
    return True


def read_rollouts(folder: Path) -> Rollouts:
    """
    Raises:
        UserError: no rollouts, or of another version.
    """
    path = folder / ROLLOUTS
    if not path.is_file():
        raise UserError(f"{path}: not found. Rollouts are made by: python ltxv2_cache_rollouts.py --rl_rollout_cache {folder} ...")
    facts = read_json(path)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(f"{path}: its format is not {FORMAT}, the one that this version reads. Make the rollouts again.")
    missing = [name for name in _FACTS if name not in facts]
    if missing:
        raise UserError(f"{path}: '{missing[0]}' is missing, so the file is damaged. Make the rollouts again.")
    if (fault := _fault(facts)) is not None:
        raise UserError(f"{path}: {fault}, so the file is damaged. Make the rollouts again.")
    return Rollouts(folder, {name: facts[name] for name in facts if name != "format"})


def _fault(facts: Mapping[str, Any]) -> str | None:
    """What of the facts cannot be so: names lead to files, and samples to prompts."""
    if facts["mode"] not in ("av", "video"):
        return f"'mode' is {facts['mode']!r:.60}"
    for key in ("width", "height", "frames", "fps"):
        if isinstance(facts[key], bool) or not isinstance(facts[key], int | float) or facts[key] <= 0:
            return f"'{key}' is {facts[key]!r:.60}"
    for key, names in _SECTIONS.items():
        value = facts[key]
        if value is None and key == "policy":
            continue  # the base model
        if not isinstance(value, dict) or any(name not in value for name in names):
            return f"'{key}' is {value!r:.60}"
        if key != "sampling" and not all(isinstance(value[name], str) for name in names):
            return f"'{key}' is {value!r:.60}"
    kinds = {"name": str, "sha256": str, "video": int | float, "audio": int | float}
    for one in facts["frozen"] if isinstance(facts["frozen"], list) else [facts["frozen"]]:
        if not isinstance(one, dict) or not all(isinstance(one.get(key), kind) for key, kind in kinds.items()):
            return f"'frozen' is {facts['frozen']!r:.60}"
    drawn = facts["sampling"]["stochastic"]
    if drawn is not None and not (isinstance(drawn, dict) and drawn.get("streams") in _DRAWN):
        return f"'sampling': 'stochastic' is {drawn!r:.60}"
    prompts, samples = facts["prompts"], facts["samples"]
    if not isinstance(prompts, list) or not all(isinstance(one, dict) and isinstance(one.get("prompt"), str) for one in prompts):
        return "'prompts' is no list of prompts"
    for one in prompts:
        sound = one.get("audio")
        if sound is not None and not (isinstance(sound, dict) and _SOUND_NAME.fullmatch(str(sound.get("file")))):
            return f"the sound of a prompt is {sound!r:.100}"
    if not isinstance(samples, list) or not samples:
        return "'samples' is no list of samples"
    for one in samples:
        if not isinstance(one, dict) or set(one) != {"name", "prompt", "k", "seed"}:
            return f"the sample {one!r:.100} is none"
        if not isinstance(one["name"], str) or not _NAME.fullmatch(one["name"]):
            return f"a sample is called {one['name']!r:.60}"
        if type(one["prompt"]) is not int or not 0 <= one["prompt"] < len(prompts):
            return f"the sample {one['name']} is of prompt {one['prompt']!r:.60}, and there are {len(prompts)}"
    return None


def sample_seed(run: int, round_number: int, prompt: str, k: int) -> int:
    """By a hash, so that no two rounds, prompts or places share noise, and no sample depends on how many others there are."""
    digest = hashlib.sha256(f"{run}|{round_number}|{k}|{prompt}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def list_samples(run: int, round_number: int, prompts: Sequence[str], group_size: int) -> tuple[Sample, ...]:
    """All samples, group after group."""
    return tuple(
        Sample(name=f"g{number:04d}_k{k:02d}", prompt=number, k=k, seed=sample_seed(run, round_number, prompt, k))
        for number, prompt in enumerate(prompts)
        for k in range(group_size)
    )


def source_name(prompt: int) -> str:
    """What all samples of a prompt are clips of, as far as the cache is concerned."""
    return f"p{prompt:04d}"


def sound_name(prompt: int, given: Path) -> str:
    """File name of a prompt's own sound."""
    return f"{source_name(prompt)}_sound{given.suffix.lower()}"


def context_name(prompt: int) -> str:
    """File name of a prompt's context."""
    return text_name(source_name(prompt))


def _toml(facts: Mapping[str, Any]) -> str:
    still = facts["frames"] == 1
    return f"""# Samples of a policy as a dataset: ltxv2_train_rl.py reads it, and ltxv2_train_network.py may.
[general]
resolution = [{facts["width"]}, {facts["height"]}]
enable_bucket = false

[[datasets]]
{"image" if still else "video"}_directory = "media"
cache_directory = "."
{"" if still else f"target_frames = [{facts['frames']}]"}
"""
