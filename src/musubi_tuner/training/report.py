"""The table at the end of a run, and the loss curve."""

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from musubi_tuner.runtime.disk import reason, write_whole
from musubi_tuner.runtime.tables import format_table
from musubi_tuner.training.metrics import loss_path, read_losses
from musubi_tuner.training.rescue import Restart
from musubi_tuner.training.run import Outcome, TrainingRun

log = logging.getLogger(__name__)

_WIDTH, _HEIGHT, _MARGIN = 900, 420, 56
_COLORS = {
    "loss_video": (31, 119, 180),
    "loss_audio": (214, 110, 20),
    "validation/loss_video": (10, 60, 110),
    "validation/loss_audio": (140, 60, 0),
}


def summary(run: TrainingRun, outcome: Outcome, restart: Restart) -> str:
    """What the run did, in one table; with the command that goes on where it was interrupted."""
    steps = outcome.step - run.start_step
    rows = [("steps", f"{run.start_step} to {outcome.step} of {run.schedule.total}")]
    if steps:
        rows.append(("time", f"{outcome.seconds:.1f} s; {outcome.stepping / steps:.3f} s a step (previews, validation, saving apart)"))
    if run.device.type == "cuda":
        rows.append(("peak GPU memory", f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"))
    rows += [(f"last {name}", f"{value:.4f}") for name, value in outcome.losses.items() if name.startswith("loss")]
    for name in ("validation/loss_video", "validation/loss_audio"):
        if name in outcome.last_validation:
            rows.append((name, f"{outcome.first_validation[name]:.4f} -> {outcome.last_validation[name]:.4f}"))
    rows += [("written", str(path)) for path in outcome.files[-4:]]
    text = format_table(rows, ("done" if not outcome.interrupted else "interrupted", ""))
    state = next((path for path in reversed(outcome.files) if path.is_dir()), None)  # none where no place took it
    if outcome.interrupted and state is not None:
        text += f"\n\nGo on with:\n  {restart.resuming(state)}"
    return text


def draw_losses(folder: Path, name: str) -> None:
    """`{name}-loss.png` from the loss file; a warning where the one cannot be read or the other written."""
    path = folder / f"{name}-loss.png"
    try:
        draw_loss_curve(read_losses(loss_path(folder, name)), path)
    except OSError as error:
        log.warning("WARNING: %s: not drawn (%s)", path, reason(error))


def draw_loss_curve(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """A PNG of the losses over the steps."""
    from PIL import Image, ImageDraw

    series = {name: [(row["step"], row[name]) for row in rows if name in row] for name in _COLORS}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return
    last_step = max(step for points in series.values() for step, _ in points) or 1
    top = max(value for points in series.values() for _, value in points) * 1.05 or 1.0
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(image)

    def place(step: float, value: float) -> tuple[float, float]:
        x = _MARGIN + (_WIDTH - 2 * _MARGIN) * step / last_step
        return x, _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * value / top

    for part in range(5):
        value = top * part / 4
        draw.line([place(0, value), place(last_step, value)], fill=(225, 225, 225))
        draw.text((6, place(0, value)[1] - 6), f"{value:.3g}", fill="black")
        draw.text((place(last_step * part / 4, 0)[0] - 8, _HEIGHT - _MARGIN + 8), f"{last_step * part / 4:.0f}", fill="black")
    for row, (name, points) in enumerate(series.items()):
        places = [place(*point) for point in points]
        draw.line(places, fill=_COLORS[name], width=2) if len(places) > 1 else draw.point(places, fill=_COLORS[name])
        draw.text((_MARGIN + 170 * row, 16), name, fill=_COLORS[name])
    data = io.BytesIO()
    image.save(data, "PNG")
    write_whole(path, data.getvalue(), path.with_name(f".{path.name}.tmp"))
