"""Captions for many files: several at work at once, each written as soon as it is there, failures told of by file."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from musubi_tuner.curation.captioning.answers import Answer, Caption, caption_of
from musubi_tuner.curation.captioning.instruction import Instruction
from musubi_tuner.curation.captioning.media import Look, Looking, Medium, look_at
from musubi_tuner.curation.captioning.places import Place
from musubi_tuner.curation.captioning.review import Review, Written, caption_hash
from musubi_tuner.runtime.disk import check_writable
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.servers import ServerGone

Given = TypeVar("Given")
Result = TypeVar("Result")

_GONE_IN_A_ROW = 5
"""Files to which no server answers, after which the others are not tried."""


class Captioner(Protocol):
    """`LocalCaptioner` or `EndpointCaptioner`."""

    name: str

    def ask(self, instruction: str, look: Look) -> Answer: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Wording:
    """What is asked, and what is made of answers."""

    instruction: Instruction
    prefixes: Sequence[str]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A caption to be written."""

    medium: Medium
    place: Place
    review: Review
    before: str | None
    """The caption that it replaces."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one file."""

    medium: Medium
    caption: str | None
    """None: there is none; the note says why."""
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """What of the media is to be captioned."""

    wanted: tuple[Wanted, ...]
    kept: int
    """Captions that are there, and stay."""
    edited: int
    """Of these, such as --overwrite would have replaced, but that somebody has written or edited."""
    unreadable: tuple[Outcome, ...]


def choose(media: Sequence[Medium], places: Mapping[str, Place], *, overwrite: bool, most: int | None) -> Choice:
    """
    Args:
        places: by the labels of the datasets.
        overwrite: captions of ours that nobody has edited too.

    Raises:
        UserError: a folder that cannot be written into.
    """
    reviews: dict[Path, Review] = {}
    wanted: list[Wanted] = []
    unreadable: list[Outcome] = []
    kept = edited = 0
    for medium in media:
        folder, place = medium.spec.root, places[medium.spec.label]
        if folder not in reviews:
            reviews[folder] = Review(folder)
        review = reviews[folder]
        now = place.now(medium)
        if now.problem:
            unreadable.append(Outcome(medium, None, f"its caption cannot be read, and is left as it is: {now.problem}"))
        elif not now.text:
            wanted.append(Wanted(medium, place, review, None))
        elif overwrite and review.is_ours(medium.source.name, place.name_of(medium), now.text):
            wanted.append(Wanted(medium, place, review, now.text))
        else:
            kept, edited = kept + 1, edited + overwrite
    chosen = tuple(wanted[:most])
    for folder in {one.medium.spec.root for one in chosen}:
        check_writable(folder)
    return Choice(chosen, kept, edited, tuple(unreadable))


def caption_all(
    wanted: Sequence[Wanted], captioner: Captioner, looking: Looking, wording: Wording, *, requests: int | None
) -> Iterator[Outcome]:
    """Caption and write, in the order in which captions come.

    Args:
        requests: at once, to a server; None: one after the other by a model in this process, while the next files are decoded.

    Raises:
        TemporaryFailure: the disk is full.
    """
    gone = 0

    def look(one: Wanted) -> Look:
        return look_at(one.medium, looking)

    def ask(one: Wanted, seen: Look) -> tuple[Answer, bool, str, float]:
        start = time.monotonic()
        heard = seen.sound is not None
        if one.medium.kind == "audio" and not heard:
            raise UserError(f"{one.medium.path}: holds no sound.")
        answer = captioner.ask(wording.instruction.text(seen.kind, heard=heard), seen)
        cut = f"only the first {looking.sound_seconds:g} s were heard" if seen.sound_is_cut else ""
        return answer, heard, cut, time.monotonic() - start

    def look_and_ask(one: Wanted) -> tuple[Answer, bool, str, float]:
        return ask(one, look(one))

    results = in_threads(look, wanted, 2) if requests is None else in_threads(look_and_ask, wanted, requests)
    for one, given in results:
        try:
            found = given()
            answer, heard, cut, seconds = ask(one, found) if isinstance(found, Look) else found
            instruction = wording.instruction
            caption = caption_of(answer, prefixes=wording.prefixes, trigger=instruction.trigger, max_words=instruction.max_words)
        except UserError as error:
            gone = gone + 1 if isinstance(error, ServerGone) else 0
            yield Outcome(one.medium, None, str(error))
            if gone >= _GONE_IN_A_ROW:
                return
            continue
        gone = 0
        note = "; ".join(part for part in (caption.note, cut) if part)
        try:
            yield _write(one, caption, answer, note, seconds, heard, captioner.name, wording.instruction)
        except TemporaryFailure:  # the disk is full: no later one can be written either
            raise
        except UserError as error:
            yield Outcome(one.medium, None, str(error))


def _write(
    one: Wanted, caption: Caption, answer: Answer, note: str, seconds: float, heard: bool, model: str, instruction: Instruction
) -> Outcome:
    """The caption, unless somebody has written one meanwhile."""
    medium, place = one.medium, one.place
    now = place.now(medium)
    if (now.text or None) != one.before or now.problem:
        return Outcome(medium, None, "somebody has written its caption meanwhile, which stays")
    place.write(medium, caption.text)
    said = answer.text.strip()
    one.review.add(
        Written(
            file=medium.source.name,
            place=place.name_of(medium),
            caption=caption.text,
            sha256=caption_hash(caption.text),
            model=model,
            instruction=instruction.fingerprint,
            seconds=round(seconds, 2),
            heard=heard,
            note=note,
            answer="" if said == caption.text else said,
        )
    )
    return Outcome(medium, caption.text, note, seconds)


class _Result(Generic[Result]):
    """What a call has given or raised; calling it gives or raises the same."""

    def __init__(self, value: Result | None, error: BaseException | None) -> None:
        self._value, self._error = value, error

    def __call__(self) -> Result:
        if self._error is not None:
            raise self._error
        return self._value  # pyrefly: ignore[bad-return] - there is one where there is no error


def in_threads(work: Callable[[Given], Result], items: Sequence[Given], count: int) -> Iterator[tuple[Given, Callable[[], Result]]]:
    """Each item with what `work` makes of it, as it comes; the threads are at most `count` items ahead of what has been taken.

    The threads end with the process, so that Ctrl-C waits for no answer of a server.
    """
    todo: queue.SimpleQueue[Given] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Given, _Result[Result]]] = queue.SimpleQueue()
    room = threading.Semaphore(2 * count)
    stopped = threading.Event()
    for item in items:
        todo.put(item)

    def run() -> None:
        while True:
            room.acquire()
            if stopped.is_set():
                return
            try:
                item = todo.get_nowait()
            except queue.Empty:
                room.release()
                return
            try:
                done.put((item, _Result(work(item), None)))
            except BaseException as error:
                done.put((item, _Result(None, error)))

    for _ in range(min(count, len(items))):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in items:
            yield done.get()
            room.release()
    finally:
        stopped.set()
        for _ in range(2 * count):
            room.release()
