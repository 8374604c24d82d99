"""The quickstart's clips, by real codecs: python tools/make_quickstart_clips.py FOLDER"""

import argparse
import sys
from pathlib import Path

from musubi_tuner.tiny.clips import write_clips


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(arguments).folder
    size = {"frames": 25, "width": 192, "height": 128}
    for path in (*write_clips(folder / "clips", count=4, **size), *write_clips(folder / "held_out_clips", count=1, seed=4, **size)):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
