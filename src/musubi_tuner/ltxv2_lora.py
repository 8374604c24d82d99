"""Files of LoRAs: what is in them, other forms of them, and LoRAs made of LoRAs or of checkpoints."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musubi_tuner.config import lora_files as config
from musubi_tuner.config.subcommands import Subcommand, run_subcommand
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.program import run_program
from musubi_tuner.runtime.tables import format_table, names_of

if TYPE_CHECKING:
    from musubi_tuner.conversion.lora.contents import LoraContents
    from musubi_tuner.publishing.card import CardFacts, Preview

log = logging.getLogger(__name__)

PROG = "tools/lora.py"
DESCRIPTION = (
    "Look into LoRA files and make others of them: other forms and ranks, parts, sums, averages, differences of checkpoints, cards."
)


def main(argv: Sequence[str], prog: str = PROG) -> int:
    return run_subcommand(SUBCOMMANDS, argv, prog=prog, description=DESCRIPTION)


def _inspect(options: config.InspectConfig) -> int:
    from musubi_tuner.conversion.facts import check_json, write_json
    from musubi_tuner.conversion.lora.contents import read_lora
    from musubi_tuner.conversion.lora.inspection import inspect, sentences
    from musubi_tuner.ltxv2.weights import open_checkpoint

    shown = options.inspection
    if shown.json is not None:
        check_json(shown.json, overwrite=shown.overwrite)
    found = inspect(read_lora(options.file.lora), None if shown.base is None else open_checkpoint(shown.base))
    contents = found.contents
    ranks = ", ".join(map(str, contents.ranks)) or "none"
    rows = [
        ("file", str(contents.path)),
        ("type", f"{', '.join(contents.kinds)} on {len(contents.adapters)} modules, rank {ranks}"),
        ("keys", contents.form),
        ("scale", contents.scale_from),
        ("values", f"{str(contents.dtype).removeprefix('torch.')}, all finite"),
    ]
    print(format_table([*rows, *found.recipe.items()], ("what", "")))
    heads = ("modules", "norm of the change", "of the weights' norm")
    print("\n" + format_table([(stream, *_cells(one)) for stream, one in found.by_stream().items()], ("stream", *heads)))
    print("\n" + format_table([(block, *_cells(one)) for block, one in found.by_block().items()], ("block", *heads)))
    if shown.modules:
        modules = [
            (one.kind, one.rank or "", f"{one.scale:g}", *_cells((1, one.norm or 0.0, one.relative))[1:], one.module)
            for one in found.modules
        ]
        print("\n" + format_table(modules, ("type", "rank", "scale", *heads[1:], "module")))
    print("\n" + "\n".join(sentences(found)))
    if shown.json is not None:
        write_json(shown.json, found.as_json())
    return 0


def _cells(one: tuple[int, float, float | None]) -> tuple[str, str, str]:
    count, norm, relative = one
    return str(count), f"{norm:.4g}", "" if relative is None else f"{relative:.3%}"


def _convert(options: config.ConvertConfig) -> int:
    from musubi_tuner.conversion.lora.contents import read_lora

    contents = read_lora(options.file.lora)
    _write(contents, options.writing, f"convert --to {options.form.to} {contents.path.name}", form=options.form.to, read=[contents.path])
    return 0


def _strip(options: config.StripConfig) -> int:
    from musubi_tuner.conversion.lora.changes import without
    from musubi_tuner.conversion.lora.contents import read_lora

    contents = read_lora(options.file.lora)
    patterns = []
    for pattern in options.removal.remove_pattern:
        try:
            patterns.append(re.compile(pattern))
        except re.error as error:
            raise UserError(f"--remove_pattern {pattern!r}: is no regular expression ({error}).") from error
    left = without(contents, options.removal.remove, patterns)
    log.info("%d of %d modules removed", len(contents.adapters) - len(left.adapters), len(contents.adapters))
    words = " ".join((*options.removal.remove, *options.removal.remove_pattern))
    _write(left, options.writing, f"strip {words} {contents.path.name}", read=[contents.path])
    return 0


def _scale(options: config.ScaleConfig) -> int:
    from musubi_tuner.conversion.lora.changes import strengthened
    from musubi_tuner.conversion.lora.contents import read_lora
    from musubi_tuner.networks.stack import Strength

    contents, chosen = read_lora(options.file.lora), options.strength
    strength = Strength(chosen.video_strength, chosen.audio_strength) * chosen.strength
    if strength == Strength(1, 1):
        raise UserError("nothing to scale by: give --strength, --video_strength or --audio_strength.")
    _write(
        strengthened(contents, strength),
        options.writing,
        f"scale {strength.video:g} (sound {strength.audio:g}) {contents.path.name}",
        read=[contents.path],
    )
    return 0


def _resize(options: config.ResizeConfig) -> int:
    from musubi_tuner.conversion.lora.contents import read_lora
    from musubi_tuner.conversion.lora.writing import check_free

    check_free(options.writing.output, overwrite=options.writing.overwrite, folder=False)
    contents = read_lora(options.file.lora)
    rank, energy = options.rank.rank, options.rank.energy
    wanted = {"rank": rank, "energy": energy}
    words = ", ".join(f"{name} {value:g}" for name, value in wanted.items() if value is not None)
    if rank is not None and energy is None and contents.kinds == ["lora"] and max(contents.ranks) < rank:
        log.info("no module has more than rank %d, so all keep theirs at --rank %d", max(contents.ranks), rank)
    _write(_resized(contents, rank, energy), options.writing, f"resize to {words} {contents.path.name}", read=[contents.path])
    return 0


def _resized(contents: LoraContents, rank: int | None, energy: float | None) -> LoraContents:
    from musubi_tuner.conversion.lora.changes import resized

    smaller, cuts = resized(contents, rank=rank, energy=energy)
    before, lost = sum(one.before for one in cuts.values()), sum(one.lost for one in cuts.values())
    shares = {name: (one.lost / one.before) ** 0.5 if one.before else 0.0 for name, one in cuts.items()}
    worst = max(shares, key=lambda name: shares[name])
    ranks = sorted({one.rank for one in cuts.values()})
    log.info(
        "rank %s; the change differs by %.3f %% of its norm, at most by %.3f %% (%s)",
        ranks[0] if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        100 * (lost / before) ** 0.5 if before else 0.0,
        100 * shares[worst],
        worst,
    )
    return smaller


def _merge(options: config.MergeConfig) -> int:
    from musubi_tuner.conversion.lora.changes import added
    from musubi_tuner.conversion.lora.contents import read_lora
    from musubi_tuner.generation.jobs import parse_lora

    if len(options.merge.loras) < 2:
        raise UserError("--loras: two or more are merged; `scale` changes the strength of one.")
    uses = [parse_lora(text, "--loras") for text in options.merge.loras]
    result = added([(read_lora(use.path), use.strength) for use in uses])
    if options.merge.rank is not None:
        result = _resized(result, options.merge.rank, None)
    names = ", ".join(f"{use.path.name} x {use.strength.video:g} (sound {use.strength.audio:g})" for use in uses)
    _write(result, options.writing, f"merge {names}", read=[use.path for use in uses])
    return 0


def _average(options: config.AverageConfig) -> int:
    from musubi_tuner.conversion.lora.changes import averaged, shares_by_decay, shares_by_width
    from musubi_tuner.conversion.lora.contents import read_lora
    from musubi_tuner.generation.axes import files_of

    chosen = options.average
    paths = list(dict.fromkeys(use.path for word in chosen.loras for use in files_of(word, "--loras", Path())))
    if len(paths) < 2:
        raise UserError(f"--loras: {len(paths)} file; an average is of two or more checkpoints of a run.")
    output = options.writing.output
    if output.exists() and any(path.exists() and path.samefile(output) for path in paths):
        raise UserError(
            f"--output {output}: is one of the files that are averaged, and would become a part of its own average. Give another name."
        )
    files = [read_lora(path) for path in paths]
    _check_saved_by_training(files, chosen.loras)
    if chosen.sigma_rel is None:
        shares, how = shares_by_decay(len(files), chosen.beta, chosen.beta2), f"beta {chosen.beta:g}"
    else:
        steps = [_steps(file) for file in files]
        if sorted(set(steps)) != steps:
            raise UserError(f"--sigma_rel: the files' steps (ss_steps) are {steps}; they must rise from file to file. Use --beta.")
        shares, how = shares_by_width(steps, chosen.sigma_rel), f"sigma_rel {chosen.sigma_rel:g}"
    print(format_table([(path.name, f"{share:.4f}") for path, share in zip(paths, shares, strict=True)], ("file", "share")))
    _write(averaged(files, shares), options.writing, f"average ({how}) {names_of([path.name for path in paths])}", read=paths)
    return 0


def _check_saved_by_training(files: Sequence[LoraContents], words: Sequence[str]) -> None:
    """
    Raises:
        UserError: a file that a wildcard or folder has found was made of others, such as an earlier average of the same checkpoints.
    """
    from musubi_tuner.conversion.lora.writing import MADE_FROM

    for file in files:
        if file.path not in map(Path, words) and MADE_FROM in file.metadata:
            raise UserError(
                f"{file.path}: is no checkpoint of a run, but was made of others ({file.metadata[MADE_FROM]}). Narrow the wildcard down to "
                "checkpoints, move this file elsewhere, or name each file to average it all the same."
            )


def _steps(file: LoraContents) -> int:
    try:
        return int(file.metadata["ss_steps"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{file.path}: does not say for how many steps it was trained (ss_steps). Use --beta.") from error


def _extract(options: config.ExtractConfig) -> int:
    import torch

    from musubi_tuner.conversion.checkpoint.streaming import check_no_input
    from musubi_tuner.conversion.lora.contents import LoraContents
    from musubi_tuner.conversion.lora.extraction import extract, tensors_of
    from musubi_tuner.conversion.lora.writing import check_free
    from musubi_tuner.ltxv2.versions import detect_version
    from musubi_tuner.ltxv2.weights import open_checkpoint
    from musubi_tuner.runtime.device import pick_device
    from musubi_tuner.runtime.progress import Progress

    chosen = options.extraction
    check_free(options.writing.output, overwrite=options.writing.overwrite, folder=False)
    tuned, base = open_checkpoint(chosen.tuned), open_checkpoint(chosen.base)
    check_no_input(options.writing.output, "--output", {entry.file for one in (tuned, base) for entry in one.entries.values()})
    with Progress("extracting", tensors_of(tuned, base), unit="tensor") as bar:
        found = extract(
            tuned, base, rank=chosen.rank, energy=chosen.energy, device=pick_device(chosen.device), advance=lambda: bar.advance()
        )
    worst = min(found.kept, key=lambda name: found.kept[name])
    share = sum(found.kept.values()) / len(found.kept)
    log.info("%d linears differ, %d are alike; %.2f %% of the differences' squared norm is kept in the mean, least of %s (%.2f %%)",
             len(found.kept), found.alike, 100 * share, worst, 100 * found.kept[worst])  # fmt: skip
    if found.left_out:
        names = sorted(found.left_out, key=lambda name: -found.left_out[name])
        log.warning("WARNING: %d other tensors differ too, which no LoRA holds: %s", len(names), names_of(names, 5))
    metadata = {"ss_base_model_version": f"ltx-{detect_version(base)}", "ss_sd_model_name": base.path.name}
    contents = LoraContents(chosen.tuned, found.adapters, metadata, "", "", torch.bfloat16)
    _write(contents, options.writing, f"extract {tuned.path.name} - {base.path.name}")
    return 0


def _metadata(options: config.MetadataConfig) -> int:
    from musubi_tuner.conversion.lora.inspection import metadata_table
    from musubi_tuner.conversion.lora.writing import rewrite_metadata, thumbnail
    from musubi_tuner.networks.reading import network_metadata, newest_file

    chosen, path = options.metadata, newest_file(options.file.lora)
    metadata = network_metadata(path)
    if chosen.changes:
        for pattern in chosen.remove:
            gone = [key for key in metadata if fnmatchcase(key, pattern)]
            if not gone:
                raise UserError(f"--remove {pattern}: {path} has no such entry. Its entries: {names_of(sorted(metadata)) or 'none'}.")
            metadata = {key: value for key, value in metadata.items() if key not in gone}
        metadata |= {name.strip(): value for name, _, value in (entry.partition("=") for entry in chosen.set)}
        if chosen.picture is not None:
            metadata["modelspec.thumbnail"] = thumbnail(chosen.picture)
        assert chosen.output is not None
        rewrite_metadata(path, chosen.output, metadata, overwrite=chosen.overwrite)
        log.info("%s: %d entries; its tensors are those of %s", chosen.output, len(metadata), path)
    print(format_table(metadata_table(metadata), ("entry", "value")) if metadata else f"{path}: has no metadata.")
    return 0


def _tell_of_connectors(paths: Sequence[Path]) -> None:
    """Warn of adapters of the text connectors beside these files, which are not read."""
    from musubi_tuner.networks.formats import CONNECTORS_ENDING, connectors_path

    if beside := [path.name for path in map(connectors_path, paths) if path.is_file()]:
        log.warning(
            "WARNING: the adapters of the text connectors in %s are no part of this. The same command takes such files by their names too; "
            "end --output in %s then, so that it is found beside the LoRA.", names_of(beside), CONNECTORS_ENDING,
        )  # fmt: skip


def _write(
    contents: LoraContents, writing: config.WritingOptions, made_from: str, form: str = "official", read: Sequence[Path] = ()
) -> None:
    """
    Args:
        read: the LoRAs that it was made from.
    """
    from musubi_tuner.conversion.lora.contents import PRECISIONS
    from musubi_tuner.conversion.lora.forms import rounding, vanished
    from musubi_tuner.conversion.lora.writing import write_lora

    _tell_of_connectors(read)
    dtype = contents.dtype if writing.save_precision is None else PRECISIONS[writing.save_precision]
    write_lora(contents, writing.output, form=form, dtype=dtype, overwrite=writing.overwrite, made_from=made_from)
    lost = rounding(contents, form, dtype)
    name = str(dtype).removeprefix("torch.")
    says = f"rounded to {name}, by at most {lost:.1e} of a tensor's norm" if lost else f"{name}, nothing lost"
    if gone := vanished(contents, form, dtype):
        log.warning("WARNING: %d of its modules are too small for %s, and change nothing any more: %s", len(gone), name, names_of(gone, 5))
    log.info("%s: %d modules, %s keys, %s", writing.output, len(contents.adapters), form, says)


def _card(options: config.CardConfig) -> int:
    from musubi_tuner.networks.reading import newest_file
    from musubi_tuner.publishing.card import card_text, relative_link
    from musubi_tuner.runtime.disk import check_folder, not_written, write_whole

    output = options.writing.output
    if output.suffix.lower() != ".md":
        raise UserError(f"--output {output}: must end in .md; the hub reads README.md.")
    check_folder(output.parent, f"--output {output}")
    if output.exists() and not options.writing.overwrite:
        raise UserError(f"--output {output}: is there already. Give another name, or --overwrite.")
    lora = newest_file(options.file.lora)
    placed = {relative_link(one.path, output.parent): one for one in _previews(options.card, lora)}
    text = card_text(lora, _facts(options.card, placed))
    try:
        write_whole(output, text.encode(), output.with_name(f".{output.name[:100]}.tmp"))
    except OSError as error:
        raise not_written(output, error) from error
    log.info("%s: the card of %s, with %d preview(s)", output, lora.name, len(placed))
    return 0


def _facts(card: config.CardOptions, previews: dict[str, Preview], repo_id: str = "") -> CardFacts:
    from musubi_tuner.publishing.card import CardFacts

    return CardFacts(
        title=card.title or "",
        trigger=card.trigger or "",
        description=card.description or "",
        base_model=card.base_model or "",
        tags=card.tags,
        repo_id=repo_id,
        previews=previews,
    )


def _previews(card: config.CardOptions, lora: Path) -> list[Preview]:
    """Those that are named, with the prompts of their recipes; else those of the run beside the file."""
    from musubi_tuner.page.fill import MEDIA_KINDS
    from musubi_tuner.publishing.card import IMAGES, Preview
    from musubi_tuner.training.page.runs import find_run
    from musubi_tuner.training.publishing import previews_of

    if not card.previews:
        return list(previews_of(find_run(lora.parent, _run_of(lora)), lora).values())
    found = []
    for path in card.previews:
        if not path.is_file():
            raise UserError(f"--previews {path}: no such file.")
        if path.suffix.lower() not in (known := dict.fromkeys((*MEDIA_KINDS, *IMAGES))):
            raise UserError(f"--previews {path}: is no clip, still or sound that a card shows ({', '.join(known)}).")
        found.append(Preview(path=path, prompt=_prompt_of(path)))
    return found


def _run_of(lora: Path) -> str:
    """The --output_name that it was saved under."""
    return re.sub(r"(-step\d{8}|-\d{6})?$", "", lora.stem)


def _prompt_of(path: Path) -> str:
    from musubi_tuner.generation.recipe import read_recipe

    try:
        return str(read_recipe(path).facts["prompt"]["prompt"])
    except (UserError, LookupError, TypeError):  # made by another program, whose words are not known
        return ""


def _publish(options: config.PublishConfig) -> int:
    from musubi_tuner.networks.formats import connectors_path
    from musubi_tuner.networks.reading import check_finite
    from musubi_tuner.networks.scales import PEFT_CONFIG, PEFT_FILE
    from musubi_tuner.publishing.card import NAME, card_text
    from musubi_tuner.publishing.hub import Hub, NotReached
    from musubi_tuner.publishing.uploads import upload_now
    from musubi_tuner.runtime.progress import Progress

    hub = Hub(options.hub)
    loras = _loras_of(options.published)
    for lora in loras:
        check_finite(lora)
    newest = loras[-1]
    previews: dict[str, Preview] = {}
    for one in _previews(options.card, newest):
        if (link := _link(one.path, newest.parent)) in previews:
            raise UserError(f"--previews {one.path}: two files would be {link} in the repository. Rename one.")
        previews[link] = one
    files: dict[str, Path | bytes] = {one.name: one for lora in loras for one in (lora, connectors_path(lora)) if one.is_file()}
    if newest.name == PEFT_FILE and (described := newest.with_name(PEFT_CONFIG)).is_file():
        files[PEFT_CONFIG] = described
    files |= {link: one.path for link, one in previews.items()}
    files[NAME] = card_text(newest, _facts(options.card, previews, hub.repo_id)).encode()
    try:
        hub.create()
    except NotReached as error:
        raise UserError(f"--huggingface_repo_id {hub.repo_id}: the hub was not reached ({error}). Run the same command again.") from error
    with Progress("uploading", len(files), unit="file") as bar:
        left_out = upload_now(hub, files, lambda: bar.advance())
    rows = [(name, "left as it is: it was not written here" if name in left_out else "uploaded") for name in files]
    print(format_table(rows, ("file", hub.url)))
    return 0


def _link(path: Path, folder: Path) -> str:
    """Where a preview goes in the repository: as it lies in the run's folder, or into a folder of its own."""
    from musubi_tuner.publishing.card import relative_link

    try:
        return relative_link(path, folder)
    except UserError:
        return f"previews/{path.name}"


def _loras_of(published: config.PublishedOptions) -> list[Path]:
    """The last one is the newest.

    Raises:
        UserError: no LoRA, or the LoRAs of several runs in a folder.
    """
    from musubi_tuner.networks.formats import CONNECTORS_ENDING
    from musubi_tuner.training.checkpoint import steps_of

    place = published.lora
    if not place.is_dir():
        if not place.is_file():
            raise UserError(f"--lora {place}: is no file and no folder.")
        return [place]
    files = [one for one in place.glob("*.safetensors") if not one.name.endswith(CONNECTORS_ENDING)]
    runs = sorted({_run_of(one) for one in files})
    if len(runs) != 1:
        raise UserError(f"--lora {place}: holds LoRAs of {len(runs)} runs ({names_of(runs) or 'none'}). Give the file.")
    final = f"{runs[0]}.safetensors"
    files.sort(key=lambda one: (one.name == final, steps_of(one), one.name))
    return files if published.steps else files[-1:]


SUBCOMMANDS: dict[str, Subcommand[Any]] = {
    "inspect": Subcommand(config.InspectConfig, _inspect, "What is in a file, and how much it changes where.", "lora"),
    "convert": Subcommand(config.ConvertConfig, _convert, "The same LoRA in the naming of another program.", "lora"),
    "strip": Subcommand(config.StripConfig, _strip, "Remove the sound's, the pictures' or other modules.", "lora"),
    "scale": Subcommand(config.ScaleConfig, _scale, "The same LoRA at another strength, by stream.", "lora"),
    "resize": Subcommand(config.ResizeConfig, _resize, "Another rank, by singular values; other types become LoRAs.", "lora"),
    "merge": Subcommand(config.MergeConfig, _merge, "Several LoRAs as one that does what all of them do.", "loras"),
    "average": Subcommand(config.AverageConfig, _average, "Checkpoints of one run as one (post-hoc EMA).", "loras"),
    "extract": Subcommand(config.ExtractConfig, _extract, "The difference of two checkpoints as a LoRA.", ""),
    "card": Subcommand(config.CardConfig, _card, "A model card: settings, previews, the licence's notice.", "lora"),
    "publish": Subcommand(config.PublishConfig, _publish, "Upload a LoRA, its card and previews to the Hugging Face Hub.", "lora"),
    "metadata": Subcommand(config.MetadataConfig, _metadata, "Show and change what a file says of itself.", "lora"),
}


if __name__ == "__main__":
    run_program(main)
