"""LoRA files beside real checkpoints and in other programs' loaders: inspected, extracted, converted."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner import ltxv2_lora
from musubi_tuner.conversion.lora.changes import change_of
from musubi_tuner.conversion.lora.contents import read_lora
from musubi_tuner.ltxv2.versions import transformer_names
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.networks.targets import is_audio_side
from musubi_tuner.runtime.errors import UserError


def lora(*words):
    assert ltxv2_lora.main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def changed(tiny_family, tmp_path_factory):
    """The tiny checkpoint with two linears changed by matrices of rank 2, one of them of the sound, and a bias; and the changes."""
    folder = tmp_path_factory.mktemp("changed")
    names = transformer_names(open_checkpoint(tiny_family.ltx23))
    tensors, metadata = load_file(tiny_family.ltx23), open_checkpoint(tiny_family.ltx23).metadata
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for module in ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.audio_attn1.to_out.0"):
        full = names[f"{module}.weight"]
        rows, columns = tensors[full].shape
        change = torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
        before = tensors[full].float()
        tensors[full] = before + 0.1 * change
        changes[module] = tensors[full] - before
    bias = names["transformer_blocks.0.attn1.to_q.bias"]
    tensors[bias] = tensors[bias].float() + 1
    save_file(tensors, folder / "changed.safetensors", metadata=dict(metadata))
    return folder / "changed.safetensors", changes


def test_the_difference_of_two_checkpoints_is_a_lora(changed, tiny_family, tmp_path, caplog):
    caplog.set_level("INFO")
    path, changes = changed
    lora("extract", "--tuned", path, "--base", tiny_family.ltx23, "--rank", "4", "--energy", "0.9999", "--save_precision", "float32",
         "--output", tmp_path / "found.safetensors")  # fmt: skip
    found = read_lora(tmp_path / "found.safetensors").adapters
    assert set(found) == set(changes)
    for name, change in changes.items():
        assert found[name].rank == 2
        assert (change_of(found[name]) - change).norm() < 1e-3 * change.norm()
    assert "1 other tensors differ too, which no LoRA holds: transformer_blocks.0.attn1.to_q.bias" in caplog.text
    assert read_lora(tmp_path / "found.safetensors").metadata["ss_base_model_version"] == "ltx-2.3"
    with pytest.raises(UserError, match="no linear differs"):
        lora("extract", "--tuned", path, "--base", path, "--output", tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="of two models"):
        lora("extract", "--tuned", path, "--base", tiny_family.ltx20, "--output", tmp_path / "none.safetensors")


def test_how_much_a_file_changes_is_measured_against_the_base(changed, tiny_family, tmp_path, capsys):
    path, changes = changed
    lora("extract", "--tuned", path, "--base", tiny_family.ltx23, "--save_precision", "float32", "--output", tmp_path / "found.safetensors")
    capsys.readouterr()
    lora("inspect", tmp_path / "found.safetensors", "--base", tiny_family.ltx23, "--json", tmp_path / "found.json", "--modules")
    text, facts = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    base = open_checkpoint(tiny_family.ltx23)
    names = transformer_names(base)
    for name, change in changes.items():
        weight = base.tensor(names[f"{name}.weight"]).float()
        share = float(change.norm() / weight.norm())
        (row,) = [one for one in facts["modules"] if one["module"] == name]
        assert row["norm"] / row["base_norm"] == pytest.approx(share, rel=1e-3)
        whose = "sound's" if is_audio_side(name) else "pictures'"
        assert f"this file changes the {whose} own weights by {share:.2%} of their norm." in text
    for module, size, says in (("transformer_blocks.40.attn1.to_q", 8, "has no"), (next(iter(changes)), 8, "made for another model")):
        key = f"diffusion_model.{module}.lora_"
        save_file({f"{key}A.weight": torch.ones(1, size), f"{key}B.weight": torch.ones(size, 1)}, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match=says):
            lora("inspect", tmp_path / "other.safetensors", "--base", tiny_family.ltx23)


def test_connectors_that_were_trained_are_in_the_difference(tiny_family, tmp_path):
    tensors, metadata = load_file(tiny_family.ltx23), dict(open_checkpoint(tiny_family.ltx23).metadata)
    name = next(name for name in tensors if "video_embeddings_connector" in name and name.endswith("attn1.to_q.weight"))
    change = torch.outer(torch.ones(len(tensors[name])), torch.arange(tensors[name].shape[1]) / 10)
    before = tensors[name].float()
    tensors[name] = before + change
    save_file(tensors, tmp_path / "tuned.safetensors", metadata=metadata)
    words = ("--base", tiny_family.ltx23, "--save_precision", "float32", "--output", tmp_path / "found.safetensors")
    lora("extract", "--tuned", tmp_path / "tuned.safetensors", *words)
    (module,) = (found := read_lora(tmp_path / "found.safetensors").adapters)
    assert module in name and "video_embeddings_connector" in module
    assert (change_of(found[module]) - change).norm() < 1e-3 * change.norm()
    without = {name: value for name, value in tensors.items() if "connector" not in name}
    save_file(without, tmp_path / "without.safetensors", metadata=metadata)
    with pytest.raises(UserError, match="no linear differs"):
        lora("extract", "--tuned", tmp_path / "without.safetensors", *words, "--overwrite")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_lora_is_made_of_what_is_not_finite(tiny_family, tmp_path, value):
    tensors, metadata = load_file(tiny_family.ltx23), dict(open_checkpoint(tiny_family.ltx23).metadata)
    name = next(name for name in tensors if name.endswith("transformer_blocks.0.attn1.to_q.weight"))
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] = value
    save_file(tensors, tmp_path / "bad.safetensors", metadata=metadata)
    for tuned, base in ((tmp_path / "bad.safetensors", tiny_family.ltx23), (tiny_family.ltx23, tmp_path / "bad.safetensors")):
        with pytest.raises(UserError, match=r"bad\.safetensors: 'transformer_blocks\.0\.attn1\.to_q\.weight' holds NaN or infinity"):
            lora("extract", "--tuned", tuned, "--base", base, "--output", tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()
