"""What the doctor says: one finding a subject, and the list of them that is printed."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from musubi_tuner.runtime.errors import UserError

State = Literal["right", "note", "wrong", "skipped"]
NO_GPU = "GPU"
"""Subject of the finding that there is none; those of cards have their numbers."""
_WIDTH, _SUBJECT = 100, 24
_MARKS: dict[State, str] = {"right": "ok", "note": "note", "wrong": "WRONG", "skipped": "-"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    subject: str
    state: State
    says: str
    """What was seen. Lines after the first are kept as they are: a list of files, or commands to copy."""


@dataclass(frozen=True, slots=True)
class Note:
    """Returned by a look in place of plain text: nothing is wrong, but the user should know."""

    says: str


def look(subject: str, at: Callable[[], str | Note]) -> Finding:
    """What a look at something finds; an error that the user can fix is a finding too."""
    try:
        found = at()
    except UserError as error:
        return Finding(subject, "wrong", str(error))
    return Finding(subject, "note", found.says) if isinstance(found, Note) else Finding(subject, "right", found)


def write_report(sections: Sequence[tuple[str, Sequence[Finding]]]) -> str:
    """The findings under their headings, no line wider than 100 columns but where a path or a command is."""
    lines: list[str] = []
    for title, findings in sections:
        lines += ["", title]
        for finding in findings:
            first, *rest = finding.says.splitlines() or [""]
            margin = " " * (10 + _SUBJECT)
            wrapped = textwrap.wrap(first, _WIDTH - len(margin), break_long_words=False, break_on_hyphens=False) or [""]
            lines.append(f"  {_MARKS[finding.state]:<8}{finding.subject:<{_SUBJECT}}{wrapped[0]}")
            lines += [margin + line for line in (*wrapped[1:], *rest)]
    return "\n".join(lines[1:])


def verdict(sections: Sequence[tuple[str, Sequence[Finding]]]) -> str:
    """The last line: how many things are wrong; where nothing is, whether there is a GPU."""
    wrong = [finding.subject for _, findings in sections for finding in findings if finding.state == "wrong"]
    if wrong:
        return f"{len(wrong)} wrong: {', '.join(wrong)}"
    if any(finding.subject == NO_GPU and finding.state == "note" for _, findings in sections for finding in findings):
        return "Nothing is wrong, but there is no GPU: training here would run on the CPU, enough for toys alone."
    return "Nothing is wrong."
