"""What a page draws of a loss file: means of steps, the gap between held-out and training loss at the same noise, the best checkpoint."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from musubi_tuner.training.hooks import VALIDATION_SIGMAS
from musubi_tuner.training.metrics import LEVELS

MOST_POINTS = 800
"""Of a curve; a longer one is drawn by means of neighbours."""
STREAMS = ("video", "audio")

Row = Mapping[str, float]
Points = list[tuple[float, float]]


def curves(rows: Sequence[Row]) -> dict[str, Points]:
    """{name: [(step, value)]} of everything in a loss file that is finite, in the order of the steps."""
    found: dict[str, Points] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                found.setdefault(name, []).append((row["step"], value))
    return {name: _thinned(points) for name, points in found.items()}


def _thinned(points: Points) -> Points:
    every = -(-len(points) // MOST_POINTS)
    parts = [points[start : start + every] for start in range(0, len(points), every)]
    return [(round(_mean([step for step, _ in part]), 2), float(f"{_mean([value for _, value in part]):.6g}")) for part in parts]


def gaps(rows: Sequence[Row]) -> dict[str, Points]:
    """By stream: held-out loss less training loss at the same noise, at each step that measured the former.

    Training losses are logged by ranges of noise levels, the held-out ones at fixed levels: those of a range are compared with its mean
    over the steps since the measurement before, and the gap is the mean over the ranges that both have. One that grows is memorisation.
    """
    ordered = sorted(rows, key=lambda row: row["step"])
    found: dict[str, Points] = {}
    for stream in STREAMS:
        since: list[Row] = []
        for row in ordered:
            if f"validation/loss_{stream}" in row:
                if (gap := _gap(row, since, stream)) is not None:
                    found.setdefault(stream, []).append((row["step"], float(f"{gap:.6g}")))
                since = []
            else:
                since.append(row)
    return found


def _gap(held_out: Row, since: Sequence[Row], stream: str) -> float | None:
    differences = []
    for level in range(LEVELS):
        name = f"noise_level/loss_{stream}_{level / LEVELS:.2f}-{(level + 1) / LEVELS:.2f}"
        trained = [row[name] for row in since if math.isfinite(row.get(name, math.nan))]
        fixed = [sigma for sigma in VALIDATION_SIGMAS if min(int(sigma * LEVELS), LEVELS - 1) == level]
        measured = [held_out[key] for sigma in fixed if (key := f"validation/loss_{stream}_sigma{sigma}") in held_out]
        if trained and measured and all(map(math.isfinite, measured)):
            differences.append(_mean(measured) - _mean(trained))
    return _mean(differences) if differences else None


def best_of(rows: Sequence[Row], files: Mapping[int, str]) -> dict[str, Any] | None:
    """The step with the least held-out loss, and the saved file that is nearest to its best.

    Several streams count alike: each by its share of its first reading.

    Args:
        files: names of saved LoRAs by their steps.

    Returns:
        `step`, `losses` by stream, and of the best file `file`, `file_step` and `measured` (the step of its reading), None where none is
        saved; None where nothing is held out.
    """
    readings: dict[int, dict[str, float]] = {}
    for row in rows:
        values = {stream: row[key] for stream in STREAMS if math.isfinite(row.get(key := f"validation/loss_{stream}", math.nan))}
        if values:
            readings[int(row["step"])] = values
    if not readings:
        return None
    first = readings[min(readings)]

    def score(step: int) -> float:
        shares = [value / first[stream] for stream, value in readings[step].items() if first.get(stream)]
        return _mean(shares) if shares else math.inf

    best = min(readings, key=lambda step: (score(step), step))
    chosen = {"step": best, "losses": readings[best], "file": None, "file_step": None, "measured": None}
    nearest = {step: min(readings, key=lambda reading: (abs(reading - step), reading)) for step in files}
    if nearest:
        step = min(nearest, key=lambda step: (score(nearest[step]), abs(nearest[step] - step), step))
        chosen |= {"file": files[step], "file_step": step, "measured": nearest[step]}
    return chosen


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
