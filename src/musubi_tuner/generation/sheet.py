"""The page that shows a grid: one HTML file beside the clips, written anew as they come, and a PNG of one frame of each.

The page opens from disk, and loads nothing but the clips. What users wrote gets into it as JSON alone, whose `<`, `>` and `&` are
escaped, and into its elements as text. Picks of better and worse clips stay in the browser; what it downloads is described in
docs/reference/picks.md.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from musubi_tuner.cache.store import write_bytes
from musubi_tuner.generation.axes import OF_LORAS
from musubi_tuner.generation.clips import Made, make_clips, recipes_of
from musubi_tuner.generation.grid import Grid
from musubi_tuner.generation.jobs import Job
from musubi_tuner.generation.recipe import Recipe
from musubi_tuner.generation.setting import Setting
from musubi_tuner.generation.sheet_picture import write_sheet_picture
from musubi_tuner.page.fill import MEDIA_KINDS, data_of, fill, part

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Progress:
    """How far a clip is."""

    path: Path | None = None
    seconds: float = 0.0
    """Of sampling; 0 where it is not known."""


class Sheet:
    """The page of one grid."""

    def __init__(self, grid: Grid, recipes: Mapping[Job, Recipe], folder: Path) -> None:
        """
        Args:
            recipes: of all its clips.
            folder: of the clips.
        """
        self.path = folder / f"{grid.name}.html"
        self._grid, self._recipes = grid, recipes
        self._progress = {job: Progress() for job in grid.jobs}
        for job, seconds in _earlier_seconds(self.path, recipes).items():
            self._progress[job].seconds = seconds

    def tell(self, job: Job, path: Path | None, seconds: float) -> None:
        """A clip has come further; as `clips.Tell`."""
        one = self._progress[job]
        one.path, one.seconds = path, seconds or one.seconds
        self.write()

    def write(self) -> None:
        """The page as of now."""
        own = part("musubi_tuner.generation", "sheet_page.js")
        page = part("musubi_tuner.generation", "sheet_page.html")
        write_bytes(self.path, fill(page, title=self._grid.name, data=self._facts(), script=own).encode())

    def paths(self) -> dict[Job, Path]:
        """Of the clips that are there."""
        return {job: one.path for job, one in self._progress.items() if one.path is not None}

    def _facts(self) -> dict[str, Any]:
        jobs = {job: place for place, job in enumerate(self._grid.jobs)}
        rows, columns = self._grid.layout
        return {
            "key": self._key(),
            "name": self._grid.name,
            "rows": rows,
            "columns": columns,
            "fps": next((job.prompt.fps for job in jobs), 24.0),
            "axes": [{"name": axis.name, "labels": axis.labels, "of_loras": axis.name in OF_LORAS} for axis in self._grid.axes],
            "cells": [{"at": cell.at, "clip": jobs[cell.job]} for cell in self._grid.cells],
            "clips": [self._clip(place, job) for job, place in jobs.items()],
        }

    def _clip(self, place: int, job: Job) -> dict[str, Any]:
        progress, recipe = self._progress[job], self._recipes[job]
        path = progress.path
        return {
            "id": place,
            "file": None if path is None else path.name,
            "href": None if path is None else quote(path.name),
            "kind": None if path is None else MEDIA_KINDS[path.suffix],
            "seconds": round(progress.seconds, 3),
            "index": job.prompt.index,
            "prompt": job.prompt.prompt,
            "negative": job.prompt.negative,
            "seed": str(job.prompt.seed),
            "recipe": recipe.digest,
            "loras": [{name: one[name] for name in ("name", "sha256", "video", "audio")} for one in recipe.facts["loras"]],
        }

    def _key(self) -> str:
        """Of what the browser keeps: the same for a grid that grew."""
        models = sorted({str(recipe.facts["model"]["fingerprint"]) for recipe in self._recipes.values()})
        return hashlib.sha256(json.dumps([self._grid.name, models]).encode()).hexdigest()[:16]


def _earlier_seconds(path: Path, recipes: Mapping[Job, Recipe]) -> dict[Job, float]:
    """What the page of a run before this one says of clips that are still of the same recipe."""
    try:
        clips = data_of(path)["clips"]
        known = {str(clip["recipe"]): float(clip["seconds"]) for clip in clips}
    except (OSError, ValueError, KeyError, TypeError):  # no page of ours, which is then replaced
        return {}
    return {job: known[recipe.digest] for job, recipe in recipes.items() if recipe.digest in known}


def make_cells(grid: Grid, setting: Setting) -> list[Made]:
    """The clips of a grid, and its page and picture.

    Raises:
        UserError: what `make_clips` raises.
    """
    sheet = Sheet(grid, recipes_of(grid.jobs, setting), setting.config.clips.output_dir)
    log.info("grid: %d cells, %d clips; %s shows them as they come", len(grid.cells), len(grid.jobs), sheet.path)
    made = make_clips(grid.jobs, setting, sheet.tell)
    sheet.write()
    write_sheet_picture(sheet.path.with_suffix(".png"), grid, sheet.paths())
    return made
