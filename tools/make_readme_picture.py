"""Draws docs/images/quickstart.png from what quickstart.py left: frames of a clip and of a preview, beside the loss curve.

python tools/make_readme_picture.py [quickstart_output]
"""

import sys
from pathlib import Path

import av
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "quickstart.png"
FRAMES, GAP, LABEL = 4, 6, 16
COLORS = 128
"""Frames of noise compress badly; a palette keeps the file small."""


def main(arguments: list[str]) -> int:
    output = Path(arguments[0]) if arguments else ROOT / "quickstart_output"
    previews = sorted((output / "training" / "sample").glob("quickstart_s*_00_1.mp4"))
    rows = {
        "a clip of the dataset": next(iter(sorted((output / "clips").glob("*.mp4")))),
        "preview at step 0": previews[0],
        "preview after the last step": previews[-1],
    }
    strips = {label: strip(path) for label, path in rows.items()}
    wide, high = max(one.width for one in strips.values()), sum(one.height + LABEL + GAP for one in strips.values())
    curve = Image.open(output / "training" / "quickstart-loss.png").convert("RGB")
    curve = curve.resize((round(curve.width * high / curve.height), high))
    sheet = Image.new("RGB", (wide + GAP + curve.width, high), "white")
    top, draw = 0, ImageDraw.Draw(sheet)
    for label, image in strips.items():
        draw.text((2, top + 2), label, fill="black")
        sheet.paste(image, (0, top + LABEL))
        top += LABEL + image.height + GAP
    sheet.paste(curve, (wide + GAP, 0))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(COLORS).save(PICTURE, optimize=True)
    return 0


def strip(path: Path) -> Image.Image:
    """`FRAMES` frames, evenly spread over a clip, side by side at half size."""
    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    chosen = [frames[round(place * (len(frames) - 1) / (FRAMES - 1))] for place in range(FRAMES)]
    width, height = chosen[0].width // 2, chosen[0].height // 2
    joined = Image.new("RGB", (FRAMES * (width + 2), height), "white")
    for place, frame in enumerate(chosen):
        joined.paste(frame.resize((width, height)), (place * (width + 2), 0))
    return joined


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
