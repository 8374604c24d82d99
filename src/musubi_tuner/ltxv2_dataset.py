"""Datasets and their caches: looked into before they are trained on."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from musubi_tuner.config import dataset_audit as audit_config
from musubi_tuner.config import dataset_media as media_config
from musubi_tuner.config import dataset_tools as config
from musubi_tuner.config.caching import first_given
from musubi_tuner.config.captioning import CaptionConfig
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.config.packing import PackConfig, UnpackConfig
from musubi_tuner.config.subcommands import Subcommand, run_subcommand
from musubi_tuner.runtime.program import EXIT_NOT_ALL, run_program
from musubi_tuner.runtime.tables import format_table

if TYPE_CHECKING:
    from musubi_tuner.curation.auditing.findings import Audit

log = logging.getLogger(__name__)

PROG = "tools/dataset.py"
DESCRIPTION = "Make datasets of films (scenes, captions, references), audit them, and move their caches to another machine."
_MOST_ROWS = 40


def main(argv: Sequence[str], prog: str = PROG) -> int:
    return run_subcommand(SUBCOMMANDS, argv, prog=prog, description=DESCRIPTION)


def _decode(options: config.DecodeConfig) -> int:
    from musubi_tuner.curation.decoding import choose, decode
    from musubi_tuner.ltxv2.weights import open_checkpoint
    from musubi_tuner.runtime.device import pick_device
    from musubi_tuner.runtime.progress import Progress

    models, chosen = options.models, options.decoding
    datasets = load_dataset_config(options.dataset.dataset_config)
    vae = open_checkpoint(first_given(("--vae", models.vae), ("--ltxv2_model", models.ltxv2_model)))
    audio_vae = vae if models.audio_vae is None else open_checkpoint(models.audio_vae)
    wanted = choose(datasets, chosen.output_dir, clips=chosen.clips, most=chosen.most, references=chosen.references)
    with Progress("decoding", len(wanted), unit="clip") as bar:
        made = list(decode(wanted, datasets, vae, audio_vae, pick_device(chosen.device), lambda: bar.advance()))
    holes = [one for one in made if one.path is None]
    rows = [(one.clip, one.what, "" if one.path is None else str(one.path)) for one in [*holes, *(o for o in made if o.path is not None)]]
    print(format_table(rows[:_MOST_ROWS], ("clip", "what", "file")))
    if len(rows) > _MOST_ROWS:
        print(f"... and {len(rows) - _MOST_ROWS} more")
    if holes:
        log.warning("WARNING: %d of %d clips are not cached; run the caching programs again", len(holes), len(made))
    return EXIT_NOT_ALL if holes else 0


def _caption(options: CaptionConfig) -> int:
    from musubi_tuner.curation.captioning.program import caption

    return caption(options)


def _pack(options: PackConfig) -> int:
    from musubi_tuner.curation.packing.program import pack

    return pack(options)


def _unpack(options: UnpackConfig) -> int:
    from musubi_tuner.curation.packing.program import unpack

    return unpack(options)


def _split_scenes(options: media_config.SplitConfig) -> int:
    from musubi_tuner.curation.scenes import check_detectors
    from musubi_tuner.curation.splitting import split

    check_detectors()
    rows, problems = [], []
    for film in split(options.split):
        counts = Counter(cut.outcome for cut in film.cuts)
        numbers = [counts[outcome] for outcome in ("made", "kept", "left out", "failed")]
        rows.append((film.name, len(film.cuts), *numbers, f"{film.seconds:.1f}"))
        problems += film.problems
        for note in film.notes:
            log.info("%s: %s", film.name, note)
    print(format_table(rows, ("film", "scenes", "made", "there already", "left out", "failed", "seconds of clips")))
    return _told(problems)


def _trim(options: media_config.TrimConfig) -> int:
    from musubi_tuner.curation.trimming import trim

    part = options.trim
    made = trim(part.input, part.start, part.end, part.output)
    sound = "with sound" if made.has_sound else "without sound"
    row = (f"{made.start_seconds:.3f}", f"{made.end_seconds:.3f}", made.end - made.first, sound, part.output)
    print(format_table([row], ("start", "end", "frames", "sound", "file")))
    return 0


def _crop(options: media_config.CropConfig) -> int:
    from musubi_tuner.curation.trimming import crop_all, files_to_crop
    from musubi_tuner.runtime.progress import Progress

    paths = files_to_crop(options.crop.input, options.crop.output_dir)
    with Progress("cropping", len(paths), unit="file") as bar:
        done = []
        for one in crop_all(paths, options.crop):
            done.append(one)
            bar.advance()
    rows = [(one.name, "there already" if one.outcome == "kept" else one.outcome, one.note) for one in done if one.outcome != "failed"]
    if rows:
        print(format_table(rows[:_MOST_ROWS], ("file", "", "picture")))
    return _told([one.note for one in done if one.outcome == "failed"])


def _references(options: media_config.ReferencesConfig) -> int:
    from musubi_tuner.curation.references import claim_folders, frame_maker, make_references, wanted_references
    from musubi_tuner.runtime.progress import Progress

    wanted = wanted_references(load_dataset_config(options.dataset.dataset_config), options.references.most)
    maker = frame_maker(options.references)
    claim_folders(wanted, options.references)
    with Progress("making references", len(wanted), unit="file") as bar:
        done = []
        for one in make_references(wanted, maker):
            done.append(one)
            bar.advance()
    rows = [
        (one.wanted.label, one.wanted.source.name, "there already" if one.outcome == "kept" else one.note)
        for one in done
        if one.outcome != "failed"
    ]
    if rows:
        print(format_table(rows[:_MOST_ROWS], ("dataset", "clip", "reference")))
    for folder in dict.fromkeys(one.wanted.output.parent for one in done):
        print(f"in {folder}")
    return _told([one.note for one in done if one.outcome == "failed"])


def _audit(options: audit_config.AuditConfig) -> int:
    from musubi_tuner.curation.auditing.run import audit
    from musubi_tuner.curation.auditing.write import check_outputs, write_outputs

    chosen = options.audit
    check_outputs(chosen.page, chosen.json)
    done = audit(load_dataset_config(options.dataset.dataset_config), chosen)
    for path in write_outputs(done, chosen.page, chosen.json):
        log.info("wrote %s", path)
    shown = [(one.label, one.clips, f"{one.seconds:.1f}", one.with_sound, f"{one.cached_bytes / 1e6:.1f} MB") for one in done.facts]
    print(format_table(shown, ("dataset", "clips", "seconds", "with sound", "cache")))
    found = [(kind, count, _first(done, kind)) for kind, count in done.counts().items() if count]
    print("\n" + (format_table(found, ("found", "", "such as")) if found else "nothing found"))
    for one in done.not_checked:
        log.warning("not checked: %s", one)
    failing = done.fails(chosen.fail_on)
    if failing:
        log.error("failed, as --fail_on asks: %s", ", ".join(failing))
    return EXIT_NOT_ALL if failing else 0


def _first(done: "Audit", kind: str) -> str:
    finding = next(finding for finding in done.findings if finding.kind == kind)
    return f"{finding.dataset} {finding.name}: {finding.text}"


def _told(problems: Sequence[str]) -> int:
    """Say what has failed; the exit code."""
    for problem in problems[:_MOST_ROWS]:
        log.error("failed: %s", problem)
    if len(problems) > _MOST_ROWS:
        log.error("... and %d more", len(problems) - _MOST_ROWS)
    return EXIT_NOT_ALL if problems else 0


SUBCOMMANDS: dict[str, Subcommand[Any]] = {
    "split-scenes": Subcommand(media_config.SplitConfig, _split_scenes, "A film, or a folder of films, to clips by its scenes.", "input"),
    "trim": Subcommand(media_config.TrimConfig, _trim, "A part of a clip by its seconds, sound in step.", "input"),
    "crop": Subcommand(media_config.CropConfig, _crop, "A part of the picture, of one file or of a folder.", "input"),
    "caption": Subcommand(
        CaptionConfig, _caption, "Captions for videos, images and sounds, by a local model or a server of yours.", "media"
    ),
    "references": Subcommand(
        media_config.ReferencesConfig, _references, "Reference videos (IC-LoRA) of a dataset's clips: edges, blur, depth.", "dataset_config"
    ),
    "audit": Subcommand(
        audit_config.AuditConfig, _audit, "What is wrong with a dataset and its cache, as JSON and a page.", "dataset_config"
    ),
    "decode": Subcommand(config.DecodeConfig, _decode, "Cached clips as mp4, png or wav: what will be trained.", "dataset_config"),
    "pack": Subcommand(
        PackConfig, _pack, "Caches as one archive or folder, to train elsewhere without media and encoders.", "dataset_config"
    ),
    "unpack": Subcommand(UnpackConfig, _unpack, "Caches out of a pack, each file compared with its checksum.", "pack"),
}


if __name__ == "__main__":
    run_program(main)
