"""Prompts written out by the language model that encodes them anyway: `--enhance_prompt`.

Off unless asked for. The model of the text encoder's folder writes the prompt anew by an instruction; its random draws come from a seed of
their own and leave torch's random state as it was, so a clip's noise does not depend on whether its prompt was enhanced.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from musubi_tuner.ltxv2.text.encoders import resolve_model
from musubi_tuner.runtime.device import free_memory
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_text

log = logging.getLogger(__name__)

DEFAULT = "default"
_TEMPERATURE, _MOST_TOKENS = 0.7, 512

INSTRUCTION = """\
You write prompts for a model that makes short videos with sound. Rewrite the user's prompt as one paragraph of at most 150 words, in
English and in the present tense. Keep everything the user says, and any word that is written in capitals or looks like a name exactly
as it is. Add what a viewer sees: the subject's looks, its movements in the order in which they happen, the place, the light, the
camera. Add what is heard: voices with what they say in quotation marks, noises, music, or silence. Add no title, no list and no
comment. Answer with the paragraph alone."""

IMAGE_INSTRUCTION = """\
You write prompts for a model that sets a picture in motion, with sound. The picture is the first frame of the video. Look at it, and
rewrite the user's prompt as one paragraph of at most 150 words, in English and in the present tense. Do not describe again what the
picture shows; say what changes from there on, in the order in which it happens: movements, expressions, the camera. Add what is heard:
voices with what they say in quotation marks, noises, music, or silence. Keep names exactly as they are. Answer with the paragraph
alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Enhancer:
    """How prompts are written out."""

    encoder: str
    """Folder of the language model, or a hub id in the local cache."""
    instruction: str
    """`default`, or a text file with one's own."""
    seed: int
    device: torch.device
    dtype: torch.dtype

    def instruction_for(self, *, with_image: bool) -> str:
        """
        Raises:
            UserError: a file that cannot be read, or is empty.
        """
        if self.instruction == DEFAULT:
            return IMAGE_INSTRUCTION if with_image else INSTRUCTION
        text = read_text(Path(self.instruction), named="--enhance_prompt").strip()
        if not text:
            raise UserError(f"--enhance_prompt {self.instruction}: is empty. Write the instruction there, or give 'default'.")
        return text


def enhance(enhancer: Enhancer, prompts: Sequence[tuple[str, Path | None]], place: Callable[[Any, int], object]) -> list[str]:
    """Each prompt, with the picture that its clip starts from, written out. Nothing stays in memory, and no random state changes.

    Args:
        place: puts the model, which lies on the CPU, onto the device; is told the tokens of the longest text with what is written.

    Raises:
        UserError: a folder that is no language model, or answers nothing.
    """
    texts = [enhancer.instruction_for(with_image=image is not None) for _, image in prompts]
    model, processor = _load(enhancer)
    inputs = [_inputs(enhancer, processor, instruction, prompt, image) for (prompt, image), instruction in zip(prompts, texts, strict=True)]
    place(model, max(given["input_ids"].shape[1] for given in inputs) + _MOST_TOKENS)
    written = []
    devices = [enhancer.device] if enhancer.device.type == "cuda" else []
    for (prompt, _), on_cpu in zip(prompts, inputs, strict=True):
        given = on_cpu.to(enhancer.device)
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(enhancer.seed)
            answer = model.generate(**given, do_sample=True, temperature=_TEMPERATURE, max_new_tokens=_MOST_TOKENS)
        words = processor.decode(answer[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        written.append(_cleaned(words, prompt))
    del model
    free_memory(enhancer.device)
    return written


def _load(enhancer: Enhancer) -> tuple[Any, Any]:
    """On the CPU, where weights in the dtype of their file are only mapped."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    folder = resolve_model(enhancer.encoder, "--text_encoder")
    if not Path(folder).is_dir():
        raise UserError(
            f"--enhance_prompt: --text_encoder {enhancer.encoder} is one packed file, which holds no part that writes. Give "
            "a folder of the language model, as it is published."
        )
    sees = (Path(folder) / "preprocessor_config.json").is_file()
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    try:
        processor = (AutoProcessor if sees else AutoTokenizer).from_pretrained(folder, local_files_only=True)
        model = kind.from_pretrained(folder, local_files_only=True, dtype=enhancer.dtype).requires_grad_(False).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"--enhance_prompt: the model in {folder} cannot be loaded to write ({str(error).splitlines()[0]}). Leave the flag out, or "
            "give the folder of a Gemma that writes."
        ) from error
    return model, processor


def _inputs(enhancer: Enhancer, processor: Any, instruction: str, prompt: str, image: Path | None) -> Any:
    sees = hasattr(processor, "image_processor")
    if image is not None and not sees:
        log.warning("WARNING: %s has no part that sees: the prompt is written out without looking at %s", enhancer.encoder, image)
    content: list[Mapping[str, Any]] = [{"type": "text", "text": f"User's prompt: {prompt}"}]
    if image is not None and sees:
        content.insert(0, {"type": "image", "path": str(image)})
    if getattr(processor, "chat_template", None):
        said: Any = content if sees else content[0]["text"]
        system: Any = [{"type": "text", "text": instruction}] if sees else instruction
        turns = [{"role": "system", "content": system}, {"role": "user", "content": said}]
        return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    tokenizer = processor.tokenizer if sees else processor
    return tokenizer(f"{instruction}\n\nUser's prompt: {prompt}\n\nParagraph:", return_tensors="pt")


def _cleaned(answer: str, prompt: str) -> str:
    """One line, without the quotation marks and marks of lists that models put around it; the prompt itself where nothing came."""
    text = " ".join(answer.split()).strip("\"'“”*#- ")
    if not text:
        log.warning("WARNING: the model wrote nothing for '%.60s', which is taken as it is", prompt)
    return text or prompt
