"""The commands of docs/how-to/publish.md, of the card in lora_files.md, and of checkpoints.md, as they stand there, on toy files of the
same names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner import ltxv2_checkpoint, ltxv2_generate_video, ltxv2_lora, ltxv2_train_network
from tests import training_parts as parts
from tests.e2e.test_publishing import hub  # noqa: F401 - a fixture
from tests.hub_stand_in import TOKEN
from tests.unit.test_docs import commands

MAINS = {"lora.py": ltxv2_lora.main, "checkpoint.py": ltxv2_checkpoint.main, "ltxv2_train_network.py": ltxv2_train_network.main}


def of_page(page: str, *containing: str) -> list[tuple[str, list[str]]]:
    """(script, its words) of the commands that have these words in them."""
    found = []
    for document, words in commands():
        place = next((index for index, word in enumerate(words) if Path(word).name in MAINS), None)
        if document == page and place is not None and all(word in words for word in containing):
            found.append((Path(words[place]).name, words[place + 1 :]))
    return found


@pytest.fixture(scope="module")
def project(tiny_family, texts, tmp_path_factory) -> Path:
    """A run, and a clip that its LoRA has made."""
    folder = tmp_path_factory.mktemp("of the pages")
    data = parts.make_data(folder / "data", tiny_family, "av")
    argv = data.arguments("--output_dir", str(folder / "output"), "--output_name", "mila", "--max_train_steps", "3")
    assert ltxv2_train_network.main([*argv, "--save_every_n_steps", "1"]) == 0
    (folder / "output" / "mila-step00000003.safetensors").unlink(missing_ok=True)
    shutil.copy(folder / "output" / "mila.safetensors", folder / "my.safetensors")
    values = dict(zip(argv[::2], argv[1::2], strict=True))
    numbers = {"--network_dim", "--network_alpha", "--max_data_loader_n_workers", "--learning_rate", "--max_train_steps"}
    lines = [f"{key[2:]} = {value if key in numbers else json.dumps(value)}" for key, value in values.items() if "output" not in key]
    (folder / "mila.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = ["--ltxv2_model", str(tiny_family.ltx23), "--sample_width", "64", "--sample_height", "64", "--sample_frames", "9"]
    flags += ["--sample_steps", "1", "--device", "cpu", "--text_encoder", str(tiny_family.gemma), "--prompt", "a dog", "--seed", "1"]
    assert ltxv2_generate_video.main([*flags, "--output_dir", str(folder / "made")]) == 0
    (folder / "release" / "previews").mkdir(parents=True)
    shutil.copy(next((folder / "made").glob("*.mp4")), folder / "release" / "previews" / "walk.mp4")
    return folder


def test_from_a_run_to_a_published_lora(project, hub, monkeypatch):  # noqa: F811
    monkeypatch.chdir(project)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    page = of_page("publish.md")
    assert [words[0] for _, words in page[:4]] == ["average", "inspect", "card", "publish"] and len(page) == 5
    for script, words in page:
        assert MAINS[script](words) == 0
    card = (project / "release" / "README.md").read_text(encoding="utf-8")
    assert 'instance_prompt: "mila"' in card and 'text: "a dog"' in card and "previews/walk.mp4" in card
    there = hub.repositories["me/mila-ltx"]
    assert {"mila.safetensors", "README.md", "previews/walk.mp4", "run1/README.md", "run1/ltxv2_lora.safetensors"} == set(there)
    assert there["mila.safetensors"] == (project / "release" / "mila.safetensors").read_bytes()


def test_the_card_of_the_page_of_files(project, monkeypatch):
    monkeypatch.chdir(project)
    ((script, words),) = of_page("lora_files.md", "card")
    assert MAINS[script](words) == 0 and "base_model" in (project / "README.md").read_text(encoding="utf-8")


def test_the_page_of_checkpoints(project, tiny_family, monkeypatch, capsys):
    """But for --keep_blocks, as the toy has two blocks, and ConvRot, whose groups of 256 it has no room for."""
    monkeypatch.chdir(project)
    shutil.copy(tiny_family.ltx23, project / "ltx-2.3-22b-dev.safetensors")
    shutil.copy(project / "my.safetensors", project / "my_lora.safetensors")
    shutil.copytree(tiny_family.gemma, project / "gemma-3-12b-it-qat-q4_0-unquantized")
    page = of_page("checkpoints.md")
    assert [words[0] for _, words in page] == [
        "inspect", "verify", "split", "split", "join", "quantize", "quantize", "bake", "convert", "convert", "compare", "compare",
    ]  # fmt: skip
    compared = []
    for script, words in page:
        if words[0] == "quantize":
            words = [*("int8" if word == "int8_convrot" else word for word in words), "--keep_blocks", "0"]
        code = MAINS[script](words)
        text = capsys.readouterr().out
        if words[0] == "compare":
            compared.append((code, text))
        else:
            assert code == 0, words
    (baked, of_lora), (rounded, of_fp8) = compared
    assert baked == 1 and "the first that differs: block 0, transformer_blocks.0." in of_lora and "alone" not in of_lora
    assert rounded == 1 and "as float32 and as float8_e4m3fn" in of_fp8, "the toy's weights are larger than a model's, and so is the error"
    kept = {line.split()[0] for line in of_fp8.splitlines() if line.endswith("%") and line.split()[2:4] == ["0", "0.000%"]}
    assert {"vae", "audio_vae", "vocoder", "text_projection"} <= kept, "what is not quantized is the same"
    assert len([*project.glob("components/*.safetensors")]) == len([*project.glob("component_folders/*/model.safetensors")]) == 5
    one = load_file(tiny_family.ltx23)
    for again in ("whole.safetensors", "ltx-2.3-again.safetensors"):
        other = load_file(project / again)
        assert list(one) and set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
