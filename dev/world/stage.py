"""A stage of training that can be stopped and run again: it goes on where its last checkpoint stands."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_SAVE_SECONDS = 60.0


class Stage:
    """Steps of one stage, with a checkpoint `NAME.pt` and a log `NAME.log` in a folder."""

    def __init__(self, folder: Path, name: str, steps: int, parts: dict[str, Any]) -> None:
        """
        Args:
            steps: of the whole stage.
            parts: by name, what has `state_dict` and `load_state_dict`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._log = folder / f"{name}.pt", folder / f"{name}.log"
        self._name, self._steps, self._parts = name, steps, parts
        self._done = 0
        if self._path.exists():
            state = torch.load(self._path, map_location="cpu", weights_only=True)
            self._done = state.pop("step")
            for key, part in parts.items():
                part.load_state_dict(state[key])

    def __iter__(self) -> Iterator[int]:
        """Numbers of the steps that are left; saves now and then, and at the end."""
        saved = time.monotonic()
        while self._done < self._steps:
            yield self._done
            self._done += 1
            if time.monotonic() - saved > _SAVE_SECONDS or self._done == self._steps:
                self._save()
                saved = time.monotonic()

    def rng(self, step: int) -> random.Random:
        """What a step draws from, the same after a stop."""
        return random.Random(f"{self._name}|{step}")

    def tell(self, text: str) -> None:
        """Print a line, and keep it in the log."""
        print(f"{self._name}: {text}", flush=True)
        with self._log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def _save(self) -> None:
        state = {key: part.state_dict() for key, part in self._parts.items()}
        temporary = self._path.with_suffix(".tmp")
        torch.save({"step": self._done, **state}, temporary)
        temporary.replace(self._path)


def share_at(step: int, steps: int, *, warmup: int = 50, fall: float = 0.7) -> float:
    """Of the learning rate: up over `warmup` steps, even, then down to a hundredth over the last `fall` of all steps."""
    left = 1 - step / steps
    return min(1.0, (step + 1) / warmup) * min(1.0, left / fall + 0.01)
