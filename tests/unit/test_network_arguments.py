"""`--network_args`: defaults, shapes of each module, optimizer groups, mistakes."""

import pytest
import torch
from safetensors.torch import save_file

from musubi_tuner.networks.arguments import network_arguments
from musubi_tuner.networks.lora_ltxv2 import create_network
from musubi_tuner.networks.reading import read_network
from musubi_tuner.networks.targets import is_audio_side, linear_names, linear_shapes
from musubi_tuner.runtime.errors import UserError
from tests.engine_parts import RANK, make_model

SELF, SOUND = "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.audio_attn1.to_q"
HEARD, SEEN = "transformer_blocks.1.audio_to_video_attn.to_v", "transformer_blocks.1.video_to_audio_attn.to_v"


def spec(name: str, **args: str):
    return network_arguments(args, dim=32, alpha=16).spec(name)


def test_defaults():
    plain = spec(SELF)
    assert (plain.rank, plain.alpha, plain.scale) == (32, 16, 0.5)
    assert (plain.dropout.rank, plain.dropout.module, plain.dropout.neuron) == (0.1, 0, 0)
    assert spec(SELF, type="lokr").dropout.rank == spec(SELF, type="loha").dropout.rank == 0


def test_the_audio_side_is_what_goes_into_the_sound():
    assert [is_audio_side(name) for name in (SELF, SOUND, HEARD, SEEN)] == [False, True, False, True]
    for name, rank in ((SELF, 32), (SOUND, 8), (HEARD, 32), (SEEN, 8)):
        assert spec(name, audio_dim="8").rank == rank
    assert spec(SOUND, audio_dim="8").scale == 0.5, "alpha follows the rank"
    assert spec(SOUND, audio_dim="8", audio_alpha="8").scale == 1
    assert spec(SOUND, audio_alpha="32").scale == 1


@pytest.mark.parametrize(
    ("name", "into_audio"),
    [
        ("av_ca_v2a_gate_adaln_single.linear", True), ("av_ca_a2v_gate_adaln_single.linear", False),
        ("av_ca_audio_scale_shift_adaln_single.linear", True), ("av_ca_video_scale_shift_adaln_single.linear", False),
        ("transformer_blocks.0.scale_shift_table_a2v_ca_audio", True), ("transformer_blocks.0.scale_shift_table_a2v_ca_video", False),
        ("transformer_blocks.0.audio_to_video_attn.to_gate_logits", False), ("audio_proj_out", True), ("proj_out", False),
    ],
)  # fmt: skip
def test_gates_and_tables_of_the_attention_across_are_of_the_stream_they_go_into(name, into_audio):
    assert is_audio_side(name) is into_audio


def test_patterns_win_over_the_audio_side_and_the_first_that_fits_counts():
    args = {"ranks": r"audio_attn\d:4,blocks\.1\.:64", "alphas": "to_v$:1", "audio_dim": "8"}
    assert [(spec(name, **args).rank, spec(name, **args).alpha) for name in (SELF, SOUND, HEARD, SEEN)] == [
        (32, 16), (4, 2), (64, 1), (64, 1)]  # fmt: skip


def test_every_module_gets_its_own_rank():
    model, _ = make_model(layers=1)
    fresh = type(model)(model.config)
    network = create_network(fresh, dim=4, alpha=4, args={"ranks": "attn1:2,attn2:6", "audio_dim": "3"}, seed=0)
    assert {network.layers[name].lora_A.shape[0] for name in network.names} == {2, 3, 4, 6}
    assert network.max_rank == 6


def like_a_file(tmp_path, written: dict[str, str], **args: str):
    """A network whose type and shapes are those of a file that was written with `written`, and which takes `args`."""
    model, network = make_model(layers=1, args={"include_patterns": "attn1", **written})
    save_file(network.file_tensors(torch.float32), tmp_path / "a.safetensors")
    fresh = type(model)(model.config)
    return create_network(fresh, dim=32, alpha=4, args=args, seed=0, like=read_network(tmp_path / "a.safetensors", linear_shapes(fresh)))


@pytest.mark.parametrize(("kind", "dropout"), [("lora", 0.1), ("dora", 0.1), ("lokr", 0), ("loha", 0)])
def test_defaults_are_those_of_the_type_that_a_file_gives(tmp_path, kind, dropout):
    network = like_a_file(tmp_path, {"type": kind})
    assert network.kind == kind and {layer.spec.dropout.rank for layer in network.layers.values()} == {dropout}
    if kind in ("lokr", "loha"):
        with pytest.raises(UserError, match=f"loraplus_lr_ratio=.*not to type={kind}"):
            like_a_file(tmp_path, {"type": kind}, loraplus_lr_ratio="4")


def test_ranks_and_alphas_of_modules_without_an_adapter_are_idle():
    args = {"ranks": r"attn1:2,ff\.:64", "alphas": "to_q:2,nothing:1", "exclude_patterns": r"ff\."}
    model, network = make_model(layers=1, args=args)
    names = [name.removesuffix(".base") for name in linear_names(model)]
    assert network.idle_patterns(names) == [("ranks", r"ff\."), ("alphas", "nothing")]


def test_rank_and_alpha_that_are_told_are_those_of_the_layers(tmp_path):
    assert like_a_file(tmp_path, {}, rank_stabilized="true").rank_and_alpha == (RANK, RANK), "not 32 and 4, as the flags say"
    assert like_a_file(tmp_path, {"ranks": "to_q:2"}).rank_and_alpha == ("Dynamic", "Dynamic")
    assert make_model(layers=1, args={"alphas": "to_q:2"})[1].rank_and_alpha == (RANK, "Dynamic")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"rank_dropuot": "0.1"}, "did you mean rank_dropout"), ({"type": "locon"}, "one of lora, dora"),
        ({"rank_dropout": "1"}, "less than 1"),
        ({"module_dropout": "x"}, "must be a number"), ({"ranks": "attn1"}, "REGEX:NUMBER"), ({"ranks": "attn1:0"}, "1 at least"),
        ({"ranks": "(:2"}, "regular expression"), ({"factor": "4"}, "belongs to type=lokr"), ({"audio_dim": "2.5"}, "whole number"),
        ({"type": "lokr", "loraplus_lr_ratio": "4"}, "belongs to type=lora or type=dora"), ({"type": "full"}, "include_patterns"),
        ({"type": "full", "include_patterns": "a", "ranks": "a:1"}, "not to type=full"), ({"rank_stabilized": "maybe"}, "true or false"),
        ({"type": "dora", "dora_key": "x"}, "lora_magnitude_vector, dora_scale"), ({"alphas": "a:0"}, "above 0"),
    ],
)  # fmt: skip
def test_mistakes_are_named(args, message):
    with pytest.raises(UserError, match=message):
        network_arguments(args, dim=4, alpha=4)


def groups(args: dict[str, str], *rates: float) -> dict[float, int]:
    network = create_network(type(made := make_model(layers=1)[0])(made.config), dim=4, alpha=4, args=args, seed=0)
    found = network.parameter_groups(*rates)
    assert sum(len(group["params"]) for group in found) == len(network.parameters())
    return {group["lr"]: len(group["params"]) for group in found}


def test_groups_of_the_optimizer():
    # one block: 6 attentions of 4 linears, 3 of these attentions on the audio side, two tensors each
    assert groups({}, 1e-4) == {1e-4: 48}
    assert groups({}, 1e-4, 1e-5) == {1e-4: 24, 1e-5: 24}
    assert groups({"loraplus_lr_ratio": "4"}, 1.0) == {1.0: 24, 4.0: 24}
    assert groups({"loraplus_lr_ratio": "4"}, 1.0, 0.5) == {1.0: 12, 4.0: 12, 0.5: 12, 2.0: 12}
    with pytest.raises(UserError, match="no audio module"):
        groups({"preset": "video"}, 1e-4, 1e-5)


def test_loraplus_trains_b_faster():
    model, _ = make_model(layers=1)
    network = create_network(type(model)(model.config), dim=4, alpha=4, args={"loraplus_lr_ratio": "16"}, seed=0)
    fast = next(group["params"] for group in network.parameter_groups(1.0) if group["lr"] == 16)
    assert {id(p) for p in fast} == {id(layer.lora_B) for layer in network.layers.values()}
    optimizer = torch.optim.SGD(network.parameter_groups(1.0), lr=1.0)
    before = [p.detach().clone() for p in network.parameters()]
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {round(float((old - new).max()), 3) for old, new in zip(before, network.parameters(), strict=True)}
    assert moved == {1.0, 16.0}
