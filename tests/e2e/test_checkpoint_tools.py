"""Checkpoints inspected, verified, taken apart, joined, quantized and baked, and read again by the product's own loaders."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner import ltxv2_checkpoint, ltxv2_lora
from musubi_tuner.conversion.checkpoint import streaming
from musubi_tuner.ltxv2.quantization import read_quantization
from musubi_tuner.ltxv2.transformer.load import load_transformer
from musubi_tuner.ltxv2.versions import transformer_names
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.networks.merging import merge_weight
from musubi_tuner.networks.reading import read_network
from musubi_tuner.runtime.errors import TemporaryFailure, UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def checkpoint(*words, code=0):
    assert ltxv2_checkpoint.main([str(word) for word in words]) == code


def weights(path):
    """{official name: float32} of the transformer's tensors, quantized ones brought back."""
    opened = open_checkpoint(path)
    names = transformer_names(opened)
    quantization = read_quantization(opened, names)
    cpu = torch.device("cpu")
    return {
        name: quantization.restored(name, opened.tensor(full), cpu, torch.float32).float() for name, full in quantization.weights.items()
    }


def with_key(source, path):
    """The file with config keys that nothing here reads, at both levels."""
    tensors, opened = load_file(source), open_checkpoint(source)
    config = json.loads(opened.metadata["config"]) | {"a_number": 5}
    config["transformer"]["causal_temporal_positioning"] = True
    save_file(tensors, path, metadata=dict(opened.metadata) | {"config": json.dumps(config)})
    return path


@pytest.mark.parametrize("flags", [(), ("--folders",)])
def test_taken_apart_and_joined_it_is_the_same(tiny_family, tmp_path, capsys, flags):
    source = with_key(tiny_family.ltx23, tmp_path / "whole.safetensors")
    checkpoint("split", source, "--output_dir", tmp_path / "pack", *flags)
    assert {"transformer", "vae", "audio_vae", "vocoder", "text_projection"} <= {
        line.split()[0] for line in capsys.readouterr().out.splitlines() if line
    }
    files = sorted((tmp_path / "pack").rglob("*.safetensors"))
    assert len(files) == 5
    assert all(json.loads(open_checkpoint(path).metadata["config"])["transformer"]["causal_temporal_positioning"] for path in files)
    checkpoint("join", *(["--checkpoints", *files]), "--output", tmp_path / "again.safetensors")
    before, after = load_file(source), load_file(tmp_path / "again.safetensors")
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    old, new = open_checkpoint(source).metadata, open_checkpoint(tmp_path / "again.safetensors").metadata
    assert json.loads(old["config"]) == json.loads(new["config"])
    assert {key: value for key, value in old.items() if key != "config"} == {key: value for key, value in new.items() if key != "config"}
    pack = load_transformer(open_checkpoint(tmp_path / "pack"), mode="av", device="cpu", dtype=torch.float32).state_dict()
    whole = load_transformer(open_checkpoint(source), mode="av", device="cpu", dtype=torch.float32).state_dict()
    assert all(torch.equal(pack[name], whole[name]) for name in whole)


def test_a_pack_of_2_5_is_joined(tiny_family, tmp_path):
    files = [tiny_family.ltx25_transformer, tiny_family.ltx25_vae, tiny_family.ltx25_audio_vae]
    checkpoint("join", *files, "--output", tmp_path / "one.safetensors")
    one = open_checkpoint(tmp_path / "one.safetensors")
    assert len(one.names()) == sum(len(open_checkpoint(file).names()) for file in files)
    assert {"transformer", "vae", "audio_vae", "vocoder"} <= set(one.config)
    with pytest.raises(UserError, match=r"tensor '.*' is in .* too"):
        checkpoint("join", *files, tiny_family.ltx25_vae, "--output", tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="two releases|is in .* too"):
        checkpoint("join", tiny_family.ltx20, tiny_family.ltx25_vae, "--output", tmp_path / "two.safetensors")
    assert not (tmp_path / "two.safetensors").exists()


def test_it_says_what_is_in_a_file(tiny_family, tmp_path, capsys):
    source = with_key(tiny_family.ltx23, tmp_path / "my-distilled-1.safetensors")
    checkpoint("inspect", source, "--json", tmp_path / "facts.json", "--config")
    text, facts = capsys.readouterr().out, json.loads((tmp_path / "facts.json").read_text())
    assert "distilled, by its name" in text and "causal_temporal_positioning" in text
    assert (facts["version"], facts["quantization"]) == ("2.3", "")
    assert "causal_temporal_positioning" in facts["unknown"]["transformer"] and "num_layers" not in facts["unknown"]["transformer"]
    assert sum(one["tensors"] for one in facts["components"].values()) == len(load_file(source))
    checkpoint("inspect", tiny_family.ltx23)
    text = capsys.readouterr().out
    assert "neither its name nor its metadata say" in text and " MB " in text and "0.00" not in text, "small parts have a size too"


def test_what_is_wrong_with_a_file_is_found(tiny_family, tmp_path, capsys):
    checkpoint("verify", tiny_family.ltx23)
    text = capsys.readouterr().out
    assert "nothing is wrong with it" in text
    from hashlib import sha256

    assert sha256(tiny_family.ltx23.read_bytes()).hexdigest() in text
    tensors, opened = load_file(tiny_family.ltx23), open_checkpoint(tiny_family.ltx23)
    names = transformer_names(opened)
    del tensors[names["transformer_blocks.1.attn1.to_q.bias"]]
    tensors[names["transformer_blocks.0.attn1.to_k.weight"]] = torch.zeros(3, 5)
    tensors[names["proj_out.bias"]] = tensors[names["proj_out.bias"]].float() * float("nan")
    tensors[names["proj_out.bias"].replace("proj_out", "proj_in_new")] = torch.zeros(2)
    save_file(tensors, tmp_path / "bad.safetensors", metadata=dict(opened.metadata))
    checkpoint("verify", tmp_path / "bad.safetensors", code=1)
    text = capsys.readouterr().out
    for says in ("lacks 'transformer_blocks.1.attn1.to_q.bias'", "proj_in_new", "(3, 5)", "proj_out.bias' holds NaN", "4 problem(s)"):
        assert says in text


@pytest.fixture(scope="module")
def wide(tiny_family, tmp_path_factory):
    """The tiny checkpoint with all linears of its blocks 256 wide, as ConvRot takes them: transformer tensors alone, random."""
    folder = tmp_path_factory.mktemp("wide")
    opened = open_checkpoint(tiny_family.ltx23)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, full in transformer_names(opened).items():
        shape = opened.shape(full)
        is_linear = name.startswith("transformer_blocks") and len(shape) == 2 and name.endswith(".weight") and "gate" not in name
        tensors[full] = torch.randn((shape[0], 256) if is_linear else shape, generator=generator).bfloat16()
    save_file(tensors, folder / "wide.safetensors", metadata={"model_version": "2.3"})
    return folder / "wide.safetensors"


@pytest.mark.parametrize(
    ("form", "most", "says"),
    [("fp8", 0.04, "fp8 e4m3"), ("int8", 0.012, "int8, one"), ("int8_convrot", 0.012, "int8 ConvRot (groups of 256)")],
)
def test_quantized_files_are_read_back_within_their_error(wide, tmp_path, capsys, caplog, form, most, says):
    caplog.set_level("INFO")
    checkpoint("quantize", wide, "--to", form, "--keep_blocks", "0", "--output", tmp_path / "small.safetensors")
    before, after = weights(wide), weights(tmp_path / "small.safetensors")
    assert set(before) == set(after)
    changed = {
        name: float((after[name] - before[name]).norm() / before[name].norm())
        for name in before
        if not torch.equal(after[name], before[name])
    }
    linears = [
        name
        for name in before
        if name.startswith("transformer_blocks") and before[name].ndim == 2 and name.endswith("weight") and "gate" not in name
    ]
    assert set(changed) == set(linears) and max(changed.values()) < most
    opened = open_checkpoint(tmp_path / "small.safetensors")
    assert says in read_quantization(opened, transformer_names(opened)).receipt
    mean = sum(changed.values()) / len(changed)
    assert f"{max(changed.values()):.3%}" in capsys.readouterr().out and mean > 0.001
    with pytest.raises(UserError, match="already"):
        checkpoint("quantize", tmp_path / "small.safetensors", "--to", "int8", "--output", tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no linear of its"):
        checkpoint("quantize", wide, "--to", form, "--keep_blocks", "1", "--output", tmp_path / "x.safetensors")


def test_convrot_makes_outliers_smaller(wide, tmp_path):
    """What it is for: a column that is larger than all others costs every other number of its row its precision."""
    tensors = load_file(wide)
    for name, value in tensors.items():
        if value.ndim == 2 and value.shape[1] == 256:
            value[:, 7] *= 100
            tensors[name] = value
    save_file(tensors, tmp_path / "outliers.safetensors", metadata={"model_version": "2.3"})
    errors = {}
    for form in ("int8", "int8_convrot"):
        checkpoint(
            "quantize", tmp_path / "outliers.safetensors", "--to", form, "--keep_blocks", "0", "--output", tmp_path / f"{form}.safetensors"
        )
        before, after = weights(tmp_path / "outliers.safetensors"), weights(tmp_path / f"{form}.safetensors")
        name = "transformer_blocks.0.attn1.to_q.weight"
        rest = [place for place in range(256) if place != 7]
        errors[form] = float((after[name] - before[name])[:, rest].norm())
    assert errors["int8_convrot"] < 0.5 * errors["int8"]


@pytest.mark.parametrize("form", ["bf16", "fp8", "int8", "int8_convrot"])
def test_a_baked_lora_is_in_the_weights_in_their_own_form(wide, tmp_path, caplog, form):
    caplog.set_level("INFO")
    source = wide
    if form != "bf16":
        source = tmp_path / "source.safetensors"
        checkpoint("quantize", wide, "--to", form, "--keep_blocks", "0", "--output", source)
    before = weights(source)
    modules = ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.audio_attn1.to_v", "transformer_blocks.1.ff.net.0.proj"]
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for module in modules:
        rows, columns = before[f"{module}.weight"].shape
        tensors[f"diffusion_model.{module}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
        tensors[f"diffusion_model.{module}.lora_B.weight"] = 0.3 * torch.randn(rows, 4, generator=generator)
    save_file(tensors, tmp_path / "lora.safetensors")
    checkpoint("bake", source, "--lora", f"{tmp_path / 'lora.safetensors'}:0.5:1:2", "--output", tmp_path / "baked.safetensors")
    after = weights(tmp_path / "baked.safetensors")
    network = read_network(tmp_path / "lora.safetensors", {module: None for module in modules})
    bound = {"bf16": 0.003, "fp8": 0.04, "int8": 0.012, "int8_convrot": 0.012}[form]
    for name, value in before.items():
        module = name.removesuffix(".weight")
        if module in modules:
            wanted = merge_weight(value, network.adapters[module], 1.0 if "audio" in module else 0.5)
            assert (after[name] - wanted).norm() < bound * wanted.norm() and not torch.equal(after[name], value)
        else:
            assert torch.equal(after[name], value)
    old, new = open_checkpoint(source), open_checkpoint(tmp_path / "baked.safetensors")
    assert old.names() == new.names() and all(old.dtype(name) == new.dtype(name) for name in old.names())
    assert new.metadata["ltxv2_baked_loras"] == "lora.safetensors x 0.5 (sound 1)"
    assert "3 weights changed" in caplog.text


def test_a_lora_of_another_model_is_not_baked(wide, tmp_path):
    key = "diffusion_model.transformer_blocks.0.attn1.to_q.lora_"
    for module, size, says in ((key, 7, "does not fit"), (key.replace("blocks.0", "blocks.40"), 256, "has no")):
        save_file({f"{module}A.weight": torch.ones(1, size), f"{module}B.weight": torch.ones(4, 1)}, tmp_path / "lora.safetensors")
        with pytest.raises(UserError, match=says):
            checkpoint("bake", wide, "--lora", tmp_path / "lora.safetensors", "--output", tmp_path / "baked.safetensors")
        assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"], "nothing is left"


def test_a_lora_of_another_release_is_not_baked(wide, tmp_path):
    key = "diffusion_model.transformer_blocks.0.attn1.to_q.lora_"
    tensors = {f"{key}A.weight": torch.ones(1, 256), f"{key}B.weight": torch.ones(256, 1)}
    save_file(tensors, tmp_path / "lora.safetensors", {"ss_base_model_version": "ltx-2.0"})
    with pytest.raises(UserError, match=f"lora.safetensors: was trained on ltx-2.0, and {wide} is ltx-2.3"):
        checkpoint("bake", wide, "--lora", tmp_path / "lora.safetensors", "--output", tmp_path / "baked.safetensors")


def test_what_is_asked_of_the_wrong_file_is_told_what_it_is(tiny_family, tmp_path):
    to_file = ("--to", "single_file", "--output", tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="is a single file already.*ltxv2 checkpoint join.*--to diffusers"):
        checkpoint("convert", tiny_family.ltx23, *to_file)
    pack = tmp_path / "a pack"
    pack.mkdir()
    shutil.copy(tiny_family.ltx25_duration_head, pack / "head.safetensors")
    with pytest.raises(UserError, match=f'but files of a checkpoint.*ltxv2 checkpoint join "{pack}"'):
        checkpoint("convert", pack, *to_file)
    quantized = ("--to", "fp8", "--output", tmp_path / "small.safetensors")
    with pytest.raises(UserError, match=r"no linear of its 2 blocks is left to be quantized. Give --keep_blocks 0\."):
        checkpoint("quantize", tiny_family.ltx23, *quantized)


def test_nothing_is_overwritten_and_a_full_disk_is_known_before(tiny_family, tmp_path, monkeypatch):
    source = shutil.copy(tiny_family.ltx23, tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match="is there already"):
        checkpoint("quantize", source, "--to", "int8", "--keep_blocks", "0", "--output", source)
    checkpoint("split", source, "--output_dir", tmp_path / "pack")
    with pytest.raises(UserError, match="is there already"):
        checkpoint("split", source, "--output_dir", tmp_path / "pack")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(TemporaryFailure, match=r"takes .* GB, and its disk has 0\.0 GB free"):
        checkpoint("split", source, "--output_dir", tmp_path / "other")
    assert not list((tmp_path / "other").rglob("*.safetensors"))


def test_a_killed_run_leaves_nothing_false(tiny_family, tmp_path):
    """Killed in the midst of writing: no file of the asked name, and the next run writes it whole."""
    code = (
        "import sys, time\n"
        "from musubi_tuner import ltxv2_checkpoint\n"
        "from musubi_tuner.conversion.checkpoint import streaming\n"
        "real = streaming._pieces\n"
        "def slow(part):\n"
        "    time.sleep(0.05)\n"
        "    yield from real(part)\n"
        "streaming._pieces = slow\n"
        "ltxv2_checkpoint.main(sys.argv[1:])\n"
    )
    words = ["quantize", str(tiny_family.ltx23), "--to", "int8", "--keep_blocks", "0", "--output", str(tmp_path / "small.safetensors")]
    child = subprocess.Popen([sys.executable, "-c", code, *words], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / ".small.safetensors.tmp").exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(UserError, match=rf"process {child.pid} on .* is at work on .*small.safetensors. Wait for it to end"):
        checkpoint(*words)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert {path.suffix for path in tmp_path.iterdir()} == {".tmp"}
    checkpoint(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]
    checkpoint("verify", tmp_path / "small.safetensors")


def changed(source, path, change):
    """The file with `change` done to its tensors."""
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, path, metadata=dict(open_checkpoint(source).metadata))
    return path


@pytest.mark.parametrize(
    ("mark", "component"),
    [
        ("vae.encoder.", "vae"),
        ("vae.decoder.", "vae"),
        ("audio_vae.decoder.", "audio_vae"),
        ("vocoder.", "vocoder"),
        ("text_embedding_projection.", "text_projection"),
        ("video_embeddings_connector.transformer", "text_projection"),
        ("audio_embeddings_connector.learnable_registers", "text_projection"),
    ],
)
def test_every_component_is_held_against_its_config(tiny_family, tmp_path, capsys, mark, component):
    def name_in(tensors):
        return next(name for name in tensors if f".{mark}" in f".{name}")

    def reshaped(tensors):
        tensors[name_in(tensors)] = torch.zeros(3, 5, 7)

    for change in (lambda tensors: tensors.pop(name_in(tensors)), reshaped):
        checkpoint("verify", changed(tiny_family.ltx23, tmp_path / "bad.safetensors", change), code=1)
        text = capsys.readouterr().out
        assert "1 problem(s)" in text
        (row,) = [line for line in text.splitlines() if line.startswith(f"{component} ")]
        assert "names and shapes differ" in row


def test_components_by_themselves_are_whole(tiny_family, tmp_path, capsys):
    checkpoint("split", tiny_family.ltx23, "--output_dir", tmp_path / "pack")
    family = tiny_family
    files = [*(tmp_path / "pack").iterdir(), family.ltx20, family.ltx25_transformer, family.ltx25_vae, family.ltx25_diffusion_vae]
    for file in (*files, family.ltx25_audio_vae, family.ltx25_duration_head):
        checkpoint("verify", file)
        assert "nothing is wrong with it" in capsys.readouterr().out, file
    (text_side,) = (tmp_path / "pack").glob("*text_projection*")
    checkpoint("verify", text_side)
    assert capsys.readouterr().out.count("not in this file, though its config describes it") == 4
    checkpoint("verify", family.ltx25_gemma)
    assert "not checked" in capsys.readouterr().out, "an encoder is no component of a checkpoint, and this is said"


def lora_for(source, path, *, size=1.0):
    """A LoRA on one linear of a checkpoint, whose change is `size` everywhere."""
    module = "transformer_blocks.0.attn1.to_q"
    rows, columns = open_checkpoint(source).shape(transformer_names(open_checkpoint(source))[f"{module}.weight"])
    key = f"diffusion_model.{module}.lora_"
    save_file({f"{key}A.weight": torch.ones(1, columns), f"{key}B.weight": torch.full((rows, 1), float(size))}, path)
    return path


def test_what_a_dtype_cannot_hold_is_not_baked(wide, tmp_path, caplog):
    caplog.set_level("INFO")

    def halved(tensors):
        for name, value in tensors.items():
            tensors[name] = value.half()

    source = changed(wide, tmp_path / "half.safetensors", halved)
    lora = lora_for(source, tmp_path / "lora.safetensors", size=1e5)
    with pytest.raises(UserError, match=r"'.*attn1.to_q.weight' would hold NaN or infinity in float16. Lower the strength"):
        checkpoint("bake", source, "--lora", lora, "--output", tmp_path / "baked.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.safetensors", "lora.safetensors"], "nothing is left"
    lora_for(wide, lora, size=1e30)
    checkpoint("bake", wide, "--lora", lora, "--output", tmp_path / "baked.safetensors")
    assert "1 weights changed" in caplog.text and "inf" not in caplog.text and "nan" not in caplog.text


def test_a_bake_that_changes_nothing_is_refused_before(wide, tmp_path):
    lora = lora_for(wide, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="at strength 0 no weight would change"):
        checkpoint("bake", wide, "--lora", f"{lora}:0", "--output", tmp_path / "baked.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_a_lora_of_another_size_is_told_before_anything_is_written(wide, tmp_path, monkeypatch):
    from musubi_tuner.conversion.checkpoint import streaming

    monkeypatch.setattr(streaming, "write_stream", lambda *words: pytest.fail("the pass began"))
    key = "diffusion_model.transformer_blocks.0.attn1.to_q.lora_"
    save_file({f"{key}A.weight": torch.ones(1, 7), f"{key}B.weight": torch.ones(4, 1)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"is for a weight of \(4, 7\) and does not fit .* It was made for another model"):
        checkpoint("bake", wide, "--lora", tmp_path / "lora.safetensors", "--output", tmp_path / "baked.safetensors")


def test_files_where_folders_should_be(wide, tmp_path):
    (tmp_path / "file").write_text("mine")
    for words in (("split", wide, "--output_dir"), ("split", wide, "--folders", "--output_dir")):
        with pytest.raises(UserError, match="file is a file, not a folder"):
            checkpoint(*words, tmp_path / "file")
    with pytest.raises(UserError, match="file is a file, not a folder"):
        checkpoint("quantize", wide, "--to", "int8", "--keep_blocks", "0", "--output", tmp_path / "file" / "deep" / "x.safetensors")
    assert (tmp_path / "file").read_text() == "mine"


def test_json_takes_the_place_of_no_file_unasked(tiny_family, tmp_path):
    source = Path(shutil.copy(tiny_family.ltx23, tmp_path / "mine.safetensors"))
    with pytest.raises(UserError, match="is the name of a model's file"):
        checkpoint("inspect", source, "--json", source, "--overwrite")
    assert source.read_bytes() == tiny_family.ltx23.read_bytes()
    checkpoint("inspect", source, "--json", tmp_path / "facts.json")
    with pytest.raises(UserError, match="facts.json: is there already"):
        checkpoint("inspect", source, "--json", tmp_path / "facts.json")
    checkpoint("inspect", source, "--json", tmp_path / "facts.json", "--overwrite")


def test_a_link_is_replaced_and_what_it_points_to_stays(wide, tmp_path):
    (tmp_path / "target.safetensors").write_text("mine")
    link = tmp_path / "link.safetensors"
    try:
        link.symlink_to(tmp_path / "target.safetensors")
    except OSError:
        pytest.skip("no links on this system")
    words = ("bake", wide, "--lora", lora_for(wide, tmp_path / "lora.safetensors"), "--output", link)
    with pytest.raises(UserError, match="is there already"):
        checkpoint(*words)
    checkpoint(*words, "--overwrite")
    assert not link.is_symlink() and (tmp_path / "target.safetensors").read_text() == "mine"


def test_a_sound_file_without_prefixes_is_known_by_its_config(tiny_family, tmp_path, capsys):
    tensors = {
        name.removeprefix("audio_vae."): value for name, value in load_file(tiny_family.ltx23).items() if name.startswith("audio_vae.")
    }
    config = {"audio_vae": dict(open_checkpoint(tiny_family.ltx23).config["audio_vae"])}
    save_file(tensors, tmp_path / "sound.safetensors", metadata={"config": json.dumps(config)})
    checkpoint("verify", tmp_path / "sound.safetensors")
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("audio_vae ")]
    assert "names and shapes fit" in row


def test_where_two_checkpoints_begin_to_differ(tiny_family, tmp_path, capsys):
    tensors, opened = load_file(tiny_family.ltx23), open_checkpoint(tiny_family.ltx23)
    names = transformer_names(opened)
    changed = tensors | {names["transformer_blocks.1.ff.net.2.weight"]: tensors[names["transformer_blocks.1.ff.net.2.weight"]].clone()}
    changed[names["transformer_blocks.1.ff.net.2.weight"]][0, 0] += 0.5
    changed[names["proj_out.bias"]] = changed[names["proj_out.bias"]].to(torch.bfloat16)
    bare = {name.removeprefix("model.diffusion_model."): value for name, value in changed.items()}
    save_file(bare, tmp_path / "changed.safetensors", metadata=dict(opened.metadata))
    checkpoint("compare", tiny_family.ltx23, tmp_path / "changed.safetensors", "--tolerance", "0.1", code=1)
    text = capsys.readouterr().out
    assert "the first that differs: block 1, transformer_blocks.1.ff.net.2.weight" in text and "they differ" in text
    assert "1 tensor(s) are stored as float32 and as bfloat16" in text and "alone" not in text
    assert [line.split()[:4] for line in text.splitlines() if line.startswith("block 1")][0][3] == "1"

    changed[names["transformer_blocks.0.attn1.to_q.bias"]] = changed[names["transformer_blocks.0.attn1.to_q.bias"]] * float("nan")
    del changed[names["audio_proj_out.bias"]]
    changed["more"], changed[names["proj_out.bias"]] = torch.zeros(2), torch.zeros(3)
    save_file(changed, tmp_path / "worse.safetensors", metadata=dict(opened.metadata))
    checkpoint("compare", tiny_family.ltx23, tmp_path / "worse.safetensors", code=1)
    text = capsys.readouterr().out
    assert "the first that differs: block 0, transformer_blocks.0.attn1.to_q.bias" in text and "inf" in text
    assert "alone: 1 tensor(s), audio_proj_out.bias" in text and "alone: 1 tensor(s), more" in text and "(128,) and (3,)" in text


def test_the_same_in_another_form_is_the_same(tiny_family, tmp_path, capsys):
    checkpoint("split", tiny_family.ltx23, "--output_dir", tmp_path / "pack")
    checkpoint("compare", tiny_family.ltx23, tmp_path / "pack")
    words = ["--to", "diffusers", "--output_dir", tmp_path / "tree", "--gemma_path", tiny_family.gemma]
    checkpoint("convert", tiny_family.ltx23, *words)
    checkpoint("compare", tmp_path / "tree", tiny_family.ltx23)
    assert capsys.readouterr().out.count("they hold the same") == 2
    checkpoint("quantize", tiny_family.ltx23, "--to", "fp8", "--keep_blocks", "0", "--output", tmp_path / "fp8.safetensors")
    checkpoint("compare", tiny_family.ltx23, tmp_path / "fp8.safetensors", code=1)
    text = capsys.readouterr().out
    assert "the first that differs: block 0" in text and "as float32 and as float8_e4m3fn" in text and "alone" not in text
    checkpoint("compare", tiny_family.ltx23, tmp_path / "fp8.safetensors", "--tolerance", "1")
    assert "they hold the same, but for differences of at most 1\n" in capsys.readouterr().out
    checkpoint("compare", tiny_family.ltx23, tmp_path / "fp8.safetensors", "--tolerance", "0.1")
    with pytest.raises(UserError, match="are the same file"):
        checkpoint("compare", tiny_family.ltx23, tiny_family.ltx23)
    with pytest.raises(UserError, match="1 given; two are compared"):
        checkpoint("compare", tiny_family.ltx23)


@pytest.mark.parametrize("words", [("quantize", "--to", "int8", "--keep_blocks", "0"), ("join",)])
def test_a_file_that_changes_while_it_is_read_is_not_copied_in_part(tiny_family, tmp_path, monkeypatch, words):
    source = tmp_path / "in" / "mine.safetensors"
    source.parent.mkdir()
    shutil.copy(tiny_family.ltx23, source)
    real = streaming._pieces

    def pieces(part):
        if part.name.endswith("transformer_blocks.1.attn1.to_q.weight"):
            newer = source.with_name("newer")  # as a download does it
            newer.write_bytes(source.read_bytes())
            newer.replace(source)
        yield from real(part)

    monkeypatch.setattr(streaming, "_pieces", pieces)
    given = source.parent if words == ("join",) else source
    with pytest.raises(UserError, match=r"mine\.safetensors: was changed by another program while it was in use"):
        checkpoint(words[0], given, *words[1:], "--output", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_file_without_tensors_is_not_taken_apart(tmp_path, capsys):
    save_file({}, tmp_path / "empty.safetensors", metadata={"model_version": "2.3"})
    for words in (("split", tmp_path / "empty.safetensors", "--output_dir", tmp_path / "out"),
                  ("join", tmp_path, "--output", tmp_path / "out.safetensors")):  # fmt: skip
        with pytest.raises(UserError, match="holds no tensors"):
            checkpoint(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.safetensors"]


@pytest.mark.parametrize(
    ("form", "value", "says"),
    [
        ("fp8", math.nan, "holds NaN or infinity"),
        ("int8", math.inf, "holds NaN or infinity"),
        ("fp8", 3e38, None),
        ("int8_convrot", 3e38, "has values that int8_convrot cannot hold"),
    ],
)
def test_what_is_not_finite_is_not_quantized(wide, tmp_path, form, value, says):
    full = next(name for name in load_file(wide) if name.endswith("transformer_blocks.0.attn1.to_q.weight"))

    def change(tensors):
        tensors[full] = tensors[full].float()
        tensors[full][0] = value

    path = changed(wide, tmp_path / "bad.safetensors", change)
    words = ("quantize", path, "--to", form, "--keep_blocks", "0", "--output", tmp_path / "small.safetensors")
    if says is None:
        checkpoint(*words)
        assert all(bool(one.isfinite().all()) for one in weights(tmp_path / "small.safetensors").values())
        return
    with pytest.raises(UserError, match=rf"bad.safetensors: '{re.escape(full)}' {says}"):
        checkpoint(*words)
    assert [one.name for one in tmp_path.iterdir()] == ["bad.safetensors"]


def test_what_is_read_is_not_replaced_by_what_is_made_of_it(tiny_family, tmp_path):
    source = tmp_path / "vae" / "model.safetensors"
    source.parent.mkdir()
    shutil.copy(tiny_family.ltx23, source)
    network = shutil.copy(tiny_family.distilled_lora, tmp_path / "lora.safetensors")
    for main, words in (
        (ltxv2_checkpoint.main, ("split", source, "--folders", "--output_dir", tmp_path)),
        (ltxv2_checkpoint.main, ("bake", source, "--lora", f"{network}:0.5", "--output", network)),
        (ltxv2_lora.main, ("extract", "--tuned", source, "--base", tiny_family.ltx23, "--output", source)),
    ):
        with pytest.raises(UserError, match="is one of the files that are read, and would be lost"):
            main([*map(str, words), "--overwrite"])
    assert source.read_bytes() == tiny_family.ltx23.read_bytes() and network.read_bytes() == tiny_family.distilled_lora.read_bytes()
    assert sorted(path.name for path in tmp_path.rglob("*.safetensors")) == ["lora.safetensors", "model.safetensors"]
