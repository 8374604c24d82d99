"""The world's training on a card; skipped elsewhere."""

import pytest
import torch

from dev.world.train_transformer import Training
from tests.unit.test_world_training import small_data

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_a_captured_step_learns_as_a_plain_one_does():
    """Other draws, so the losses are near and not equal; the warm-up steps before the capture move nothing."""
    captions, clips = small_data()
    captions = captions.to("cuda")
    clips = type(clips)(**{name: getattr(clips, name).cuda() for name in ("video", "audio", "captions", "sights")})
    reached = []
    for captured in (False, True):
        training = Training(captions, clips, batch=32, seed=0)
        before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
        if captured:
            training.capture()
            assert all(torch.equal(tensor, before[name]) for name, tensor in training.model.state_dict().items())
            assert all(torch.equal(tensor, before[name]) for name, tensor in training.average.state_dict().items())
        for step in range(60):
            if step == 50:
                training.losses.zero_()
            training.step(step, 1.0)
        reached.append(training.losses / 10)
    torch.testing.assert_close(reached[0], reached[1], rtol=0.15, atol=0.05)
