"""What the quickstart's LoRA has learned, from its previews: python tools/read_world.py FOLDER

Prints the scorer's numbers, and leaves before_and_after.html and before_and_after.png in FOLDER.
"""

import argparse
import html
import sys
from pathlib import Path

import av
from PIL import Image, ImageDraw

from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.world.lesson import PROMPTS, Examined, examine, read_prompts
from musubi_tuner.tiny.world.subjects import CHARACTER

FRAMES = (1, 8, 15)
SHOWN = (0, 1, 2, 6, 7, 8)
"""Lines of the prompt file that the picture shows."""
GAP, LABEL, MIDDLE = 4, 18, 24
ROWS = (("color", "orange"), ("shape", "a star"), ("eye", "a cyan eye"), ("voice", "its voice of two pitches"))
PAGE = """\
<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Before and after</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }}
td, th {{ padding: .2rem 1rem .2rem 0; text-align: left; }}
video {{ width: 100%; image-rendering: pixelated; }}
figure {{ display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; margin: 1.5rem 0; }}
figcaption {{ grid-column: 1 / -1; }}
</style>
<h1>Before and after</h1>
<p>Left: the base model. Right: the same prompt and seed after {step} steps. Each clip has its sound.</p>
<table><tr><th>share of the clips<th>before<th>after</tr>
{rows}
</table>
{figures}
</html>
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(arguments).folder
    examined = examine(folder / "training" / "sample", folder / PROMPTS)
    if len(examined) < 2:
        raise UserError(f"{folder}: previews of {len(examined)} step(s); before and after are wanted.")
    before, after, step = examined[min(examined)], examined[max(examined)], max(examined)
    captions = [one.caption for one in read_prompts(folder / PROMPTS)]
    table = rows_of(before, after)
    write_page(folder, captions, before, after, table, step)
    write_picture(folder / "before_and_after.png", captions, before, after)
    print(f"{'share of the clips':44} before  after")
    for label, first, second in table:
        print(f"{label:44}   {first:.2f}   {second:.2f}")
    return 0


def rows_of(before: Examined, after: Examined) -> list[tuple[str, float, float]]:
    """What was looked at, and its shares before and after."""
    rows = [(f"{CHARACTER}: {words}", before.character[name], after.character[name]) for name, words in ROWS]
    return rows + [
        (f"everything else: {name} as the caption says", before.base[name], after.base[name])
        for name in ("color", "shape", "motion", "ground", "voice")
    ]


def write_page(
    folder: Path, captions: list[str], before: Examined, after: Examined, table: list[tuple[str, float, float]], step: int
) -> None:
    """Clips side by side, by relative links."""
    figures = []
    for caption, first, second in zip(captions, before.paths, after.paths, strict=True):
        words = html.escape(caption)
        clips = "".join(
            f'<video src="{path.relative_to(folder).as_posix()}" controls loop preload="metadata" aria-label="{when}: {words}"></video>'
            for when, path in (("before", first), ("after", second))
        )
        figures.append(f"<figure><figcaption>{words}</figcaption>{clips}</figure>")
    rows = "\n".join(f"<tr><td>{html.escape(label)}<td>{first:.2f}<td>{second:.2f}</tr>" for label, first, second in table)
    page = PAGE.format(step=step, rows=rows, figures="\n".join(figures))
    (folder / "before_and_after.html").write_text(page, encoding="utf-8")


def write_picture(path: Path, captions: list[str], before: Examined, after: Examined) -> None:
    """Frames of some previews: before on the left, after on the right."""
    strips = [(captions[place], strip(before.paths[place]), strip(after.paths[place])) for place in SHOWN if place < len(captions)]
    width, height = strips[0][1].size
    sheet = Image.new("RGB", (2 * width + MIDDLE, LABEL + len(strips) * (height + LABEL + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((2, 3), "before training", fill="black")
    draw.text((width + MIDDLE + 2, 3), "after training", fill="black")
    for row, (caption, first, second) in enumerate(strips):
        top = LABEL + row * (height + LABEL + GAP)
        draw.text((2, top + 3), caption, fill="black")
        sheet.paste(first, (0, top + LABEL))
        sheet.paste(second, (width + MIDDLE, top + LABEL))
    sheet.save(path, optimize=True)


def strip(path: Path) -> Image.Image:
    """Three frames of a clip, side by side."""
    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    chosen = [frames[place] for place in FRAMES]
    width, height = chosen[0].size
    joined = Image.new("RGB", (len(chosen) * (width + GAP) - GAP, height), "white")
    for place, frame in enumerate(chosen):
        joined.paste(frame, (place * (width + GAP), 0))
    return joined


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
