"""Each network type through the real program: trained, saved, read back, merged; starts, base LoRAs, rates, resuming."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from musubi_tuner import ltxv2_train_network
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.memory.quantized import QuantizedLinear
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.networks.types import TYPES
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import processes
from musubi_tuner.training.loop import train
from musubi_tuner.training.run import Outcome
from musubi_tuner.training.setup import make_hooks
from tests import training_parts as parts
from tests.conftest import REPOSITORY
from tests.model_parts import predict_latents

ARGS = {
    "lora": ["rank_dropout=0.2", "module_dropout=0.1", "neuron_dropout=0.1", "rank_stabilized=true", "audio_dim=2", "ranks=attn2:3"],
    "dora": ["type=dora", "preset=cross"],
    "lokr": ["type=lokr", "factor=4", "preset=all"],
    "loha": ["type=loha", "rank_dropout=0.2"],
    "full": ["type=full", r"include_patterns=blocks\.1\.attn1\.to_[qv]$,audio_ff"],
}
EVERY_LINEAR = ["type=full", "include_patterns=."]


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("daten ü"), tiny_family, "av", held_out=False)


def config_of(data: parts.Data, output: Path, *extra: str):
    flags = ("--output_dir", str(output), "--save_precision", "float32", "--max_train_steps", "3", *extra)
    return ltxv2_train_network.parse_arguments(data.arguments(*flags))


def load(data: parts.Data, output: Path, *extra: str):
    config = config_of(data, output, *extra)
    return parts.load(config, data)


@torch.no_grad()
def outputs(wrapper: OfficialLTXV2Wrapper) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    config = wrapper.config
    text = torch.randn(1, 16, config.video_context_width + config.audio_context_width, generator=generator)
    video = torch.randn(1, 128, 2, 2, 3, generator=generator)
    audio = torch.randn(1, 8, 6, 16, generator=generator)
    return list(predict_latents(wrapper, video, torch.tensor(500.0), text, audio_latents=audio))


def difference(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("kind", "args"), [*((kind, ARGS[kind]) for kind in TYPES), ("full", EVERY_LINEAR)], ids=[*TYPES, "full, every linear"]
)
def test_trained_saved_read_back_and_merged_networks_are_the_live_one(data, tmp_path, kind, args):
    config = config_of(data, tmp_path, "--network_args", *args, "--learning_rate", "1e-2" if args is not EVERY_LINEAR else "1e-3")
    with processes() as group:
        run, inputs = parts.build(config, group)
        train(run, Outcome(step=0), *make_hooks(run, inputs, None))
    live = outputs(run.wrapper)
    path = tmp_path / "ltxv2_lora.safetensors"
    with run.network.disabled():
        base = outputs(run.wrapper)
    assert difference(live, base) > 1e-2, "something was learned"

    fresh, _ = load(data, tmp_path, "--network_args", *args, "--network_weights", str(path))
    assert difference(outputs(fresh), live) < 1e-4
    shaped, network = load(data, tmp_path, "--network_weights", str(path), "--dim_from_weights")
    assert network.kind == kind and set(network.names) == set(run.network.names)
    assert difference(outputs(shaped), live) < 1e-4
    merged, network = load(data, tmp_path, "--base_weights", str(path))
    assert network.kind == "lora", "the new network starts on top"
    assert difference(outputs(merged), live) < 1e-4
    half, _ = load(data, tmp_path, "--base_weights", str(path), str(path), "--base_weights_multiplier", "0.0", "1.0")
    assert difference(outputs(half), live) < 1e-4

    tensors = load_file(path)
    if args is EVERY_LINEAR:
        linears = {name for name, module in merged.transformer.named_modules() if isinstance(module, torch.nn.Linear)}
        linears = {name.removesuffix(".base") for name in linears if ".lora" not in name}
        assert {name.removeprefix("diffusion_model.").removesuffix(".diff") for name in tensors} == linears
        assert all(bool(tensor.any()) for tensor in tensors.values()), "each of them has learned"
    assert not any("alpha" in name for name in tensors) and all(name.startswith("diffusion_model.") for name in tensors)
    metadata = open_checkpoint(path).metadata
    assert (metadata["ss_network_dim"] == "Dynamic") is (kind == "lora"), "whose arguments give some modules ranks of their own"
    assert metadata["ltxv2_network_type"] == kind and "folded" in metadata["ltxv2_network_scaling"]


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_a_resumed_run_equals_an_undisturbed_one_with_dropout_of_every_kind(data, tmp_path, kind):
    args = [*ARGS[kind], "module_dropout=0.2"] if kind == "dora" else ARGS[kind]
    flags = ["--network_args", *args, "--save_precision", "float32", "--save_state", "--save_every_n_steps", "2"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder, extra in (
        (whole, ["--max_train_steps", "4"]),
        (halves, ["--max_train_steps", "2"]),
        (halves, ["--max_train_steps", "4", "--resume", str(halves / "ltxv2_lora-step00000002-state")]),
    ):
        assert ltxv2_train_network.main(data.arguments("--output_dir", str(folder), *flags, *extra)) == 0
    one, other = (load_file(folder / "ltxv2_lora.safetensors") for folder in (whole, halves))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_checkpointing_changes_no_gradient_under_dropout(data, tmp_path):
    files = []
    for flag in ("--gradient_checkpointing", "--no-gradient_checkpointing"):
        folder = tmp_path / flag
        extra = ("--save_precision", "float32", "--max_train_steps", "2", flag, "--network_args", *ARGS["lora"])
        assert ltxv2_train_network.main(data.arguments("--output_dir", str(folder), *extra)) == 0
        files.append(load_file(folder / "ltxv2_lora.safetensors"))
    assert all(torch.allclose(files[0][name], files[1][name], atol=1e-6) for name in files[0])


def test_base_loras_stand_in_banner_and_metadata_and_add_up(data, tmp_path, caplog):
    name = "transformer_blocks.0.attn1.to_q"
    generator = torch.Generator().manual_seed(0)
    pair = {"lora_A.weight": torch.randn(2, 128, generator=generator), "lora_B.weight": torch.randn(128, 2, generator=generator)}
    save_file({f"diffusion_model.{name}.{leaf}": value for leaf, value in pair.items()}, tmp_path / "style.safetensors")
    kohya = {"lora_down.weight": pair["lora_A.weight"], "lora_up.weight": pair["lora_B.weight"], "alpha": torch.tensor(1.0)}
    save_file({f"lora_unet_{name.replace('.', '_')}.{leaf}": value for leaf, value in kohya.items()}, tmp_path / "motion.safetensors")
    flags = ("--base_weights", str(tmp_path / "style.safetensors"), str(tmp_path / "motion.safetensors"),
             "--base_weights_multiplier", "0.5", "2")  # fmt: skip
    plain, _ = load(data, tmp_path)
    merged, network = load(data, tmp_path, *flags)
    weights = [wrapper.transformer.get_submodule(name).base.weight for wrapper in (plain, merged)]
    expected = (0.5 + 2 * 0.5) * pair["lora_B.weight"] @ pair["lora_A.weight"]
    assert torch.allclose(weights[1] - weights[0], expected, atol=1e-4)
    other = "transformer_blocks.1.attn1.to_q"
    assert torch.equal(*(wrapper.transformer.get_submodule(other).base.weight for wrapper in (plain, merged)))
    with caplog.at_level(logging.INFO):
        assert ltxv2_train_network.main(data.arguments("--output_dir", str(tmp_path), "--max_train_steps", "1", *flags)) == 0
    assert "motion.safetensors x 2" in caplog.text
    metadata = open_checkpoint(tmp_path / "ltxv2_lora.safetensors").metadata
    assert json.loads(metadata["ltxv2_base_weights"]) == ["style.safetensors x 0.5", "motion.safetensors x 2"]


def test_files_that_do_not_fit_are_refused(data, tmp_path):
    def stored(name: str, module: str, width: int, metadata: dict[str, str] | None = None) -> str:
        tensors = {
            f"diffusion_model.{module}.lora_A.weight": torch.ones(2, width),
            f"diffusion_model.{module}.lora_B.weight": torch.ones(128, 2),
        }
        save_file(tensors, tmp_path / name, metadata)
        return str(tmp_path / name)

    query = "transformer_blocks.0.attn1.to_q"
    foreign, wide = stored("a.safetensors", "blocks.0.attn1.to_q", 128), stored("b.safetensors", query, 64)
    old = stored("c.safetensors", query, 128, {"ss_base_model_version": "ltx-2.0"})
    good, empty = stored("d.safetensors", query, 128), str(tmp_path / "e.safetensors")
    save_file({}, empty)
    more = {f"diffusion_model.transformer_blocks.0.attn1.to_k.{half}.weight": torch.ones(128, 3) for half in ("lora_A", "lora_B")}
    more["diffusion_model.transformer_blocks.0.attn1.to_k.lora_A.weight"] = torch.ones(3, 128)
    mixed = str(tmp_path / "f.safetensors")
    save_file(load_file(good) | more, mixed)
    for flags, message in (
        (("--base_weights", foreign), "adapts 1 module"),
        (("--base_weights", wide), "made for another model: .* takes 64 values .* 128 and 128 in this model"),
        (("--base_weights", empty), "holds no adapter"),
        (("--base_weights", wide, "--base_weights_multiplier", "1", "2"), "2 number"),
        (("--base_weights", old), "trained on ltx-2.0"),
        (("--network_weights", foreign), "adapts 1 module"),
        (("--network_weights", wide, "--network_dim", "2"), "made for another model"),
        (("--network_weights", wide, "--dim_from_weights"), "made for another model"),
        (("--network_weights", old, "--network_dim", "2"), "trained on ltx-2.0"),
        (("--network_weights", good), "--network_dim 2"),
        (("--network_weights", mixed), "its modules have ranks from 2 to 3; give --dim_from_weights"),
        (("--network_weights", good, "--network_args", "type=dora"), "type=lora"),
        (("--network_weights", good, "--network_args", "type=dora", "--dim_from_weights"), "takes over"),
        (("--dim_from_weights",), "needs --network_weights"),
        (("--network_dim", "1000000000"), "a rank of 1000000000 for .* must be at most 256"),
    ):
        with pytest.raises(UserError, match=message):
            load(data, tmp_path, *flags)


def test_a_start_is_described_and_what_is_left_out_is_named(data, tmp_path, caplog):
    halves = {"lora_A": torch.ones(2, 128), "lora_B": torch.ones(128, 2)}
    modules = ("transformer_blocks.0.attn1.to_q", "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q")
    stored = {f"transformer.{name}.{leaf}.default.weight": value.clone() for name in modules for leaf, value in halves.items()}
    save_file(stored, tmp_path / "a.safetensors", {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 8}'})
    flags = ("--network_args", r"include_patterns=[r'blocks\.0\.attn1\.to_q$', r'nothing_of_it']", "exclude_patterns=neither")
    with caplog.at_level(logging.INFO):
        _, network = load(data, tmp_path, "--network_dim", "2", "--network_weights", str(tmp_path / "a.safetensors"), *flags)
    assert network.names == ["transformer_blocks.0.attn1.to_q"]
    (layer,) = network.layers.values()
    assert torch.allclose(layer.file_tensors()["lora_B.weight"], 4 * halves["lora_B"])
    assert "a.safetensors: lora on 1 module(s) (video 1), keys transformer.*.lora_A, rank 2, scale 4 (" in caplog.text
    assert "its 1 adapter(s) of the text connectors are left out, first 'video_embeddings_connector" in caplog.text
    assert "include_patterns: the pattern 'nothing_of_it' matches no linear" in caplog.text
    assert "exclude_patterns: the pattern 'neither' matches no linear" in caplog.text and r"attn1\.to_q$' matches" not in caplog.text
    assert "change nothing" not in caplog.text
    shapes = ("--dim_from_weights", "--network_alpha", "4", "--network_args", "rank_stabilized=true", "rank_dropout=0")
    load(data, tmp_path, "--network_weights", str(tmp_path / "a.safetensors"), *shapes)
    assert "its own being folded in: --network_alpha 4, rank_stabilized=true change nothing" in caplog.text


def test_the_audio_side_learns_at_its_own_rate(data, tmp_path):
    flags = ("--audio_learning_rate", "0", "--max_train_steps", "2")
    assert ltxv2_train_network.main(data.arguments("--output_dir", str(tmp_path), *flags)) == 0
    ups = {
        name: bool(value.any()) for name, value in load_file(tmp_path / "ltxv2_lora.safetensors").items() if name.endswith("lora_B.weight")
    }
    silent = {name for name, moved in ups.items() if not moved}
    assert silent == {name for name in ups if ".audio_attn" in name or "video_to_audio" in name} and len(silent) < len(ups)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_trains_on_quantized_and_streamed_weights(data, tmp_path, kind):
    memory = ("--weight_format", "nf4", "--blocks_to_swap", "1")
    wrapper, network = load(data, tmp_path, "--network_args", *ARGS[kind], *memory)
    linears = [module for module in wrapper.modules() if isinstance(module, QuantizedLinear)]
    assert linears and any(isinstance(layer.base, QuantizedLinear) for layer in network.layers.values()) == (kind != "full")
    flags = ("--max_train_steps", "2", "--save_precision", "float32", "--network_args", *ARGS[kind], *memory)
    assert ltxv2_train_network.main(data.arguments("--output_dir", str(tmp_path), *flags)) == 0
    path = tmp_path / "ltxv2_lora.safetensors"
    started, network = load(data, tmp_path, "--network_args", *ARGS[kind], *memory, "--network_weights", str(path))
    with network.disabled():
        base = outputs(started)
    assert difference(outputs(started), base) > 1e-4
    assert all(bool(torch.isfinite(value).all()) for value in load_file(path).values())


def test_references_need_an_adapter(data, tmp_path):
    recipe = ("--conditioning_config", str(REPOSITORY / "conditioning_recipes" / "reference_video.toml"))
    with pytest.raises(UserError, match="type=full.*references"):
        load(data, tmp_path, *recipe, "--network_args", *ARGS["full"])


def test_full_weights_taken_from_a_file_stay_whole_beside_quantized_ones(data, tmp_path):
    flags = ["--output_dir", str(tmp_path), "--max_train_steps", "1", "--learning_rate", "1e-2"]
    assert ltxv2_train_network.main(data.arguments(*flags, "--network_args", *ARGS["full"])) == 0
    start = ("--network_weights", str(tmp_path / "ltxv2_lora.safetensors"), "--dim_from_weights", "--weight_format", "nf4")
    wrapper, network = load(data, tmp_path, *start)
    assert network.kind == "full"
    assert all(isinstance(layer.base, torch.nn.Linear) for layer in network.layers.values())
    assert any(isinstance(module, QuantizedLinear) for module in wrapper.modules())
