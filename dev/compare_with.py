"""Whether the working tree does what an earlier revision does, bit for bit on the CPU: python dev/compare_with.py [REVISION]

    python dev/compare_with.py                      against the revision before the code was rearranged
    python dev/compare_with.py HEAD --only resume   what has changed since the last commit, in one case and those that it needs

Both trees run the same commands on the same inputs, each in folders of its own, and all that they leave is compared. What the revision
leaves is computed once and kept in the folder of --work. Exits with 1 where anything differs, except what `compare/intended.py` names for
the revision before the code was rearranged: those differences are counted by their reasons.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from compare.cases import CASES, MEDIA, Case
from compare.files import Comparison
from compare.intended import REVISION, reason_for
from compare.trees import ROOT, CaseFailed, Side, make_sides

SHOWN = 5
"""Differences of a case that are printed."""


def main(arguments: Sequence[str]) -> int:
    started = time.monotonic()
    options = parse(arguments)
    media = options.media if options.media.is_dir() else None
    if media is None:
        print(f"the case '{MEDIA.name}' is left out: there is no {options.media} (--media names another folder)")
    cases = chosen(options.only, with_media=media is not None)
    old, new = make_sides(options.revision, options.work.resolve(), media, fresh=options.fresh)
    print(f"older tree: {old.tree}\nnewer tree: {new.tree}\n", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = submit(pool, (old, new), cases)
        excuses = options.revision == REVISION
        differing = [case.name for case in cases if not report(case, (old, new), futures[case.name], excuses=excuses)]
    same = f"all {len(cases)} cases are the same{', except what is meant to differ' if excuses else ''}"
    verdict = f"not the same: {', '.join(differing)}" if differing else same
    print(f"\n{verdict} ({time.monotonic() - started:.0f} s)")
    return 1 if differing else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", default=REVISION, help=f"default: {REVISION}")
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=[case.name for case in CASES], help="default: all cases")
    parser.add_argument("--fresh", action="store_true", help="compute anew what the revision leaves")
    parser.add_argument("--jobs", type=int, default=2, help="programs at once; default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "ltxv2_compare", help="default: %(default)s")
    parser.add_argument("--media", type=Path, default=ROOT.parent / "shared" / "media", help="real clips; default: %(default)s")
    return parser.parse_args(arguments)


def chosen(names: Sequence[str] | None, *, with_media: bool) -> list[Case]:
    """The cases that were asked for and those that they need, in an order in which they can run."""
    wanted = set(names or [case.name for case in CASES])
    for case in reversed(CASES):
        if case.name in wanted:
            wanted |= set(case.needs)
    return [case for case in CASES if case.name in wanted and (with_media or case is not MEDIA)]


def submit(pool: ThreadPoolExecutor, sides: tuple[Side, Side], cases: Sequence[Case]) -> dict[str, list[Future]]:
    """Start all cases on both sides; one that waits comes after what it waits for, so there is always one that runs."""
    futures: dict[str, list[Future]] = {}
    for case in cases:
        needed = [[futures[name][place] for name in case.needs] for place in range(2)]
        futures[case.name] = [pool.submit(side.run, case, waits) for side, waits in zip(sides, needed, strict=True)]
    return futures


def report(case: Case, sides: tuple[Side, Side], futures: Sequence[Future], *, excuses: bool) -> bool:
    """Wait for a case, print its row and its first differences, and return whether there are none, or none that are not intended."""
    old, new = sides
    comparison = Comparison((str(old.folder), str(new.folder)))
    try:
        for future in futures:
            future.result()
        comparison.folders(old.folder / case.name, new.folder / case.name, leave_out=case.from_tree)
        if case.twin is not None:
            twins = [new.folder / case.name / name for name in case.twin]
            comparison.folders(*twins, title=f"{case.twin[0]} against {case.twin[1]}: ")
    except CaseFailed as error:
        comparison.differences.append(str(error))
    reasons = {text: reason_for(case.name, text) if excuses else None for text in comparison.differences}
    found = [text for text in comparison.differences if reasons[text] is None]
    decoded = comparison.decoded
    note = f" ({decoded} file(s) of other bytes, but of the same pictures and sound)" if decoded else ""
    print(f"{case.name:25} {comparison.files:4} files {comparison.tensors:5} tensors {len(found):4} differences{note}")
    for reason, count in Counter(reason for reason in reasons.values() if reason is not None).items():
        print(f"    intended: {count} by this: {reason}")
    for text in found[:SHOWN]:
        print(f"    {text}")
    if len(found) > SHOWN:
        print(f"    and {len(found) - SHOWN} more")
    sys.stdout.flush()
    return not found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
