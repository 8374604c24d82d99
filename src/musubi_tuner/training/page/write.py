"""`report.html`: runs on one page that opens from disk, with all that it says in it; media lie beside it, or are embedded."""

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from musubi_tuner.page.fill import MEDIA_KINDS, fill, part
from musubi_tuner.runtime.disk import write_whole
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.page.losses import best_of, curves, gaps
from musubi_tuner.training.page.record import Prompt
from musubi_tuner.training.page.runs import FoundRun, PreviewFile

PAGE = "report.html"
_PACKAGE = "musubi_tuner.training.page"
_TYPES = {".mp4": "video/mp4", ".png": "image/png", ".jpg": "image/jpeg", ".wav": "audio/wav"}


def write_page(path: Path, runs: Sequence[FoundRun], *, embed: bool = False) -> None:
    """Write the page of `runs` whole.

    Args:
        embed: put the previews into it.

    Raises:
        OSError: it could not be written; the one of before is untouched.
        UserError: a preview that cannot be embedded.
    """
    title = ", ".join(dict.fromkeys(run.name for run in runs))
    script = f"{part('musubi_tuner.page', 'charts.js')}\n{part(_PACKAGE, 'report_page.js')}"
    style = f"{part('musubi_tuner.page', 'charts.css')}\n{part(_PACKAGE, 'report_page.css')}"
    page = part(_PACKAGE, "report_page.html")
    text = fill(page, title=title, data=facts(runs, path.parent, embed=embed), script=script, style=style)
    written = text.encode("utf-8", "backslashreplace")
    write_whole(path, written, path.with_name(f".{path.name}.{os.getpid()}.tmp"), lasting=False)


def facts(runs: Sequence[FoundRun], folder: Path, *, embed: bool = False) -> dict[str, Any]:
    """What the page is made of, as plain JSON values.

    Args:
        folder: of the page, which links start from.
    """
    labels = _labels(runs)
    rows: dict[tuple[str, str, str, int], int] = {}
    clips = []
    for place, run in enumerate(runs):
        prompts = {prompt.index: prompt for prompt in run.record.prompts} if run.record else {}
        for preview in run.previews:
            prompt = prompts.get(preview.index)
            words = (prompt.prompt, prompt.negative) if prompt else ("", "")
            key = (words[0], words[1], str(preview.seed), 0 if prompt else preview.index)
            row = rows.setdefault(key, len(rows))
            clip = _clip(run, preview, prompt, _link(preview.path, folder, embed=embed))
            clips.append(clip | {"id": len(clips), "run": place, "index": row})
    prompts = [prompt for run in runs if run.record for prompt in run.record.prompts]
    return {
        "ltxv2_report": 1,
        "key": hashlib.sha256("".join(sorted(run.identity for run in runs)).encode()).hexdigest()[:16],
        "name": "_".join(dict.fromkeys(run.name for run in runs)),
        "fps": prompts[0].fps if prompts else 24.0,
        "rows": [{"prompt": prompt, "negative": negative, "seed": seed} for prompt, negative, seed, _ in rows],
        "clips": clips,
        "runs": [_run(run, label, folder, embed=embed) for run, label in zip(runs, labels, strict=True)],
    }


def _run(run: FoundRun, label: str, folder: Path, *, embed: bool) -> dict[str, Any]:
    record: dict[str, Any] | None = None if run.record is None else asdict(run.record)
    for dataset in record["datasets"] if record else ():
        for clip in dataset["clips"]:
            there = clip["picture"] and Path(clip["picture"]).is_file()
            clip["picture"] = _link(Path(clip["picture"]), folder, embed=embed) if there else ""
    return {
        "label": label,
        "name": run.name,
        "record": record,
        "losses": curves(run.losses),
        "gaps": gaps(run.losses) if _of_squares(run) else {},
        "best": best_of(run.losses, run.loras),
        "loras": [{"step": step, "file": run.loras[step]} for step in sorted(run.loras)],
    }


def _of_squares(run: FoundRun) -> bool:
    """Whether training losses are squared errors, as held-out ones always are: others cannot be compared with them."""
    return run.record is None or all(value == "mse" for flag, value, _ in run.record.settings if flag == "loss_type")


def _clip(run: FoundRun, preview: PreviewFile, prompt: Prompt | None, href: str) -> dict[str, Any]:
    told = [prompt.prompt, prompt.negative] if prompt else [str(preview.index)]
    recipe = hashlib.sha256(json.dumps([run.identity, preview.step, preview.seed, *told]).encode()).hexdigest()[:16]
    lora = {"name": f"{run.name}-step{preview.step:08d}.safetensors", "sha256": None, "video": 1, "audio": 1}
    return {
        "file": preview.path.name,
        "href": href,
        "kind": MEDIA_KINDS[preview.path.suffix],
        "seconds": 0,
        "step": preview.step,
        "prompt": prompt.prompt if prompt else "",
        "negative": prompt.negative if prompt else "",
        "seed": str(preview.seed),
        "recipe": recipe,
        "loras": [lora] if preview.step else [],
    }


def _link(path: Path, folder: Path, *, embed: bool) -> str:
    if embed:
        try:
            return f"data:{_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
        except OSError as error:
            raise UserError(f"{path}: cannot be embedded ({error.strerror}).") from error
    try:
        relative = os.path.relpath(path.resolve(), folder.resolve())
    except ValueError:  # on another drive
        return path.resolve().as_uri()
    return quote(Path(relative).as_posix())


def _labels(runs: Sequence[FoundRun]) -> list[str]:
    """Names that tell the runs apart: with their folders where several have the same."""
    names = [run.name for run in runs]
    labels = [name if names.count(name) == 1 else f"{run.folder.resolve().name}/{name}" for run, name in zip(runs, names, strict=True)]
    return [label if labels.count(label) == 1 else f"{run.folder}/{run.name}" for run, label in zip(runs, labels, strict=True)]
