"""What lies beside the training itself: trackers, what earlier runs left, where a start comes from."""

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner import ltxv2_train_network
from tests import training_parts as parts


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("aside"), tiny_family, "video", held_out=False)


def run(data: parts.Data, output, *extra: str) -> dict[str, torch.Tensor]:
    assert ltxv2_train_network.main(data.arguments("--output_dir", str(output), *extra)) == 0
    return load_file(output / "ltxv2_lora.safetensors")


def test_tensorboard_receives_the_losses(data, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(data, tmp_path, "--max_train_steps", "2", "--log_with", "tensorboard")
    found = reader.EventAccumulator(str(tmp_path / "logs" / "ltxv2_lora"))
    found.Reload()
    told = [(event.step, event.value) for event in found.Scalars("loss_video")]
    assert told == [(row["step"], pytest.approx(row["loss_video"])) for row in parts.losses(tmp_path)]
