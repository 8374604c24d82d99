"""A LoRA's new file or folder: checked, whole or not at all, never over another file unasked, and with how it was made."""

import base64
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from musubi_tuner.cache.store import serialize
from musubi_tuner.conversion.checkpoint.streaming import check_new, copied, write_stream
from musubi_tuner.conversion.lora.contents import LoraContents
from musubi_tuner.conversion.lora.forms import WITH_ALPHA, config_text, formed, vanished
from musubi_tuner.ltxv2.weights import open_files
from musubi_tuner.media.picture import read_picture, small_jpeg
from musubi_tuner.networks.keys import is_text_side
from musubi_tuner.networks.scales import FOLDED, HEADER, PEFT_CONFIG, PEFT_FILE, PeftScale, peft_scale
from musubi_tuner.networks.targets import count_by_stream
from musubi_tuner.runtime.disk import check_folder, not_written, write_folder, write_whole
from musubi_tuner.runtime.errors import UserError

MADE_FROM = "ltxv2_made_from"
"""Entry of the metadata of files that were made of others: what was done to which files, one after the other."""


def write_lora(contents: LoraContents, path: Path, *, form: str, dtype: torch.dtype, overwrite: bool, made_from: str) -> None:
    """
    Args:
        form: one of `FORMS`; PEFT's is a folder.
        made_from: what was done to which files, for the metadata.

    Raises:
        UserError: values that are not finite, or of which the dtype leaves nothing; something that is there already, or a place that
            cannot be written.
    """
    check_free(path, overwrite=overwrite, folder=form == "peft")
    if path.name == PEFT_FILE and (beside := path.with_name(PEFT_CONFIG)).is_file():
        raise UserError(
            f"--output {path}: {beside} beside it says by what its tensors are multiplied, and would multiply those of the new file again. "
            "Give another name, or write PEFT's folder with convert --to peft."
        )
    result = formed(contents, form, dtype)
    bad = [key for key, value in result.tensors.items() if not bool(value.isfinite().all())]
    if bad:
        raise UserError(
            f"{path}: '{bad[0]}' would hold NaN or infinity in {str(dtype).removeprefix('torch.')}. Give --save_precision float32."
        )
    if len(vanished(contents, form, dtype)) == len(contents.adapters):
        raise UserError(f"{path}: all its values are too small for {str(dtype).removeprefix('torch.')}. Give --save_precision float32.")
    data = serialize(result.tensors, _metadata(contents, form, made_from))
    try:
        if result.config is None:
            write_whole(path, data, _temporary(path))
        else:
            config = config_text(result.config).encode()

            def fill(folder: Path) -> None:
                (folder / PEFT_FILE).write_bytes(data)
                (folder / PEFT_CONFIG).write_bytes(config)

            write_folder(path, _temporary(path), fill)
    except OSError as error:
        raise not_written(path, error) from error


def rewrite_metadata(source: Path, path: Path, metadata: Mapping[str, str], *, overwrite: bool) -> None:
    """Copy a safetensors file with other metadata; its tensors are copied byte for byte, a part at a time.

    Raises:
        UserError: as `write_lora`; or the new file would say another scale than the old one.
    """
    check_free(path, overwrite=overwrite, folder=False)
    opened = open_files(source, [source])
    entries = sorted(opened.entries.items(), key=lambda one: one[1].start)
    said, says = (peft_scale(file, known, opened.names()) for file, known in ((source, opened.metadata), (path, metadata)))
    if _without_place(said) != _without_place(says):
        where = said.where if said is not None else says.where if says is not None else ""
        raise UserError(
            f"--output {path}: {where} says by what the tensors of {source} are multiplied, and the new file would be read with another "
            "scale. Bring it to a form of its own first: convert --to official."
        )
    write_stream(path, [copied(name, entry) for name, entry in entries], metadata, lambda count: None)


def _without_place(scale: PeftScale | None) -> PeftScale | None:
    return None if scale is None else dataclasses.replace(scale, where="")


def thumbnail(path: Path) -> str:
    """A picture as model sites read it in `modelspec.thumbnail`: a JPEG of 256 pixels at most, as a data URI.

    Raises:
        UserError: no picture that can be read.
    """
    return f"data:image/jpeg;base64,{base64.b64encode(small_jpeg(read_picture(path), longest=256, quality=85)).decode()}"


def check_free(path: Path, *, overwrite: bool, folder: bool) -> None:
    """
    Raises:
        UserError: something is there, or it is named as another kind of thing.
    """
    if not folder:
        check_new(path, "--output", overwrite=overwrite)
        return
    if path.suffix == ".safetensors":
        raise UserError(
            f"--output {path}: PEFT's form is a folder, with adapter_model.safetensors and adapter_config.json in it. Name one."
        )
    check_folder(path.parent, f"--output {path}")
    if path.is_dir() and {one.name for one in path.iterdir()} - {PEFT_FILE, PEFT_CONFIG}:
        raise UserError(f"--output {path}: is a folder with other files in it. Give another name.")
    if path.exists() and not overwrite:
        raise UserError(f"--output {path}: is there already. Give another name, or --overwrite.")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")


def _metadata(contents: LoraContents, form: str, made_from: str) -> dict[str, str]:
    """Of the file that was read, with what is no longer true of it changed."""
    metadata = {key: value for key, value in contents.metadata.items() if key != HEADER}
    ranked = [one for one in contents.adapters.values() if one.rank]
    alphas = [one.rank * (one.scale if form in WITH_ALPHA else 1) for one in ranked]
    for key, values in (("ss_network_dim", [one.rank for one in ranked]), ("ss_network_alpha", alphas)):
        if values:
            metadata[key] = f"{values[0]:g}" if len(set(values)) == 1 else "Dynamic"
    trained = contents.metadata.get("ss_network_dim"), contents.metadata.get("ltxv2_network_shape", "")
    if trained[1] and ranked and trained[0] != metadata["ss_network_dim"]:
        kind = trained[1].partition(" ")[0]
        metadata["ltxv2_network_shape"] = f"{kind} rank {metadata['ss_network_dim']} alpha {metadata['ss_network_alpha']}"
    if "ltxv2_network_scaling" in metadata:
        metadata["ltxv2_network_scaling"] = "alpha / rank, by the alpha tensors of this file" if form in WITH_ALPHA else FOLDED
    if "ltxv2_adapted_streams" in metadata:
        adapted = count_by_stream([name for name in contents.adapters if not is_text_side(name)])
        metadata["ltxv2_adapted_streams"] = ",".join(stream for stream, count in adapted.items() if count)
    before = metadata.get(MADE_FROM)
    return metadata | {MADE_FROM: f"{before}; {made_from}" if before else made_from}
