"""Updates of a model's own weights, tensor by tensor."""

import copy

import pytest
import torch
from torch import nn

from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.optimizer import make_optimizer
from musubi_tuner.training.weight_steps import BY_TENSOR, NotFinite, WeightSteps, check_by_tensor, round_stochastically


def steps_of(model: nn.Module, name: str = "AdamW", **args: str) -> WeightSteps:
    named = dict(model.named_parameters())
    groups = [{"params": [weight], "lr": 0.01 * place} for place, weight in enumerate(named.values(), 1)]
    return WeightSteps(named, groups, lambda made: make_optimizer(name, made, 0.01, args), seed=3)


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)).to(dtype)


def loss_of(model: nn.Module, at: int = 1) -> torch.Tensor:
    return model(torch.linspace(-1, at, 12).view(2, 6).to(next(model.parameters()).dtype)).float().square().mean()


def test_rounding_at_random_is_right_in_the_mean_and_leaves_what_bf16_has():
    generator = torch.Generator().manual_seed(0)
    value = torch.tensor([1.0 + 2**-9, -(1.0 + 2**-9), 0.1, -3e-5, 0.0]).repeat_interleave(20000)
    rounded = round_stochastically(value, generator)
    assert rounded.dtype == torch.bfloat16
    means = rounded.double().view(5, -1).mean(1)
    assert torch.allclose(means, value.double().view(5, -1)[:, 0], rtol=2e-4, atol=0)
    assert set(rounded[:20000].tolist()) == {1.0, 1.0078125}, "its two neighbors"
    held = torch.randn(3, 1000).bfloat16()
    assert torch.equal(round_stochastically(held.float(), generator), held)
    assert torch.equal(round_stochastically(torch.tensor([1e38]), generator).float().isfinite(), torch.tensor([True]))


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "SGD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_the_backward_pass_as_after_it(name, dtype):
    one, other = model_of(dtype), model_of(dtype)
    after, within = steps_of(one, name), steps_of(other, name)
    for step in range(1, 4):
        after.begin(step)
        loss_of(one, step).backward()
        after.step()
        one.zero_grad()
        within.begin(step)
        with within.within_backward(lambda: None):
            loss_of(other, step).backward()
        assert all(weight.grad is None for weight in other.parameters()), "used up"
    assert all(torch.equal(left, right) for left, right in zip(one.parameters(), other.parameters(), strict=True))
    start = model_of(dtype)
    assert not any(torch.equal(left, right) for left, right in zip(one.parameters(), start.parameters(), strict=True))


def test_each_weight_has_its_own_rate():
    model, plain = model_of(), model_of()
    steps = steps_of(model, "SGD")
    loss_of(model).backward()
    loss_of(plain).backward()
    steps.step()
    for place, (now, before) in enumerate(zip(model.parameters(), plain.parameters(), strict=True), 1):
        assert torch.allclose(now, before - 0.01 * place * before.grad)


def test_states_of_bf16_weights_stay_float32_when_they_are_loaded():
    """And the run goes on with them as it would have."""
    one, other = model_of(torch.bfloat16), model_of(torch.bfloat16)
    first, second = steps_of(one), steps_of(other)
    for step in range(1, 3):
        first.begin(step)
        loss_of(one, step).backward()
        first.step()
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))  # torch would share the tensors
    with torch.no_grad():
        for target, source in zip(other.parameters(), one.parameters(), strict=True):
            target.copy_(source)
    states = [state["exp_avg"] for state in second.optimizer.state.values()]
    assert len(states) == 4 and all(state.dtype == torch.float32 for state in states)
    for steps, model in ((first, one), (second, other)):
        steps.begin(3)
        with steps.within_backward(lambda: None):
            loss_of(model, 3).backward()
    assert all(torch.equal(left, right) for left, right in zip(one.parameters(), other.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_stops_before_its_weight_is_touched():
    model = model_of()
    steps, changed = steps_of(model), []
    before = [weight.detach().clone() for weight in model.parameters()]
    with pytest.raises(NotFinite), steps.within_backward(lambda: changed.append(1)):
        (loss_of(model) * float("nan")).backward()
    assert not changed and all(torch.equal(left, right) for left, right in zip(before, model.parameters(), strict=True))
    model.zero_grad()
    inner = model[0].weight
    handle = model[1].register_full_backward_hook(lambda module, given, taken: (given[0] * float("inf"),))
    with pytest.raises(NotFinite, match=r"0\.(weight|bias)"), steps.within_backward(lambda: changed.append(1)):
        loss_of(model).backward()
    handle.remove()
    assert changed == [1] and torch.equal(inner, before[0]) and not torch.equal(model[2].weight, before[2]), "between two steps, and said"


def test_a_weight_that_is_read_after_its_update_is_noticed():
    """What this rests on would otherwise fail in silence: no operation of the pass reads a weight whose gradient is complete."""
    weight = nn.Parameter(torch.ones(3))
    steps = WeightSteps({"w": weight}, [{"params": [weight], "lr": 0.1}], lambda made: torch.optim.SGD(made, lr=0.1), seed=0)
    x = torch.ones(3, requires_grad=True)
    late = x * weight.detach()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), steps.within_backward(lambda: None):
        (weight * 2).sum().backward()
        late.sum().backward()


def test_optimizers_with_numbers_of_all_weights_are_refused():
    with pytest.raises(UserError, match="--optimizer_type Prodigy: here"):
        check_by_tensor("Prodigy", "here")
    for name in BY_TENSOR:
        check_by_tensor(name, "here")
