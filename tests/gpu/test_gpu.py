"""What needs a GPU: `python run_tests.py tests/gpu` on a machine that has one; skipped elsewhere."""

import pytest
import torch

from musubi_tuner import ltxv2_train_network
from tests import training_parts as parts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_av_run_in_bf16_has_the_losses_of_the_cpu(tiny_family, tmp_path):
    data = parts.make_data(tmp_path / "data", tiny_family, "av")
    for device in ("cpu", "cuda"):
        flags = [*data.arguments("--output_dir", str(tmp_path / device), "--max_train_steps", "4"), "--mixed_precision", "bf16"]
        assert ltxv2_train_network.main([*flags, "--device", device]) == 0
    for ours, theirs in zip(parts.losses(tmp_path / "cuda"), parts.losses(tmp_path / "cpu"), strict=True):
        for name in ours.keys() & {"loss_video", "loss_audio"}:
            assert abs(ours[name] - theirs[name]) < 1e-2, (ours["step"], name)


def test_blocks_compile_to_one_graph():
    from musubi_tuner.ltxv2.transformer.block import sequence_axes
    from musubi_tuner.memory.checkpointing import Recompute
    from musubi_tuner.memory.engine import BlockEngine
    from tests import engine_parts

    model, network = engine_parts.make_model(3)
    wanted = [engine_parts.step(model, network, shape) for shape in engine_parts.SHAPES]
    model.cuda()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rungs = [Recompute.NOTHING] * 3
    model.run_block = BlockEngine(model.transformer_blocks, rungs, max_rank=engine_parts.RANK, compiled=True, sequence_axes=sequence_axes)
    with torch.device("cuda"):
        for shape, (loss, _) in zip(engine_parts.SHAPES, wanted, strict=True):
            assert abs(engine_parts.step(model, network, shape)[0] - loss) < 1e-2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
