"""A text encoder's folder, as Hugging Face has it, copied into a folder of diffusers: the model into `text_encoder`, what reads text into
`tokenizer`. Copied and not linked, so that the folder can be moved and published by itself; its shards stay as they are."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.ltxv2.weights import INDEX_ENDING, shards_of
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.headers import read_header

_MODEL = ("config.json", "generation_config.json")
_TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_PIECE = 2**24
_TYPES = ("gemma3", "gemma3_text", "gemma4", "gemma4_unified", "gemma4_text", "gemma4_unified_text")


@dataclass(frozen=True, slots=True)
class TextEncoderFolder:
    """What is copied, and what its classes are called."""

    model_files: Sequence[Path]
    tokenizer_files: Sequence[Path]
    model_class: str
    tokenizer_class: str
    width: int
    """Of its hidden states."""

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(file.stat().st_size for file in (*self.model_files, *self.tokenizer_files))

    def copy(self, folder: Path, advance: Callable[[int], object]) -> None:
        """
        Args:
            advance: called with the bytes that were written.

        Raises:
            OSError: it could not be written.
        """
        for name, files in (("text_encoder", self.model_files), ("tokenizer", self.tokenizer_files)):
            (folder / name).mkdir()
            for file in files:
                with file.open("rb") as source, (folder / name / file.name).open("wb") as target:
                    while piece := source.read(_PIECE):
                        target.write(piece)
                        advance(len(piece))


def read_text_encoder_folder(folder: Path) -> TextEncoderFolder:
    """
    Raises:
        UserError: it is no folder of a Gemma in safetensors with its tokenizer, or is not whole.
    """
    named = f"--gemma_path {folder}"
    if not folder.is_dir():
        raise UserError(
            f"{named}: is no folder. Give the text encoder's folder from Hugging Face, with config.json, .safetensors and tokenizer.json."
        )
    config = _object(folder / "config.json", named)
    if config.get("model_type") not in _TYPES:
        raise UserError(
            f"{named}: a model of the type {config.get('model_type')!r}, and LTX-2's text encoder is a Gemma (gemma3, gemma4_unified)."
        )
    weights = sorted(folder.glob("*.safetensors"))
    indexes = sorted(folder.glob(f"*{INDEX_ENDING}"))
    for index in indexes:
        shards_of(index)
    if not weights:
        raise UserError(f"{named}: holds no .safetensors file. Pickled weights (.bin) are not copied; download the safetensors files.")
    for file in weights:
        read_header(file)
    classes = config.get("architectures")
    model_class = classes[0] if isinstance(classes, list) and classes else None
    text = config.get("text_config")
    width = (text if isinstance(text, dict) else config).get("hidden_size")
    if not isinstance(model_class, str) or type(width) is not int or width < 1:
        raise UserError(f"{folder / 'config.json'}: does not say its class ('architectures') and its width ('hidden_size').")
    tokenizer = [folder / name for name in _TOKENIZER if (folder / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model") for file in tokenizer):
        raise UserError(f"{named}: holds no tokenizer.json. Download the tokenizer's files of the encoder into the same folder.")
    said = _object(folder / "tokenizer_config.json", named).get("tokenizer_class", "")
    return TextEncoderFolder(
        model_files=[*(folder / name for name in _MODEL if (folder / name).is_file()), *weights, *indexes],
        tokenizer_files=tokenizer,
        model_class=_known(model_class, named),
        tokenizer_class=_known(said or "AutoTokenizer", named),
        width=width,
    )


def _object(path: Path, named: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{named}: holds no {path.name}. Give the encoder's whole folder from Hugging Face.")
    try:  # not `read_json`: tokenizers say 'without limit' by a number of more than 64 bits
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no JSON object. Download it again.")
    return content


def _known(name: str, named: str) -> str:
    import transformers

    if not hasattr(transformers, name):
        raise UserError(
            f"{named}: its class {name} is not in transformers {transformers.__version__}. Update transformers, or give another encoder."
        )
    return name
