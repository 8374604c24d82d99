"""Latents of clips that are not decoded yet, and which clips are there: what a run that was stopped goes on from."""

import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from musubi_tuner.cache.store import read, read_metadata, serialize, write_bytes
from musubi_tuner.generation.denoise import SampledLatents
from musubi_tuner.generation.recipe import TEXT_PROJECTION, Recipe, read_recipe
from musubi_tuner.runtime.errors import UserError

FOLDER = "unfinished"
_ENDINGS = (".mp4", ".png", ".wav")
_TEMPORARY = re.compile(r"\.(?:[0-9a-f]{12}|.+\.(?:mp4|png|wav))\.(\d{1,9})[\w.]*\.tmp")
"""Of files that `cache.store` and `media.write` are at, with the process that writes them."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """Of one output folder."""

    folder: Path

    def finished(self, stem: str, recipe: Recipe) -> Path | None:
        """The clip of this recipe, where there is one under this name."""
        for path in self._clips(stem):
            try:
                there = read_recipe(path)
            except UserError:  # another program's file
                continue
            if there.digest == recipe.digest and recipe.has_projection(there.facts.get(TEXT_PROJECTION)):
                return path
        return None

    def free_stem(self, stem: str) -> Path:
        """Where a clip is written: never over another."""
        taken = {path.stem for path in self._clips(stem)}
        names = [stem, *(f"{stem}-{number}" for number in range(2, len(taken) + 2))]
        return self.folder / next(name for name in names if name not in taken)

    def has(self, stem: str, recipe: Recipe, stage: int) -> bool:
        path = self._path(stem, recipe, stage)
        return path.is_file() and recipe.has_projection(read_metadata(path).get(TEXT_PROJECTION))

    def keep(self, stem: str, recipe: Recipe, stage: int, latents: SampledLatents, seconds: float, weight_format: str) -> None:
        tensors = {name: value for name in ("video", "audio") if (value := getattr(latents, name)) is not None}
        path = self._path(stem, recipe, stage)
        facts = {"seconds": f"{seconds:.3f}", "weight_format": weight_format}
        if (projection := recipe.facts.get(TEXT_PROJECTION)) is not None:
            facts[TEXT_PROJECTION] = projection
        write_bytes(path, serialize({name: value.contiguous() for name, value in tensors.items()}, facts))

    def read(self, stem: str, recipe: Recipe, stage: int) -> SampledLatents:
        tensors = read(self._path(stem, recipe, stage))
        return SampledLatents(video=tensors.get("video"), audio=tensors.get("audio"))

    def seconds(self, stem: str, recipe: Recipe, stages: int) -> float:
        """Of sampling, all stages."""
        return sum(float(read_metadata(self._path(stem, recipe, stage))["seconds"]) for stage in range(stages))

    def weight_formats(self, stem: str, recipe: Recipe, stages: int) -> list[str]:
        """What each stage was sampled with."""
        return [read_metadata(self._path(stem, recipe, stage))["weight_format"] for stage in range(stages)]

    def remove(self, stem: str, recipe: Recipe) -> None:
        """What is kept of a clip that is there now."""
        beginning = self._path(stem, recipe, 0).name.removesuffix("0.safetensors")
        if (self.folder / FOLDER).is_dir():
            for path in [one for one in (self.folder / FOLDER).iterdir() if one.name.startswith(beginning)]:
                path.unlink(missing_ok=True)
        self._remove_empty()

    def open(self) -> None:
        """Make the folder, and remove what a run that was killed was writing.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {self.folder}: cannot be made ({error.strerror}).") from error
        for folder in (self.folder, self.folder / FOLDER):
            for path in folder.glob(".*.tmp"):
                if (match := _TEMPORARY.fullmatch(path.name)) and not psutil.pid_exists(int(match[1])):
                    path.unlink(missing_ok=True)
        self._remove_empty()

    def _remove_empty(self) -> None:
        if (folder := self.folder / FOLDER).is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def _path(self, stem: str, recipe: Recipe, stage: int) -> Path:
        return self.folder / FOLDER / f"{stem}_{recipe.digest}_{stage}.safetensors"

    def _clips(self, stem: str) -> list[Path]:
        """By this name, or by it and a number."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if path.suffix in _ENDINGS and path.stem.startswith(stem)]
        return sorted(path for path in found if path.stem == stem or path.stem[len(stem) :].removeprefix("-").isdigit())
