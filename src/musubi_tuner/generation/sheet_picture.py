"""A grid as one picture: a frame of each clip, with rows and columns labelled."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from musubi_tuner.generation.axes import OF_LORAS
from musubi_tuner.generation.grid import Grid
from musubi_tuner.generation.jobs import Job
from musubi_tuner.media.picture import read_picture
from musubi_tuner.media.probe import probe_video
from musubi_tuner.media.video import read_frames
from musubi_tuner.media.write import write_image

if TYPE_CHECKING:
    import PIL.Image

_GROUND, _INK, _FIELD = (250, 250, 250), (26, 26, 26), (225, 225, 225)
_GAP, _FONT, _LINE, _HEAD, _SIDE = 8, 14, 18, 44, 200
_WIDEST, _NARROWEST = 320, 48
_MOST_PIXELS = 40_000_000


@dataclass(frozen=True, slots=True)
class _Line:
    """A row or a column: the places on its axes."""

    label: str
    at: Mapping[int, int | None]


def write_sheet_picture(path: Path, grid: Grid, clips: Mapping[Job, Path]) -> None:
    """
    Args:
        clips: those that are there; the middle frame of each is shown.

    Raises:
        UserError: a clip that cannot be read, or a disk that is full.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows, columns = _lines(grid)
    jobs = {cell.at: cell.job for cell in grid.cells}
    aspect = max((job.prompt.height / job.prompt.width for job in grid.jobs), default=1.0)
    width = min(_WIDEST, max((job.prompt.width for job in grid.jobs), default=_WIDEST))
    while width > _NARROWEST and len(rows) * len(columns) * (width + _GAP) * (width * aspect + _GAP) > _MOST_PIXELS:
        width -= 16
    height = max(1, round(width * aspect))
    size = (_SIDE + len(columns) * (width + _GAP), _HEAD + len(rows) * (height + _GAP))
    picture = Image.new("RGB", size, _GROUND)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT)
    thumbnails: dict[Path, PIL.Image.Image] = {}
    for column, line in enumerate(columns):
        _write(draw, font, line.label, (_SIDE + column * (width + _GAP), 4), width, 2)
    for row, line in enumerate(rows):
        top = _HEAD + row * (height + _GAP)
        _write(draw, font, line.label, (4, top), _SIDE - 12, max(1, height // _LINE))
        for column, across in enumerate(columns):
            places = {**line.at, **across.at}
            is_base = any(places[axis] is None for axis in places)
            at = tuple(None if is_base and one.name in OF_LORAS else places[axis] for axis, one in enumerate(grid.axes))
            left, clip = _SIDE + column * (width + _GAP), clips.get(jobs[at]) if at in jobs else None
            draw.rectangle((left, top, left + width - 1, top + height - 1), fill=_FIELD)
            if clip is not None and clip.suffix == ".wav":
                _write(draw, font, "sound", (left + 4, top + 4), width - 8, 1)
            elif clip is not None:
                if clip not in thumbnails:
                    thumbnails[clip] = _thumbnail(clip, width, height)
                picture.paste(thumbnails[clip], (left, top))
    write_image(path, torch.from_numpy(np.array(picture)))


def _lines(grid: Grid) -> tuple[list[_Line], list[_Line]]:
    """The base first; what is neither row nor column becomes further rows."""
    columns_axis = grid.layout[1]
    has_base = any(None in cell.at for cell in grid.cells)
    columns = [_Line("", {})]
    if columns_axis >= 0:
        axis = grid.axes[columns_axis]
        columns = [_Line(f"{axis.name} {label}", {columns_axis: place}) for place, label in enumerate(axis.labels)]
        if has_base:
            columns.insert(0, _Line("base", {columns_axis: None}))
    others = [place for place in range(len(grid.axes)) if place != columns_axis]
    rows = []
    for places in itertools.product(*(range(len(grid.axes[axis].labels)) for axis in others)):
        at = dict(zip(others, places, strict=True))
        rows.append(_Line("\n".join(f"{grid.axes[axis].name} {grid.axes[axis].labels[place]}" for axis, place in at.items()), at))
    return rows, columns


def _write(draw: Any, font: Any, text: str, at: tuple[int, int], width: int, most: int) -> None:
    """Lines as they fit, the last one cut."""
    lines: list[str] = []
    for whole in text.splitlines():
        rest = whole
        while rest:
            count = len(rest)
            while count > 1 and draw.textlength(rest[:count], font=font) > width:
                count -= 1 if count < 64 else count // 8
            lines.append(rest[:count])
            rest = rest[count:].lstrip()
    if len(lines) > most:
        lines[most - 1 :] = [f"{lines[most - 1][:-1]}…"]
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + number * _LINE), line, fill=_INK, font=font)


def _thumbnail(clip: Path, width: int, height: int) -> "PIL.Image.Image":
    """Of a still, or the middle frame of a clip; with its own aspect, on the cell's ground."""
    from PIL import Image

    if clip.suffix == ".png":
        frame = Image.fromarray(read_picture(clip).numpy())
    else:
        info = probe_video(clip)
        frame = Image.fromarray(read_frames(info, [len(info.times) // 2], info.width, info.height)[0].numpy())
    frame.thumbnail((width, height))
    cell = Image.new("RGB", (width, height), _FIELD)
    cell.paste(frame, ((width - frame.width) // 2, (height - frame.height) // 2))
    return cell
