"""Films to clips: scenes are found, written into a list, and cut. A second run goes on where the first one was stopped.

    <output_dir>/<film>_scenes.jsonl    first line: the film and how its scenes were found; then a line for each scene
    <output_dir>/<film>_0001.mp4        clips, numbered as the scenes

The list is written before the first clip is cut, so a film is searched once. Clips are whole or not at all, and one that is there is kept.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.cache.store import file_fingerprint, write_bytes
from musubi_tuner.config.dataset_media import DETECTOR_THRESHOLDS, SplitOptions
from musubi_tuner.curation.scenes import Scene, find_cuts, scenes_between
from musubi_tuner.media.cut import COPIED_INTO, copy_part, encode_part, key_frames, seconds_at
from musubi_tuner.media.probe import VideoInfo, probe_video
from musubi_tuner.runtime.disk import check_folder
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.files import read_json_lines, real_path
from musubi_tuner.runtime.progress import Progress
from musubi_tuner.sources.listing import EXTENSIONS

LIST_ENDING = "_scenes.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Film:
    """A film, its scenes and where they go."""

    info: VideoInfo
    scenes: tuple[Scene, ...]
    folder: Path
    holes: int
    """Frames that do not decode, when its scenes were found."""

    def clip(self, scene: Scene, *, copied: bool) -> Path:
        ending = self.info.path.suffix.lower() if copied else ".mp4"
        return self.folder / f"{self.info.path.stem}_{scene.number:04d}{ending}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """What became of a scene."""

    scene: Scene
    outcome: str
    """`made`, `kept` (it was there), `left out` or `failed`."""
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilmReport:
    """What became of a film."""

    name: str
    cuts: tuple[Cut, ...] = ()
    problems: tuple[str, ...] = ()
    """What failed, and what does not decode."""
    notes: tuple[str, ...] = ()
    """What else is to be known."""

    @property
    def seconds(self) -> float:
        """Of the clips that are there."""
        return sum(cut.seconds for cut in self.cuts)


def split(options: SplitOptions) -> Iterator[FilmReport]:
    """Film after film; of several, one that cannot be read does not stop the others.

    Raises:
        TemporaryFailure: a full disk.
        UserError: what `films_of` raises, and what `film_of` raises of the only film.
    """
    films = films_of(options.input, options.output_dir)
    for path in films:
        try:
            film = film_of(path, options)
        except TemporaryFailure:
            raise
        except UserError as error:
            if len(films) == 1:
                raise
            yield FilmReport(name=path.name, problems=(str(error),))
            continue
        cuts = []
        with Progress(f"cutting {path.name}", len(film.scenes), unit="scene") as bar:
            for cut in cut_film(film, copied=options.keyframes_only):
                cuts.append(cut)
                bar.advance()
        info = film.info
        problems = [f"{path}: is cut off: {len(info.stamps)} of its {info.stored_frames} frames are there"] if info.stored_frames else []
        problems += [f"{path}: {film.holes} of its {len(film.info.stamps)} frames do not decode"] if film.holes else []
        problems += [f"{path}: scene {cut.scene.number}: {cut.note}" for cut in cuts if cut.outcome == "failed"]
        notes = [f"scene {cut.scene.number}: {cut.note}" for cut in cuts if cut.note and cut.outcome == "made"]
        if info.lost_frames:
            notes.append(f"{info.lost_frames} frames before its first key frame cannot be decoded, and are in no scene")
        if left := sum(cut.outcome == "left out" for cut in cuts):
            notes.append(f"{left} scenes are left out; {list_path(path, options)} says why of each")
        yield FilmReport(name=path.name, cuts=tuple(cuts), problems=tuple(problems), notes=tuple(notes))


def films_of(source: Path, folder: Path) -> list[Path]:
    """The film, or the films of a folder.

    Raises:
        UserError: none, two of one stem, or clips that would go where the films are.
    """
    check_folder(folder, f"--output_dir {folder}")
    if not source.is_dir():
        return [source]
    if real_path(source) == real_path(folder):
        raise UserError(f"--output_dir {folder}: is the folder of the films; their clips would count as films. Give another one.")
    films = sorted(path for path in source.iterdir() if path.suffix.lower() in EXTENSIONS["video"] and not path.name.startswith("._"))
    if not films:
        raise UserError(f"--input {source}: holds no film ({', '.join(EXTENSIONS['video'])}).")
    stems: dict[str, Path] = {}
    for film in films:
        if (other := stems.setdefault(film.stem.casefold(), film)) != film:
            raise UserError(f"{other} and {film} have the same stem, and so would their clips. Rename one.")
    return films


def list_path(film: Path, options: SplitOptions) -> Path:
    """Where the list of its scenes lies."""
    return options.output_dir / f"{film.stem}{LIST_ENDING}"


def film_of(path: Path, options: SplitOptions) -> Film:
    """A film with its scenes, from its list where there is one, otherwise searched, and the list written.

    Raises:
        UserError: a film that cannot be read or copied from, or a list of another film or of other settings.
    """
    info = probe_video(path)
    if options.keyframes_only and (path.suffix.lower() not in COPIED_INTO or info.is_counted):
        raise UserError(
            f"{path}: packets are copied out of {', '.join(COPIED_INTO)} alone, where time stamps are. Leave --keyframes_only out."
        )
    listed = list_path(path, options)
    made_from = _made_from(path, options)
    if listed.is_file():
        scenes, holes = _read_list(listed, made_from, len(info.stamps))
        return Film(info=info, scenes=scenes, folder=options.output_dir, holes=holes)
    with Progress(f"looking for scenes in {path.name}", len(info.stamps), unit="frame") as bar:
        cuts, holes = find_cuts(info, options, bar.advance)
    scenes = scenes_between(info, cuts, options.min_seconds, options.max_seconds)
    film = Film(info=info, scenes=scenes, folder=options.output_dir, holes=len(holes))
    there = [clip for scene in scenes if (clip := film.clip(scene, copied=options.keyframes_only)).exists()]
    if there:
        raise UserError(f"{there[0]}: is there already, and {listed.name} is not, which would say what it is. Give another --output_dir.")
    if options.keyframes_only:
        scenes = _at_key_frames(info, scenes, options.min_seconds)
        film = Film(info=info, scenes=scenes, folder=options.output_dir, holes=len(holes))
    lines = [{**made_from, "fps": info.fps, "frames": len(info.stamps), "damaged_frames": len(holes)}]
    lines += [_line(film, scene, copied=options.keyframes_only) for scene in scenes]
    write_bytes(listed, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "backslashreplace"))
    return film


def cut_film(film: Film, *, copied: bool) -> Iterator[Cut]:
    """Make the clips that are not there yet.

    Raises:
        TemporaryFailure: a full disk.
    """
    for scene in film.scenes:
        path, seconds = film.clip(scene, copied=copied), _seconds(film.info, scene)
        if scene.why:
            yield Cut(scene=scene, outcome="left out", note=scene.why)
        elif path.exists():
            yield Cut(scene=scene, outcome="kept", seconds=seconds)
        else:
            try:
                note = _make(film.info, scene, path, copied=copied)
            except TemporaryFailure:
                raise
            except UserError as error:
                yield Cut(scene=scene, outcome="failed", note=str(error))
            else:
                yield Cut(scene=scene, outcome="made", seconds=seconds, note=note)


def _make(info: VideoInfo, scene: Scene, path: Path, *, copied: bool) -> str:
    if copied:
        taken = copy_part(info, scene.first, scene.end, path)
        lost = scene.end - taken.end
        return f"{lost} frames at its end lean on the next key frame and are left out" if lost else ""
    with_sound = encode_part(info, scene.first, scene.end, path)
    return "" if with_sound or info.audio is None else "no sound in these seconds"


def _at_key_frames(info: VideoInfo, scenes: Sequence[Scene], shortest: float) -> tuple[Scene, ...]:
    """Scenes that begin at their first key frame, and end before the first one of the next scene, or their last one."""
    keys = (*key_frames(info), len(info.stamps))
    found = []
    for scene in scenes:
        inside = [place for place in keys if scene.first <= place <= scene.end]
        moved = Scene(number=scene.number, first=inside[0], end=inside[-1]) if len(inside) > 1 else None
        if scene.why or moved is None:
            found.append(Scene(number=scene.number, first=scene.first, end=scene.end, why=scene.why or "no two key frames in it to cut at"))
            continue
        seconds = _seconds(info, moved)
        begin, stop = (seconds_at(info, a) - seconds_at(info, b) for a, b in ((moved.first, scene.first), (scene.end, moved.end)))
        why = "" if seconds >= shortest - 1e-6 else f"{seconds:.2f} s from key frame to key frame, below --min_seconds {shortest:g}"
        found.append(_Moved(number=scene.number, first=moved.first, end=moved.end, why=why, begin_moved=begin, end_moved=stop))
    return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Moved(Scene):
    """A scene whose ends were moved inwards."""

    begin_moved: float
    """Seconds."""
    end_moved: float


def _seconds(info: VideoInfo, scene: Scene) -> float:
    return seconds_at(info, scene.end) - seconds_at(info, scene.first)


def _made_from(path: Path, options: SplitOptions) -> dict[str, Any]:
    """What a list has to agree in with a run that goes on with it."""
    return {
        "film": path.name,
        "fingerprint": file_fingerprint(path),
        "detector": options.detector,
        "threshold": options.threshold if options.threshold is not None else DETECTOR_THRESHOLDS[options.detector],
        "fades": options.fades,
        "min_seconds": options.min_seconds,
        "max_seconds": options.max_seconds,
        "keyframes_only": options.keyframes_only,
    }


def _line(film: Film, scene: Scene, *, copied: bool) -> dict[str, Any]:
    start, end = (seconds_at(film.info, place) for place in (scene.first, scene.end))
    line: dict[str, Any] = {"scene": scene.number, "first_frame": scene.first, "end_frame": scene.end}
    line |= {"start_seconds": round(start, 6), "end_seconds": round(end, 6), "seconds": round(end - start, 6)}
    if isinstance(scene, _Moved):
        line |= {"start_moved_by": round(scene.begin_moved, 6), "end_moved_by": round(-scene.end_moved, 6)}
    return line | ({"left_out": scene.why} if scene.why else {"clip": film.clip(scene, copied=copied).name})


def _read_list(path: Path, made_from: Mapping[str, Any], frames: int) -> tuple[tuple[Scene, ...], int]:
    """
    Raises:
        UserError: it is of another film or of other settings, or damaged.
    """
    remedy = "Give another --output_dir, or remove the list and its clips."
    lines = [line for _, line in read_json_lines(path)]
    head = lines[0] if lines and isinstance(lines[0], dict) else {}
    for key, value in made_from.items():
        if head.get(key) != value:
            what = "is another film's" if key in ("film", "fingerprint") else f"was made with {key} {head.get(key)!r}, not {value!r}"
            raise UserError(f"{path}: {what}. {remedy}")
    scenes, before = [], 0
    for number, line in enumerate(lines[1:], start=1):
        scene = _listed_scene(line, number, before, frames)
        if scene is None:
            raise UserError(f"{path}, line {number + 1}: is no scene of the film. {remedy}")
        scenes.append(scene)
        before = scene.end
    holes = head.get("damaged_frames")
    return tuple(scenes), holes if isinstance(holes, int) else 0


def _listed_scene(line: Any, number: int, before: int, frames: int) -> Scene | None:
    """What a line holds; None where that is no scene behind the frame `before`."""
    if not isinstance(line, dict) or line.get("scene") != number:
        return None
    first, end, why = line.get("first_frame"), line.get("end_frame"), line.get("left_out", "")
    if type(first) is not int or type(end) is not int or not isinstance(why, str) or not before <= first < end <= frames:
        return None
    return Scene(number=number, first=first, end=end, why=why)
