"""Makes the page of a run from its output folder, or one page that compares several."""

import logging
from collections.abc import Sequence

from musubi_tuner.config.flags import parse
from musubi_tuner.config.report import ReportConfig
from musubi_tuner.runtime.program import run_program

log = logging.getLogger(__name__)

PROG = "tools/make_report.py"
DESCRIPTION = "Make the page of a run from its output folder; of several folders, one page that compares them."


def main(argv: Sequence[str], prog: str = PROG) -> int:
    words = list(argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--runs")
    config = parse(ReportConfig, words, prog=prog, description=DESCRIPTION)
    from musubi_tuner.runtime.disk import reason
    from musubi_tuner.runtime.errors import UserError
    from musubi_tuner.runtime.files import real_path
    from musubi_tuner.training.page.runs import find_runs
    from musubi_tuner.training.page.write import write_page

    folders = list(dict.fromkeys(real_path(folder) for folder in config.report.runs))
    if not folders:
        raise UserError("--runs: names no folder. Give the --output_dir of one run or of several.")
    found = [run for folder in folders for run in find_runs(folder)]
    if config.page.is_dir():
        raise UserError(f"--output {config.page}: is a folder. Give the name of a file, such as {config.page / 'report.html'}.")
    try:
        write_page(config.page, found, embed=config.report.embed)
    except OSError as error:
        raise UserError(f"{config.page}: cannot be written ({reason(error)}). Give another place by --output.") from error
    log.info("%s: %d run(s), %d preview(s); open it in a browser", config.page, len(found), sum(len(run.previews) for run in found))
    return 0


if __name__ == "__main__":
    run_program(main)
