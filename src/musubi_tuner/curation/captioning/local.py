"""Captions by a vision-language or omni model in a folder, run by transformers on this machine."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from musubi_tuner.curation.captioning.answers import Answer
from musubi_tuner.curation.captioning.media import SOUND_RATE, Look
from musubi_tuner.media.audio import resample
from musubi_tuner.runtime.device import compute_dtype, free_memory
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.files import read_json
from musubi_tuner.runtime.local_models import first_line, model_type, quiet

_WRITERS = {
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
"""Of models that also speak, by their type: the part that writes. What speaks is left in its file, a pickle among it."""
_EARS = ("feature_extractor", "audio_processor")
"""Parts of processors."""
_REMEDY = "Give the folder of a vision-language or omni model as it is published (config.json, processor, tokenizer, *.safetensors)."


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How words are chosen."""

    max_tokens: int
    temperature: float
    seed: int


class LocalCaptioner:
    """A model with its processor, on a device."""

    def __init__(self, folder: Path, device: torch.device, sampling: Sampling) -> None:
        """
        Raises:
            UserError: no folder of such a model, weights that are no safetensors, code of its own, or a library that it needs.
        """
        self.name = folder.name
        self._device, self._sampling = device, sampling
        _check(folder)
        with quiet():
            self._processor = _load_processor(folder)
            self._model = _load_model(folder, device)
        known = self._processor.get_attributes()
        self.sees = "image_processor" in known
        ears = [name for name in _EARS if name in known]
        self.hears = bool(ears)
        if not self.sees and not self.hears:
            raise UserError(f"--model {folder}: its processor takes neither pictures nor sound. {_REMEDY}")
        if not getattr(self._processor, "chat_template", None):
            raise UserError(f"--model {folder}: holds no chat template, so it follows no instruction. Give a model tuned to instructions.")
        self._rate = int(getattr(getattr(self._processor, ears[0]), "sampling_rate", SOUND_RATE)) if ears else SOUND_RATE

    def ask(self, instruction: str, look: Look) -> Answer:
        """What it says.

        Raises:
            TemporaryFailure: no memory for it.
            UserError: it cannot take what there is to see or hear.
        """
        if look.pictures and not self.sees or look.sound is not None and not self.hears:
            raise UserError(f"{self.name} {'hears nothing' if self.sees else 'sees nothing'}. Give an omni model for it.")
        try:
            given = self._inputs(instruction, look).to(self._device)
            for name, value in given.items():
                if torch.is_tensor(value) and value.is_floating_point():
                    given[name] = value.to(self._model.dtype)
            with _drawing(self._device, self._sampling.seed), torch.inference_mode():
                said = self._model.generate(**given, **self._choosing())
        except torch.OutOfMemoryError as error:
            free_memory(self._device)
            raise TemporaryFailure(
                f"{self.name}: {self._device} has too little memory. Give smaller --frames or --longest_side, a smaller model, or "
                "--endpoint with a server that runs a quantized one."
            ) from error
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            raise UserError(f"{self.name} cannot take it ({first_line(error)}). Models of one picture need --frames 1.") from error
        tokens = said[0, given["input_ids"].shape[1] :]
        is_cut = len(tokens) >= self._sampling.max_tokens and int(tokens[-1]) not in _ends(self._model)
        return Answer(self._processor.decode(tokens, skip_special_tokens=True), is_cut)

    def _inputs(self, instruction: str, look: Look) -> Any:
        from PIL import Image

        content: list[dict[str, Any]] = [{"type": "image", "image": Image.fromarray(picture.numpy())} for picture in look.pictures]
        if look.sound is not None:
            content.append({"type": "audio", "audio": resample(look.sound, SOUND_RATE, self._rate).numpy()})
        turns = [{"role": "user", "content": [*content, {"type": "text", "text": instruction}]}]
        return self._processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")

    def _choosing(self) -> dict[str, Any]:
        """Without what the model's own generation_config.json says of drawing: the flags count."""
        chosen: dict[str, Any] = {"max_new_tokens": self._sampling.max_tokens, "do_sample": self._sampling.temperature > 0}
        if self._sampling.temperature > 0:
            chosen["temperature"] = self._sampling.temperature
        else:
            chosen |= {"temperature": None, "top_p": None, "top_k": None}
        return chosen


def _check(folder: Path) -> None:
    """
    Raises:
        UserError: what can be told without loading anything.
    """
    kind = model_type(folder, named="--model", remedy=_REMEDY)
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    if kind not in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        own_code = " It brings code of its own, which is not run." if "auto_map" in read_json(folder / "config.json") else ""
        raise UserError(
            f"--model {folder}: model_type '{kind}' is none that this transformers reads with pictures or sound.{own_code} "
            "Give another model, or run it in a server of its own and give --endpoint."
        )


def _load_processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        library = "torchvision" if "torchvision" in str(error).lower() else first_line(error)
        raise UserError(
            f"--model {folder}: its processor needs {library}, which is not installed here, or does not fit torch. Install it "
            "(docs/how-to/caption_clips.md), or run the model in a server and give --endpoint."
        ) from error
    except Exception as error:  # of tokenizers, which has no narrower class for what is wrong with a file
        raise UserError(f"--model {folder}: its processor cannot be loaded ({first_line(error)}). {_REMEDY}") from error
    if not hasattr(processor, "get_attributes"):  # what AutoProcessor gives where there is a tokenizer alone
        raise UserError(f"--model {folder}: it holds no processor of pictures or sound. {_REMEDY}")
    return processor


def _load_model(folder: Path, device: torch.device) -> Any:
    import transformers

    config = read_json(folder / "config.json")
    kind: Any = getattr(transformers, _WRITERS.get(config["model_type"], "AutoModelForMultimodalLM"))
    quantized = "quantization_config" in config  # such weights are made on the device, and stay there
    where = {"device_map": {"": str(device)}} if quantized else {}
    try:
        model, found = kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True,
            dtype="auto" if quantized else compute_dtype(device), **where,
        )  # fmt: skip
        if missing := sorted(found["missing_keys"]):
            raise UserError(f"--model {folder}: its files lack {len(missing)} weights, first {missing[0]}. Download it again.")
        model = model.requires_grad_(False).eval()
        return model if quantized else model.to(device)
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise TemporaryFailure(
            f"--model {folder}: {device} has too little memory for it. Give a smaller model, or --endpoint with a server that runs a "
            "quantized one."
        ) from error
    except SafetensorError as error:
        raise UserError(f"--model {folder}: its weights are damaged ({first_line(error)}). Download them again.") from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError) as error:
        raise UserError(f"--model {folder}: cannot be loaded ({first_line(error)}). {_REMEDY}") from error


@contextlib.contextmanager
def _drawing(device: torch.device, seed: int) -> Iterator[None]:
    """Draws from the seed, for each file anew; torch's random state is as before afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _ends(model: Any) -> tuple[int, ...]:
    found = model.generation_config.eos_token_id
    return tuple(found) if isinstance(found, list | tuple) else (found,) if found is not None else ()
