"""The commands of docs/how-to/caption_clips.md and move_caches.md, each as it stands there, on toy files of the same names."""

import shutil
from pathlib import Path

import pytest

from musubi_tuner import ltxv2_dataset, ltxv2_train_network
from musubi_tuner.curation.captioning.answers import USUAL_PREFIXES
from musubi_tuner.tiny.clips import write_clips, write_stills
from tests import captioning_parts, training_parts
from tests.unit.test_docs import DOCS, commands

CAPTIONS, CACHES = "caption_clips.md", "move_caches.md"
SCRIPT, TRAIN = "tools/dataset.py", "ltxv2_train_network.py"


def of_page(page: str) -> list[list[str]]:
    return [words for name, words in commands() if name == page]


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Path:
    return captioning_parts.write_seeing_model(tmp_path_factory.mktemp("captioner") / "gemma")


@pytest.mark.parametrize("words", of_page(CAPTIONS), ids=lambda words: " ".join(words[3:])[:70])
def test_a_command_captions(captioner, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    write_clips(tmp_path / "clips", count=2, frames=9)
    write_stills(tmp_path / "clips", count=1)
    for path in (tmp_path / "clips").glob("*.txt"):
        path.unlink()
    shutil.copytree(captioner, "gemma-3-12b-it-qat-q4_0-unquantized")
    Path("dataset.toml").write_text('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [9]\n', encoding="utf-8")
    Path("instruction.txt").write_text("Say in {max_words} words what {trigger} does.", encoding="utf-8")
    given = words[words.index(SCRIPT) + 1 :]
    with captioning_parts.serving() as server:
        small = [server.url if word.startswith("http://") else word for word in given]
        small += ["--device", "cpu", "--max_tokens", "4"] if "--model" in words else []
        assert ltxv2_dataset.main(small) == 0
    assert server.faults == [] and bool(server.requests) == ("--endpoint" in words)
    assert len(list(Path("clips").glob("*.txt"))) == (2 if "dataset.toml" in words else 3)
    if "--trigger_word" in words:
        assert all("MILA" in path.read_text(encoding="utf-8") for path in Path("clips").glob("*.txt"))


def test_the_page_names_all_that_is_taken_off_answers():
    page = (DOCS / "how-to" / CAPTIONS).read_text(encoding="utf-8").lower()
    words = {word.strip(":,") for prefix in USUAL_PREFIXES for word in prefix.split()}
    assert {word for word in words if word not in page} == set()


def test_the_commands_move_caches(tiny_family, tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    training_parts.make_data(here, tiny_family, "av", count=1, held_out=False)
    there.mkdir()
    shutil.copy(tiny_family.ltx23, there / "ltx-2.3-22b-dev.safetensors")
    pack, *others = of_page(CACHES)
    monkeypatch.chdir(here)
    assert ltxv2_dataset.main(pack[pack.index(SCRIPT) + 1 :]) == 0
    (here / "dataset_pack.tar").rename(there / "dataset_pack.tar")
    here.rename(tmp_path / "gone")
    monkeypatch.chdir(there)
    for words in others:
        if SCRIPT in words:
            assert ltxv2_dataset.main(words[words.index(SCRIPT) + 1 :]) == 0
        else:
            small = ["--device", "cpu", "--max_train_steps", "1", "--network_dim", "2", "--mixed_precision", "no"]
            assert ltxv2_train_network.main([*words[words.index(TRAIN) + 1 :], *small, "--max_data_loader_n_workers", "0"]) == 0
    assert (there / "output" / "ltxv2_lora.safetensors").is_file()
