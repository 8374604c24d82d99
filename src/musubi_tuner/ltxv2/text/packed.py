"""The text encoder of LTX-2.5: one file, and which checkpoint it belongs to.

    model.layers.*, model.embed_tokens, model.norm                    the language model, a Gemma 4 (`gemma4_unified` of transformers)
    text_embedding_projection.*                                       the projection, which transformer files of 2.5 do not hold
    tokenizer_json, hf_asset__<file name>                             uint8: the tokenizer's files, byte for byte
    metadata: gemma_config                                            the encoder's config.json
    vision_model.*, multi_modal_projector.*, audio_projector.*        what texts do not need

Lightricks tuned this Gemma for LTX-2.5. Its config names its release (`gemma_version`), and so does a checkpoint that was trained with it,
in the metadata `gemma_source_checkpoint`.
"""

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from musubi_tuner.ltxv2.text.features import PREFIX
from musubi_tuner.ltxv2.versions import detect_version
from musubi_tuner.ltxv2.weights import QUANTIZATION, Checkpoint, open_files, quantized_layers
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import parse_json
from musubi_tuner.runtime.headers import SUFFIXES

GEMMA4 = ("gemma4_unified", "gemma4_unified_text")
"""Model types of LTX-2.5's encoder."""
CONFIG, SOURCE, VERSION = "gemma_config", "gemma_source_checkpoint", "gemma_version"

_TOKENIZER, _ASSET = "tokenizer_json", "hf_asset__"
_NEEDED, _OPTIONAL = "tokenizer_config.json", ("special_tokens_map.json", "added_tokens.json")
_AGAIN = "Download the release's own file again."


def is_packed(path: Path) -> bool:
    """Whether a path is a file that carries the config of its text encoder.

    Raises:
        UserError: a safetensors file that cannot be read.
    """
    try:
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            return False
    except OSError:  # a name that no file can have: whoever looks for a folder of that name says so
        return False
    return CONFIG in open_files(path, [path]).metadata


def packed_config(path: Path) -> dict[str, Any]:
    """The config.json of a packed encoder.

    Raises:
        UserError: it is no JSON object.
    """
    where = f"{path}: its '{CONFIG}' metadata"
    config = parse_json(open_files(path, [path]).metadata[CONFIG], where)
    if not isinstance(config, dict):
        raise UserError(f"{where} is no JSON object. {_AGAIN}")
    return config


@contextmanager
def tokenizer_folder(path: Path) -> Iterator[Path]:
    """The tokenizer's files of a packed encoder, in a folder that is gone afterwards.

    Raises:
        UserError: the file holds no tokenizer.
    """
    checkpoint = open_files(path, [path])
    blobs = {"tokenizer.json": _TOKENIZER} | {name: f"{_ASSET}{name}" for name in (_NEEDED, *_OPTIONAL)}
    for name in ("tokenizer.json", _NEEDED):
        if blobs[name] not in checkpoint.entries:
            raise UserError(f"{path}: holds no '{blobs[name]}', its tokenizer's {name}. Give the folder of the tokenizer with --tokenizer.")
    with tempfile.TemporaryDirectory(prefix="tokenizer") as folder:
        for name, blob in blobs.items():
            if blob in checkpoint.entries:
                (Path(folder) / name).write_bytes(checkpoint.tensor(blob).numpy().tobytes())
        yield Path(folder)


def with_projection(checkpoint: Checkpoint, encoder: str | None) -> Checkpoint:
    """A checkpoint with the text projection of a packed encoder, where it has none of its own.

    Args:
        encoder: a file, a folder or a hub id.

    Raises:
        UserError: what `is_packed` raises.
    """
    if encoder is None or checkpoint.with_prefix(PREFIX) or not is_packed(Path(encoder)):
        return checkpoint
    packed = open_files(Path(encoder), [Path(encoder)])
    projection = {name: entry for name, entry in packed.entries.items() if name.startswith(PREFIX)}
    layers = [quantized_layers(one.path, one.metadata) for one in (checkpoint, packed)]
    declared = {QUANTIZATION: json.dumps({"layers": layers[0] | layers[1]})} if any(layers) else {}
    return dataclasses.replace(checkpoint, entries={**checkpoint.entries, **projection}, metadata={**checkpoint.metadata, **declared})


def check_belongs(checkpoint: Checkpoint, encoder: str, config: Any) -> None:
    """Whether a checkpoint was trained with a Gemma.

    Their hidden states are of one width and number, whichever it is, so that nothing else would tell.

    Args:
        encoder: what messages call it.
        config: of the encoder, as transformers has it.

    Raises:
        UserError: Gemma 3 for a checkpoint of 2.5, Gemma 4 for an earlier one, or another release of Gemma 4.
    """
    where, version = f"--text_encoder {encoder}", detect_version(checkpoint)
    wanted, found = _source(checkpoint), getattr(config, VERSION, None)
    is_gemma4 = config.model_type in GEMMA4
    if wanted is None and is_gemma4 != (version == "2.5") or wanted is not None and not is_gemma4:
        kind, needed = ("4", "Gemma 3 12B") if is_gemma4 else ("3", "the Gemma 4 of its release (gemma4-12b-with-proj-ltx-2.5...)")
        raise UserError(
            f"{where}: a Gemma {kind}; {checkpoint.path.name} is LTX-{version}, which was trained with {needed}. Its states have the same "
            "shape, and would be read without an error and mean nothing."
        )
    if wanted is not None and found != wanted:
        says = f"'{VERSION}' of its config is {found!r}" if found else f"its config has no '{VERSION}', as the stock model's"
        raise UserError(
            f"{where}: {says}; {checkpoint.path.name} was trained with {wanted!r} (its '{SOURCE}' metadata). Give the text encoder of the "
            "checkpoint's own release."
        )


def _source(checkpoint: Checkpoint) -> str | None:
    """The release of Gemma that a checkpoint names; None where it names none.

    Raises:
        UserError: metadata that say nothing of the kind.
    """
    if SOURCE not in checkpoint.metadata:
        return None
    where = f"{checkpoint.path}: its '{SOURCE}' metadata"
    content = parse_json(checkpoint.metadata[SOURCE], where)
    version = content.get(VERSION) if isinstance(content, dict) else None
    if not isinstance(version, str):
        raise UserError(f"{where} has no '{VERSION}'. {_AGAIN}")
    return version
