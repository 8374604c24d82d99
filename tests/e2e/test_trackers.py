"""`--log_with`: what is logged can be read back by the tracker's own tool."""

import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from musubi_tuner import ltxv2_train_network
from musubi_tuner.runtime.errors import UserError
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
