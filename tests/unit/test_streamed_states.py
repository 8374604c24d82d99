"""Trained blocks whose weights and optimizer states lie on the host: every bit as where all lie on the device."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from musubi_tuner.memory.checkpointing import Recompute
from musubi_tuner.memory.engine import BlockEngine
from musubi_tuner.memory.streaming import BlockStreamer, spread
from musubi_tuner.training.optimizer import make_optimizer
from musubi_tuner.training.weight_steps import WeightSteps

BLOCKS, WIDTH = 5, 8


class Block(nn.Module):
    """Two streams, of which the second may be absent, a weight that is read twice, and one that nobody trains."""

    def __init__(self) -> None:
        super().__init__()
        self.video, self.audio = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.table = nn.Parameter(torch.randn(WIDTH))
        self.frozen = nn.Parameter(torch.randn(WIDTH), requires_grad=False)

    def forward(self, states: tuple[Tensor | None, Tensor | None], inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        video, audio = states
        assert video is not None
        video = video + self.video(nn.functional.gelu(self.video(video) * self.table)) + inputs * self.frozen
        return video, None if audio is None else audio + torch.tanh(self.audio(audio + video))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.run_block = lambda block, states, inputs: block(states, inputs)

    def forward(self, given: Tensor, *, sound: bool) -> Tensor:
        inputs, states = self.shared(given), (self.first(given), self.first(given.sin()) if sound else None)
        for block in self.blocks:
            states = self.run_block(block, states, inputs)
        return sum(self.last(one).float().square().mean() for one in states if one is not None)


def model_of(dtype: torch.dtype, device: str = "cpu") -> Model:
    torch.manual_seed(0)
    return Model().to(device, dtype)


def streamed(model: Model, count: int, slots: int, level: Recompute | None) -> BlockStreamer:
    """Free slots, of weights and of states, are filled with NaN."""
    chosen = [model.blocks[place] for place in spread(BLOCKS, count)]
    streamer = BlockStreamer(chosen, model.first.weight.device, slots=slots, poison=True, trained=True)
    model.run_block = BlockEngine(list(model.blocks), [level] * BLOCKS, max_rank=1, keeps_trained=True, streamer=streamer)
    return streamer


def steps_with(model: Model, name: str, streamer: BlockStreamer | None = None, **args: str) -> WeightSteps:
    named = {key: one for key, one in model.named_parameters() if one.requires_grad}
    groups = [{"params": list(named.values()), "lr": 0.01}]
    return WeightSteps(named, groups, lambda made: make_optimizer(name, made, 0.01, args), seed=3, streamer=streamer)


def train(model: Model, steps: WeightSteps, numbers: range) -> list[float]:
    """Losses, and that of a pass without gradients after each step. The first batch has no sound."""
    losses = []
    for number in numbers:
        given = torch.linspace(-1, number, 2 * 3 * WIDTH).view(2, 3, WIDTH).to(model.first.weight)
        steps.begin(number)
        with steps.within_backward(lambda: None):
            loss = model(given, sound=number != 1)
            loss.backward()
        with torch.no_grad():
            losses += [float(loss), float(model(given, sound=True))]
    return losses


def tensors_in(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    states = optimizer.state_dict()["state"]
    return {(place, key): value for place, own in states.items() for key, value in own.items() if isinstance(value, Tensor)}


def compare(plain: Model, ours: Model, streamer: BlockStreamer, one: WeightSteps, other: WeightSteps) -> None:
    streamer.settle()
    for (name, wanted), found in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(streamer.home(found).cpu(), wanted.cpu()), name
    wanted, found = tensors_in(one.optimizer), tensors_in(other.optimizer)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[key].cpu(), found[key].cpu()) for key in wanted)


OPTIMIZERS = {"AdamW": {}, "Adafactor": {}, "SGD": {"momentum": "0.9"}, "AdamW8bit": {"min_8bit_size": "1"}, "Lion": {}}


@pytest.mark.parametrize(
    ("count", "slots", "dtype"),
    [(5, 2, torch.bfloat16), (5, 2, torch.float32), (4, 1, torch.bfloat16), (5, 3, torch.bfloat16), (1, 2, torch.float32)],
)
@pytest.mark.parametrize("level", [None, Recompute.EVERYTHING, Recompute.NOTHING])
def test_streamed_blocks_train_as_resident_ones(count, slots, dtype, level):
    plain, ours = model_of(dtype), model_of(dtype)
    streamer = streamed(ours, count, slots, level)
    one, other = steps_with(plain, "AdamW"), steps_with(ours, "AdamW", streamer)
    assert train(ours, other, range(1, 5)) == train(plain, one, range(1, 5))
    compare(plain, ours, streamer, one, other)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "AdamW"])
def test_states_of_every_optimizer_travel(name):
    plain, ours = model_of(torch.bfloat16), model_of(torch.bfloat16)
    streamer = streamed(ours, 5, 2, None)
    one, other = steps_with(plain, name, **OPTIMIZERS[name]), steps_with(ours, name, streamer, **OPTIMIZERS[name])
    assert train(ours, other, range(1, 4)) == train(plain, one, range(1, 4))
    compare(plain, ours, streamer, one, other)


@pytest.mark.parametrize("broken", ["write_back", "beside"])
def test_what_does_not_travel_back_shows(broken, monkeypatch):
    """The comparison above can fail."""
    plain, ours = model_of(torch.bfloat16), model_of(torch.bfloat16)
    streamer = streamed(ours, 5, 2, None)
    one, other = steps_with(plain, "AdamW"), steps_with(ours, "AdamW", streamer)
    ring = streamer._ring if broken == "write_back" else streamer.beside._ring
    monkeypatch.setattr(ring, "write_back", lambda number: None)
    assert train(ours, other, range(1, 6)) != train(plain, one, range(1, 6))


def test_between_passes_the_device_holds_slots_alone():
    ours = model_of(torch.bfloat16)
    streamer = streamed(ours, 5, 2, None)
    train(ours, steps := steps_with(ours, "AdamW", streamer), range(1, 4))
    weights, states = streamer, streamer.beside
    for ring in (weights, states):
        assert ring.device_bytes <= ring.host_bytes * 2 / 5 + 2**12
    homes = {value.untyped_storage().data_ptr() for key, value in tensors_in(steps.optimizer).items() if key[1] != "step"}
    assert len(homes) >= BLOCKS, "and the optimizer those on the host"


@pytest.mark.parametrize(("left", "right"), [*itertools.product((False, True), repeat=2)])
def test_a_saved_optimizer_goes_on_streamed_or_not(left, right):
    wanted = train(whole := model_of(torch.bfloat16), steps_with(whole, "AdamW"), range(1, 6))
    models, steps, streamers = [], [], []
    for is_streamed in (left, right):
        model = model_of(torch.bfloat16)
        streamer = streamed(model, 5, 2, None) if is_streamed else None
        models, steps, streamers = [*models, model], [*steps, steps_with(model, "AdamW", streamer)], [*streamers, streamer]
    train(models[1], steps[1], range(1, 2))  # what is in its slots then is old
    assert train(models[0], steps[0], range(1, 4)) == wanted[:6]
    if streamers[0] is not None:
        streamers[0].settle()
    home, other = ((lambda one: one) if streamer is None else streamer.home for streamer in streamers)
    with torch.no_grad():
        for value, wanted_value in zip(models[1].parameters(), models[0].parameters(), strict=True):
            other(value).copy_(home(wanted_value))
    if streamers[1] is not None:
        streamers[1].forget()
    steps[1].optimizer.load_state_dict(copy.deepcopy(steps[0].optimizer.state_dict()))
    assert train(models[1], steps[1], range(4, 6)) == wanted[6:]


def test_a_backward_pass_that_is_cut_short_leaves_on_the_host_what_was_done(monkeypatch):
    """In the middle of a block; as where all lies on the device."""
    plain, ours = model_of(torch.bfloat16), model_of(torch.bfloat16)
    streamer = streamed(ours, 5, 2, None)
    one, other = steps_with(plain, "AdamW"), steps_with(ours, "AdamW", streamer)
    for model, steps in ((plain, one), (ours, other)):
        train(model, steps, range(1, 3))
        left, update = 9, steps._step_one

        def ends(weight: nn.Parameter, update=update) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise torch.OutOfMemoryError("no room")
            update(weight)

        monkeypatch.setattr(steps, "_step_one", ends)
        with pytest.raises(torch.OutOfMemoryError):
            train(model, steps, range(3, 4))
    compare(plain, ours, streamer, one, other)
