"""A checkpoint as the folder that diffusers' `from_pretrained` reads, written tensor by tensor, and back.

FOLDER/model_index.json                     the pipeline: LTX2Pipeline and the class of each part
FOLDER/scheduler/scheduler_config.json
FOLDER/transformer/config.json, diffusion_pytorch_model-00001-of-00008.safetensors ..., its index; so each model
FOLDER/text_encoder, FOLDER/tokenizer       copied from --gemma_path
FOLDER/ltxv2_source/source.json             the checkpoint's metadata, and where each of its tensors went: what the way back reads
FOLDER/ltxv2_source/rest.safetensors        tensors that no model of diffusers has
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config.flags import VERSION
from musubi_tuner.conversion.checkpoint.components import OTHER, components_of, model_names
from musubi_tuner.conversion.checkpoint.diffusers_models import IN_PIPELINE, Model, models_of, third
from musubi_tuner.conversion.checkpoint.parts import whole_metadata
from musubi_tuner.conversion.checkpoint.streaming import Part, copied, total_size, write_stream, writing_alone
from musubi_tuner.conversion.checkpoint.text_encoder_folder import TextEncoderFolder
from musubi_tuner.ltxv2.quantization import Quantization, read_quantization
from musubi_tuner.ltxv2.reading import TensorEntry
from musubi_tuner.ltxv2.versions import looks_distilled, transformer_prefix
from musubi_tuner.ltxv2.weights import INDEX_ENDING, QUANTIZATION, Checkpoint
from musubi_tuner.runtime.disk import check_folder, not_written, write_folder
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.tables import names_of

INDEX = "model_index.json"
SOURCE = "ltxv2_source"
NOTES, REST = "source.json", "rest.safetensors"
SHARD_BYTES = 5 * 10**9
WEIGHTS = "diffusion_pytorch_model"
_FORMAT = {"format": "pt"}
_SPARE = 2**24
"""Bytes for configs and indexes."""


@dataclass(frozen=True, slots=True)
class Tree:
    """What a folder of diffusers will hold."""

    checkpoint: Checkpoint
    models: Sequence[Model]
    parts: Mapping[str, Sequence[Part]]
    """By folder, in the file's order; under `SOURCE`, what no model has."""
    metadata: Mapping[str, str]
    """For the way back."""
    encoder: TextEncoderFolder | None
    left_out: Sequence[str]
    """Tensors of a text encoder, which are in no part."""

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(total_size(parts) for parts in self.parts.values()) + (self.encoder.size if self.encoder else 0)

    def remarks(self) -> list[str]:
        """What the folder lacks, and what diffusers does in another way than the official code, a line each."""
        own = {model.folder for model in self.models}
        lacking = [name for name in IN_PIPELINE if name not in own and name != "duration_head"]
        found = []
        if self.encoder is None:
            lacking += ["text_encoder", "tokenizer"]
        if "transformer" not in own:
            found.append("models alone, which `from_pretrained(FOLDER, subfolder=...)` of their classes reads; no whole pipeline")
        elif lacking:
            said = ", ".join(f"{name}=..." for name in lacking)
            found.append(f"without {names_of(lacking)}: give them to LTX2Pipeline.from_pretrained(FOLDER, {said})")
        if "diffusion_decoder" in own:
            found.append(
                "diffusion_decoder is for LTX2VideoDiffusionDecodePipeline; its encoder, and what diffusers lacks, is kept for the way back"
            )
        if self.left_out:
            found.append(f"{len(self.left_out):,} tensors of the text encoder's file were left out: --gemma_path brings an encoder along")
        if "transformer" in own:
            found.append(
                "where tokens of picture and sound have different noise levels (image to video), diffusers' gates between them differ "
                "from the official code's"
            )
        return found


def plan_tree(checkpoint: Checkpoint, encoder: TextEncoderFolder | None, *, dequantize: bool) -> Tree:
    """
    Args:
        dequantize: write the bf16 numbers of a quantized checkpoint.

    Raises:
        UserError: a quantized checkpoint without `dequantize`, no component at all, or what `models_of` raises.
    """
    quantization = Quantization({}, "", {})
    names: Mapping[str, str] = {}
    if transformer_prefix(checkpoint.names()) is not None:
        names = model_names(checkpoint)
        quantization = read_quantization(checkpoint, names)
    if quantization.receipt and not dequantize:
        raise UserError(
            f"{checkpoint.path}: is stored as {quantization.receipt}, which diffusers does not read. Give the release's bf16 file, or "
            "--dequantize to write the bf16 numbers that it stands for."
        )
    official = {full: name for name, full in quantization.weights.items()}
    scales = set(names.values()) - official.keys()
    left_out = _of_text_encoder(checkpoint)
    aside = scales | set(left_out)
    shapes = {full: entry.shape for full, entry in checkpoint.entries.items() if full not in aside}
    models = models_of(checkpoint, shapes, encoder.width if encoder else None)
    if not models:
        raise UserError(f"{checkpoint.path}: holds no component of LTX-2. Give a checkpoint, or the files of its components.")
    parts: dict[str, list[Part]] = {}
    placed: set[str] = set()
    for model in models:
        own = parts.setdefault(model.folder, [])
        for full, targets in model.targets.items():
            placed.add(full)
            own += _parts(checkpoint, full, targets, quantization, official.get(full, ""))
    if rest := [full for full in shapes if full not in placed]:
        parts[SOURCE] = [copied(full, checkpoint.entries[full]) for full in rest]
    metadata = {key: value for key, value in whole_metadata(checkpoint).items() if key != QUANTIZATION}
    return Tree(checkpoint, models, parts, metadata, encoder, left_out)


def _of_text_encoder(checkpoint: Checkpoint) -> list[str]:
    """Of 2.5, the text projection comes in a file with the encoder."""
    return components_of(checkpoint).get(OTHER, []) if "gemma_config" in checkpoint.metadata else []


def _parts(checkpoint: Checkpoint, full: str, targets: tuple[str, ...], quantization: Quantization, name: str) -> list[Part]:
    entry = checkpoint.entries[full]
    if name and quantization.holds_codes(name):
        (target,) = targets

        def restored() -> Tensor:
            return quantization.restored(name, checkpoint.tensor(full), torch.device("cpu"), torch.bfloat16)

        return [Part(target, torch.bfloat16, entry.shape, restored)]
    if len(targets) == 1:
        return [copied(targets[0], entry)]
    size = entry.size // 3
    starts = range(entry.start, entry.end, size)
    thirds = [TensorEntry(entry.file, third(entry.shape), entry.dtype, start, start + size) for start in starts]
    return [copied(target, one) for target, one in zip(targets, thirds, strict=True)]


def check_new_folder(folder: Path, *, overwrite: bool) -> None:
    """
    Raises:
        UserError: something is there that is not to be replaced, or a file stands where the folder would be.
    """
    if folder.name in ("", "..") or folder.resolve() == Path.cwd():
        raise UserError(f"--output_dir {folder}: must be a folder of its own, which is renamed when it is whole. Give a name.")
    check_folder(folder, f"--output_dir {folder}")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(f"--output_dir {folder}: is not empty. Give another folder, or --overwrite to replace a folder of diffusers.")
    if not (folder / INDEX).is_file():
        raise UserError(f"--output_dir {folder}: holds no {INDEX}, so it is no folder of diffusers, and is not replaced. Give another.")


def write_tree(tree: Tree, folder: Path, advance: Callable[[int], object]) -> None:
    """Write the folder whole or not at all.

    Raises:
        TemporaryFailure: the disk has no room for it.
        UserError: it cannot be written, another process is writing it, or what `write_stream` raises.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with writing_alone(folder) as temporary:
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
            free = shutil.disk_usage(folder.parent).free
            if tree.size + _SPARE > free:
                raise TemporaryFailure(
                    f"{folder}: takes {tree.size / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free. Make room, or name another disk."
                )
            write_folder(folder, temporary, lambda place: _write(tree, place, advance))
    except OSError as error:
        raise not_written(folder, error) from error


def _write(tree: Tree, folder: Path, advance: Callable[[int], object]) -> None:
    for model in tree.models:
        place = folder / model.folder
        place.mkdir()
        (place / "config.json").write_text(model.config_text(), encoding="utf-8")
        _write_shards(place, tree.parts[model.folder], advance)
    source = folder / SOURCE
    source.mkdir()
    if SOURCE in tree.parts:
        write_stream(source / REST, tree.parts[SOURCE], _FORMAT, advance)
    targets = {full: [model.folder, *names] for model in tree.models for full, names in model.targets.items()}
    targets |= {part.name: [SOURCE, part.name] for part in tree.parts.get(SOURCE, ())}
    tensors = {full: targets[full] for full in tree.checkpoint.names() if full in targets}
    _write_json(
        source / NOTES, {"program": VERSION, "file": tree.checkpoint.path.name, "metadata": dict(tree.metadata), "tensors": tensors}
    )
    if tree.encoder is not None:
        tree.encoder.copy(folder, advance)
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(distilled=looks_distilled(tree.checkpoint)))
    _write_json(folder / INDEX, model_index(tree))


def _write_shards(folder: Path, parts: Sequence[Part], advance: Callable[[int], object]) -> None:
    shards: list[list[Part]] = [[]]
    for part in parts:
        if shards[-1] and total_size(shards[-1]) + part.size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(part)
    if len(shards) == 1:
        write_stream(folder / f"{WEIGHTS}.safetensors", shards[0], _FORMAT, advance)
        return
    owners = {}
    for number, shard in enumerate(shards, 1):
        name = f"{WEIGHTS}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_stream(folder / name, shard, _FORMAT, advance)
        owners |= {part.name: name for part in shard}
    _write_json(folder / f"{WEIGHTS}{INDEX_ENDING}", {"metadata": {"total_size": total_size(parts)}, "weight_map": owners})


def model_index(tree: Tree) -> dict[str, Any]:
    """The classes of the pipeline's parts; of those that are absent, that they are."""
    import diffusers

    found: dict[str, Any] = {"_class_name": "LTX2Pipeline", "_diffusers_version": diffusers.__version__}
    own = {model.folder: model.cls.__name__ for model in tree.models if model.folder in IN_PIPELINE}
    for name in IN_PIPELINE:
        library = "diffusers" if name in ("transformer", "vae", "audio_vae") else "ltx2"
        found[name] = [library, own[name]] if name in own else [None, None]
    found["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    found["text_encoder"] = ["transformers", tree.encoder.model_class] if tree.encoder else [None, None]
    found["tokenizer"] = ["transformers", tree.encoder.tokenizer_class] if tree.encoder else [None, None]
    return found


def scheduler_config(*, distilled: bool) -> dict[str, Any]:
    """Of `FlowMatchEulerDiscreteScheduler`: the shift by size and the end at 0.1 of a dev checkpoint; a distilled one takes its noise
    levels as they are given."""
    import diffusers

    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": diffusers.__version__,
        "base_image_seq_len": 1024,
        "base_shift": 0.95,
        "max_image_seq_len": 4096,
        "max_shift": 2.05,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "shift_terminal": None if distilled else 0.1,
        "time_shift_type": "exponential",
        "use_dynamic_shifting": not distilled,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
