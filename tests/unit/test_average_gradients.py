"""Gradients of several processes, exchanged."""

import pytest
import torch

from musubi_tuner.training.optimizer import average_gradients, make_optimizer


@pytest.mark.parametrize("other_has", [True, False])
def test_a_weight_that_took_part_in_no_process_stays_without_a_gradient(monkeypatch, other_has):
    """Of two processes this one has a gradient of the first weight alone. With a gradient of zero AdamW would move the second one on."""
    seen, unseen = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))

    def all_reduce(flat: torch.Tensor) -> None:
        """The other process: gradients of 3, of both weights or of the first."""
        has = [1.0, float(other_has)]
        flat += torch.tensor([3.0, 3.0, 3.0 * has[1], 3.0 * has[1], *has])

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    optimizer = make_optimizer("AdamW", [seen, unseen], 1e-2, {})
    for step in range(3):
        seen.grad, unseen.grad = torch.ones(2), torch.ones(2) if step == 0 else None
        average_gradients([seen, unseen], 2)
        assert seen.grad.tolist() == [2, 2]
        if step and not other_has:
            assert unseen.grad is None
        elif step:
            assert unseen.grad.tolist() == [1.5, 1.5]
        optimizer.step()
    assert int(optimizer.state[unseen]["step"]) == (3 if other_has else 1)
