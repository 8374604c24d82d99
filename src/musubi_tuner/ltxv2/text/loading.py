"""From an encoder's folder or file to its language model, strictly: every tensor of it is in the files, and no other.

Plain and 8-bit files (`ltxv2.quantization`) are read as checkpoints are, straight to the device, whatever prefix their names have. Only
what bitsandbytes makes or has made, and pickled weights, are left to transformers, which is held to the same rule.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.ltxv2.filling import cast, fill
from musubi_tuner.ltxv2.quantization import read_quantization
from musubi_tuner.ltxv2.text.packed import GEMMA4
from musubi_tuner.ltxv2.weights import INDEX_ENDING, Checkpoint, open_files, shards_of
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.headers import GGUF, SUFFIXES
from musubi_tuner.runtime.local_models import quiet

_LAYERS = {"gemma": "layers", "t5": "encoder.block"}
"""{backend: where its layers are in the language model}."""

_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
"""Before the names of a language model: of transformers 5, of older ones (the hub's Gemma 3), of ComfyUI's single files, and bare."""

_ASIDE = (
    "vision_tower.", "vision_model.", "multi_modal_projector.", "audio_projector.", "embed_vision.", "embed_audio.", "lm_head.",
    "decoder.", "spiece_model", "tokenizer_json", "hf_asset__", "text_embedding_projection.",
)  # fmt: skip
"""Beside a language model under its own prefix: towers, heads and packed files, which caching texts needs none of."""

_SHARED, _EMBEDDING = "shared.weight", "encoder.embed_tokens.weight"
"""One tensor of T5 under two names, of which a file may hold either."""

_BITSANDBYTES = (".quant_state.bitsandbytes", ".SCB")
"""In the names of what bitsandbytes stores beside a weight of 4 or of 8 bits."""

OnHost = Mapping[int, Callable[[Tensor], Tensor]]
"""{number of a layer: lays a tensor of it in host memory, and returns it as it lies there}."""

_REMEDY = "Download the whole encoder again, config.json and weights of the same model; nothing was encoded."


@dataclass(frozen=True, slots=True)
class LoadedBytes:
    """What the weights of an encoder take once they are loaded, in bytes."""

    layers: tuple[int, ...]
    beside: int
    """Of all but the layers: embeddings and the last norm."""

    @property
    def total(self) -> int:
        return sum(self.layers) + self.beside


def layers_of(model: nn.Module, backend: str) -> list[nn.Module]:
    """The layers of a language model, in the order in which they run."""
    return list(model.get_submodule(_LAYERS[backend]).children())


def loaded_bytes(source: Path, config: Any, *, backend: str, dtype: torch.dtype) -> LoadedBytes | None:
    """Of an encoder whose files are read here; None where transformers loads it.

    Raises:
        UserError: no weights, or a config.json that no encoder can be built by.
    """
    if _prequantized(source, config) or not weight_files(source):
        return None
    model = _on_meta(source, config, backend)
    model.tie_weights()
    layers, beside = [0] * len(layers_of(model, backend)), 0
    for name, tensor in model.named_parameters():
        number, size = _layer_number(name, backend), tensor.numel() * _dtype_of(name, backend, dtype).itemsize
        if number is None:
            beside += size
        else:
            layers[number] += size
    return LoadedBytes(tuple(layers), beside)


def load_model(
    source: Path,
    config: Any,
    *,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    bits: int | None,
    on_host: OnHost,
) -> Any:
    """The language model, frozen.

    Args:
        source: folder or packed file.
        config: of transformers, of the whole model.
        bits: 8 or 4: quantized by bitsandbytes while it is loaded.
        on_host: layers that are left in host memory, of an encoder that `loaded_bytes` knows.

    Raises:
        UserError: no weights, files that cannot be read, tensors that are missing, unexpected, of another shape or not finite, a
            quantization that is not read, or bitsandbytes wanted and missing.
    """
    stored = _prequantized(source, config)
    if bits is not None or stored:
        _import_bitsandbytes(f"{source}: prequantized, it needs" if stored else "--gemma_load_in_8bit and --gemma_load_in_4bit need")
    files = weight_files(source)
    checkpoint = open_files(source, files) if files else None
    if checkpoint is not None and bits is None and not stored:
        return _filled(checkpoint, config, backend=backend, device=device, dtype=dtype, on_host=on_host)
    assert not on_host, "layers are left on the host by this file's own reading alone"
    if checkpoint is not None:
        _check_for_transformers(checkpoint, stored=stored)
    extra: dict[str, Any] = {}
    if bits is not None or stored:
        extra["device_map"] = {"": device}
    if bits is not None and not stored:
        extra["quantization_config"] = _quantization(bits, dtype)
    return _loaded_by_transformers(source, config, backend, {"dtype": dtype, **extra}, device)


def weight_files(source: Path) -> list[Path]:
    """The safetensors files of an encoder: a packed file itself; of a folder `model.safetensors`, those that its index names, or the only
    one or the shards that are there.

    Returns:
        Nothing where the folder has pickled weights alone.

    Raises:
        UserError: no weights, a shard that is missing, or several files none of which is the model's.
    """
    if source.is_file():
        return [source]
    whole, index = source / "model.safetensors", source / f"model{INDEX_ENDING}"
    if whole.is_file():
        return [whole]
    if index.is_file():
        return shards_of(index)
    files = [file for file in sorted(source.iterdir()) if file.suffix.lower() in SUFFIXES and file.is_file()]
    shards = [file for file in files if "-of-" in file.name]
    if len(files) == 1 or (shards and shards == files):
        return files
    if files:
        raise UserError(f"{source}: holds {', '.join(file.name for file in files)}: which of them is the encoder? Keep one of them there.")
    if any(source.glob("pytorch_model*.bin")):
        return []
    if gguf := next(source.glob("*.gguf"), None):
        raise UserError(f"{gguf}: {GGUF}")
    raise UserError(f"{source}: the folder holds no weights (model.safetensors). Download the encoder's weights into it.")


def language_names(checkpoint: Checkpoint, expected: Collection[str]) -> dict[str, str]:
    """{name in the language model: full name} of what lies under its prefix, with the scales of quantized weights.

    Args:
        expected: names of the language model.
    """
    expected = set(expected)
    found = [{name: full for name, full in checkpoint.with_prefix(prefix).items() if not name.startswith(_ASIDE)} for prefix in _PREFIXES]
    names = max(found, key=lambda names: len(expected & names.keys()))
    if not expected & names.keys():
        some = ", ".join(f"'{name}'" for name in checkpoint.names()[:3])
        raise UserError(
            f"{checkpoint.path}: none of its {len(checkpoint.names())} tensors has a name of the encoder's; first {some}. {_REMEDY}"
        )
    for here, there in ((_SHARED, _EMBEDDING), (_EMBEDDING, _SHARED)):
        if here in expected and here not in names and there in names:
            names[here] = names[there]
    return names


def _filled(checkpoint: Checkpoint, config: Any, *, backend: str, device: torch.device, dtype: torch.dtype, on_host: OnHost) -> Any:
    model = _on_meta(checkpoint.path, config, backend)
    host = torch.device("cpu")

    def place(name: str, tensor: Tensor) -> Tensor:
        number, kept = _layer_number(name, backend), _dtype_of(name, backend, dtype)
        return on_host[number](cast(tensor, host, kept)) if number in on_host else cast(tensor, device, kept)

    names = language_names(checkpoint, model.state_dict())
    fill(model, names, checkpoint, device=device, dtype=dtype, place=place, remedy=_REMEDY)
    model.tie_weights()
    for module in model.modules():  # weights have their places
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.requires_grad_(False).eval()


def _on_meta(where: Path, config: Any, backend: str) -> Any:
    """The language model without weights. Its buffers lie in no file: they are computed when it is built."""
    from accelerate import init_empty_weights

    kind, own_config = _language_class(config, backend)
    try:
        with init_empty_weights(include_buffers=False):
            return kind(own_config)
    except Exception as error:  # whatever its layers make of values that no encoder has
        raise UserError(f"{where}: no encoder can be built by its config.json ({error}). {_REMEDY}") from error


def _layer_number(name: str, backend: str) -> int | None:
    """Which layer a tensor belongs to; None for one beside the layers."""
    prefix = f"{_LAYERS[backend]}."
    return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None


def _dtype_of(name: str, backend: str, dtype: torch.dtype) -> torch.dtype:
    """Of T5 in float16, the last linear of each feed-forward stays float32, as its products overflow."""
    whole = backend == "t5" and dtype == torch.float16 and name.endswith(".wo.weight")
    return torch.float32 if whole else dtype


def _language_class(config: Any, backend: str) -> tuple[type, Any]:
    if backend == "t5":
        from transformers import T5EncoderModel

        return T5EncoderModel, config
    own = getattr(config, "text_config", config)
    if config.model_type in GEMMA4:
        from transformers import Gemma4UnifiedTextModel

        return Gemma4UnifiedTextModel, own
    from transformers import Gemma3TextModel

    return Gemma3TextModel, own


def _whole_class(config: Any) -> Any:
    """Of a model whose language model has towers beside it; None where it stands alone."""
    if config.model_type == "gemma3":
        from transformers import Gemma3ForConditionalGeneration

        return Gemma3ForConditionalGeneration
    if config.model_type == "gemma4_unified":
        from transformers import Gemma4UnifiedForConditionalGeneration

        return Gemma4UnifiedForConditionalGeneration
    return None


def _loaded_by_transformers(source: Path, config: Any, backend: str, options: Mapping[str, Any], device: torch.device) -> nn.Module:
    language, own_config = _language_class(config, backend)
    whole = None if source.is_file() else _whole_class(config)
    kind: Any = whole or language
    try:
        with quiet():  # its table of missing tensors too, which the error says in words
            if source.is_file():
                model, info = _from_packed(source, kind, own_config, options)
            else:
                model, info = kind.from_pretrained(source, local_files_only=True, output_loading_info=True, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: transformers cannot load the encoder ({error}). {_REMEDY}") from error
    problems = []
    for what in ("missing", "unexpected"):
        names = sorted(name for name in info[f"{what}_keys"] if not any(part in f"{name}." for part in _ASIDE))
        if names:
            problems.append(f"{what} {len(names)} tensor(s), first '{names[0]}'")
    if problems:
        raise UserError(f"{source}: its tensors do not fit {kind.__name__}: {'; '.join(problems)}. {_REMEDY}")
    if whole is not None:
        model = model.model.language_model
    if "device_map" not in options:
        model = model.to(device)
    return model.requires_grad_(False).eval()


def _from_packed(source: Path, kind: Any, config: Any, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """A language model under names of its own, by slices of the file: each tensor is read when its turn comes."""
    from safetensors import safe_open

    names = language_names(open_files(source, [source]), _on_meta(source, config, "gemma").state_dict())
    with safe_open(source, framework="pt") as file:
        slices = {name: file.get_slice(full) for name, full in names.items()}
        return kind.from_pretrained(None, config=config, state_dict=slices, output_loading_info=True, **options)


def _prequantized(source: Path, config: Any) -> bool:
    """Whether the config says that bitsandbytes has made the weights."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return False
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    if method != "bitsandbytes":
        raise UserError(f"{source}: an encoder prequantized by {method!r}, which is not read. Give the bf16 folder of the same model.")
    return True


def _check_for_transformers(checkpoint: Checkpoint, *, stored: bool) -> None:
    """Whether the tensors are what transformers takes them for.

    Args:
        stored: in the form of bitsandbytes, as the config says.
    """
    if stored:
        if not any(mark in name for name in checkpoint.names() for mark in _BITSANDBYTES):
            raise UserError(
                f"{checkpoint.path}: its config.json says that the weights are prequantized by bitsandbytes, and they are not. Download "
                "config.json and weights of the same model; of full weights, delete 'quantization_config' from config.json."
            )
        return
    receipt = read_quantization(checkpoint, {name: name for name in checkpoint.names()}).receipt
    if receipt:
        raise UserError(
            f"{checkpoint.path}: stored as {receipt}; --gemma_load_in_8bit and --gemma_load_in_4bit take a bf16 folder. Leave the flag out."
        )


def _import_bitsandbytes(who: str) -> None:
    try:
        import bitsandbytes  # noqa: F401 - transformers needs it
    except ImportError as error:
        raise UserError(f"{who} bitsandbytes: pip install bitsandbytes") from error


def _quantization(bits: int, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
