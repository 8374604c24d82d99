"""Pages of clips: one HTML file that opens from disk, with the styles, scripts and controls that all of them share.

What users wrote gets into a page as JSON alone, whose `<`, `>` and `&` are escaped, and into its elements as text.
"""

import html
import importlib.resources
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MEDIA_KINDS = {".mp4": "video", ".png": "image", ".wav": "sound"}
"""Of the files that a page shows, by their endings."""

_DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def part(package: str, name: str) -> str:
    """The text of a file of a package."""
    return importlib.resources.files(package).joinpath(name).read_text(encoding="utf-8").strip()


def fill(page: str, *, title: str, data: Mapping[str, Any], script: str, style: str = "") -> str:
    """The whole page.

    Args:
        page: HTML with `{{title}}`, `{{style}}`, `{{player}}`, `{{picks}}`, `{{data}}` and `{{script}}` in it.
        data: plain JSON values; what `clips.js` reads of them is said there.
        script, style: its own, behind the shared ones.
    """
    shared = {name: part("musubi_tuner.page", name) for name in ("clips.css", "clips.js", "player.html", "picks.html")}
    filled = {
        "title": html.escape(title),
        "style": f"{shared['clips.css']}\n{style}".strip(),
        "player": shared["player.html"],
        "picks": shared["picks.html"],
        "data": as_json(data),
        "script": f"{shared['clips.js']}\n{script}",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], page) + "\n"


def as_json(value: Any) -> str:
    """JSON that may stand within a <script>."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def data_of(page: Path) -> Any:
    """What `fill` was given.

    Raises:
        OSError, ValueError: it cannot be read, or is no page of ours.
    """
    match = _DATA.search(page.read_text(encoding="utf-8"))
    if match is None:
        raise ValueError(f"{page}: holds no data")
    return json.loads(match[1])
