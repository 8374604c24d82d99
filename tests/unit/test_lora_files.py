"""LoRA files: forms that are read, checks before one is written; targets; losses and optimizers."""

import errno
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.networks import formats
from musubi_tuner.networks.lora import DOWN, MAGNITUDE, UP
from musubi_tuner.networks.lora_ltxv2 import create_network
from musubi_tuner.networks.lycoris import W1, W2, W2_DOWN, W2_UP
from musubi_tuner.networks.reading import read_network
from musubi_tuner.networks.targets import TargetChoice, choose_targets, count_by_stream
from musubi_tuner.networks.types import DIFF
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.checkpoint import remove_old_loras
from musubi_tuner.training.objective import ItemLosses, masked_mean, squared_error, total_loss
from musubi_tuner.training.optimizer import ScheduleOptions, evaluating, make_optimizer, make_scheduler, try_out
from musubi_tuner.training.state import state_path
from musubi_tuner.training.state_folders import remove_old_states

NAMES = ["transformer_blocks.0.attn1.to_q", "transformer_blocks.0.audio_attn1.to_out.0"]
LINEARS = dict.fromkeys(NAMES, (6, 8))
SHAPES = {
    "lora": {DOWN: (4, 8), UP: (6, 4)},
    "dora": {DOWN: (4, 8), UP: (6, 4), MAGNITUDE: (6,)},
    "lokr": {W1: (2, 2), W2_UP: (3, 4), W2_DOWN: (4, 4)},
    "loha": {"hada_w1_a": (6, 4), "hada_w1_b": (4, 8), "hada_w2_a": (6, 4), "hada_w2_b": (4, 8)},
    "full": {DIFF: (6, 8)},
}
SCALED = {"lora": UP, "dora": UP, "lokr": W2_UP, "loha": "hada_w2_a"}
ZERO = (UP, W2, W2_DOWN, "hada_w2_a", DIFF)


def contents(kind: str) -> formats.Contents:
    generator = torch.Generator().manual_seed(0)
    return {name: {leaf: torch.randn(shape, generator=generator) for leaf, shape in SHAPES[kind].items()} for name in NAMES}


def ours(values, kind="lora"):
    return formats.to_file(values, torch.float32)


def ours_for_comfy(values, kind):
    return formats.to_file(values, torch.float32, dora_key="dora_scale")


def kohya(values, kind):
    """Flattened names, and an alpha of half the rank."""
    tensors = {}
    for name, own in values.items():
        key = "lora_unet_" + name.replace(".", "_")
        for leaf, value in own.items():
            leaf = {DOWN: "lora_down.weight", UP: "lora_up.weight", MAGNITUDE: "dora_scale"}.get(leaf, leaf)
            value = value[:, None] if leaf == "dora_scale" else value
            tensors[f"{key}.{leaf}"] = value / 0.5 if leaf in (SCALED.get(kind), "lora_up.weight") else value
        if kind != "full":
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    return tensors


def lycoris(values, kind):
    return {key.replace("lora_unet_", "lycoris_"): value for key, value in kohya(values, kind).items()}


def diffusers(values, kind):
    return {f"transformer.{name}.{leaf}": value for name, own in values.items() for leaf, value in own.items()}


@pytest.mark.parametrize("form", [ours, ours_for_comfy, kohya, lycoris, diffusers])
@pytest.mark.parametrize("kind", SHAPES)
def test_every_form_of_every_type_reads_as_the_same_tensors(tmp_path, form, kind):
    stored = form(contents(kind), kind)
    save_file({name: value.contiguous() for name, value in stored.items()}, tmp_path / "a.safetensors")
    read = read_network(tmp_path / "a.safetensors", LINEARS)
    assert read.kind == kind
    for name, own in contents(kind).items():
        assert own.keys() == read.adapters[name].tensors.keys()
        assert all(torch.allclose(value, read.adapters[name].tensors[leaf]) for leaf, value in own.items())


def test_a_lokr_of_two_whole_halves_has_no_scale_as_in_lycoris(tmp_path):
    save_file({f"{NAMES[0]}.lokr_w1": torch.ones(2, 2), f"{NAMES[0]}.lokr_w2": torch.ones(3, 4), f"{NAMES[0]}.alpha": torch.tensor(7.0)},
              tmp_path / "a.safetensors")  # fmt: skip
    read = read_network(tmp_path / "a.safetensors", LINEARS)
    assert torch.equal(read.adapters[NAMES[0]].tensors[W2], torch.ones(3, 4))


def test_the_newest_file_of_a_folder_is_read(tmp_path):
    for age, name in enumerate(("b.safetensors", "a.safetensors", "a.connectors.safetensors")):
        save_file(
            formats.to_file({NAMES[0]: {DOWN: torch.full((1, 8), float(age)), UP: torch.zeros(6, 1)}}, torch.float32), tmp_path / name
        )
        os.utime(tmp_path / name, (age, age))
    assert read_network(tmp_path, LINEARS).path.name == "a.safetensors"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no .safetensors"):
        read_network(tmp_path / "empty", LINEARS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"text_model.weight": torch.zeros(1)}, "of no form"),
        (lambda t: {n: v for n, v in t.items() if not n.endswith("attn1.to_q.lora_B.weight")}, "no partner"),
        (lambda t: {n.replace("blocks.0", "blocks.9"): v for n, v in t.items()}, "adapts 2 module"),
        (lambda t: t | {f"diffusion_model.{NAMES[0]}.dora_scale": torch.ones(1, 8)}, "one for each output"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, change, message):
    save_file(change(ours(contents("lora"))), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        read_network(tmp_path / "a.safetensors", LINEARS)


@pytest.mark.parametrize("kind", SHAPES)
def test_nothing_bad_is_written(kind):
    good = ours(contents(kind))
    expected = formats.file_keys(dict.fromkeys(NAMES, SHAPES[kind]))
    formats.check_file(good, expected, ZERO)
    key = next(iter(good))
    for tensors, message in (
        ({name: value for name, value in good.items() if name != key}, "not whole"),
        (good | {key: torch.full_like(good[key], float("nan"))}, "NaN or infinity in 1 tensor"),
        ({name: torch.zeros_like(value) if name.endswith(ZERO) else value for name, value in good.items()}, "all zero"),
    ):
        with pytest.raises(UserError, match=message):
            formats.check_file(tensors, expected, ZERO)


@pytest.fixture(scope="module")
def model():
    config = TransformerConfig(
        num_layers=2, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32, audio_num_attention_heads=4,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=16, apply_gated_attention=True, cross_attention_adaln=True, caption_proj_before_connector=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LTXModel(config)


@pytest.mark.parametrize(
    ("preset", "counts"),
    [
        ("attention", {"video": 16, "audio": 16, "cross": 16}), ("attention_ff", {"video": 20, "audio": 20, "cross": 16}),
        ("video", {"video": 20, "audio": 0, "cross": 0}), ("audio", {"video": 0, "audio": 20, "cross": 0}),
        ("cross", {"video": 0, "audio": 0, "cross": 16}), ("all", {"video": 20, "audio": 20, "cross": 16}),
    ],
)  # fmt: skip
def test_presets_choose_by_stream_and_never_gates(model, preset, counts):
    names = choose_targets(model, TargetChoice(preset=preset))
    assert count_by_stream(names) == counts
    assert not any("gate_logits" in name for name in names)


def test_patterns_and_their_mistakes(model):
    gates = choose_targets(model, TargetChoice(include=("to_gate_logits",), exclude=("audio",)))
    assert len(gates) == 4
    for choice, message in (
        (TargetChoice(include=("nothing",)), "no linear"),
        (TargetChoice(include=("(",)), "regular expression"),
        (TargetChoice(preset="x"), "one of"),
    ):
        with pytest.raises(UserError, match=message):
            choose_targets(model, choice)
    with pytest.raises(UserError, match="conv_dim"):
        create_network(nn.Linear(2, 2), dim=4, alpha=4, args={"conv_dim": "4"}, seed=0)


def test_loss_is_a_masked_mean_and_weights_multiply_it():
    prediction, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    weight = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    losses = masked_mean(squared_error(prediction, target), weight)
    assert torch.allclose(losses[0], (prediction[0, :2] - target[0, :2]).pow(2).mean())
    assert losses[1] == 0, "an item whose tokens all weigh nothing"
    assert torch.allclose(masked_mean(squared_error(prediction, target), 0.1 * weight), losses), (
        "a mask of grey alone is as good as of white"
    )
    changed = target.clone()
    changed[0, 2] = 1e6
    assert torch.equal(masked_mean(squared_error(prediction, changed), weight), losses)
    items = ItemLosses(video=torch.tensor([1.0, 3.0]), audio=torch.tensor([2.0, 0.0]), audio_present=torch.tensor([True, False]))
    assert float(total_loss(items, torch.tensor([1.0, 0.5]), torch.tensor([2.0, 2.0]))) == pytest.approx((1 + 1.5 + 4) / 2)
    video_only = ItemLosses(video=items.video, audio=None, audio_present=None)
    assert float(total_loss(video_only, torch.ones(2), torch.ones(2))) == 2


OPTIMIZERS = (
    "AdamW", "adamw8bit", "Adafactor", "Lion", "Lion8bit", "CAME", "Prodigy", "AdamWScheduleFree", "ProdigyPlusScheduleFree",
    "torch.optim.SGD",
)  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_descend(name):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(8, 8) * 3)
    optimizer = make_optimizer(name, [parameter], 1.0 if name.startswith("Prodigy") else 0.05, {})
    before = float(parameter.pow(2).mean())
    for _ in range(600 if name.startswith("ProdigyPlus") else 200):
        optimizer.zero_grad()
        parameter.pow(2).mean().mul(10).backward()
        optimizer.step()
    with evaluating(optimizer):
        assert float(parameter.pow(2).mean()) < 0.5 * before


def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(monkeypatch):
    with pytest.raises(UserError, match=r"--optimizer_type AdamWW: must be one of AdamW, AdamW8bit, .*Did you mean 'adamw'\?"):
        make_optimizer("AdamWW", [torch.nn.Parameter(torch.zeros(1))], 1e-3, {})
    monkeypatch.setitem(sys.modules, "dadaptation", None)
    with pytest.raises(UserError, match="--optimizer_type DAdaptation.*pip install dadaptation"):
        make_optimizer("DAdaptation", [torch.nn.Parameter(torch.zeros(1))], 1.0, {})


def test_optimizer_mistakes_are_named():
    parameter = [nn.Parameter(torch.zeros(1))]
    for name, args, message in (
        ("adam_w", {}, "one of AdamW, AdamW8bit"), ("torch.optim.Nothing", {}, "no optimizer class"),
        ("not_there.Optim", {}, "cannot be imported"), ("AdamW", {"beta": "3"}, "beta"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            make_optimizer(name, parameter, 0.1, args)
    assert make_optimizer("AdamW", parameter, 0.1, {"betas": "(0.8, 0.9)"}).defaults["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1]),
        ("constant_with_warmup", [0.5, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 0.75, 0.5, 0.125]),
        ("cosine", [0.5, 1, 0.854, 0.5, 0.038]),
        ("cosine_with_restarts", [0.5, 1, 0.25, 0.75, 0.75]),
        ("polynomial", [0.5, 1, 0.5625, 0.25, 0.015625]),
    ],
)
def test_schedules(name, expected):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    rates = run_schedule(optimizer, ScheduleOptions(name=name, total_steps=9, warmup=1))
    assert [rates[i] for i in (0, 1, 3, 5, 8)] == pytest.approx(expected, abs=2e-3)
    with pytest.raises(UserError, match="lr_warmup_steps"):
        make_scheduler(optimizer, ScheduleOptions(name=name, total_steps=9, warmup=9))


def test_adafactor_moves_a_zero_tensor_by_the_learning_rate():
    parameter = nn.Parameter(torch.zeros(4, 4))
    optimizer = make_optimizer("Adafactor", [parameter], 1e-3, {})
    parameter.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert parameter.detach().square().mean().sqrt() == pytest.approx(1e-3, rel=0.3)


def test_an_optimizer_that_finds_its_own_rate_warns_of_another(caplog):
    pytest.importorskip("prodigyopt")
    for rate, warned in ((1.0, False), (1e-4, True)):
        try_out("Prodigy", rate, {}, ScheduleOptions(name="constant", total_steps=2), torch.device("cpu"))
        assert ("finds its own rate" in caplog.text) is warned


@pytest.mark.parametrize(
    ("flag", "name", "args", "schedule"),
    [
        ("--optimizer_type .", ".", {}, {}),
        ("--optimizer_type torch.optim.LBFGS", "torch.optim.LBFGS", {}, {}),
        ("--optimizer_type torch.optim.SparseAdam", "torch.optim.SparseAdam", {}, {}),
        ("--optimizer_type AdamW", "AdamW", {"betas": "()"}, {}),
        ("--optimizer_args relative_step=False.*torch's", "adafactor", {"relative_step": "False"}, {}),
        ("--lr_scheduler_type ReduceLROnPlateau", "AdamW", {}, {"class_name": "ReduceLROnPlateau"}),
        ("--lr_scheduler_type StepLR.*step_size=0", "AdamW", {}, {"class_name": "StepLR", "args": {"step_size": "0"}}),
        ("--lr_scheduler_type ''", "AdamW", {}, {"class_name": ""}),
        ("--lr_warmup_steps 0 ", "AdamW", {}, {"warmup": 9}),
    ],
)
def test_what_cannot_train_is_found_out_before_a_model_is_loaded(flag, name, args, schedule):
    """A class that wants more than step() fails in a trial step, in words."""
    options = ScheduleOptions(**{"name": "constant", "total_steps": 4, **schedule})
    with pytest.raises(UserError, match=flag):
        try_out(name, 0.1, args, options, torch.device("cpu"))


def run_schedule(optimizer: torch.optim.Optimizer, options: ScheduleOptions) -> list[float]:
    scheduler = make_scheduler(optimizer, options)
    rates = []
    for _ in range(options.total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedules_take_shares_decay_and_classes():
    def rates(**options) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return run_schedule(optimizer, ScheduleOptions(**{"name": "constant", "total_steps": 10} | options))

    assert rates(warmup=0.2, decay=0.3) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3], abs=1e-6)
    assert rates(class_name="torch.optim.lr_scheduler.StepLR", args={"step_size": "5", "gamma": "0.1"})[-1] == pytest.approx(0.1)
    assert rates(name="polynomial", args={"power": "1"})[5] == pytest.approx(0.5)
    for wrong, message in (
        ({"args": {"power": "1"}}, "lr_scheduler_args power"), ({"name": "cosine", "decay": 2}, "falls by itself"),
        ({"name": "polynomial", "args": {"power": "high"}}, "power=high: must be a number"),
        ({"name": "cosine_with_restarts", "args": {"num_cycles": "0"}}, "num_cycles=0: must be 1 at least"),
        ({"class_name": "torch.optim.lr_scheduler.Nothing"}, "cannot be imported"),
        ({"class_name": "torch.optim.lr_scheduler.StepLR", "args": {"size": "1"}}, "size"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            rates(**wrong)


def test_an_old_lora_that_cannot_be_removed_is_told_of_and_costs_no_run(tmp_path, caplog):
    """Windows removes no file that another program has open; a folder stands for it here."""
    (tmp_path / "a-step00000001.safetensors").mkdir()
    for step in (2, 3):
        (tmp_path / f"a-step{step:08d}.safetensors").write_bytes(b"")
    remove_old_loras(tmp_path, "a", 1, step=3, epoch=0)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a-step00000001.safetensors", "a-step00000003.safetensors"]
    assert "a-step00000001.safetensors: an old LoRA that could not be removed" in caplog.text


def test_an_old_state_that_cannot_be_removed_is_told_of_and_costs_no_run(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        state_path(tmp_path, "a", step).mkdir()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "in use")))
    remove_old_states(tmp_path, "a", 1, step=2)
    assert "a-step00000001-state: an old state that could not be removed (in use)" in caplog.text
