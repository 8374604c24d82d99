"""What has changed on purpose since the revision before the rooms, each with the reason: all else must be the same bit for bit."""

import re
from dataclasses import dataclass

REVISION = "7fe838b"


@dataclass(frozen=True, slots=True)
class Intended:
    """Differences that are meant."""

    case: str
    """Pattern of the whole name of a case."""
    difference: str
    """Pattern that a difference begins with."""
    reason: str
    at_most: float = float("inf")
    """Of a tensor's max abs difference."""

    def covers(self, case: str, difference: str) -> bool:
        if not (re.fullmatch(self.case, case) and re.match(self.difference, difference)):
            return False
        distance = re.search(r"max abs difference ([^,]+)", difference)
        return distance is None or float(distance[1]) <= self.at_most


INTENDED = (
    Intended(".*", r".*ltxv2_looks/.*: only in", "caching leaves a picture and a waveform of each clip, for the page of a run"),
    Intended(
        ".*",
        r".*(report\.html|-report\.json|-loss\.png): only in",
        "a run leaves its page, which has the loss curves of the picture before",
    ),
    Intended(".*", r".*models/(gemma4|ltx2_tiny_2\.5_).*: only in", "the tiny family has all of 2.5"),
    Intended(".*", r".*ltxv2_sources_.*: only in", "caching leaves what became of each source, for the page of a run"),
    Intended("resume", r"whole against resumed: .*-report\.json: (command|pace)", "a page tells its own command and times"),
    Intended(".*", r".*/progress\.json: (fingerprints|settings clips|settings datasets): only in the newer", "states remember more"),
    Intended("resume", r"whole against resumed: .*fingerprints optimizer\.pt", "a digest of a file that holds torch's own seed"),
    Intended("plans", r"plans\.md: row", "seconds of the planner since an H200 was measured (memory/step_model.py)"),
    Intended("previews", r"given/sample/.*_0[01]_10\.mp4", "images in prompts: compressed as videos are, keyframes beside the clip"),
    Intended(".*", r".*/sample/.*\.mp4: video", "previews are BT.709, as they say, and were BT.601", at_most=64),
    Intended("options", r"fp8/.*\.(safetensors|pt):", "the bias is added within the fp8 product", at_most=2 * 3 * 1e-3),
    Intended("options", r"fp8/ltxv2_lora-loss\.(jsonl|png):", "the bias is added within the fp8 product"),
)


def reason_for(case: str, difference: str) -> str | None:
    """Why a difference is meant; none for one that is not."""
    return next((one.reason for one in INTENDED if one.covers(case, difference)), None)
