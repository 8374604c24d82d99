"""All options of `ltxv2 report`."""

from pathlib import Path
from typing import Annotated

from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import AnyPath, List, options


@options
class ReportOptions:
    """The page."""

    runs: Annotated[tuple[AnyPath, ...], List] = flag("output folders of runs; the flag's name may be left out", common=True)
    embed: bool = flag("put the previews into the page, one file to send", default=False, common=True)
    output: AnyPath | None = flag(
        "the page; default: report.html in the folder of one run, in the current folder for several", default=None, common=True
    )


@options
class ReportConfig:
    """All sections."""

    report: ReportOptions

    @property
    def page(self) -> Path:
        """Where the page goes."""
        if self.report.output is not None:
            return self.report.output
        return (self.report.runs[0] if len(self.report.runs) == 1 else Path()) / "report.html"
