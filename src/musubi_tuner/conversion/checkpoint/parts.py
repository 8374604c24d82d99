"""A checkpoint taken apart into a file for each component, and put together again: bytes are copied, names and metadata stay."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from musubi_tuner.conversion.checkpoint.components import components_of
from musubi_tuner.conversion.checkpoint.streaming import check_new, check_no_input, copied, total_size, write_stream
from musubi_tuner.ltxv2.weights import QUANTIZATION, Checkpoint
from musubi_tuner.runtime.errors import UserError


def part_paths(checkpoint: Checkpoint, folder: Path, stem: str, *, as_folders: bool) -> dict[str, Path]:
    """Where the file of each component goes: `FOLDER/STEM-vae.safetensors`, or `FOLDER/vae/model.safetensors`."""
    return {
        component: folder / component / "model.safetensors" if as_folders else folder / f"{stem}-{component}.safetensors"
        for component in components_of(checkpoint)
    }


def split(checkpoint: Checkpoint, paths: dict[str, Path], *, overwrite: bool, advance: Callable[[int], object]) -> None:
    """Write each component's file; every one carries all metadata, the config with all its keys among them.

    Raises:
        UserError: nothing in it, a file that is there already or is taken apart, before any is written; what `write_stream` raises.
    """
    _check_any([checkpoint])
    for path in paths.values():
        check_new(path, "--output_dir", overwrite=overwrite)
        check_no_input(path, "--output_dir", sorted({entry.file for entry in checkpoint.entries.values()}))
    for component, names in components_of(checkpoint).items():
        write_stream(paths[component], [copied(name, checkpoint.entries[name]) for name in names], whole_metadata(checkpoint), advance)


def join(checkpoints: Sequence[Checkpoint], path: Path, *, overwrite: bool, advance: Callable[[int], object]) -> None:
    """Write all tensors of several files into one.

    Raises:
        UserError: what `joined` or `write_stream` raises.
    """
    check_new(path, "--output", overwrite=overwrite)
    _check_any(checkpoints)
    one = joined(checkpoints)
    write_stream(path, [copied(name, entry) for name, entry in one.entries.items()], one.metadata, advance)


def _check_any(checkpoints: Sequence[Checkpoint]) -> None:
    for one in checkpoints:
        if not one.entries:
            raise UserError(f"{one.path}: holds no tensors. Download it again.")


def joined(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """Several files as one checkpoint. Metadata are those of all; each section of the config is from the file with its tensors.

    Raises:
        UserError: one tensor in two files, or files of two releases.
    """
    owner: dict[str, Checkpoint] = {}
    metadata: dict[str, str] = {}
    config: dict[str, object] = {}
    layers: dict[str, object] = {}
    for one in checkpoints:
        for name in one.names():
            if name in owner:
                raise UserError(f"{one.path}: tensor '{name}' is in {owner[name].path} too. Give one file for each component.")
            owner[name] = one
        version = metadata.get("model_version", "")
        if version and one.model_version and version != one.model_version:
            raise UserError(f"{one.path}: is of version {one.model_version}, {checkpoints[0].path} of {version}. They are of two releases.")
        metadata |= {key: value for key, value in one.metadata.items() if key not in ("config", QUANTIZATION)}
        if QUANTIZATION in one.metadata:
            layers |= json.loads(one.metadata[QUANTIZATION])["layers"]
        own = set(components_of(one))
        config |= {key: value for key, value in raw_config(one).items() if key not in config or key in own}
    if config:
        metadata["config"] = json.dumps(config, ensure_ascii=False)
    if layers:
        metadata[QUANTIZATION] = json.dumps({"layers": layers})
    sections = {key: value for key, value in config.items() if isinstance(value, dict)}
    return Checkpoint(checkpoints[0].path, metadata, sections, {name: one.entries[name] for name, one in owner.items()})


def raw_config(checkpoint: Checkpoint) -> dict[str, object]:
    """All keys of its config, those that nothing here reads among them."""
    return {**json.loads(checkpoint.metadata.get("config", "{}")), **checkpoint.config}


def whole_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """With the config of all its files."""
    config = raw_config(checkpoint)
    return dict(checkpoint.metadata) | ({"config": json.dumps(config, ensure_ascii=False)} if config else {})


def size_of(checkpoints: Sequence[Checkpoint]) -> int:
    """Bytes of all their tensors."""
    return total_size(copied(name, entry) for one in checkpoints for name, entry in one.entries.items())
