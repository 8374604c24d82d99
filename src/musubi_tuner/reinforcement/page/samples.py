"""`scores/first.html`: the first samples of each prompt side by side, with scores, to pick pairs from (docs/reference/picks.md)."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from musubi_tuner.cache.store import write_bytes
from musubi_tuner.page.fill import MEDIA_KINDS, fill, part
from musubi_tuner.reinforcement.advantages import Scored
from musubi_tuner.reinforcement.rollouts import SCORES, Rollouts, Sample
from musubi_tuner.reinforcement.scores import Scores

PAGE = "first.html"
_PACKAGE = "musubi_tuner.reinforcement.page"


def clip_of_page(rollouts: Rollouts, sample: Sample, file: Path, folder: Path, scored: Sequence[Scores | Scored]) -> dict[str, Any]:
    """What a page says of a decoded sample, but for who made it.

    Args:
        folder: of the page.
        scored: what is shown below it.
    """
    return {
        "file": file.name,
        "href": quote(file.relative_to(folder).as_posix()),
        "kind": MEDIA_KINDS[file.suffix],
        "seconds": 0,
        "prompt": rollouts.facts["prompts"][sample.prompt]["prompt"],
        "negative": "",
        "index": sample.prompt,
        "seed": str(sample.seed),
        "fps": rollouts.facts["fps"],
        "scores": {one.reward: one.scores.get(sample.name) for one in scored},
    }


def write_samples_page(rollouts: Rollouts, media: Path, scored: Sequence[Scores]) -> Path:
    """Write the page whole, beside the folder of the samples.

    Args:
        media: folder of samples that were decoded, each under its name.
        scored: what is shown below each.
    """
    path = rollouts.folder / SCORES / PAGE
    policy = rollouts.facts["policy"]
    loras = [] if policy is None else [{"name": policy["name"], "sha256": policy["sha256"], "video": 1, "audio": 1}]
    files = {one.stem: one for one in media.iterdir()}
    clips: list[dict[str, Any]] = []
    for sample in rollouts.samples:
        if (file := files.get(sample.name)) is None:
            continue
        clips.append(
            {
                "id": len(clips),
                "at": [sample.prompt, sample.k],
                **clip_of_page(rollouts, sample, file, path.parent, scored),
                "recipe": hashlib.sha256(f"{sample.name}|{sample.seed}".encode()).hexdigest()[:16],
                "loras": loras,
            }
        )
    name = rollouts.folder.resolve().name
    data = {
        "key": hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogatepass")).hexdigest()[:16],
        "name": name,
        "fps": rollouts.facts["fps"],
        "seeds_differ": True,
        "rows": [one["prompt"] for one in rollouts.facts["prompts"]],
        "clips": clips,
    }
    text = fill(part(_PACKAGE, "samples_page.html"), title=f"Samples of {name}", data=data, script=part(_PACKAGE, "samples_page.js"))
    write_bytes(path, text.encode("utf-8", "backslashreplace"), lasting=False)
    return path
