"""Stochastic steps, advantages and update rules against closed forms, finite differences and simulation."""

import math

import pytest
import torch

from musubi_tuner.flow.schedule import ancestral_euler_step, ltx2_sigmas
from musubi_tuner.flow.stochastic import next_step
from musubi_tuner.reinforcement import rules
from musubi_tuner.reinforcement.advantages import Scored, advantages, group_softmax

SHAPE = (2, 5, 3)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("level", [0.3, 0.7, 1.0])
def test_a_cps_step_has_the_coefficients_of_the_straight_path(level):
    """With the true clean clip and noise the result is distributed as (1 - s') x0 + s' noise: its mean, and its variance by both parts."""
    x0, noise, sigma, following = random(), random(seed=1), at(0.8), at(0.5)
    x = (1 - sigma) * x0 + sigma * noise
    step = next_step("cps", x, x0, sigma, following, level, sigma)
    share = math.sin(math.pi * level / 2)
    assert torch.allclose(step.std, following * share)
    assert torch.allclose(step.mean, (1 - following) * x0 + following * math.sqrt(1 - share**2) * noise)


def test_cps_of_the_whole_level_is_ddim_with_all_its_noise_and_level_0_is_euler():
    x, x0, fresh = random(), random(seed=1), random(seed=2)
    sigma, following = at(0.8), at(0.5)
    euler = x + (x - x0) / sigma * (following - sigma)
    assert torch.allclose(next_step("cps", x, x0, sigma, following, 0.0, sigma).draw(fresh), euler)
    assert torch.allclose(next_step("cps", x, x0, sigma, following, 1.0, sigma).draw(fresh), (1 - following) * x0 + following * fresh)
    ancestral = ancestral_euler_step(x, x0, sigma, following, fresh)
    assert not torch.allclose(ancestral, euler), "another split of the same variance"


@pytest.mark.parametrize("kind", ["flow_sde", "cps"])
def test_a_chain_of_steps_ends_at_the_data(kind):
    """The clean value is 2 with a spread of 0.5, whose best prediction is known in closed form; many small steps give it back."""
    levels = ltx2_sigmas(200).double()
    x = torch.randn(20000, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = torch.Generator().manual_seed(1)
    for number, (sigma, following) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        variance = (1 - sigma) ** 2 * 0.25 + sigma**2
        x0 = 2 + (1 - sigma) * 0.25 / variance * (x - (1 - sigma) * 2)
        if float(following) == 0:
            x = x0
        else:
            level = 0.7 if kind == "flow_sde" or number < 20 else 0.0  # CPS narrows with every stochastic step
            x = next_step(kind, x, x0, sigma, following, level, levels[1]).draw(torch.randn(x.shape, generator=draws, dtype=torch.float64))
    assert abs(float(x.mean()) - 2) < 0.02
    assert abs(float(x.std()) - 0.5) < (0.03 if kind == "flow_sde" else 0.06)


def test_the_log_density_is_the_normal_one():
    x, x0, action = random(), random(seed=1), random(seed=2)
    step = next_step("flow_sde", x, x0, at(0.8), at(0.5), 0.7, at(0.9))
    wanted = torch.distributions.Normal(step.mean, step.std.expand(SHAPE)).log_prob(action)
    assert torch.allclose(step.log_density("flow_sde", action), wanted)
    first = next_step("flow_sde", x, x0, at(1.0), at(0.9), 0.7, at(0.9))
    assert bool(torch.isfinite(first.mean).all()) and float(first.std) > 0, "at the level 1 the second one stands in"


def gradient(loss, new: torch.Tensor) -> torch.Tensor:
    leaf = new.clone().requires_grad_(True)
    loss(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_nft_pulls_to_better_samples_pushes_from_worse_ones_and_leaves_even_ones():
    """At v = v_old; and the distance that normalizes is not learned through."""
    target, old, weight = random(), random(seed=1), torch.ones(2, 5, dtype=torch.float64)
    sigma = torch.tensor([0.3, 0.9], dtype=torch.float64)

    def loss(value: float, mix: float = 1.0):
        advantage = torch.full((2,), value, dtype=torch.float64)
        return lambda new: rules.nft(target, new, old, advantage, sigma, weight, mix=mix, most=5.0)

    assert float(gradient(loss(0.0), old).abs().max()) < 1e-12
    towards = (old - target).flatten()
    assert float(gradient(loss(2.0), old).flatten() @ towards) > 0 > float(gradient(loss(-2.0), old).flatten() @ towards)
    distance = (sigma[:, None, None] * (old - target)).abs().mean((1, 2))
    by_hand = 2.0 / 5 * 5.0 * 2 * sigma[:, None, None] ** 2 * (old - target) / distance[:, None, None] / 15
    assert torch.allclose(gradient(loss(2.0), old), by_hand), "2 A / (2 most) of the difference of both branches, by most / mix"
    assert torch.allclose(gradient(loss(2.0, mix=0.5), old), by_hand)


@pytest.mark.parametrize("rule", ["grpo", "guard cps", "guard flow_sde", "awm", "rwr", "dpo"])
def test_gradients_by_finite_differences(rule):
    target, old, weight = random(), random(seed=1), torch.ones(2, 5, dtype=torch.float64)
    advantage, std = torch.tensor([1.3, -0.7], dtype=torch.float64), torch.tensor([0.4, 0.6], dtype=torch.float64)
    new = old + 0.01 * random(seed=3)

    def loss(velocity: torch.Tensor) -> torch.Tensor:
        error, error_old = (rules.mean((one - target).square(), weight) for one in (velocity, old))
        moved = rules.mean((velocity - old).square(), weight)
        if rule == "grpo":
            return rules.grpo(advantage, -error, -error_old, width=10.0)
        if rule.startswith("guard"):
            kind = rule.split()[1]
            return rules.grpo_guard(advantage, -error, -error_old, moved, std, kind=kind, width=10.0)
        if rule == "awm":
            return rules.awm(advantage, error, error_old, std, width=10.0)
        if rule == "rwr":
            return rules.rwr(std, error)
        return rules.dpo(error[:1], error_old[:1], error[1:], error_old[1:], beta=3.0)

    found, h = gradient(loss, new), 1e-6
    for place in ((0, 0, 0), (1, 4, 2), (0, 3, 1)):
        moved = torch.zeros_like(new)
        moved[place] = h
        assert float(found[place]) == pytest.approx(float((loss(new + moved) - loss(new - moved)).sum() / (2 * h)), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("kind", ["cps", "flow_sde"])
def test_the_guarded_ratio_is_1_on_average(kind):
    """Of steps that `old` drew, whose number is as large as the policy's difference is small."""
    old = torch.zeros(1, 200000, 1, dtype=torch.float64)
    new, std = old + 0.01, at(0.5)
    action = old + std * random(*old.shape)
    first, second = -((action - new) ** 2), -((action - old) ** 2)
    if kind == "flow_sde":
        first, second = first / (2 * std**2), second / (2 * std**2)
    weight = torch.ones(1, 200000, dtype=torch.float64)
    moved = rules.mean((new - old).square(), weight)
    ratio_loss = rules.grpo_guard(
        at(-1.0)[None], rules.mean(first, weight), rules.mean(second, weight), moved, std[None], kind=kind, width=1.0
    )
    assert float(ratio_loss.log()) == pytest.approx(0, abs=5e-5)


def test_clipping_stops_what_has_moved_far_enough():
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    log_ratio = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    loss = rules.clipped(advantage, log_ratio, 1e-4)
    loss.sum().backward()
    assert log_ratio.grad is not None and [bool(one) for one in log_ratio.grad] == [False, True, True, False]
    assert rules.at_bound(loss.detach(), advantage, 1e-4).tolist() == [True, False, False, True], "as the log tells it"
    assert not rules.at_bound(-advantage, advantage, 1e-4).any(), "a ratio of 1"


GROUPS = {0: ("a", "b", "c"), 1: ("d", "e", "f")}


def scored(*values: float | None, reward: str = "r", route: str = "video", weight: float = 1.0) -> Scored:
    return Scored(reward=reward, route=route, weight=weight, scores=dict(zip("abcdef", values, strict=True)))


def test_advantages_by_hand_by_stream_and_group():
    found = advantages(GROUPS, [scored(1, 2, 3, 30, 20, 10), scored(0, 0, 6, 1, 1, 4, reward="s", route="sync", weight=0.5)])
    spread = math.sqrt(2 / 3) + 1e-4
    first = [-1 / spread, 0, 1 / spread, 10 / (10 * math.sqrt(2 / 3) + 1e-4), 0, -10 / (10 * math.sqrt(2 / 3) + 1e-4)]
    second = [-2 / (math.sqrt(8) + 1e-4), -2 / (math.sqrt(8) + 1e-4), 4 / (math.sqrt(8) + 1e-4)]
    second += [-1 / (math.sqrt(2) + 1e-4), -1 / (math.sqrt(2) + 1e-4), 2 / (math.sqrt(2) + 1e-4)]
    assert [found.of[name]["video"] for name in "abcdef"] == pytest.approx([a + 0.5 * b for a, b in zip(first, second, strict=True)])
    assert [found.of[name]["audio"] for name in "abcdef"] == pytest.approx([0.5 * b for b in second])
    assert found.flagged == () and len(found.learned) == 6


def test_groups_without_order_are_flagged_and_nothing_is_learned_from_them():
    found = advantages(GROUPS, [scored(1, 1, 1, 1, None, 2)])
    assert [(one.group, one.reason) for one in found.flagged] == [
        (0, "all samples have the same score"),
        (1, "1 of 3 samples have no score"),
    ]
    assert found.learned == ()


def test_outliers_are_clipped_and_a_shuffled_control_has_the_same_numbers():
    rewards = [scored(0, 0, 9, 1, 2, 3)]
    assert max(value["video"] for value in advantages(GROUPS, rewards, clip=0.5).of.values()) == 0.5
    plain, shuffled = advantages(GROUPS, rewards), advantages(GROUPS, rewards, shuffled=3)
    for names in GROUPS.values():
        assert sorted(plain.of[name]["video"] for name in names) == sorted(shuffled.of[name]["video"] for name in names)
    assert any(advantages(GROUPS, rewards, shuffled=seed).of != plain.of for seed in range(4))
    over_all = advantages(GROUPS, [scored(1, 2, 3, 1, 2, 9)], over_all=True)
    assert sum(value["video"] for value in over_all.of.values()) == pytest.approx(0, abs=1e-9)


def test_a_group_without_order_stays_without_when_all_samples_are_normalized():
    """The mean over all is no more than rounding, which would have the whole group learned from."""
    found = advantages(GROUPS, [scored(0.1, 0.5, 0.7, 4, 4, 4)], over_all=True)
    assert found.learned == ("a", "b", "c") and not any(found.of[name][stream] for name in "def" for stream in ("video", "audio"))


def test_softmax_weights_of_a_group_average_to_1_and_nothing_is_learned_of_what_no_reward_orders():
    weights = group_softmax(GROUPS, advantages(GROUPS, [scored(1, 2, 3, 4, 4, 4)]), temperature=0.5)
    assert sum(weights[name]["video"] for name in "abc") == pytest.approx(3) and weights["c"]["video"] > weights["b"]["video"]
    assert [weights[name]["video"] for name in "def"] == [0, 0, 0]
    assert not any(weights[name]["audio"] for name in "abcdef"), "the reward is the picture's alone"
