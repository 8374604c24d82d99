"""Plain text tables for reports."""

import unicodedata
from collections.abc import Sequence

WIDTH = 100
"""Columns of a terminal that tables fit into."""
_NARROWEST = 8


def format_table(rows: Sequence[Sequence[object]], headers: Sequence[str], width: int = WIDTH) -> str:
    """Left-aligned columns, two blanks apart, a rule under the headers; the longest cells are wrapped where `width` does not suffice.

    Words of the last column stay whole, whatever their length: paths and commands are copied from there.
    """
    cells = [[printable(str(cell).replace("\n", " ")) for cell in row] for row in (headers, *rows)]
    widths = [max(shown_width(row[column]) for row in cells) for column in range(len(headers))]
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
    first, *others = [_lines(row, widths) for row in cells]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([*first, rule, *(line for lines in others for line in lines)])


def printable(text: str) -> str:
    """With control characters as Python writes them: those of a file that was downloaded must not steer a terminal. Lines stay."""
    return "".join(repr(sign)[1:-1] if unicodedata.category(sign) == "Cc" and sign not in "\n\t" else sign for sign in text)


def shown_width(text: str) -> int:
    """Columns that a terminal gives to a text: two to each wide letter of East Asia, none to combining marks."""
    return sum(0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text)


def names_of(names: Sequence[str], most: int = 10) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _lines(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Of one row of cells."""
    wrapped = [_wrapped(cell, width) for cell, width in zip(row[:-1], widths[:-1], strict=True)]
    wrapped.append(_wrapped(row[-1], widths[-1], whole_words=True))
    lines = []
    for place in range(max(len(cell) for cell in wrapped)):
        parts = [cell[place] if place < len(cell) else "" for cell in wrapped]
        lines.append("  ".join(part + " " * (width - shown_width(part)) for part, width in zip(parts, widths, strict=True)).rstrip())
    return lines


def _wrapped(text: str, width: int, *, whole_words: bool = False) -> list[str]:
    """At blanks where there are any; at any letter of longer words, but for `whole_words`."""
    if shown_width(text) <= width:
        return [text]
    lines, line = [], ""
    for word in text.split(" "):
        joined = f"{line} {word}" if line else word
        if shown_width(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        line = word if whole_words else ""
        for sign in "" if whole_words else word:
            if shown_width(line + sign) > width:
                lines.append(line)
                line = ""
            line += sign
    return [*lines, line]
