"""`ltxv2 doctor`: one row for each thing, what is wrong with the remedy, and no model loaded for it."""

import os
import re
import shlex
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner import ltxv2_cache_latents, ltxv2_doctor
from musubi_tuner.doctor import machine
from musubi_tuner.doctor.findings import Finding
from musubi_tuner.ltxv2 import reading
from tests import training_parts as parts


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("geprüft"), tiny_family, "av")


def rows(text: str) -> dict[str, tuple[str, str]]:
    """{subject: (mark, all that is said)}; the last of a subject."""
    found: dict[str, tuple[str, str]] = {}
    subject = ""
    for line in text.splitlines():
        if match := re.match(r"  (ok|note|WRONG|-) +(\S.*?)  +(\S.*)$", line):
            mark, subject, said = match.groups()
            found[subject] = mark, said
        elif line.startswith("          ") and subject:
            found[subject] = found[subject][0], f"{found[subject][1]} {line.strip()}"
    return found


def test_a_run_that_is_right_is_called_right_without_reading_a_weight(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reading, "read_tensor", lambda *arguments: pytest.fail("a tensor was read"))
    monkeypatch.setattr(reading, "ReadAhead", lambda *arguments: pytest.fail("tensors were read"))
    argv = data.arguments("--output_dir", str(tmp_path), "--text_encoder", str(data.encoder))
    assert ltxv2_doctor.main(argv) == 0
    found = rows(capsys.readouterr().out)
    wanted = ("torch", "transformer", "video VAE", "audio VAE", "text encoder", "dataset", "planned", "caches", "optimizer", "output")
    assert {subject: found[subject][0] for subject in wanted} == dict.fromkeys(wanted, "ok")
    assert "LTX-2.3, 2 blocks" in found["transformer"][1] and "3 item(s), 3 with sound" in found["planned"][1]


def test_an_earlier_run_of_the_name_is_found_as_training_finds_it(data, tmp_path, capsys):
    (tmp_path / "ltxv2_lora.safetensors").write_bytes(b"of yesterday")
    argv = data.arguments("--output_dir", str(tmp_path), "--text_encoder", str(data.encoder))
    assert ltxv2_doctor.main(argv) == 1
    mark, says = rows(capsys.readouterr().out)["output"]
    assert mark == "WRONG" and "holds an earlier run of this --output_name" in says and "--overwrite" in says


def test_the_command_for_a_dataset_that_was_not_planned_is_whole(data, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(data.folder, folder)
    for index in folder.rglob("ltxv2_index_*.json"):
        index.unlink()
    copied = replace(data, folder=folder, toml=folder / "dataset.toml")
    assert ltxv2_doctor.main(copied.arguments("--text_encoder", str(data.encoder))) == 1
    mark, says = rows(capsys.readouterr().out)["planned"]
    program, *arguments = [word.strip('"') for word in shlex.split(says.partition("Run: python ")[2], posix=os.name != "nt")]
    assert mark == "WRONG" and program == "ltxv2_cache_latents.py" and ltxv2_cache_latents.main(arguments) == 0


def test_the_machine_alone_needs_no_flags(capsys):
    assert ltxv2_doctor.main([]) == 0
    found = rows(capsys.readouterr().out)
    assert found["packages"][0] == "ok" and "torch" in found["packages"][1] and "free for" in found["disk"][1]


@pytest.mark.parametrize(("gpu", "last"), [(False, "there is no GPU: training here would run on the CPU"), (True, "Nothing is wrong.")])
def test_a_machine_without_a_gpu_is_told_so_in_the_last_line(gpu, last, capsys, monkeypatch):
    card = Finding("GPU 0", "note", "bf16 is slow before 8.0")
    monkeypatch.setattr(machine, "_gpus", machine._gpus if not gpu else lambda: iter([card]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ltxv2_doctor.main([]) == 0
    said = capsys.readouterr().out
    assert last in said.splitlines()[-1] and (gpu or "would run on the CPU" in rows(said)["GPU"][1])


def test_everything_that_is_wrong_has_a_row_of_its_own(data, tiny_family, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(data.folder, folder)
    copied = replace(data, folder=folder, toml=folder / "dataset.toml")
    (folder / "clips" / "clip_001.txt").unlink()
    (cached,) = (folder / "cache").glob("clip_002*_ltxv2.safetensors")
    cached.unlink()
    lora = tmp_path / "other.safetensors"
    save_file({f"diffusion_model.nowhere.{name}": tensor for name, tensor in load_file(cached_lora(tmp_path)).items()}, lora)
    argv = copied.arguments("--output_dir", str(folder / "dataset.toml"), "--text_encoder", str(tiny_family.t5))
    argv += ["--network_weights", str(lora), "--optimizer_type", "Adamm", "--network_module", "nowhere"]
    argv += ["--sample_prompts", str(tmp_path / "none.txt")]
    assert ltxv2_doctor.main(argv) == 1
    out = capsys.readouterr().out
    found = rows(out)
    for subject, says in {
        "text encoder": "T5|t5",
        "datasets[0]": r"1 without a caption: clip_001\.mp4",
        "caches": r"ltxv2_cache_latents\.py --dataset_config",
        "network_weights": "nowhere",
        "optimizer": "Adamm",
        "network": "nowhere",
        "previews": r"none\.txt",
        "output": "cannot be written into",
    }.items():
        assert found[subject][0] == "WRONG", (subject, out)
        assert re.search(says, found[subject][1]), (subject, out)
    assert "8 wrong: " in out


def cached_lora(folder):
    import torch

    path = folder / "lora.safetensors"
    save_file({"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(4, 2)}, path)
    return path


def test_a_flag_that_training_requires_is_missed_and_the_rest_looked_at(data, capsys):
    assert ltxv2_doctor.main(["--ltxv2_model", str(data.model), "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "--dataset_config is not given" in out and "--ltxv2_timestep_format is not given" in out
    assert rows(out)["transformer"][0] == "ok"


def test_lines_fit_the_terminal(data, tmp_path, capsys):
    ltxv2_doctor.main([])
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines())
