"""`ltxv2 dataset caption`: from its options to captions, and what is told at the end."""

import logging
from collections.abc import Sequence

from musubi_tuner.cache.index import printable
from musubi_tuner.config.captioning import NO_PREFIXES, CaptionConfig, CaptionerOptions, WordingOptions
from musubi_tuner.curation.captioning.answers import USUAL_PREFIXES
from musubi_tuner.curation.captioning.endpoint import EndpointCaptioner, find_server
from musubi_tuner.curation.captioning.instruction import read_instruction
from musubi_tuner.curation.captioning.local import LocalCaptioner, Sampling
from musubi_tuner.curation.captioning.media import Looking, Medium, list_media, media_specs
from musubi_tuner.curation.captioning.page import write_pages
from musubi_tuner.curation.captioning.places import Place, open_places
from musubi_tuner.curation.captioning.review import REVIEW_NAME
from musubi_tuner.curation.captioning.run import Choice, Outcome, Wording, caption_all, choose
from musubi_tuner.runtime.device import pick_device
from musubi_tuner.runtime.program import EXIT_NOT_ALL
from musubi_tuner.runtime.progress import Progress
from musubi_tuner.runtime.tables import format_table

log = logging.getLogger(__name__)

_MOST_ROWS = 40
_LONGEST_SHOWN = 160


def caption(options: CaptionConfig) -> int:
    """Caption what has no caption yet; returns the exit code.

    Raises:
        UserError: what can be told before anything is captioned, and a caption that cannot be written.
    """
    wording = _wording(options.wording)
    media, shared = list_media(media_specs(options.media.media, options.media.caption_extension))
    places = open_places([medium.spec for medium in media], options.writing.output)
    choice = choose(media, places, overwrite=options.writing.overwrite, most=options.media.most)
    made = list(choice.unreadable)
    if choice.wanted:
        try:
            made += _made(options, choice, wording)
        finally:
            _finish(list(places.values()))
    pages = write_pages(media, places) if options.writing.page else []
    code = _told(made, choice, shared)
    for page in pages:
        print(f"to look at: {printable(str(page))}")
    return code


def _made(options: CaptionConfig, choice: Choice, wording: Wording) -> list[Outcome]:
    given, chosen = options.media, options.captioner
    captioner = _open(chosen, options.wording)
    hears = given.sound == "on" or given.sound == "auto" and isinstance(captioner, LocalCaptioner) and captioner.hears
    looking = Looking(given.frames, given.longest_side, hears, given.sound_seconds)
    log.info("%d file(s) to caption by %s, %d captions kept", len(choice.wanted), captioner.name, choice.kept)
    made = []
    with Progress("captioning", len(choice.wanted), unit="file") as bar:
        for outcome in caption_all(
            choice.wanted, captioner, looking, wording, requests=None if chosen.endpoint is None else chosen.requests
        ):
            made.append(outcome)
            bar.advance()
    return made


def _open(chosen: CaptionerOptions, wording: WordingOptions) -> LocalCaptioner | EndpointCaptioner:
    sampling = Sampling(max_tokens=wording.max_tokens, temperature=wording.temperature, seed=wording.seed)
    if chosen.model is not None:
        return LocalCaptioner(chosen.model, pick_device(chosen.device), sampling)
    assert chosen.endpoint is not None
    server = find_server(
        chosen.endpoint, key_file=chosen.api_key_file, allow_remote=chosen.allow_remote, timeout=chosen.timeout, retries=chosen.retries
    )
    return EndpointCaptioner(server, chosen.model_name, sampling)


def _wording(options: WordingOptions) -> Wording:
    instruction = read_instruction(options.instruction, trigger=options.trigger_word, max_words=options.max_words)
    prefixes = options.strip_prefix or USUAL_PREFIXES
    return Wording(instruction=instruction, prefixes=() if prefixes == (NO_PREFIXES,) else prefixes)


def _finish(places: Sequence[Place]) -> None:
    for place in places:
        if (path := place.finish()) is not None:
            print(f"captions are in {printable(str(path))}; name it in the dataset TOML")


def _told(made: Sequence[Outcome], choice: Choice, shared: Sequence[tuple[Medium, Medium]]) -> int:
    """A table of what was written, the failures first, both by name; returns the exit code."""
    made = sorted(made, key=lambda one: one.medium.path)
    failed = [one for one in made if one.caption is None]
    rows = [(printable(one.medium.path.name), f"FAILED: {one.note}") for one in failed]
    rows += [(printable(one.medium.path.name), _shown(one.caption, one.note)) for one in made if one.caption is not None]
    if rows:
        print(format_table(rows[:_MOST_ROWS], ("file", "caption")))
    if len(rows) > _MOST_ROWS:
        print(f"... and {len(rows) - _MOST_ROWS} more")
    for medium, owner in shared[:_MOST_ROWS]:
        name, owns = printable(medium.path.name), printable(owner.path.name)
        print(f"{name}: not captioned by itself, as its caption is that of {owns}")
    cut = sum(bool(one.note) for one in made if one.caption is not None)
    untried = len(choice.wanted) + len(choice.unreadable) - len(made)
    written = f"{len(made) - len(failed)} written{f' ({cut} of them cut)' if cut else ''}"
    kept = f"{choice.kept} kept{f' ({choice.edited} of them a person has written or edited)' if choice.edited else ''}"
    print(f"Captions: {written}, {kept}, {len(failed)} failed, {untried} not tried")
    for folder in sorted({one.medium.spec.root for one in made if one.caption is not None}):
        print(f"to review: {printable(str(folder / REVIEW_NAME))}")
    if failed or untried:
        log.warning("WARNING: %d file(s) have no new caption; run the same command again, it keeps what is there", len(failed) + untried)
    return EXIT_NOT_ALL if failed or untried else 0


def _shown(caption: str, note: str) -> str:
    text = caption if len(caption) <= _LONGEST_SHOWN else f"{caption[:_LONGEST_SHOWN]} ..."
    return f"{text} [{note}]" if note else text
