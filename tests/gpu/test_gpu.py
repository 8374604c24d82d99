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


def test_blocks_compile_to_one_graph(tiny_family):
    from musubi_tuner.ltxv2.transformer.load import load_transformer
    from musubi_tuner.ltxv2.weights import open_checkpoint
    from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper, create_network

    model = load_transformer(open_checkpoint(tiny_family.ltx23), mode="av", device="cuda", dtype=torch.bfloat16)
    create_network(model, dim=4, alpha=4, args={}, seed=0)
    torch._dynamo.reset()
    compiled = torch.compile(lambda block, *arguments: block(*arguments), fullgraph=True, dynamic=True)
    model.run_block = lambda block, *arguments: compiled(block, *arguments)
    adapter = OfficialLTXV2Wrapper(model, "sd3_0_1")
    for steps in (6, 9, 12):
        video, audio = torch.randn(1, 128, 2, 2, 3, device="cuda"), torch.randn(1, 8, steps, 16, device="cuda")
        outputs = adapter.predict_latents(
            video, torch.tensor(0.5, device="cuda"), torch.randn(1, 16, 192, device="cuda"), audio_latents=audio
        )
        sum(output.float().pow(2).mean() for output in outputs).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "the first block's inputs need no gradient: a graph of its own"
