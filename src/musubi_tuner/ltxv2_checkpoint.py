"""Checkpoints: what is in them, and others made of them, tensor by tensor, so that none has to fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from musubi_tuner.config import checkpoint_files as config
from musubi_tuner.config.subcommands import Subcommand, run_subcommand
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.program import run_program
from musubi_tuner.runtime.tables import format_table, names_of

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

PROG = "tools/checkpoint.py"
DESCRIPTION = "Look into checkpoints, and verify, take apart, join, quantize or convert them, or bake LoRAs in: tensor by tensor."
_MOST_PROBLEMS = 20


def main(argv: Sequence[str], prog: str = PROG) -> int:
    return run_subcommand(SUBCOMMANDS, argv, prog=prog, description=DESCRIPTION)


@contextmanager
def _progress(title: str, size: int) -> Iterator[Callable[[int], None]]:
    """Told of bytes, shows megabytes."""
    from musubi_tuner.runtime.progress import Progress

    megabyte, left = 10**6, 0
    with Progress(title, -(-size // megabyte), unit="MB") as bar:

        def advance(count: int) -> None:
            nonlocal left
            whole, left = divmod(left + count, megabyte)
            bar.advance(whole)

        yield advance
        bar.advance(1 if left else 0)


def _inspect(options: config.InspectConfig) -> int:
    from musubi_tuner.conversion.checkpoint.inspection import config_text, inspect
    from musubi_tuner.conversion.facts import check_json, write_json
    from musubi_tuner.ltxv2.weights import open_checkpoint

    shown = options.inspection
    if shown.json is not None:
        check_json(shown.json, overwrite=shown.overwrite)
    found = inspect(open_checkpoint(options.file.checkpoint))
    checkpoint, transformer = found.checkpoint, found.config
    rows = [("file", str(checkpoint.path)), ("release", found.version or "no transformer in it")]
    if transformer is not None:
        rows.append(("kind", found.kind))
        rows.append(
            ("transformer", f"{transformer.num_layers} blocks, {transformer.video_dim} wide for video, {transformer.audio_dim} for sound")
        )
        rows.append(("stored as", found.stored_as or "not quantized"))
    for name, keys in found.unknown.items():
        rows.append((f"config, {name}: not read here", names_of(keys)))
    rows += [
        (key, value if len(value) <= 200 else f"({len(value):,} characters)")
        for key, value in sorted(checkpoint.metadata.items())
        if key != "config"
    ]
    print(format_table(rows, ("what", "")))
    parts = [(name, f"{count:,}", _size(size), dtypes) for name, (count, size, dtypes) in found.components.items()]
    print("\n" + format_table(parts, ("component", "tensors", "size", "dtypes")))
    if shown.config:
        print("\n" + config_text(checkpoint))
    if shown.json is not None:
        write_json(shown.json, found.as_json())
    return 0


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.2f} MB"


def _verify(options: config.VerifyConfig) -> int:
    from musubi_tuner.conversion.checkpoint.parts import size_of
    from musubi_tuner.conversion.checkpoint.verifying import file_hashes, verify
    from musubi_tuner.ltxv2.weights import open_checkpoint

    checkpoint = open_checkpoint(options.file.checkpoint)
    with _progress("verifying", 2 * size_of([checkpoint])) as advance:
        found = verify(checkpoint, advance)
        hashes = file_hashes(checkpoint, advance)
    problems = found.problems
    for problem in problems[:_MOST_PROBLEMS]:
        print(f"{checkpoint.path}: {problem}")
    if len(problems) > _MOST_PROBLEMS:
        print(f"... and {len(problems) - _MOST_PROBLEMS} more")
    print(format_table(list(found.components.items()), ("component", "")))
    print(format_table([(path.name, digest) for path, digest in hashes.items()], ("file", "SHA-256")))
    print("nothing is wrong with it" if not problems else f"{len(problems)} problem(s)")
    return 1 if problems else 0


def _split(options: config.SplitConfig) -> int:
    from musubi_tuner.conversion.checkpoint.components import components_of
    from musubi_tuner.conversion.checkpoint.parts import part_paths, size_of, split
    from musubi_tuner.ltxv2.weights import open_checkpoint

    checkpoint, writing = open_checkpoint(options.file.checkpoint), options.writing
    paths = part_paths(checkpoint, writing.output_dir, checkpoint.path.stem, as_folders=writing.folders)
    with _progress("splitting", size_of([checkpoint])) as advance:
        split(checkpoint, paths, overwrite=writing.overwrite, advance=advance)
    counts = {component: len(names) for component, names in components_of(checkpoint).items()}
    print(format_table([(name, counts[name], str(path)) for name, path in paths.items()], ("component", "tensors", "file")))
    return 0


def _join(options: config.JoinConfig) -> int:
    from musubi_tuner.conversion.checkpoint.parts import join, size_of
    from musubi_tuner.ltxv2.weights import open_checkpoint

    checkpoints = [open_checkpoint(path) for path in options.joining.checkpoints]
    if len(checkpoints) < 2 and not options.joining.checkpoints[0].is_dir():
        raise UserError("--checkpoints: give two files or more, or the folder of a split pack.")
    with _progress("joining", size_of(checkpoints)) as advance:
        join(checkpoints, options.writing.output, overwrite=options.writing.overwrite, advance=advance)
    entries = [entry for one in checkpoints for entry in one.entries.values()]
    log.info("%s: %d tensors of %d files", options.writing.output, len(entries), len({one.file for one in entries}))
    return 0


def _quantize(options: config.QuantizeConfig) -> int:
    from musubi_tuner.conversion.checkpoint.quantizing import Errors, by_kind, quantized_parts
    from musubi_tuner.conversion.checkpoint.streaming import check_new, total_size, write_stream
    from musubi_tuner.ltxv2.weights import open_checkpoint

    output, errors = options.writing.output, Errors()
    check_new(output, "--output", overwrite=options.writing.overwrite)
    checkpoint = open_checkpoint(options.file.checkpoint)
    parts, metadata = quantized_parts(checkpoint, options.quantization.to, keep_blocks=options.quantization.keep_blocks, errors=errors)
    with _progress("quantizing", total_size(parts)) as advance:
        write_stream(output, parts, metadata, advance)
    rows = [(kind, count, f"{mean:.3%}", f"{most:.3%}") for kind, count, mean, most in by_kind(errors)]
    print(format_table(rows, ("linear", "count", "error in the mean", "at most")))
    log.info("%s: %d linears as %s, %.2f GB", output, len(errors.relative), options.quantization.to, total_size(parts) / 1e9)
    return 0


def _bake(options: config.BakeConfig) -> int:
    from musubi_tuner.conversion.checkpoint.baking import Baked, baked_parts
    from musubi_tuner.conversion.checkpoint.streaming import check_new, check_no_input, total_size, write_stream
    from musubi_tuner.conversion.lora.contents import read_lora
    from musubi_tuner.generation.jobs import parse_lora
    from musubi_tuner.ltxv2.weights import open_checkpoint

    output, baked = options.writing.output, Baked()
    check_new(output, "--output", overwrite=options.writing.overwrite)
    checkpoint = open_checkpoint(options.file.checkpoint)
    uses = [parse_lora(text) for text in options.baking.lora]
    check_no_input(output, "--output", [use.path for use in uses])
    parts, metadata = baked_parts(checkpoint, [(read_lora(use.path), use.strength) for use in uses], baked)
    with _progress("baking", total_size(parts)) as advance:
        write_stream(output, parts, metadata, advance)
    changed, rounded = sum(baked.changed.values()) / len(baked.changed), max(baked.rounded, key=lambda name: baked.rounded[name])
    log.info(
        "%s: %d weights changed, by %.3f %% of their norm in the mean; storing them lost up to %.1f %% of a change (%s)",
        output, len(baked.changed), 100 * changed, 100 * baked.rounded[rounded], rounded,
    )  # fmt: skip
    return 0


def _compare(options: config.CompareConfig) -> int:
    from musubi_tuner.conversion.checkpoint.comparing import check_comparable, compare, stored_tensors

    one, other = options.comparison.checkpoints
    check_comparable(one, other)
    first, second = stored_tensors(one), stored_tensors(other)
    with _progress("comparing", sum(tensor.size for tensor in first.values())) as advance:
        found = compare(first, second, tolerance=options.comparison.tolerance, advance=advance)
    rows = [
        (name, group.tensors, group.different or "", f"{group.largest:.3g}", f"{group.relative:.3%}", group.first)
        for name, group in found.groups.items()
    ]
    print(format_table(rows, ("part", "tensors", "differ", "by at most", "of the norm", "first")))
    for path, names in ((one, found.only_first), (other, found.only_second)):
        if names:
            print(f"in {path} alone: {len(names):,} tensor(s), {names_of(names, 5)}")
    for name, shape, other_shape in found.shapes[:_MOST_PROBLEMS]:
        print(f"{name}: {shape} and {other_shape}")
    if len(found.shapes) > _MOST_PROBLEMS:
        print(f"... and {len(found.shapes) - _MOST_PROBLEMS} more of another shape")
    for (dtype, other_dtype), count in found.dtypes.items():
        print(f"{count:,} tensor(s) are stored as {str(dtype).removeprefix('torch.')} and as {str(other_dtype).removeprefix('torch.')}")
    if found.first:
        print(f"the first that differs: {found.first}, {found.groups[found.first].first}")
    tolerance = options.comparison.tolerance
    within = f", but for differences of at most {tolerance:g}" if tolerance and any(one.largest for one in found.groups.values()) else ""
    print(f"they hold the same{within}" if found.is_same else "they differ")
    return 0 if found.is_same else 1


def _convert(options: config.ConvertConfig) -> int:
    return _to_diffusers(options) if options.conversion.to == "diffusers" else _to_single_file(options)


def _to_diffusers(options: config.ConvertConfig) -> int:
    from musubi_tuner.conversion.checkpoint.diffusers_tree import check_new_folder, plan_tree, write_tree
    from musubi_tuner.conversion.checkpoint.parts import joined
    from musubi_tuner.conversion.checkpoint.streaming import total_size
    from musubi_tuner.conversion.checkpoint.text_encoder_folder import read_text_encoder_folder
    from musubi_tuner.ltxv2.weights import open_checkpoint

    chosen = options.conversion
    assert chosen.output_dir is not None
    check_new_folder(chosen.output_dir, overwrite=chosen.overwrite)
    encoder = None if chosen.gemma_path is None else read_text_encoder_folder(chosen.gemma_path)
    checkpoint = joined([open_checkpoint(path) for path in options.source.checkpoints])
    tree = plan_tree(checkpoint, encoder, dequantize=chosen.dequantize)
    with _progress("converting", tree.size) as advance:
        write_tree(tree, chosen.output_dir, advance)
    rows: list[tuple[str, str, int | str, str]] = [
        (model.folder, model.cls.__name__, len(tree.parts[model.folder]), _size(total_size(tree.parts[model.folder])))
        for model in tree.models
    ]
    if encoder is not None:
        rows.append(("text_encoder", encoder.model_class, "", _size(encoder.size)))
    print(format_table(rows, ("folder", "class", "tensors", "size")))
    print("\n".join(tree.remarks()))
    log.info("%s: %.2f GB", chosen.output_dir, tree.size / 1e9)
    return 0


def _to_single_file(options: config.ConvertConfig) -> int:
    from musubi_tuner.conversion.checkpoint.single_file import single_file_parts
    from musubi_tuner.conversion.checkpoint.streaming import check_new, total_size, write_stream
    from musubi_tuner.ltxv2.weights import open_checkpoint

    chosen, folders = options.conversion, options.source.checkpoints
    if len(folders) > 1:
        raise UserError(f"--checkpoints: {len(folders)} paths; --to single_file takes the one folder that holds model_index.json.")
    assert chosen.output is not None
    check_new(chosen.output, "--output", overwrite=chosen.overwrite)
    parts, metadata = single_file_parts(folders[0], None if chosen.like is None else open_checkpoint(chosen.like))
    with _progress("converting", total_size(parts)) as advance:
        write_stream(chosen.output, parts, metadata, advance)
    log.info("%s: %d tensors, %.2f GB", chosen.output, len(parts), total_size(parts) / 1e9)
    return 0


SUBCOMMANDS: dict[str, Subcommand[Any]] = {
    "inspect": Subcommand(config.InspectConfig, _inspect, "Release, components, dtypes, quantization, config.", "checkpoint"),
    "verify": Subcommand(config.VerifyConfig, _verify, "Names and shapes against the release, NaN, and the file's hash.", "checkpoint"),
    "split": Subcommand(
        config.SplitConfig, _split, "A file for each component: transformer, VAEs, vocoder, text projection.", "checkpoint"
    ),
    "join": Subcommand(config.JoinConfig, _join, "Component files as one checkpoint.", "checkpoints"),
    "quantize": Subcommand(config.QuantizeConfig, _quantize, "The linears of the blocks in fp8, int8 or int8 ConvRot.", "checkpoint"),
    "convert": Subcommand(config.ConvertConfig, _convert, "The folder that diffusers reads, and back.", "checkpoints"),
    "compare": Subcommand(config.CompareConfig, _compare, "Two checkpoints block by block, and where they begin to differ.", "checkpoints"),
    "bake": Subcommand(config.BakeConfig, _bake, "LoRAs merged into the weights, in the checkpoint's own form.", "checkpoint"),
}


if __name__ == "__main__":
    run_program(main)
