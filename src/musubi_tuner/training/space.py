"""Room on the disk: what a save takes, known before the first step and kept in view during the run."""

import logging
import shutil

from musubi_tuner.config.network import parse_pairs
from musubi_tuner.placement.planning import state_bytes
from musubi_tuner.runtime.errors import TemporaryFailure
from musubi_tuner.training.checkpoint import SAVE_DTYPES
from musubi_tuner.training.run import TrainingRun

log = logging.getLogger(__name__)

_MB = 10**6


class SpaceWatch:
    """Compares the room that the run's folder has with what the next save needs."""

    def __init__(self, run: TrainingRun, *, beside_trained: int = 0) -> None:
        """
        Args:
            beside_trained: bytes of a file beside the trained weights.
        """
        saving, optimization = run.config.saving, run.config.optimization
        weights = sum(parameter.numel() for parameter in run.network.parameters())
        self._folder = run.output_dir
        self.lora = weights * SAVE_DTYPES[saving.save_precision].itemsize + beside_trained
        """Bytes, near enough: a file's header and its folded scale are small."""
        args = parse_pairs(optimization.optimizer_args, "--optimizer_args")
        beside = state_bytes(optimization.optimizer_type, args, averaged=optimization.ema_decay > 0)
        self.state = round(sum(parameter.numel() * (parameter.element_size() + beside) for parameter in run.network.parameters()))
        """Bytes of one state, which an interrupt writes whatever was asked for."""
        self._warned = False

    def check_before(self) -> None:
        """
        Raises:
            TemporaryFailure: not even the LoRA of the last step would find room.
        """
        free = self._free()
        if free is None:
            return
        if free < self.lora:
            raise TemporaryFailure(
                f"--output_dir {self._folder}: {_mb(free)} are free, and the LoRA alone takes {_mb(self.lora)}. Make room, or choose "
                "another --output_dir."
            )
        self.check(0)

    def check(self, step: int) -> None:
        """Warn, once, where the next save would not find room."""
        if self._warned or not self.is_short():
            return
        self._warned = True
        log.warning(
            "WARNING: step %d: %s has %s free; the next save takes about %s (LoRA %s, state %s). Make room: a save that finds none "
            "costs that save, and the last one is then written elsewhere.",
            step,
            self._folder,
            _mb(self._free() or 0),
            _mb(self.lora + self.state),
            _mb(self.lora),
            _mb(self.state),
        )

    def is_short(self) -> bool:
        """Whether LoRA and state together have no room."""
        free = self._free()
        return free is not None and free < self.lora + self.state

    def _free(self) -> int | None:
        """None where the folder has gone; the save makes it again."""
        try:
            return shutil.disk_usage(self._folder).free
        except OSError:
            return None


def _mb(count: int) -> str:
    return f"{count / _MB:,.1f} MB"
