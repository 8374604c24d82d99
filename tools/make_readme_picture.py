"""Makes docs/images/quickstart.png of what quickstart.py left: frames of previews before and after training.

python tools/make_readme_picture.py [quickstart_output]
"""

import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "quickstart.png"
COLORS = 128
"""A palette keeps the file small."""


def main(arguments: list[str]) -> int:
    output = Path(arguments[0]) if arguments else ROOT / "quickstart_output"
    with Image.open(output / "world" / "before_and_after.png") as picture:
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        picture.convert("RGB").quantize(COLORS).save(PICTURE, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
