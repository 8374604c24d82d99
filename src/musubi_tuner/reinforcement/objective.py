"""An update rule as the training loop's objective: three predictions of one batch, by the policy, the old policy and the base model.

All see the same noise at the same level (or the same recorded step). The old policy is the one that made the rollouts: its adapter weights
are kept beside the policy's and swapped in, so there is no second model. While the policy has not moved, both predict the same numbers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.conditioning.apply import condition
from musubi_tuner.conditioning.tokens import audio_stream, loss_weights, model_input, video_stream
from musubi_tuner.dataset.batch import Batch
from musubi_tuner.flow.path import velocity_to_x0
from musubi_tuner.flow.stochastic import NextStep, next_step
from musubi_tuner.ltxv2.transformer.modality import Velocity
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork
from musubi_tuner.reinforcement import rules
from musubi_tuner.reinforcement.rollouts import Rollouts
from musubi_tuner.training.objective import FlowMatching, ItemLosses, Noised, Prediction, of_stream


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleSettings:
    """What the rule's formulas take."""

    rule: str
    mix: float
    most: float
    """Largest advantage."""
    width: float
    """How far a ratio may move from 1."""
    awm_weighting: str
    beta: float
    reference_weight: float


COMPARED_WITH_OLD = ("nft", "awm", "grpo", "grpo_guard")
"""Rules that take the prediction of the policy that made the rollouts."""
CLIPPED = ("awm", "grpo", "grpo_guard")
"""Rules that stop to learn from a sample where the policy has moved far enough."""
COPY_BYTES = 4.0
"""Of each trained weight, which is float32, in `OldPolicy`."""


class OldPolicy:
    """The adapter weights that made the rollouts, beside those that are trained."""

    def __init__(self, network: LoRANetwork) -> None:
        """Remembers the weights that the network has now."""
        self._network = network
        self._weights = [parameter.detach().clone() for parameter in network.parameters()]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the network has the old weights; nothing is learned."""
        parameters = list(self._network.parameters())
        mine = [parameter.data for parameter in parameters]
        try:
            for parameter, old in zip(parameters, self._weights, strict=True):
                parameter.data = old
            with torch.no_grad():
                yield
        finally:
            for parameter, own in zip(parameters, mine, strict=True):
                parameter.data = own


@dataclass(frozen=True, slots=True)
class Predictions(Prediction):
    """Of one batch, by each of the three."""

    old: Velocity | None = None
    reference: Velocity | None = None
    """Of the base model; None where the rule does not need it."""
    steps: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Of rules on recorded steps, by stream: `before`, `after`, `sigma`, `following`, `second`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutObjective:
    """One rule."""

    matching: FlowMatching
    network: LoRANetwork
    old: OldPolicy | None
    """None where the rule does not compare with it."""
    settings: RuleSettings
    advantages: Mapping[str, Mapping[str, float]]
    """{item: {stream: advantage}}; of RWR its weight, of DPO 1 for the chosen sample and -1 for the other. 0 = nothing is learned."""
    rollouts: Rollouts

    def predict(self, batch: Batch) -> Predictions:
        recorded = self.settings.rule.startswith("grpo")
        if self.settings.rule == "dpo":
            batch = _with_equal_draws(batch)
        noised, steps = self._at_steps(batch) if recorded else (self.matching.noise(batch), {})
        wrapper = self.matching.wrapper
        old = reference = None
        if self.settings.rule in COMPARED_WITH_OLD:
            assert self.old is not None
            with self.old.in_place():
                old = wrapper(*noised.inputs)
        if self.settings.reference_weight or self.settings.rule == "dpo":
            with torch.no_grad(), self.network.disabled():
                reference = wrapper(*noised.inputs)
        return Predictions(noised, wrapper(*noised.inputs), None, old, reference, steps)

    def loss(self, prediction: Prediction) -> ItemLosses:
        assert isinstance(prediction, Predictions)
        names, losses, kept = prediction.noised.batch.names, {}, []
        present: dict[str, Tensor] = {}
        clipped = []
        for stream, weight in prediction.noised.weights.items():
            new = of_stream(prediction.velocity, stream)
            advantage = torch.tensor([self.advantages[name][stream] for name in names], device=weight.device)
            present[stream] = (weight.sum(1) > 0) & (advantage != 0)
            losses[stream] = self._loss(prediction, stream, new, advantage, weight) * present[stream]
            if self.settings.rule in CLIPPED:
                clipped.append(rules.at_bound(losses[stream].detach(), advantage, self.settings.width))
            if self.settings.reference_weight:
                assert prediction.reference is not None
                distance = rules.mean((new - of_stream(prediction.reference, stream)).square(), weight)
                kept.append(self.settings.reference_weight * distance)
        return ItemLosses(
            video=losses.get("video"),
            audio=losses.get("audio"),
            video_present=present.get("video"),
            audio_present=present.get("audio"),
            preserved=torch.stack(kept).sum(0) if kept else None,
            preserved_present=torch.ones_like(kept[0], dtype=torch.bool) if kept else None,
            clipped=torch.stack(clipped).sum(0) if clipped else None,
            clipped_of=torch.stack(list(present.values())).sum(0) if clipped else None,
        )

    def _loss(self, prediction: Predictions, stream: str, new: Tensor, advantage: Tensor, weight: Tensor) -> Tensor:
        """(B,)"""
        settings, rule = self.settings, self.settings.rule
        old = None if prediction.old is None else of_stream(prediction.old, stream)
        if rule.startswith("grpo"):
            assert old is not None
            return self._of_steps(prediction.steps[stream], new, old, advantage, weight)
        target, batch = prediction.noised.targets[stream], prediction.noised.batch
        sigma = batch.video_sigma if stream == "video" else batch.audio_sigma
        error = rules.mean((new - target).square(), weight)
        if rule == "nft":
            assert old is not None
            return rules.nft(target, new, old, advantage, sigma, weight, mix=settings.mix, most=settings.most)
        if rule == "awm":
            assert old is not None
            power = {"uniform": 0, "sigma": 1, "sigma2": 2}[settings.awm_weighting]
            return rules.awm(advantage, error, rules.mean((old - target).square(), weight), sigma**power, width=settings.width)
        if rule == "rwr":
            return rules.rwr(advantage, error)
        assert prediction.reference is not None
        reference = rules.mean((of_stream(prediction.reference, stream) - target).square(), weight)
        chosen, rejected = int(advantage.argmax()), int(advantage.argmin())
        pair = rules.dpo(error[chosen], reference[chosen], error[rejected], reference[rejected], beta=settings.beta)
        return pair.expand(len(advantage))

    def _of_steps(self, steps: Mapping[str, Tensor], new: Tensor, old: Tensor, advantage: Tensor, weight: Tensor) -> Tensor:
        drawn = self.rollouts.stochastic
        assert drawn is not None
        if "after" not in steps:  # its steps were Euler's: they have no probability
            return new.sum((1, 2)) * 0
        own = steps["before"].shape[1]
        now, before = (self._next(steps, velocity[:, :own], drawn) for velocity in (new, old))
        counted = weight[:, :own]
        log_new, log_old = (rules.mean(step.log_density(drawn["kind"], steps["after"]), counted) for step in (now, before))
        if self.settings.rule == "grpo":
            return rules.grpo(advantage, log_new, log_old, width=self.settings.width)
        moved = rules.mean((now.mean - before.mean).square(), counted)
        std = now.std[:, 0, 0]
        return rules.grpo_guard(advantage, log_new, log_old, moved, std, kind=drawn["kind"], width=self.settings.width)

    def _next(self, steps: Mapping[str, Tensor], velocity: Tensor, drawn: Mapping[str, Any]) -> NextStep:
        sigma, following, second = (steps[name][:, None, None] for name in ("sigma", "following", "second"))
        x0 = velocity_to_x0(steps["before"], velocity, sigma)
        return next_step(drawn["kind"], steps["before"], x0, sigma, following, drawn["level"], second)

    def _at_steps(self, batch: Batch) -> tuple[Noised, dict[str, dict[str, Tensor]]]:
        """The batch at one of the recorded steps of each sample, chosen by the item's own draw."""
        device = batch.video_sigma.device
        rows: dict[str, list[Tensor]] = {}
        for name, draw in zip(batch.names, batch.dropout_seeds, strict=True):
            found = self.rollouts.steps_of(name.partition("/")[2])
            place = draw % len(found["levels"])
            for key, tensor in found.items():
                rows.setdefault(key, []).append((tensor if key == "second" else tensor[place]).float())
        stacked = {key: torch.stack(values).to(device) for key, values in rows.items()}
        sigma, following = stacked["levels"].unbind(1)
        streams = {}
        if batch.latents is not None:
            streams["video"] = video_stream(batch.latents, batch.fps)
        if batch.audio_latents is not None:
            streams["audio"] = audio_stream(batch.audio_latents, batch.audio_lengths if batch.audio_padded else None)
        modalities, weights, steps = {}, {}, {}
        for name, stream in condition(streams, batch.conditions).items():
            before = stacked[f"{name}_before"]
            modalities[name] = model_input(stream, before, sigma)
            weights[name] = loss_weights(stream)
            steps[name] = {"before": before, "sigma": sigma, "following": following, "second": stacked["second"]}
            if f"{name}_after" in stacked:
                steps[name]["after"] = stacked[f"{name}_after"]
        inputs = (modalities.get("video"), modalities.get("audio"), batch.text, batch.text_mask)
        batch = replace(batch, video_sigma=sigma, audio_sigma=sigma)
        return Noised(batch=batch, inputs=inputs, targets={}, weights=weights), steps


def _with_equal_draws(batch: Batch) -> Batch:
    """Both samples of a pair at the same noise and level."""

    def first(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[:1].expand_as(tensor)

    sigmas = {name: getattr(batch, name)[:1].expand(batch.size) for name in ("video_sigma", "audio_sigma")}
    return replace(batch, video_noise=first(batch.video_noise), audio_noise=first(batch.audio_noise), **sigmas)
