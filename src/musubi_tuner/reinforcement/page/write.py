"""`rounds.html`: how rounds did on held-out prompts, beside a control, and samples of the same seeds after each, with their scores."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from musubi_tuner.cache.store import write_bytes
from musubi_tuner.page.fill import MEDIA_KINDS, fill, part
from musubi_tuner.reinforcement.page.samples import clip_of_page
from musubi_tuner.reinforcement.rollouts import ROLLOUTS, SCORES, read_rollouts
from musubi_tuner.reinforcement.scores import rewards_of
from musubi_tuner.reinforcement.shown import FIRST

PAGE = "rounds.html"
_PACKAGE = "musubi_tuner.reinforcement.page"


def write_page(
    path: Path, rows: Sequence[Mapping[str, Any]], control: Sequence[Mapping[str, Any]], *, heldout: Mapping[int, Path], best: int | None,
    reward_fn: str,
) -> None:  # fmt: skip
    """Write the page whole.

    Args:
        rows: as in rounds.json, the base model's first.
        control: the same of rounds with shuffled advantages; none where there are none.
        heldout: folders of held-out samples, by the number of updates before them: 0 for the base model's.
        best: the round whose LoRA was taken.
    """
    clips = list(_clips(path.parent, heldout, reward_fn))
    places = {one: place for place, one in enumerate(dict.fromkeys((clip["index"], clip["seed"]) for clip in clips))}
    columns = sorted({clip["round"] for clip in clips})
    for number, clip in enumerate(clips):
        clip |= {"id": number, "at": [places[clip["index"], clip["seed"]], columns.index(clip["round"])]}
    prompts = {(clip["index"], clip["seed"]): clip["prompt"] for clip in clips}
    data = {
        "key": hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogatepass")).hexdigest()[:16],
        "name": path.resolve().parent.name,
        "fps": next((clip["fps"] for clip in clips), 24.0),
        "rounds": [_row(row, best) for row in rows],
        "control": [_row(row, None) for row in control],
        "rows": [{"prompt": prompt, "seed": seed} for (_, seed), prompt in prompts.items()],
        "columns": [_label(updates) for updates in columns],
        "clips": clips,
    }
    script = f"{part('musubi_tuner.page', 'charts.js')}\n{part(_PACKAGE, 'rounds_page.js')}"
    text = fill(
        part(_PACKAGE, "rounds_page.html"), title=f"Rounds of {data['name']}", data=data, script=script,
        style=part("musubi_tuner.page", "charts.css"),
    )  # fmt: skip
    write_bytes(path, text.encode("utf-8", "backslashreplace"), lasting=False)


def _label(updates: int) -> str:
    return "base model" if updates == 0 else f"round {updates - 1}"


def _row(row: Mapping[str, Any], best: int | None) -> dict[str, Any]:
    """`round` is the number of updates, so that the base model stands at 0."""
    updates = 0 if row["round"] is None else row["round"] + 1
    is_best = row["round"] is not None and row["round"] == best
    return {
        "round": updates,
        "label": _label(updates) + (" (best)" if is_best else ""),
        "best": is_best,
        **{name: row["heldout"][name] for name in ("gain", "error", "rewards")},
        "learned": row.get("rollouts"),
    }


def _clips(folder: Path, heldout: Mapping[int, Path], reward_fn: str) -> Iterator[dict[str, Any]]:
    """Samples that were decoded; of a folder that is gone, none."""
    for updates, place in heldout.items():
        if not (place / ROLLOUTS).is_file() or not (place / SCORES / FIRST).is_dir():
            continue
        rollouts = read_rollouts(place)
        rewards, media = rewards_of(rollouts, reward_fn), {one.stem: one for one in (place / SCORES / FIRST).iterdir()}
        loras = [{"name": f"round {updates - 1}", "sha256": None, "video": 1, "audio": 1}] if updates else []
        for sample in rollouts.samples:
            if (file := media.get(sample.name)) is None or file.suffix not in MEDIA_KINDS:
                continue
            yield {
                **clip_of_page(rollouts, sample, file, folder, rewards),
                "recipe": hashlib.sha256(f"{updates}|{sample.prompt}|{sample.seed}".encode()).hexdigest()[:16],
                "loras": loras,
                "round": updates,
            }
