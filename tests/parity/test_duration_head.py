"""LTX-2.5's duration head against diffusers' one, on the same weights."""

import pytest
import torch

from musubi_tuner.ltxv2.text.duration import PREFIX, DurationHead, frames_of
from musubi_tuner.ltxv2.weights import open_checkpoint


@pytest.fixture(scope="module")
def heads(tiny_family):
    module = pytest.importorskip("diffusers.pipelines.ltx2.duration_head")
    checkpoint = open_checkpoint(tiny_family.ltx25_duration_head)
    ours = DurationHead.load(checkpoint)
    tensors = {name: checkpoint.tensor(full).float() for name, full in checkpoint.with_prefix(PREFIX).items()}
    for part in ("weight", "bias"):
        pieces = tensors.pop(f"attention_pooler.cross_attn.in_proj_{part}").chunk(3)
        tensors |= {f"attention_pooler.{name}.{part}": piece for name, piece in zip(("to_q", "to_k", "to_v"), pieces, strict=True)}
        tensors[f"attention_pooler.to_out.{part}"] = tensors.pop(f"attention_pooler.cross_attn.out_proj.{part}")
    theirs = module.LTX2DurationHead(*ours.widths, pooler_hidden_dim=16, num_queries=1, num_pooler_heads=4, mlp_hidden_dim=16)
    theirs.load_state_dict(tensors, strict=True)
    return ours, theirs


@pytest.mark.parametrize("streams", [(True, True), (True, False), (False, True)])
def test_it_predicts_the_same_seconds(heads, streams):
    ours, theirs = heads
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        both = [torch.randn(1, 30, width, generator=generator) for width in ours.widths]
        given = [tokens if shown else None for tokens, shown in zip(both, streams, strict=True)]
        with torch.inference_mode():
            wanted = float(theirs(*given))
        assert ours.seconds(*given) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("fps", [12.0, 23.976, 24.0, 25.0, 50.0])
def test_seconds_become_the_same_frames(heads, monkeypatch, fps):
    """Below a second and beyond twenty, too."""
    _, theirs = heads
    for seconds in torch.tensor([0.01, 0.4, 1.0, 1.04, 1.3, 2.9, 7.77, 19.99, 20.0, 20.4, 1e9]).tolist():
        monkeypatch.setattr(type(theirs), "forward", lambda self, video, audio, seconds=seconds: torch.tensor([seconds]))
        assert frames_of(seconds, fps) == theirs.predict_num_frames(None, None, frame_rate=fps, temporal_compression_ratio=8), seconds
    assert frames_of(float("inf"), fps) == frames_of(20.0, fps)
