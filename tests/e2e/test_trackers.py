"""`--log_with`: what is logged can be read back by the tracker's own tool."""

import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from musubi_tuner import ltxv2_train_network
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.metrics import Trackers
from tests import training_parts as parts


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("data"), tiny_family, "av")


def test_tensorboard_shows_the_numbers_of_the_loss_file(data, tmp_path):
    argv = data.arguments("--output_dir", str(tmp_path), "--max_train_steps", "3", "--log_with", "tensorboard")
    assert ltxv2_train_network.main(argv) == 0
    events = EventAccumulator(str(tmp_path / "logs" / "ltxv2_lora"))
    events.Reload()
    rows = parts.losses(tmp_path)
    for name in ("loss_video", "loss_audio", "validation/loss_audio"):
        logged = [(event.step, pytest.approx(event.value, rel=1e-5)) for event in events.Scalars(name)]
        assert logged and logged == [(row["step"], row[name]) for row in rows if name in row]


def test_a_tracker_that_is_not_there_stops_before_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--log_with wandb.*pip install wandb"):
        ltxv2_train_network.main(data.arguments("--output_dir", str(tmp_path), "--log_with", "wandb"))
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_tracker_that_fails_costs_its_numbers_and_never_the_run(data, tmp_path, monkeypatch, caplog):
    """A full disk under the logs, or a service that does not answer."""

    def broken(self, *arguments, **named):
        raise OSError("no space left")

    monkeypatch.setattr(SummaryWriter, "add_scalar", broken)
    monkeypatch.setattr(SummaryWriter, "add_scalars", broken)
    argv = data.arguments("--output_dir", str(tmp_path), "--max_train_steps", "3", "--log_with", "tensorboard")
    assert ltxv2_train_network.main(argv) == 0
    assert len([row for row in parts.losses(tmp_path) if "loss_video" in row]) == 3
    assert sum("no space left" in record.getMessage() for record in caplog.records) == 1


def test_wandb_shows_the_previews_of_each_step(data, tmp_path, monkeypatch):
    """With the package itself, which needs neither login nor network where it is offline."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "prompts.txt").write_text("A disc --w 64 --h 64 --f 9 --s 1\nA still --w 64 --h 64 --f 1 --s 1\n", encoding="utf-8")
    flags = ["--output_dir", str(tmp_path / "out"), "--max_train_steps", "2", "--log_with", "wandb", "--text_encoder", str(data.encoder)]
    flags += ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "1"]
    words = data.arguments(*flags, "--log_every_n_steps", "1")
    monkeypatch.setattr(sys, "argv", ["ltxv2_train_network.py", *words, "--huggingface_token", "hf_seen_by_nobody"])
    assert ltxv2_train_network.main(words) == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_seen_by_nobody" in path.read_bytes()]
    (stored,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    said = stored.read_bytes()
    assert b"loss_video" in said and b"A disc" in said and b"A still" in said, "numbers, and words under the pictures"
    for prompt, kind, ending in ((0, "videos", "mp4"), (1, "images", "png")):
        shown = {path.read_bytes() for path in tmp_path.glob(f"wandb/offline-run-*/files/media/{kind}/previews/{prompt}_*.{ending}")}
        assert shown and shown == {path.read_bytes() for path in (tmp_path / "out" / "sample").glob(f"*.{ending}")}


def test_previews_reach_wandb_by_their_kind_and_failures_cost_the_tracker_alone(tmp_path, monkeypatch, caplog):
    """A stand-in for the package: what it is handed, and what becomes of an upload that fails."""
    kinds = {name: lambda path, caption, name=name: (name, path, caption) for name in ("Video", "Image", "Audio")}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**kinds))
    logged = []
    wandb = SimpleNamespace(name="wandb", log=lambda values, step: logged.append((values, step)))
    numbers_alone = SimpleNamespace(name="tensorboard")
    trackers = Trackers(SimpleNamespace(trackers=[numbers_alone, wandb], log=lambda values, step: logged.append(values)), None, "", {})
    files = [tmp_path / name for name in ("a.mp4", "b.png", "c.wav")]
    prompts = ["a dog", "a cat", "rain"]
    trackers.log_previews(files, prompts, 7)
    rows = enumerate(zip(kinds, files, prompts, strict=True))
    expected = {f"previews/{n}": (kind, str(file), prompt) for n, (kind, file, prompt) in rows}
    assert logged == [(expected, 7)]

    wandb.log = lambda values, step: 1 / 0
    trackers.log_previews(files, prompts, 8)
    trackers.log({"loss": 1.0}, 9)
    assert len(logged) == 1 and caplog.text.count("the tracker failed (ZeroDivisionError") == 1
