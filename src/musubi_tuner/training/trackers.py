"""accelerate's trackers: TensorBoard, Weights & Biases."""

import logging
from collections.abc import Mapping
from typing import Any

from musubi_tuner.runtime.errors import UserError

log = logging.getLogger(__name__)

_REMEDIES = {
    "tensorboard": "pip install tensorboard",
    "wandb": "pip install wandb, then 'wandb login' or WANDB_MODE=offline",
    "all": "pip install tensorboard, or wandb",
}


class Trackers:
    """What `--log_with` asks for. One that cannot start ends the program before any work; one that fails later is warned of and no more."""

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
        if self._failed:
            return
        try:
            self._accelerator.log(dict(values), step=step)
        except Exception as error:  # whatever a tracker raises: reporting must not end a run
            self._failed = True
            log.warning("WARNING: the tracker failed (%s: %s); training goes on without it.", type(error).__name__, error)

    def close(self) -> None:
        """Flush and end the trackers."""
        try:
            self._accelerator.end_training()
        except Exception as error:  # as above
            log.warning("WARNING: the tracker failed at the end (%s: %s).", type(error).__name__, error)
