"""What the text caching program says: forecast, last table, files that nobody asked for."""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from musubi_tuner.cache.names import TEXT_ENDING
from musubi_tuner.runtime.tables import format_table

_ROWS = 40


@dataclass(slots=True)
class TextReport:
    """Files by what became of them; those of several processes add up."""

    kept: int = 0
    encoded: int = 0
    rebuilt: list[tuple[str, str]] = field(default_factory=list)
    """(file, reason) of files that were there and were made anew."""
    failed: list[tuple[str, str]] = field(default_factory=list)
    """(file, reason)"""

    def add(self, other: "TextReport") -> None:
        self.kept += other.kept
        self.encoded += other.encoded
        self.rebuilt += other.rebuilt
        self.failed += other.failed

    def table(self) -> str:
        counts = [("kept", self.kept), ("encoded", self.encoded), ("of these rebuilt", len(self.rebuilt)), ("failed", len(self.failed))]
        parts = [format_table(counts, ("files", ""))]
        for title, rows in (("rebuilt", self.rebuilt), ("failed", self.failed)):
            if rows:
                more = f"\n... and {len(rows) - _ROWS} more" if len(rows) > _ROWS else ""
                parts.append(format_table(rows[:_ROWS], (title, "because")) + more)
        parts.append(f"Text caching: {self.encoded} encoded, {len(self.failed)} failed")
        return "\n\n".join(parts)


def describe_forecast(targets: Sequence[Path], *, texts: int, kept: int, bytes_each: int, at_most: bool) -> str:
    """`--dry_run`: files, texts, bytes to be written and free space.

    Args:
        targets: files that would be made.
        texts: different texts among them.
        at_most: the size depends on the number of tokens.
    """
    lines = [format_table([("kept", kept), ("to encode", len(targets))], ("files", "")), ""]
    for folder, count in sorted(Counter(target.parent for target in targets).items()):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        size, free = count * bytes_each / 2**20, shutil.disk_usage(existing).free / 2**20
        lines.append(f"{folder}: {count} file(s), {'at most' if at_most else 'about'} {size:,.1f} MiB to be written, {free:,.1f} MiB free")
    lines.append(f"Text caching: {len(targets)} file(s) of {texts} different text(s) would be encoded; nothing was (--dry_run).")
    return "\n".join(lines)


def describe_orphans(targets: Sequence[Path]) -> str:
    """Text files that belong to no caption and no prompt. Empty where there are none.

    Args:
        targets: every file that is wanted.
    """
    wanted = set(targets)
    folders = sorted({target.parent for target in targets})
    names = [path.name for folder in folders for path in sorted(folder.glob(f"*{TEXT_ENDING}")) if path not in wanted]
    if not names:
        return ""
    listed = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return f"{len(names)} text file(s) belong to no caption and no sample prompt; they are left where they are: {listed}"
