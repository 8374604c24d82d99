"""The results as a table by family, and what is wrong, each with the command that runs it again."""

from collections import Counter
from collections.abc import Iterable, Sequence

from musubi_tuner.runtime.tables import format_table
from tests.malformed.runner import Result

_HEAD = ("family", "inputs", "refused", "accepted", "tracebacks", "hangs", "wrong otherwise", "seconds")


def table(results: Sequence[Result]) -> str:
    families = sorted({result.family for result in results})
    rows = [_row(family, [result for result in results if result.family == family]) for family in families]
    return "\n".join([format_table([*rows, _row("all", results)], _HEAD), "", *_wrong(results)])


def _row(name: str, results: Sequence[Result]) -> tuple[object, ...]:
    counts = Counter(_column(result) for result in results)
    other = sum(bool(result.wrong) and _column(result) in ("refused", "accepted") for result in results)
    seconds = round(sum(result.seconds for result in results))
    return (name, len(results), counts["refused"], counts["accepted"], counts["tracebacks"], counts["hangs"], other, seconds)


def _column(result: Result) -> str:
    if result.outcome.startswith("TRACEBACK"):
        return "tracebacks"
    if result.outcome.startswith("HANG"):
        return "hangs"
    return "accepted" if result.outcome == "code 0" else "refused"


def _wrong(results: Iterable[Result]) -> list[str]:
    """By what is wrong, most frequent first, with three ids each."""
    by_kind: dict[str, list[Result]] = {}
    for result in results:
        if result.wrong:
            by_kind.setdefault(f"{result.wrong}" if result.outcome == result.wrong else f"{result.family}: {result.wrong}", []).append(
                result
            )
    lines = []
    for kind, found in sorted(by_kind.items(), key=lambda pair: -len(pair[1])):
        lines += [f"{len(found)} x {kind}", *(f"    {result.id}" for result in found[:3])]
    return lines
