"""Prompts written out by a language model: the tiny Gemma writes nonsense, by the real path."""

from pathlib import Path

import pytest
import torch

from musubi_tuner.ltxv2.text.enhancing import IMAGE_INSTRUCTION, INSTRUCTION, Enhancer, _cleaned
from musubi_tuner.ltxv2.text.enhancing import enhance as enhance_by
from musubi_tuner.runtime.errors import UserError


def enhance(how: Enhancer, prompts, place=lambda model, tokens: model.to("cpu")) -> list[str]:
    return enhance_by(how, prompts, place)


def enhancer(folder: Path, **options: object) -> Enhancer:
    values = {"instruction": "default", "seed": 10, "device": torch.device("cpu"), "dtype": torch.float32} | options
    return Enhancer(encoder=str(folder), **values)


def test_the_same_seed_writes_the_same_and_torchs_random_state_stays(tiny_family):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    prompts = [("a dog barks", None), ("rain", None)]
    first = enhance(enhancer(tiny_family.gemma), prompts)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert enhance(enhancer(tiny_family.gemma), prompts) == first and len(first) == 2
    assert enhance(enhancer(tiny_family.gemma, seed=11), prompts) != first
    assert enhance(enhancer(tiny_family.gemma), prompts[1:]) == first[1:], "each prompt by itself"


def test_instructions(tiny_family, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("Write it as a haiku.\n", encoding="utf-8")
    assert enhancer(tiny_family.gemma).instruction_for(with_image=False) == INSTRUCTION
    assert enhancer(tiny_family.gemma).instruction_for(with_image=True) == IMAGE_INSTRUCTION
    assert enhancer(tiny_family.gemma, instruction=str(own)).instruction_for(with_image=True) == "Write it as a haiku."
    own.write_text(" \n", encoding="utf-8")
    for instruction, says in ((str(own), "is empty"), (str(tmp_path / "no.txt"), "no.txt")):
        with pytest.raises(UserError, match=says):
            enhance(enhancer(tiny_family.gemma, instruction=instruction), [("a dog", None)])


def test_an_encoder_that_cannot_write_is_refused(tiny_family, tmp_path):
    with pytest.raises(UserError, match="--enhance_prompt: the model in .* cannot be loaded to write"):
        enhance(enhancer(tiny_family.t5), [("a dog", None)])


def test_answers_lose_what_models_put_around_them():
    assert _cleaned('  "A dog\n barks." ', "x") == "A dog barks." and _cleaned(" ** ", "as it was") == "as it was"
