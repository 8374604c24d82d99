"""The table at the end of a run."""

from collections.abc import Sequence

import torch

from musubi_tuner.runtime.tables import format_table
from musubi_tuner.training.page.write import PAGE
from musubi_tuner.training.rescue import Restart
from musubi_tuner.training.run import Outcome, TrainingRun

_NEWEST = 4
"""Files that are named."""


def _short(value: float) -> str:
    """Four decimals, but for what they would show as 0."""
    return f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.3g}"


def summary(run: TrainingRun, outcome: Outcome, restart: Restart, uploaded: Sequence[tuple[str, str]] = ()) -> str:
    """What the run did, in one table; with the command that goes on where it was interrupted.

    Args:
        uploaded: rows of what is on the hub, and of what is not.
    """
    steps = outcome.step - run.start_step
    rows = [("steps", f"{run.start_step} to {outcome.step} of {run.schedule.total}")]
    if steps:
        rows.append(("time", f"{outcome.seconds:.1f} s; {outcome.stepping / steps:.3f} s a step (previews, validation, saving apart)"))
    if run.device.type == "cuda":
        rows.append(("peak GPU memory", f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"))
    rows += [(f"last {name}", _short(value)) for name, value in outcome.losses.items() if name.startswith("loss")]
    for name in ("validation/loss_video", "validation/loss_audio"):
        if name in outcome.last_validation:
            first, last = (f"{found[name]:.4f}" for found in (outcome.first_validation, outcome.last_validation))
            rows.append((name, last if outcome.first_validation is outcome.last_validation else f"{first} -> {last}"))
    rows += [("written", str(path)) for path in outcome.files[-_NEWEST:]]
    if (older := len(outcome.files) - _NEWEST) > 0:
        rows.append(("", f"and {older} before them, in {run.output_dir}"))
    if (page := run.output_dir / PAGE).is_file():
        rows.append(("to look at", str(page)))
    rows += uploaded
    text = format_table(rows, ("done" if not outcome.interrupted else "interrupted", ""))
    state = next((path for path in reversed(outcome.files) if path.is_dir()), None)  # none where no place took it
    if outcome.interrupted and state is not None:
        text += f"\n\nGo on with:\n  {restart.resuming(state)}"
    return text
