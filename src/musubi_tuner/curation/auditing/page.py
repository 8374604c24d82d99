"""The page of an audit: one HTML file without a script, with small pictures of the clips that something was found of.

All that users wrote, names and captions, is escaped.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from musubi_tuner.curation.auditing.findings import MEANING, Audit, DatasetFacts, Finding
from musubi_tuner.page.fill import part

_MOST_ROWS = 200
"""Of one kind; the JSON has them all."""
_MARK = 'data-ltxv2-audit="1"'


def render(audit: Audit) -> str:
    """The whole page."""
    counts = audit.counts()
    clips, seconds = sum(one.clips for one in audit.facts), sum(one.seconds for one in audit.facts)
    filled = {
        "title": f"Audit of {escape(audit.dataset_config.name)}",
        "style": f"{part('musubi_tuner.page', 'clips.css')}\n{part('musubi_tuner.curation.auditing', 'page.css')}",
        "summary": f"{clips} clips, {_clock(seconds)} in all; findings: {sum(counts.values())}.",
        "found": _summary(audit),
        "datasets": _datasets(audit.facts),
        "unchecked": _unchecked(audit.not_checked),
        "kinds": "\n".join(_kind(audit, kind) for kind, count in counts.items() if count),
        "nearest": _nearest(audit),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], part("musubi_tuner.curation.auditing", "page.html")) + "\n"


def is_page(text: str) -> bool:
    """Whether a file is a page of an audit, which may be written over."""
    return _MARK in text[:200]


def _summary(audit: Audit) -> str:
    rows = []
    for kind, count in audit.counts().items():
        name = f'<a href="#{kind}">{_words(kind)}</a>' if count else _words(kind)
        start = f'<tr{"" if count else " class=nothing"}><th scope="row">{name}</th>'
        rows.append(f'{start}<td class="number">{count}</td><td>{escape(MEANING[kind])}</td></tr>')
    return _table("Findings by kind", ("kind", "#found", "what it is"), rows)


def _datasets(facts: Sequence[DatasetFacts]) -> str:
    rows = []
    for one in facts:
        least, median, most = one.caption_words
        cells = (
            f'<td class="number">{one.clips}</td><td class="number">{one.sources}</td><td class="number">{_clock(one.seconds)}</td>'
            f'<td class="number">{one.with_sound}</td><td>{_counted(one.lengths)}</td><td>{_counted(one.sizes)}</td>'
            f"<td>{_counted(one.rates)}</td><td>{_counted(one.source_sizes)}</td><td>{least} to {most}, median {median:g}</td>"
            f'<td class="number">{one.cached_bytes / 1e6:.1f} MB</td>'
        )
        rows.append(f'<tr><th scope="row">{escape(one.label)} <span class="faint">{one.kind}</span></th>{cells}</tr>')
    heads = (
        "dataset",
        "#clips",
        "#sources",
        "#time",
        "#with sound",
        "lengths",
        "sizes",
        "rates",
        "source sizes",
        "caption words",
        "#cache",
    )
    return _table("Datasets", heads, rows)


def _unchecked(not_checked: Sequence[str]) -> str:
    if not not_checked:
        return ""
    rows = "".join(f"<li>{escape(one)}</li>" for one in not_checked)
    return f'<section aria-labelledby="unchecked">\n<h2 id="unchecked">Not checked</h2>\n<ul>{rows}</ul>\n</section>'


def _kind(audit: Audit, kind: str) -> str:
    own = [finding for finding in audit.findings if finding.kind == kind]
    has_pictures = any((finding.dataset, finding.clip) in audit.looks for finding in own)
    rows = [_finding(audit, finding, has_pictures) for finding in own[:_MOST_ROWS]]
    more = f"<p>{len(own) - _MOST_ROWS} more are in the JSON (--json).</p>" if len(own) > _MOST_ROWS else ""
    heads = (*(("!picture",) if has_pictures else ()), "dataset", "name", "what")
    table = _table(f"Findings: {_words(kind)}", heads, rows)
    return _section(kind, f"{_words(kind).capitalize()} ({len(own)})", escape(MEANING[own[0].kind]), f"{table}{more}")


def _finding(audit: Audit, finding: Finding, has_pictures: bool) -> str:
    picture = _picture(audit.looks.get((finding.dataset, finding.clip)), finding.name)
    cell = f'<td class="picture">{picture}</td>' if has_pictures else ""
    return f'<tr>{cell}<td>{escape(finding.dataset)}</td><th scope="row">{escape(finding.name)}</th><td>{escape(finding.text)}</td></tr>'


def _nearest(audit: Audit) -> str:
    if not audit.nearest:
        return ""
    rows = []
    for first, second, distance in audit.nearest:
        pictures = "".join(_picture(audit.looks.get(_split(key)), key) for key in (first, second))
        start = f'<tr><td class="number">{distance:.3f}</td><td><div class="pair">{pictures}</div></td>'
        rows.append(f"{start}<td>{escape(first)}</td><td>{escape(second)}</td></tr>")
    table = _table("Nearest pairs", ("#distance", "pictures", "clip", "other clip"), rows)
    note = "Those whose latents are nearest to each other, duplicates or not: 0 is the same, pictures without relation are near 1.4."
    return _section("nearest", "Nearest pairs", note, table)


def _section(key: str, title: str, note: str, table: str) -> str:
    return f'<section aria-labelledby="{key}">\n<h2 id="{key}">{title}</h2>\n<p>{note}</p>\n{table}\n</section>'


def _split(key: str) -> tuple[str, str]:
    label, _, clip = key.partition("/")
    return label, clip


def _picture(path: Path | None, name: str) -> str:
    try:
        data = None if path is None else path.read_bytes()
    except OSError:
        data = None
    if data is None:
        return ""
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(data).decode()}" alt="{escape(name)}" loading="lazy">'


def _table(caption: str, heads: Sequence[str], rows: Iterable[str]) -> str:
    """Heads that begin with # are over numbers, with ! over pictures."""
    classes = {"#": ' class="number"', "!": ' class="picture"'}
    head = "".join(f'<th scope="col"{classes.get(one[0], "")}>{one.lstrip("#!")}</th>' for one in heads)
    body = "\n".join(rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _counted(counts: dict[str, int]) -> str:
    shown = [f"{escape(name)}: {count}" for name, count in list(counts.items())[:6]]
    return "<br>".join([*shown, *([f"{len(counts) - 6} more"] if len(counts) > 6 else [])])


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes) // 60}:{int(minutes) % 60:02d}:{rest:04.1f}"
