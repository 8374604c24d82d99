"""The audit of a dataset file: all of its datasets, validation among them, their media as far as they are there, and their caches."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from musubi_tuner.cache.index import DatasetIndex, read_index
from musubi_tuner.cache.looks import look_path
from musubi_tuner.config.dataset import DatasetConfig, DatasetSpec
from musubi_tuner.config.dataset_audit import AuditOptions, Kind
from musubi_tuner.curation.auditing.captions import cached_captions, caption_findings, word_counts
from musubi_tuner.curation.auditing.files import cache_orphans, changes, dropped, holes, items_of, listed, new, orphans
from musubi_tuner.curation.auditing.findings import MEANING, Audit, DatasetFacts, Finding
from musubi_tuner.curation.auditing.latents import Nearest, nearest_pairs, signature
from musubi_tuner.curation.auditing.media import media_findings
from musubi_tuner.dataset.items import Item
from musubi_tuner.encoding.look import Probed, look_into
from musubi_tuner.encoding.plan import plan_datasets
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import processes
from musubi_tuner.runtime.progress import Progress
from musubi_tuner.sources.captions import Caption, captions_now
from musubi_tuner.sources.listing import Source

_THREADS = 4
_UPSCALED = 1.05
"""How much larger than its source a bucket may be."""
_NEAREST_SHOWN = 10


def audit(datasets: DatasetConfig, options: AuditOptions) -> Audit:
    """Look into everything; whatever is wrong with a file becomes a finding, and what cannot be looked at is named.

    Raises:
        UserError: a dataset whose sources cannot be listed.
    """
    findings: list[Finding] = []
    facts: list[DatasetFacts] = []
    not_checked: list[str] = []
    items: list[Item] = []
    for spec in datasets.all:
        sources, lacking = listed(spec)
        findings += lacking
        try:
            index, is_planned = read_index(spec, datasets.path), True
        except UserError as error:
            findings.append(Finding(kind="hole", dataset=spec.label, name="all clips", text=str(error)))
            index, is_planned = _plan(spec, datasets, bool(sources), not_checked), False
        own = items_of(spec, index)
        items += own
        captions: Mapping[str, Caption] = captions_now(spec, list(sources) or [clip.source for clip in index.clips])
        if not captions:  # of sources that are there, nobody has written any
            captions = {name: Caption(None) for name in sources} if sources else cached_captions(own)
        findings += caption_findings(spec.label, captions, options.trigger)
        findings += holes(own) if is_planned else ()
        findings += _upscaled(spec, index)
        if sources:
            findings += [*dropped(spec, index), *orphans(spec, sources)]
            if is_planned:
                findings += new(spec, index, sources)
                try:
                    findings += changes(spec, own)
                except UserError as error:  # companions that are lacking, of which is told one by one
                    not_checked.append(f"{spec.label}: whether sources have changed: {error}")
            if options.media:
                findings += _media(spec, own, sources)
            else:
                not_checked.append(f"{spec.label}: sound, motion and damage of the media (--no-media)")
        else:
            not_checked.append(f"{spec.label}: the media, which are not at {spec.root}")
        facts.append(_facts(spec, own, len(sources) or len({clip.source for clip in index.clips}), captions, datasets))
    findings += cache_orphans(datasets.all)
    validation = {spec.label for spec in datasets.validation_datasets}
    nearest = _nearest(items, validation, options.near, not_checked)
    findings += _duplicates_and_leaks(items, nearest, validation)
    order = list(MEANING)
    return Audit(
        dataset_config=datasets.path,
        facts=tuple(facts),
        findings=tuple(sorted(findings, key=lambda finding: order.index(finding.kind))),
        not_checked=tuple(not_checked),
        nearest=tuple((pair.first.key, pair.second.key, round(pair.distance, 4)) for pair in nearest.overall),
        looks=_looks(items),
    )


def _plan(spec: DatasetSpec, datasets: DatasetConfig, has_media: bool, not_checked: list[str]) -> DatasetIndex:
    """What caching would plan, of a dataset that was not cached yet: it can be audited before."""
    if has_media:
        try:
            with processes() as group:
                (plan,) = plan_datasets(DatasetConfig(datasets.path, (spec,), ()), group, _THREADS)
            return plan.index
        except UserError as error:
            not_checked.append(f"{spec.label}: its clips, as nothing can be planned: {error}")
    return DatasetIndex(settings={}, clips=())


def _media(spec: DatasetSpec, items: Sequence[Item], sources: Mapping[str, Source]) -> list[Finding]:
    clips: dict[str, list[Item]] = {}
    for item in items:
        if not item.clip.mirrored:
            clips.setdefault(item.clip.source, []).append(item)

    def look(source: Source) -> list[Finding]:
        probed = look_into(spec, source)
        if not isinstance(probed, Probed):
            return [Finding(kind="unreadable", dataset=spec.label, name=source.name, text=probed.problem)]
        return [finding for item in clips.get(source.name, ()) for finding in media_findings(spec, item.clip, probed)]

    found = []
    with Progress(f"decoding {spec.label}", len(sources), unit="source") as bar, ThreadPoolExecutor(_THREADS) as pool:
        for own in pool.map(look, sources.values()):
            found += own
            bar.advance()
    return found


def _upscaled(spec: DatasetSpec, index: DatasetIndex) -> Iterable[Finding]:
    for clip in index.clips:
        if clip.width and clip.original_width and not clip.mirrored:
            factor = max(clip.width / clip.original_width, clip.height / clip.original_height)
            if factor > _UPSCALED:
                text = f"{clip.original_width}x{clip.original_height}, trained on as {clip.width}x{clip.height}: {factor:.2f} times larger"
                yield Finding(kind="upscaled", dataset=spec.label, name=clip.key, text=text, clip=clip.key, value=factor)


def _nearest(items: Sequence[Item], validation: set[str], near: float, not_checked: list[str]) -> Nearest:
    seen = [item for item in items if "latents" in item.paths and not item.clip.mirrored]
    with Progress("comparing latents", len(seen), unit="clip") as bar:
        signatures = []
        for item in seen:
            signatures.append(signature(item))
            bar.advance()
    known = [(item, one) for item, one in zip(seen, signatures, strict=True) if one is not None]
    widths = Counter(len(one) for _, one in known)
    if len(widths) > 1:  # caches of two models beside each other
        usual = widths.most_common(1)[0][0]
        not_checked.append(f"duplicates of {sum(widths.values()) - widths[usual]} clips, whose latents have another number of channels")
        known = [(item, one) for item, one in known if len(one) == usual]
    if len(known) < len(seen):
        not_checked.append(f"duplicates of {len(seen) - len(known)} clips, whose latents are not cached or cannot be read")
    held = [item.spec.label in validation for item, _ in known]
    return nearest_pairs([item for item, _ in known], [one for _, one in known], held, near, _NEAREST_SHOWN)


def _duplicates_and_leaks(items: Sequence[Item], nearest: Nearest, validation: set[str]) -> Iterator[Finding]:
    """Of each validation clip one leak at most: by its source, else by its latents."""
    leaked = set()
    trained = {item.clip.source_fingerprint: item for item in items if item.spec.label not in validation}
    for item in items:
        other = trained.get(item.clip.source_fingerprint)
        if item.spec.label in validation and other is not None:
            leaked.add(item.key)
            yield _of_pair("leak", item, f"its source is trained on too, as {other.key}", 0.0)
    for pair in nearest.leaks:
        if pair.first.key not in leaked:
            yield _of_pair("leak", pair.first, f"distance {pair.distance:.3f} from {pair.second.key}, which is trained on", pair.distance)
    for pair in nearest.alike:
        yield _of_pair("duplicate", pair.first, f"distance {pair.distance:.3f} from {pair.second.key}", pair.distance)


def _of_pair(kind: Kind, item: Item, text: str, distance: float) -> Finding:
    return Finding(kind=kind, dataset=item.spec.label, name=item.clip.key, text=text, clip=item.clip.key, value=distance)


def _facts(
    spec: DatasetSpec, items: Sequence[Item], sources: int, captions: Mapping[str, Caption], datasets: DatasetConfig
) -> DatasetFacts:
    clips = [item.clip for item in items]
    files = {path for item in items for path in item.paths.values()}
    with_length = [(f"{clip.frames} frames" if clip.frames else f"{clip.seconds:.1f} s") for clip in clips]
    return DatasetFacts(
        label=spec.label,
        kind=spec.kind,
        is_validation=spec in datasets.validation_datasets,
        clips=len(clips),
        sources=sources,
        seconds=round(sum(clip.seconds for clip in clips if clip.kind != "image"), 3),
        with_sound=sum(item.has_sound for item in items),
        cached_bytes=sum(path.stat().st_size for path in files if path.is_file()),
        lengths=_counted(with_length),
        sizes=_counted(f"{clip.width}x{clip.height}" for clip in clips if clip.width),
        rates=_counted(f"{clip.fps:.3f}".rstrip("0").rstrip(".") for clip in clips if clip.kind == "video"),
        source_sizes=_counted(f"{clip.original_width}x{clip.original_height}" for clip in clips if clip.original_width),
        caption_words=word_counts(captions),
    )


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _looks(items: Sequence[Item]) -> dict[tuple[str, str], Path]:
    paths = {(item.spec.label, item.clip.key): look_path(item.paths["latents"], "latents") for item in items if "latents" in item.paths}
    return {key: path for key, path in paths.items() if path.is_file()}
