"""Draws docs/images/quickstart.png from what quickstart.py left: frames of a clip and of a preview, beside the loss curve.

python tools/make_readme_picture.py [quickstart_output]
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import av
from PIL import Image, ImageDraw

from musubi_tuner.training.metrics import loss_path, read_losses

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "quickstart.png"
FRAMES, GAP, LABEL = 4, 6, 16
COLORS = 128
"""Frames of noise compress badly; a palette keeps the file small."""
WIDTH, HEIGHT, MARGIN = 900, 420, 56
CURVES = {
    "loss_video": (31, 119, 180),
    "loss_audio": (214, 110, 20),
    "validation/loss_video": (10, 60, 110),
    "validation/loss_audio": (140, 60, 0),
}


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
    curve = loss_curve(read_losses(loss_path(output / "training", "quickstart")))
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


def loss_curve(rows: Sequence[Mapping[str, float]]) -> Image.Image:
    """The losses over the steps."""
    series = {name: [(row["step"], row[name]) for row in rows if name in row] for name in CURVES}
    series = {name: points for name, points in series.items() if points}
    last_step = max(step for points in series.values() for step, _ in points) or 1
    top = max(value for points in series.values() for _, value in points) * 1.05 or 1.0
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)

    def place(step: float, value: float) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * step / last_step
        return x, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * value / top

    for part in range(5):
        value = top * part / 4
        draw.line([place(0, value), place(last_step, value)], fill=(225, 225, 225))
        draw.text((6, place(0, value)[1] - 6), f"{value:.3g}", fill="black")
        draw.text((place(last_step * part / 4, 0)[0] - 8, HEIGHT - MARGIN + 8), f"{last_step * part / 4:.0f}", fill="black")
    for row, (name, points) in enumerate(series.items()):
        places = [place(*point) for point in points]
        draw.line(places, fill=CURVES[name], width=2) if len(places) > 1 else draw.point(places, fill=CURVES[name])
        draw.text((MARGIN + 170 * row, 16), name, fill=CURVES[name])
    return image


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
