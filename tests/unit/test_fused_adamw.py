"""The fused AdamW does what torch's does, to the bit, and leaves the same states."""

import copy

import torch
from torch import nn

from musubi_tuner.training.fused_adamw import FusedAdamW
from musubi_tuner.training.optimizer import clip_together

SHAPES = [(4, 3), (5,), (2, 6), (7,)]


def groups_of(weights):
    return [{"params": weights[:2], "lr": 1e-2}, {"params": weights[2:], "lr": 1e-3}]


def train(make, *, amsgrad=False):
    """(weights, optimizer) after eight steps: a rate that changes, a step with a weight that has no gradient, one that is refused, and a
    state that is loaded into a new optimizer on the way."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = make(groups_of(weights), lr=1e-2, amsgrad=amsgrad)
    for step in range(8):
        for place, weight in enumerate(weights):
            gradient = torch.randn(weight.shape, generator=generator)
            weight.grad = None if (step, place) == (3, 1) else gradient
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.found_inf = torch.tensor(float(step == 4))
        optimizer.step()
        if step == 5:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = make(groups_of(weights), lr=1e-2, amsgrad=amsgrad)
            optimizer.load_state_dict(state)
    return weights, optimizer


def test_steps_and_states_are_those_of_torch_to_the_bit():
    for amsgrad in (False, True):
        ours, our_optimizer = train(FusedAdamW, amsgrad=amsgrad)
        theirs, their_optimizer = train(lambda groups, **options: torch.optim.AdamW(groups, fused=True, **options), amsgrad=amsgrad)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        state, wanted = our_optimizer.state_dict(), their_optimizer.state_dict()
        assert state["param_groups"] == wanted["param_groups"]
        for place, entries in wanted["state"].items():
            assert entries.keys() == state["state"][place].keys()
            assert all(torch.equal(value, state["state"][place][name]) for name, value in entries.items())


def test_gradients_are_clipped_together_as_torch_clips_them():
    generator = torch.Generator().manual_seed(1)
    for max_norm in (0.0, 1.0, 100.0):
        ours = [torch.randn(shape, generator=generator) for shape in SHAPES]
        theirs = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        for weight, gradient in zip(theirs, ours, strict=True):
            weight.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm or float("inf"))
        assert torch.equal(clip_together(ours, max_norm), norm) and float(norm) > 1
        assert all(torch.equal(gradient, weight.grad) for gradient, weight in zip(ours, theirs, strict=True))
