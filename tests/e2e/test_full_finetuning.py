"""Training the model's own weights through the real program: as plain PyTorch does it, fused or not, resumed, saved and sampled from."""

import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file

from musubi_tuner import ltxv2_checkpoint, ltxv2_generate_video, ltxv2_lora, ltxv2_train_network
from musubi_tuner.conversion.checkpoint import streaming
from musubi_tuner.dataset.loader import iterate_batches
from musubi_tuner.ltxv2.transformer.load import load_transformer
from musubi_tuner.ltxv2.versions import CONNECTORS, transformer_names
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.processes import processes
from musubi_tuner.training import state
from musubi_tuner.training.full_finetuning import why_not_streamed
from musubi_tuner.training.objective import FlowMatching
from musubi_tuner.training.saving import NotSaved, Saving
from musubi_tuner.training.weight_steps import WeightSteps
from tests import training_parts as parts
from tests.unit.test_docs import commands

STEPS = 4
SGD = ("--optimizer_type", "torch.optim.SGD")


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("daten ü"), tiny_family, "av")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate remembers the precision of the first run in the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def argv(data: parts.Data, output: Path, *extra: str) -> list[str]:
    flags = ["--full_finetune", "--output_dir", str(output), "--max_train_steps", str(STEPS), "--save_precision", "float32"]
    given = data.arguments(*flags, *extra)
    for name in ("--network_dim", "--network_alpha"):
        del given[given.index(name) : given.index(name) + 2]
    return given


def train(data: parts.Data, output: Path, *extra: str) -> Path:
    """The checkpoint of a run."""
    assert ltxv2_train_network.main(argv(data, output, *extra)) == 0
    return output / "ltxv2_lora.safetensors"


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.tensor(full) for name, full in transformer_names(checkpoint).items()}


def same(left: Path, right: Path) -> bool:
    one, other = load_file(left), load_file(right)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_losses_and_weights_are_those_of_a_plain_loop(data, tmp_path):
    """float32, AdamW, clipping, both streams: every weight, as PyTorch trains them."""
    saved = weights(train(data, tmp_path, "--max_grad_norm", "0.5"))
    config = ltxv2_train_network.parse_arguments(argv(data, tmp_path / "other", "--max_grad_norm", "0.5"))
    with processes() as group:
        run, _ = parts.build(config, group)
    model = load_transformer(open_checkpoint(data.model), mode="av", device="cpu", dtype=torch.float32).requires_grad_(True).train()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    matching = FlowMatching(OfficialLTXV2Wrapper(model, config.mode.ltxv2_timestep_format))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    batches = iterate_batches(run.items, mode="av", rules=run.rules, numbers=range(STEPS), workers=0, device=torch.device("cpu"))
    for batch in batches:
        noised = matching.noise(batch)
        velocity = matching.wrapper(*noised.inputs)
        losses = {}
        for name, made in (("video", velocity.video), ("audio", velocity.audio)):
            assert made is not None
            weight = noised.weights[name]
            losses[name] = ((made - noised.targets[name]).pow(2).mean(-1) * weight).sum() / weight.sum()
        (losses["video"] + losses["audio"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(losses["video"].item())
    logged = [line["loss_video"] for line in parts.losses(tmp_path) if "loss_video" in line]
    assert logged == pytest.approx(seen, abs=1e-6)
    trained = dict(model.named_parameters())
    assert trained.keys() == saved.keys()
    assert max(float((saved[name] - trained[name].detach()).abs().max()) for name in saved) < 2e-6
    moved = [name for name in saved if not torch.equal(saved[name], start[name])]
    assert len(moved) > 0.95 * len(saved) and {"proj_out.weight", "audio_scale_shift_table"} <= set(moved), "norms and tables too"


def test_the_saved_file_is_the_base_with_trained_weights(data, tmp_path):
    path = train(data, tmp_path, "--max_train_steps", "1")
    base = open_checkpoint(data.model)
    saved = open_checkpoint(path)
    assert saved.names() == base.names(), "the same names in the same order"
    assert saved.config == base.config
    trained = set(transformer_names(base).values())
    others = [name for name in base.names() if name not in trained]
    assert any(name.rpartition("model.")[2].startswith(CONNECTORS) or "connector" in name for name in others)
    assert any(name.startswith("vae.") for name in others)
    assert all(torch.equal(saved.tensor(name), base.tensor(name)) and saved.dtype(name) == base.dtype(name) for name in others)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_steps"] == "1" and metadata["ltxv2_full_finetune"] == "every weight"
    assert not any(key.startswith("ss_network") for key in metadata)


@pytest.mark.parametrize("dtype", ["no", "bf16"])
def test_fused_steps_are_the_unfused_ones(data, tmp_path, dtype):
    flags = ("--max_grad_norm", "0", "--mixed_precision", dtype)
    one, two = (train(data, tmp_path / name, *flags, *extra) for name, extra in (("a", ()), ("b", ("--fused_backward_pass",))))
    assert same(one, two)
    first, second = ([line["grad_norm"] for line in parts.losses(tmp_path / name) if "grad_norm" in line] for name in "ab")
    assert len(first) == STEPS and first == pytest.approx(second, rel=1e-5)


@pytest.mark.parametrize("flags", [(), ("--mixed_precision", "bf16", "--max_grad_norm", "0", "--fused_backward_pass")])
def test_a_resumed_run_is_the_uninterrupted_one(data, tmp_path, flags):
    whole = train(data, tmp_path / "whole", *flags, "--save_every_n_steps", "2", "--save_state")
    saved = tmp_path / "whole" / "ltxv2_lora-step00000002-state"
    again = train(data, tmp_path / "again", *flags, "--resume", str(saved))
    assert same(whole, again)


FUSED = ("--max_grad_norm", "0", "--fused_backward_pass")
STREAMED = ("--blocks_to_swap", "2")


def series(folder: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if "second" not in key} for line in parts.losses(folder)]


def states_of(path: Path) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    saved = state.read_state(path)
    return dict(saved.network), list(state._tensors_in(saved.stored["optimizer"]))


def same_states(left: Path, right: Path) -> bool:
    (one, first), (other, second) = states_of(left), states_of(right)
    pairs = [*((one[name], other[name]) for name in one), *zip(first, second, strict=True)]
    return one.keys() == other.keys() and all(torch.equal(*pair) for pair in pairs)


def test_streamed_blocks_train_save_and_resume_as_resident_ones(data, tmp_path, monkeypatch):
    """Losses, validation, the last preview, checkpoints and states, bit for bit; a state of the one goes on in the other."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog --w 64 --h 64 --f 9 --s 2 --d 7\n", encoding="utf-8")
    flags = (*FUSED, "--mixed_precision", "bf16", "--save_every_n_steps", "2", "--save_state")
    shown = ("--sample_prompts", str(prompts), "--text_encoder", str(data.encoder))
    whole = train(data, tmp_path / "a", *flags, *shown)
    streamed = train(data, tmp_path / "b", *flags, *shown, *STREAMED)
    assert series(tmp_path / "a") == series(tmp_path / "b") and any("validation/loss_video" in line for line in series(tmp_path / "b"))
    assert same(whole, streamed)
    (left,), (right,) = ((tmp_path / name / "sample").glob("*.mp4") for name in "ab")
    assert torch.equal(frames(left), frames(right))
    middle = [tmp_path / name / "ltxv2_lora-step00000002-state" for name in "ab"]
    assert same_states(*middle)
    monkeypatch.setattr(state, "_MOST_IN_MEMORY", 0)  # as a whole model's state
    last = train(data, tmp_path / "c", *flags, *STREAMED, "--resume", str(middle[0]))
    assert same(whole, last) and same_states(*(path.parent / "ltxv2_lora-step00000004-state" for path in (whole, last)))
    assert same(whole, train(data, tmp_path / "d", *flags, "--resume", str(middle[1])))


def test_streamed_blocks_of_a_plan_train_as_resident_ones(data, tmp_path, caplog):
    caplog.set_level("INFO")
    plain = train(data, tmp_path / "plain", *FUSED)
    assert same(plain, train(data, tmp_path / "planned", *FUSED, *STREAMED, "--vram_gb", "1"))
    with pytest.raises(UserError, match=r"2 blocks streamed.* takes .* MiB pinned on the host; .* and 0\.0 GiB may be used"):
        train(data, tmp_path / "short", *FUSED, *STREAMED, "--vram_gb", "1", "--ram_gb", "6")  # which are left for other things
    assert "2 of 2 blocks streamed from host memory" in caplog.text and re.search(r"predicted .* 0\.01 GiB pinned on the host", caplog.text)


def test_a_step_that_ends_in_the_middle_is_saved_as_it_is_on_the_device(data, tmp_path, monkeypatch):
    """Between two weights of a streamed block."""
    saved = []
    for name, flags in (("a", ()), ("b", STREAMED)):
        updated, update = [], WeightSteps._step_one
        tensors = len(weights(data.model))

        def ends(steps, weight, updated=updated, update=update, tensors=tensors):
            if len(updated) == tensors + 60:  # in the second step
                raise torch.OutOfMemoryError("no room")
            updated.append(weight)
            update(steps, weight)

        with monkeypatch.context() as patch, pytest.raises(TemporaryFailure) as caught:
            patch.setattr(WeightSteps, "_step_one", ends)
            train(data, tmp_path / name, *FUSED, *flags, "--mixed_precision", "bf16")
        assert "in the middle of its update" in caught.value.__notes__[0]
        saved += (tmp_path / name).glob("*-step00000001-state")
    assert same_states(*saved)


def test_streamed_blocks_that_a_lora_was_merged_into_are_in_the_file(data, tmp_path):
    """Trained or not."""
    lora = tmp_path / "lora"
    assert ltxv2_train_network.main(data.arguments("--output_dir", str(lora), "--max_train_steps", "1", "--learning_rate", "0.05")) == 0
    flags = ("--base_weights", str(lora / "ltxv2_lora.safetensors"), *FUSED, "--max_train_steps", "1")
    flags += ("--network_args", r"include_patterns=^proj_out.bias,transformer_blocks\.1\.")
    assert same(train(data, tmp_path / "a", *flags), train(data, tmp_path / "b", *flags, *STREAMED))


def test_several_processes_do_not_stream(data, tmp_path):
    config = ltxv2_train_network.parse_arguments(argv(data, tmp_path, *FUSED, *STREAMED))
    assert why_not_streamed(config, 1) is None
    assert re.search(r"2 processes would each have weights of their own .*shard", why_not_streamed(config, 2) or "")


def test_states_that_move_by_themselves_are_not_streamed(data, tmp_path):
    with pytest.raises(UserError, match="--blocks_to_swap 2: .*paged .*AdamW8bit"):
        train(data, tmp_path, *FUSED, *STREAMED, "--optimizer_type", "PagedAdamW8bit")


def frames(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)])


def test_the_saved_file_makes_the_clip_of_the_last_preview(data, tmp_path):
    """In the generation program, which knows nothing of the run."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog --w 64 --h 64 --f 9 --s 2 --d 7\n", encoding="utf-8")
    shared = ("--sample_prompts", str(prompts), "--text_encoder", str(data.encoder))
    path = train(data, tmp_path / "out", *shared)
    (preview,) = (tmp_path / "out" / "sample").glob("ltxv2_lora_s00000004_*.mp4")
    argv = ["--ltxv2_model", str(path), *shared, "--ltxv2_timestep_format", "flowmatch_1_1000", "--device", "cpu"]
    assert ltxv2_generate_video.main([*argv, "--output_dir", str(tmp_path / "made")]) == 0
    (made,) = (tmp_path / "made").glob("*.mp4")
    assert torch.equal(frames(made), frames(preview))
    argv[1] = str(data.model)
    assert ltxv2_generate_video.main([*argv, "--output_dir", str(tmp_path / "base")]) == 0
    (base,) = (tmp_path / "base").glob("*.mp4")
    assert not torch.equal(frames(base), frames(preview)), "the base makes another"


REFUSED = {
    "--dop_prompt": ("person",),
    "--audio_dop_weight": ("1",),
    "--weight_format": ("nf4",),
    "--blocks_to_swap": ("1",),
    "--network_args": ("type=lokr",),
    "--fused_backward_pass": (),
    "--network_weights": ("lora.safetensors",),
}


@pytest.mark.parametrize("flag", REFUSED)
def test_what_does_not_go_with_it_is_refused_before_anything_is_loaded(data, tmp_path, monkeypatch, flag):
    def load(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("musubi_tuner.placement.load.load_transformer", load)
    (tmp_path / "lora.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=flag):
        ltxv2_train_network.main(argv(data, tmp_path / "out", flag, *REFUSED[flag]))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_preserved_items_are_refused(data, tmp_path):
    toml = tmp_path / "d.toml"
    text = data.toml.read_text(encoding="utf-8").replace("[[datasets]]", "[[datasets]]\npreserve_base = true")
    for name in ("clips", "cache", "held out", "held out cache"):
        text = text.replace(f'"{name}"', f"'{data.folder / name}'")
    toml.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="preserve_base: asks the base model"):
        ltxv2_train_network.main(argv(data, tmp_path / "out", "--dataset_config", str(toml)))


def test_patterns_leave_the_rest_as_it_is(data, tmp_path):
    path = train(
        data,
        tmp_path,
        "--network_args",
        r"include_patterns=transformer_blocks\.1\.,proj_out",
        "exclude_patterns=audio_",
        "--max_train_steps",
        "1",
    )
    base, saved = weights(data.model), weights(path)
    changed = {name for name in base if not torch.equal(base[name].float(), saved[name].float())}
    assert changed and all(("transformer_blocks.1." in name or "proj_out" in name) and "audio_" not in name for name in changed)
    with pytest.raises(UserError, match="include_patterns=nothing: matches no weight"):
        train(data, tmp_path / "none", "--network_args", "include_patterns=nothing")


def test_it_says_what_it_takes_and_refuses_what_does_not_fit(data, tmp_path, caplog):
    caplog.set_level("INFO")
    train(data, tmp_path / "fits", "--max_train_steps", "1", "--vram_gb", "1")
    assert re.search(r"full fine-tuning +every weight, \d+ video", caplog.text)
    assert re.search(r"takes +weights [\d.]+ MiB, gradients [\d.]+ MiB, optimizer states [\d.]+ MiB", caplog.text)
    with pytest.raises(UserError, match=r"--full_finetune: weights .*no plan fits: .*takes .* on the device.*--fused_backward_pass"):
        train(data, tmp_path / "not", "--vram_gb", "0.01")


def test_with_a_plan_and_recomputation_it_trains_the_same(data, tmp_path):
    plain = train(data, tmp_path / "plain")
    planned = train(data, tmp_path / "planned", "--vram_gb", "1", "--gradient_checkpointing")
    assert same(plain, planned)


COMMANDS = [words for page, words in commands() if page == "full_finetuning.md"]


def test_the_commands_of_the_page_run(tiny_family, data, tmp_path, monkeypatch):
    """In their order, in a folder with toy files of the same names; the one for two cards is started in tests/e2e/test_sharded.py."""
    shutil.copy(tiny_family.ltx23, tmp_path / "ltx-2.3-22b-dev.safetensors")
    shutil.copytree(tiny_family.gemma, tmp_path / "gemma-3-12b-it-qat-q4_0-unquantized")
    monkeypatch.chdir(tmp_path)
    small = {"--dataset_config": str(data.toml), "--rank": "2", "--save_every_n_steps": "1"}
    size = ["--sample_width", "64", "--sample_height", "64", "--sample_frames", "9", "--sample_steps", "2", "--device", "cpu"]
    ran = []
    for words in COMMANDS:
        place = next(index for index, word in enumerate(words) if word.endswith(".py"))
        flags = [small.get(before, word) for before, word in zip(words[place:], words[place + 1 :], strict=False)]
        AcceleratorState._reset_state(reset_partial_state=True)
        if words[place] == "ltxv2_train_network.py" and "--config_file" not in words:
            short = ["--device", "cpu", "--max_train_steps", "2", "--mixed_precision", "bf16", "--max_data_loader_n_workers", "0"]
            assert ltxv2_train_network.main([*flags, *short]) == 0
            ran.append("train")
        elif words[place] == "ltxv2_generate_video.py":
            assert ltxv2_generate_video.main([*flags, *size]) == 0
            ran.append("generate")
        elif words[place] == "tools/lora.py":
            assert ltxv2_lora.main(flags) == 0
            ran.append("extract")
    assert ran == ["train", "train", "generate", "extract", "train"]
    lora = load_file(tmp_path / "output" / "my_lora.safetensors")
    assert lora and all(bool(torch.isfinite(value).all()) for value in lora.values())


def test_bf16_weights_take_steps_that_are_smaller_than_they_can_show(data, tmp_path, caplog):
    """At a rate of 1/1000 of a weight's neighbor distance: in the mean over all weights, bf16 moves as float32 does."""
    flags = ("--learning_rate", "2e-6", "--max_grad_norm", "0", "--optimizer_args", "weight_decay=0")
    base = {name: value.float() for name, value in weights(data.model).items()}
    exact = weights(train(data, tmp_path / "exact", *flags))
    AcceleratorState._reset_state(reset_partial_state=True)
    caplog.set_level(logging.INFO)
    rounded = weights(train(data, tmp_path / "rounded", *flags, "--mixed_precision", "bf16"))
    stored = sum(value.dtype == torch.float32 for value in weights(data.model).values())
    assert stored and f"{stored} of them are float32 in the file, and rounded to bfloat16" in caplog.text
    wanted = torch.cat([(exact[name] - base[name]).flatten() for name in base])
    made = torch.cat([(rounded[name].float() - base[name].bfloat16().float()).flatten() for name in base])
    share = float(torch.dot(made, wanted.sign()) / wanted.abs().sum())
    assert 0.7 < share < 1.3, "to the nearest it would be 0"
    assert float((made != 0).float().mean()) < 0.5, "most weights stay for the time being"


def test_a_split_pack_gives_one_whole_file(data, tmp_path):
    pack = tmp_path / "pack"
    assert ltxv2_checkpoint.main(["split", str(data.model), "--output_dir", str(pack)]) == 0
    path = train(replace(data, model=pack), tmp_path / "packed", "--max_train_steps", "1")
    assert same(path, train(data, tmp_path / "single", "--max_train_steps", "1"))
    assert ltxv2_checkpoint.main(["verify", str(path)]) == 0


def test_connectors_are_trained_where_asked_and_planned_for(data, tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("clips", "held out"):
        shutil.copytree(data.folder / name, tmp_path / name)
    toml = tmp_path / "dataset.toml"
    shutil.copy(data.toml, toml)
    other = replace(data, folder=tmp_path, toml=toml)
    parts.cache(other, text=("--text_encoder", str(data.encoder), "--text_cache_stage", "features"))
    saved, base = load_file(train(other, tmp_path / "out", "--max_train_steps", "1", "--train_connectors")), load_file(data.model)
    plans = {}
    for flags in ((), ("--train_connectors",)):  # of which --vram_gb has one made
        caplog.clear()
        given = data if not flags else other
        train(given, tmp_path / f"planned {len(flags)}", "--max_train_steps", "1", "--vram_gb", "1", *flags)
        (row,) = re.findall(r"takes +(weights .*)", caplog.text)
        plans[flags] = {name: float(size) for name, size in re.findall(r"([a-z ]+?) ([\d.]+) MiB", row.replace(", ", ","))}
    weights_of_connectors = sum(base[name].numel() for name in base if "embeddings_connector" in name) * 4 / 2**20  # --mixed_precision no
    assert weights_of_connectors > 0.3
    for name, times in (("weights", 1), ("gradients", 1), ("optimizer states", 2)):
        more = plans["--train_connectors",][name] - plans[()][name]
        assert more == pytest.approx(times * weights_of_connectors, abs=0.15), name
    only = ("--network_args", "include_patterns=embeddings_connector")
    train(other, tmp_path / "only", "--max_train_steps", "1", "--train_connectors", "--vram_gb", "1", *only)
    names = [name for name in base if "embeddings_connector" in name]
    assert names and all(not torch.equal(saved[name].float(), base[name].float()) for name in names if "bias" not in name)


def test_loras_that_were_merged_first_are_in_the_file(data, tmp_path):
    """In weights too that were not trained, as the file stands alone."""
    lora = tmp_path / "lora"
    assert ltxv2_train_network.main(data.arguments("--output_dir", str(lora), "--max_train_steps", "2", "--learning_rate", "0.05")) == 0
    only = ("--network_args", "include_patterns=^proj_out.bias", "--max_train_steps", "1")
    saved = weights(train(data, tmp_path / "out", "--base_weights", str(lora / "ltxv2_lora.safetensors"), *only))
    base = weights(data.model)
    changed = {name for name in base if not torch.equal(saved[name].float(), base[name].float())}
    assert "proj_out.bias" in changed and any(".attn1.to_q.weight" in name for name in changed)


def test_what_is_not_finite_stops_and_says_where_the_last_good_step_is(data, tmp_path):
    flags = ("--optimizer_type", "SGD", "--learning_rate", "1e30", "--max_grad_norm", "0", "--fused_backward_pass", "--save_state")
    with pytest.raises(UserError, match=r"step 2: not finite: the gradient of \w*proj_out") as caught:
        train(data, tmp_path, *flags, "--save_every_n_steps", "1")
    assert "Step 1, the last good one, is saved" in caught.value.__notes__[0], "no weight was changed in step 2"


def test_a_save_that_finds_no_room_costs_that_save(data, tmp_path, monkeypatch, caplog):
    room, asked = streaming._check_room, []

    def full_at_first(path, size, temporary):
        asked.append(path.name)
        if len(asked) == 1:
            raise TemporaryFailure(f"{path}: takes more than there is.")
        room(path, size, temporary)

    monkeypatch.setattr(streaming, "_check_room", full_at_first)
    final = train(data, tmp_path, "--save_every_n_steps", "2")
    assert asked == ["ltxv2_lora-step00000002.safetensors", final.name]
    assert "ltxv2_lora-step00000002.safetensors was not saved, and training goes on" in caplog.text
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [final.name] and not list(tmp_path.glob(".*.tmp"))


def test_what_a_killed_save_has_left_is_removed(data, tmp_path):
    lock = ".ltxv2_lora-step00000002.safetensors.lock.tmp"
    for name in (lock, ".ltxv2_lora-step00000002.safetensors.tmp", ".ltxv2_lora.safetensors.tmp", ".another.safetensors.tmp"):
        (tmp_path / name).write_bytes(b"0")
    train(data, tmp_path, "--max_train_steps", "1")
    assert [path.name for path in tmp_path.glob(".*.tmp")] == [".another.safetensors.tmp"]


@pytest.mark.parametrize("change", ["gone", "another"])
def test_a_base_that_is_no_longer_what_it_was_is_not_copied_from(data, tmp_path, monkeypatch, change, caplog):
    base = shutil.copy(data.model, tmp_path / "base.safetensors")
    mine = replace(data, model=Path(base))
    save = Saving.after_step

    def after_step(self, outcome, seconds):
        if outcome.step == 1:
            Path(base).unlink()
            if change == "another":
                shutil.copy(data.model, base)
        save(self, outcome, seconds)

    monkeypatch.setattr(Saving, "after_step", after_step)
    flags = ("--save_every_n_steps", "2")
    with pytest.raises(NotSaved, match=r"base\.safetensors.*Its weights are in .*step00000004-state: .*--max_train_steps 5"):
        train(mine, tmp_path / "out", *flags)
    assert "ltxv2_lora-step00000002.safetensors was not saved, and training goes on" in caplog.text
    assert not list(tmp_path.rglob("*lora*.safetensors"))
    monkeypatch.undo()
    shutil.copy(data.model, base)
    state_folder = tmp_path / "out" / "ltxv2_lora-step00000004-state"
    train(mine, tmp_path / "out", "--max_train_steps", "5", "--resume", str(state_folder))
    train(data, tmp_path / "plain", "--max_train_steps", "5")
    assert same(tmp_path / "out" / "ltxv2_lora.safetensors", tmp_path / "plain" / "ltxv2_lora.safetensors")


@pytest.mark.parametrize("name", ["ltxv2_lora.safetensors", "ltxv2_lora-step00000002.safetensors", "link.safetensors"])
def test_a_run_does_not_remove_the_checkpoint_that_it_starts_from(data, tmp_path, name):
    own = tmp_path / ("ltxv2_lora.safetensors" if name.startswith("link") else name)
    shutil.copy(data.model, own)
    if name.startswith("link"):
        (tmp_path / name).symlink_to(own)
    before = own.read_bytes()
    with pytest.raises(UserError, match=r"--ltxv2_model .*: is a file of 'ltxv2_lora' in .*Give another --output_name"):
        train(replace(data, model=tmp_path / name), tmp_path, "--overwrite")
    assert own.read_bytes() == before
    train(replace(data, model=tmp_path / name), tmp_path, "--output_name", "next", "--max_train_steps", "1")
    assert own.read_bytes() == before and (tmp_path / "next.safetensors").is_file()


def test_groups_of_rates_that_differ_are_named_when_a_run_resumes(data, tmp_path):
    train(data, tmp_path / "one", "--save_state", "--max_train_steps", "1")
    resumed = ("--resume", str(tmp_path / "one" / "ltxv2_lora-step00000001-state"))
    with pytest.raises(UserError, match=r"1 group\(s\) of rates, this run has 2.*--audio_learning_rate") as caught:
        train(data, tmp_path / "other", *resumed, "--audio_learning_rate", "1e-4")
    assert "damaged" not in str(caught.value)
