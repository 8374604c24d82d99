"""Losses on their way to the screen, the loss file and the trackers. They stay on the device until they are logged."""

import importlib
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.objective import ItemLosses

log = logging.getLogger(__name__)


class Reading:
    """Numbers on their way from the device to the host, which does not wait for them before it needs them."""

    def __init__(self, values: Tensor) -> None:
        self._host = torch.empty(values.numel(), dtype=values.dtype, pin_memory=values.is_cuda)
        self._host.copy_(values.detach().flatten(), non_blocking=True)
        self._arrived = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def values(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


class LossMeter:
    """Sums since the last look: raw losses of video and audio, items in each of them; distance from the base model of items that learn
    from it and their number, distance under the prompt of `--dop_prompt` and its number; what an update rule clips, and of how many.
    """

    SIZE = 12
    """Of what `take` gives."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(10, dtype=torch.float64, device=device)
        self._expected = self._supervised = 0

    def add(self, losses: ItemLosses, expected: int, supervised: int) -> None:
        """Without waiting for the device.

        Args:
            expected: items whose audio should be trained: no stills, not all conditioning, of some weight, not held to the base model.
            supervised: those of them that have some.
        """
        self._expected += expected
        self._supervised += supervised
        seen = losses.video_present
        if seen is None and losses.video is not None:
            seen = torch.ones_like(losses.video)
        of_prompt = (None, None) if losses.prompt is None else (losses.prompt, torch.ones_like(losses.prompt))
        row = [losses.video, losses.audio, seen, losses.audio_present, losses.preserved, losses.preserved_present, *of_prompt]
        row += [losses.clipped, losses.clipped_of]
        nothing = self._sums.new_zeros(())
        self._sums += torch.stack([nothing if value is None else value.detach().to(torch.float64).sum() for value in row])

    def take(self, processes: int) -> Tensor:
        """(12,) float64 sums over all processes, for `means`; then start again. Without waiting for the device."""
        counts = [self._sums.new_full((1,), count) for count in (self._expected, self._supervised)]
        sums = torch.cat([self._sums, *counts])
        self._sums.zero_()
        self._expected = self._supervised = 0
        if processes > 1:
            torch.distributed.all_reduce(sums)
        return sums

    @staticmethod
    def means(sums: Sequence[float], mode: str) -> dict[str, float]:
        """Mean losses, and of the items whose sound should be trained the share whose sound was; neither of what there was none."""
        video, audio, seen, heard, preserved, with_teacher, held, asked, clipped, rated, expected, supervised = sums
        values = {}
        if mode != "audio" and seen:
            values["loss_video"] = video / seen
        if mode != "video":
            if heard:
                values["loss_audio"] = audio / heard
            if expected:
                values["audio_supervised"] = supervised / expected
        if with_teacher:
            values["loss_preserved"] = preserved / with_teacher
        if asked:
            values["loss_dop"] = held / asked
        if rated:
            values["clipped"] = clipped / rated
        return values


LEVELS = 4
"""Ranges of equal width into which noise levels are sorted for the log."""


class NoiseLevelMeter:
    """Sums of raw losses by range of noise level since the last look; kept on the device, as `LossMeter` is."""

    SIZE = 4 * LEVELS

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, 2, LEVELS, dtype=torch.float64, device=device)
        """Of video and audio: losses, and items that are in them."""

    def add(self, losses: ItemLosses, video_sigma: Tensor, audio_sigma: Tensor) -> None:
        """
        Args:
            video_sigma, audio_sigma: (B,) levels at which the losses were taken.
        """
        rows = ((losses.video, losses.video_present, video_sigma), (losses.audio, losses.audio_present, audio_sigma))
        for sums, (values, present, sigma) in zip(self._sums, rows, strict=True):
            if values is None:
                continue
            seen = torch.ones_like(values, dtype=torch.float64) if present is None else present.double()
            index = (sigma * LEVELS).long().clamp(0, LEVELS - 1)
            sums[0].scatter_add_(0, index, values.detach().double() * seen)
            sums[1].scatter_add_(0, index, seen)

    def take(self, processes: int) -> Tensor:
        """(4 LEVELS,) float64 sums over all processes, for `means`; then start again. Without waiting for the device."""
        sums = self._sums.flatten().clone()
        self._sums.zero_()
        if processes > 1:
            torch.distributed.all_reduce(sums)
        return sums

    @staticmethod
    def means(sums: Sequence[float]) -> dict[str, float]:
        """Mean losses of the ranges that were met, such as `noise_level/loss_video_0.25-0.50`."""
        values = {}
        for place, name in enumerate(("loss_video", "loss_audio")):
            totals, counts = (sums[(2 * place + row) * LEVELS :][:LEVELS] for row in (0, 1))
            for level, (total, count) in enumerate(zip(totals, counts, strict=True)):
                if count:
                    values[f"noise_level/{name}_{level / LEVELS:.2f}-{(level + 1) / LEVELS:.2f}"] = total / count
        return values


class LossFile:
    """`{name}-loss.jsonl`: a line of numbers for each logged step, one object a line."""

    def __init__(self, path: Path, first_step: int, again: int = 0) -> None:
        """Lines after `first_step` are dropped, as a resumed run writes them again. A new run puts the file of an earlier one aside.

        Args:
            again: a file that ends by this step is no earlier run, but this one, which began before and came to no save.

        Raises:
            OSError: the folder cannot be written.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if first_step > 0 and path.is_file():
            kept = [json.dumps(row) + "\n" for row in read_losses(path) if row["step"] <= first_step]
        elif path.is_file() and path.stat().st_size and max((row["step"] for row in read_losses(path)), default=again + 1) > again:
            aside = next(
                name for number in itertools.count(1) if not (name := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists()
            )
            path.replace(aside)
            log.warning("WARNING: %s is of an earlier run; it is now %s", path, aside.name)
        path.write_text("".join(kept), encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def loss_path(folder: Path, name: str) -> Path:
    return folder / f"{name}-loss.jsonl"


def read_losses(path: Path) -> list[dict[str, float]]:
    """The rows of a loss file; lines that are none, such as one that a power cut has torn, are left out with a warning.

    Raises:
        OSError: it cannot be read.
    """
    rows, odd = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        numbers = isinstance(row, dict) and all(isinstance(value, int | float) for value in row.values())
        if numbers and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            odd += 1
    if odd:
        log.warning("WARNING: %s: %d line(s) are no losses of a step and are left out", path, odd)
    return rows


_REMEDIES = {
    "tensorboard": "pip install tensorboard",
    "wandb": "pip install wandb, then 'wandb login' or WANDB_MODE=offline",
    "all": "pip install tensorboard, or wandb",
}
_MEDIA = {".mp4": "Video", ".png": "Image", ".wav": "Audio"}
"""Classes of wandb for the files of previews."""


class Trackers:
    """accelerate's trackers (TensorBoard, Weights & Biases), as `--log_with` asks for them. One that cannot start ends the program before
    any work; one that fails later costs a warning."""

    def __init__(self, accelerator: Any, wanted: str | None, name: str, settings: Mapping[str, Any]) -> None:
        """
        Args:
            accelerator: made with `log_with=wanted`; it drops what is not installed.
            name: of the run.
            settings: shown beside the curves.

        Raises:
            UserError: no such package, or it refuses to start.
        """
        self._accelerator = accelerator
        self._failed = False
        if wanted is None:
            return
        if not accelerator.log_with:
            raise UserError(f"--log_with {wanted}: the package is not installed. Remedy: {_REMEDIES[wanted]}.")
        try:
            accelerator.init_trackers(name, config={key: str(value) for key, value in settings.items()})
        except Exception as error:  # whatever a tracker raises where there is no login, no network, no folder
            raise UserError(f"--log_with {wanted}: cannot start ({type(error).__name__}: {error}). {_REMEDIES[wanted]}.") from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._try(lambda: self._accelerator.log(dict(values), step=step))

    def log_previews(self, files: Sequence[Path], prompts: Sequence[str], step: int) -> None:
        """Show a step's previews in Weights & Biases, under `previews/` and the number of the prompt, with its words; TensorBoard plays no
        such files."""
        for tracker in self._accelerator.trackers:
            if tracker.name == "wandb":
                self._try(lambda tracker=tracker: tracker.log(_media(files, prompts), step=step))

    def _try(self, report: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            report()
        except Exception as error:  # whatever a tracker raises: reporting must not end a run
            self._failed = True
            log.warning("WARNING: the tracker failed (%s: %s); training goes on without it.", type(error).__name__, error)

    def close(self) -> None:
        """Flush and end the trackers."""
        try:
            self._accelerator.end_training()
        except Exception as error:  # as above
            log.warning("WARNING: the tracker failed at the end (%s: %s).", type(error).__name__, error)


def _media(files: Sequence[Path], prompts: Sequence[str]) -> dict[str, Any]:
    wandb = importlib.import_module("wandb")
    return {
        f"previews/{number}": getattr(wandb, _MEDIA[file.suffix])(str(file), caption=prompt)
        for number, (file, prompt) in enumerate(zip(files, prompts, strict=True))
    }
