"""The step asks nothing of the device: no value is read on the host between the batch's arrival and the optimizer's update."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.draws import DrawRules
from musubi_tuner.dataset.items import Draw, list_items
from musubi_tuner.flow.sigma import SigmaSettings
from musubi_tuner.ltxv2.transformer.load import load_transformer
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.memory.checkpointing import Recompute
from musubi_tuner.memory.engine import BlockEngine
from musubi_tuner.memory.streaming import BlockStreamer
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper, create_network
from musubi_tuner.training.metrics import LossMeter, NoiseLevelMeter
from musubi_tuner.training.objective import total_loss
from musubi_tuner.training.optimizer import clip
from tests import training_parts as parts

WAITS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
}
"""Operations whose result, or its shape, the host must wait for."""


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation not in WAITS, f"{operation} makes the host wait for the device"
        return operation(*args, **(kwargs or {}))


def test_the_guard_itself_notices():
    with NoWaiting(), pytest.raises(AssertionError, match="wait"):
        torch.ones(3).sum().item()


@pytest.mark.parametrize("level", [Recompute.NOTHING, Recompute.EVERYTHING])
def test_nothing_in_the_step_waits_for_the_device(tiny_family, tmp_path, level):
    data = parts.make_data(tmp_path, tiny_family, "av", held_out=False)
    (item, *_) = list_items(load_dataset_config(data.toml).datasets, "av", data.toml)
    rules = DrawRules(
        seed=0, purpose="train", sigma=SigmaSettings(kind="shifted_logit_normal"), independent_audio_timestep=True, video_loss_weight=1.0,
        audio_loss_weight=1.0,
    )  # fmt: skip
    batch = make_batch([Draw(item, epoch=0, repeat=0)], "av", rules)
    model = load_transformer(open_checkpoint(data.model), mode="av", device="cpu", dtype=torch.float32)
    network = create_network(model, dim=4, alpha=4, args={}, seed=0)
    streamer = BlockStreamer(list(model.transformer_blocks), torch.device("cpu"))
    model.run_block = BlockEngine(model.transformer_blocks, [level] * 2, max_rank=4, streamer=streamer)
    wrapper = OfficialLTXV2Wrapper(model, "flowmatch_1_1000")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    meter, levels = LossMeter(torch.device("cpu")), NoiseLevelMeter(torch.device("cpu"))
    with NoWaiting(), network.dropout(batch.dropout_seeds):
        losses = parts.item_losses(wrapper, batch)
        total_loss(losses, batch.video_weight, batch.audio_weight).backward()
        meter.add(losses, batch.audio_expected, batch.audio_supervised)
        levels.add(losses, batch.video_sigma, batch.audio_sigma)
        clip(network.parameters(), 1.0)
        optimizer.step()
    assert all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters())
