"""Checking every cache before the transformer is loaded: what is missing, stale or of another model, and the command that fixes it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.cache.audit import cut_alike, reason_to_rebuild
from musubi_tuner.cache.contents import content_faults
from musubi_tuner.cache.forms import Forms
from musubi_tuner.cache.names import is_legacy_key
from musubi_tuner.cache.sidecars import KINDS, SidecarKind
from musubi_tuner.cache.store import read_header
from musubi_tuner.dataset.changes import Problem, source_problems
from musubi_tuner.dataset.items import Item
from musubi_tuner.runtime.errors import UserError

log = logging.getLogger(__name__)

_MOST_ROWS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What this run knows of the encoders that its caches must come from; entries that cannot be known are left out."""

    latents: Mapping[str, str]
    audio: Mapping[str, str]
    text: Mapping[str, str]
    arguments: Mapping[str, str]
    """{program: its arguments}, for the command in messages."""

    def of(self, kind: SidecarKind) -> Mapping[str, str]:
        """Of the encoder that makes such files."""
        return {"video_vae": self.latents, "audio_vae": self.audio, "text": self.text, None: {}}[kind.encoder]


def verify_caches(items: Sequence[Item], wanted: Wanted) -> None:
    """Check every file that the items will read: its header against index and model, and its content where it was not checked before.

    Sources that are still there are compared with what was cached; training goes on without them where they are gone.

    Raises:
        UserError: lists the files and reasons, and for each program the one command that fixes them.
    """
    problems = source_problems(items)
    files = {path: (item, KINDS[name]) for item in items for name, path in item.paths.items()}
    right: dict[Path, Forms] = {}
    told = {problem.path for problem in problems}
    for path, (item, kind) in files.items():
        if path in told:
            continue
        forms = kind.forms(item.clip)
        expected, unwanted = {**kind.expected(item.clip), **wanted.of(kind)}, kind.unwanted_note(item.spec.supervise_silence)
        reason = reason_to_rebuild(path, expected, kind.keys, forms, to_read=True, unwanted_note=unwanted)
        if reason is None:
            right[path] = forms
        else:
            problems.append(Problem(item.key, path, reason, kind.program))
    for path, reason in content_faults(right).items():
        item, kind = files[path]
        problems.append(Problem(item.key, path, reason, kind.program))
    if problems:
        raise UserError(_listed(problems, wanted))
    _tell_of_texts([path for path, (_, kind) in files.items() if kind.name == "text"], wanted)


def _listed(problems: Sequence[Problem], wanted: Wanted) -> str:
    rows = "\n".join(f"  {problem.item}: {problem.path.name}: {problem.reason}" for problem in problems[:_MOST_ROWS])
    more = f"\n  ... and {len(problems) - _MOST_ROWS} more" if len(problems) > _MOST_ROWS else ""
    commands = "\n".join(
        f"  python {program} {wanted.arguments[program]}" for program in dict.fromkeys(problem.program for problem in problems)
    )
    return f"{len(problems)} cache file(s) cannot be trained on:\n{rows}{more}\nRun, then start training again:\n{commands}"


def _tell_of_texts(paths: Sequence[Path], wanted: Wanted) -> None:
    """One warning each: of older keys, and of captions of which it cannot be told where they were cut."""
    headers = {path: read_header(path) for path in paths}
    if any(is_legacy_key(key) for _, found in headers.values() for key in found):
        log.warning("WARNING: text caches use the older keys 't5' and 't5_mask'; they are read as 'text' and 'text_mask'.")
    limit = wanted.text.get("max_length")
    unknown = [] if limit is None else [path for path, (metadata, _) in headers.items() if cut_alike(metadata, limit) is None]
    if unknown:
        names = ", ".join(path.name for path in unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        log.warning(
            "WARNING: %d caption(s) were cached without a note of their length, so it cannot be told whether --max_length %s would "
            "cut them; they are trained on as they are cached: %s",
            len(unknown), limit, names,
        )  # fmt: skip
