"""Prompts of a run written out by the text encoder's model, once: what it wrote is kept beside the clips."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from musubi_tuner.cache.store import write_bytes
from musubi_tuner.config.generation import GenerateConfig
from musubi_tuner.generation.recipe import file_hash
from musubi_tuner.prompts.prompt import PreviewPrompt
from musubi_tuner.runtime.device import compute_dtype, pick_device
from musubi_tuner.runtime.files import read_json

log = logging.getLogger(__name__)

FILE = "enhanced_prompts.json"


def enhanced(prompts: Sequence[PreviewPrompt], config: GenerateConfig) -> tuple[PreviewPrompt, ...]:
    """The prompts as they are, or written out where `--enhance_prompt` asks for it. What was written before, from the same prompt, picture,
    instruction, seed and model, is taken from FILE in the output folder, so that the same command makes the same clips.

    Raises:
        UserError: an instruction or a model that cannot be used.
    """
    wanted, encoder = config.enhancement.enhance_prompt, config.model.text_encoder
    if wanted is None or encoder is None:
        return tuple(prompts)
    from musubi_tuner.ltxv2.text.encoders import encoder_fingerprint, encoder_options
    from musubi_tuner.ltxv2.text.enhancing import Enhancer, enhance
    from musubi_tuner.placement.text import memory_in_words
    from musubi_tuner.placement.writing import place_writer

    device = pick_device(config.model.device)
    enhancer = Enhancer(
        encoder=encoder, instruction=wanted, seed=config.enhancement.prompt_enhancement_seed, device=device, dtype=compute_dtype(device)
    )
    options = encoder_options(encoder, tokenizer=None, backend=config.model.text_encoder_backend, device=device, max_length=None)
    model = encoder_fingerprint(options)
    path = config.clips.output_dir / FILE
    known = _read(path)
    keys = {
        prompt: _key(prompt, enhancer.instruction_for(with_image=prompt.inputs.image is not None), enhancer.seed, model)
        for prompt in prompts
    }
    if missing := [prompt for prompt in prompts if keys[prompt] not in known]:
        log.info("writing out %d prompt(s) by the model of %s", len(missing), encoder)
        place = partial(place_writer, device=device, vram_gb=config.memory.vram_gb, ram_gb=config.memory.ram_gb)
        with memory_in_words("--vram_gb is smaller, and more of the model's layers are streamed", doing="prompts were written out"):
            texts = enhance(enhancer, [(prompt.prompt, prompt.inputs.image) for prompt in missing], place)
        known |= {keys[prompt]: {"written": prompt.prompt, "enhanced": text} for prompt, text in zip(missing, texts, strict=True)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, json.dumps(known, ensure_ascii=False, indent=1).encode())
    found = []
    for prompt in prompts:
        text = known[keys[prompt]]["enhanced"]
        log.info("prompt %d: %s\n  -> %s", prompt.index, prompt.prompt, text)
        found.append(dataclasses.replace(prompt, prompt=text, written=prompt.prompt))
    return tuple(found)


def _key(prompt: PreviewPrompt, instruction: str, seed: int, model: str) -> str:
    image = "" if prompt.inputs.image is None else file_hash(prompt.inputs.image)
    return hashlib.sha256("\0".join((prompt.prompt, image, instruction, str(seed), model)).encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path) -> dict[str, dict[str, str]]:
    """What was written before; a file of another kind counts as none."""
    if not path.is_file():
        return {}
    document = read_json(path)
    if not isinstance(document, dict):
        return {}
    return {key: value for key, value in document.items() if isinstance(value, dict) and isinstance(value.get("enhanced"), str)}
