"""Automatic balance, strict sound, losses, noise levels and their weights."""

from statistics import NormalDist

import pytest
import torch

from musubi_tuner.config.losses import AudioOptions, LossOptions, PreservationOptions, check_losses
from musubi_tuner.config.validation import validated
from musubi_tuner.flow.schedule import mu_for_tokens
from musubi_tuner.flow.sigma import SCHEMES, STRATA, SigmaSettings, draw_sigma, expected, loss_weight, stretched
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.balance import LEAST, MOST, TARGET, AudioBalance, at_bound
from musubi_tuner.training.objective import ItemLosses, error_function, masked_mean, total_loss
from musubi_tuner.training.setup import sigma_settings
from musubi_tuner.training.watch import AudioSupervision


def losses(video: float, audio: float, *, heard: bool = True) -> ItemLosses:
    return ItemLosses(video=torch.tensor([video]), audio=torch.tensor([audio]), audio_present=torch.tensor([heard]))


ONE = torch.ones(1)


def run(video: float, audio: float, steps: int = 500, noise: float = 0.0) -> list[float]:
    """Multipliers over a run of two streams of constant losses."""
    generator = torch.Generator().manual_seed(1)
    balance, multipliers = AudioBalance(torch.device("cpu")), []
    for _ in range(steps):
        multipliers.append(float(balance.multiplier()))
        factor = 1 + noise * (torch.rand(2, generator=generator) - 0.5)
        balance.add(losses(video * float(factor[0]), audio * float(factor[1])), ONE, ONE)
        balance.step(1)
    return multipliers


@pytest.mark.parametrize(("video", "audio"), [(4.0, 1.0), (1.0, 4.0)])
def test_balance_settles_at_its_target_from_both_sides(video, audio):
    """The scaled audio loss is a third of the video loss, whichever was larger."""
    multipliers = run(video, audio, noise=1.0)
    for multiplier in multipliers[300:]:
        assert multiplier * audio / video == pytest.approx(TARGET, rel=0.08)
    assert len(set(multipliers[1:])) > 400 and at_bound(multipliers[-1]) is None


def test_balance_rests_at_its_bounds_and_says_so():
    assert run(1.0, 10.0)[-1] == pytest.approx(LEAST) and "lowest allowed, 0.05" in at_bound(LEAST)
    assert run(1.0, 0.001)[-1] == pytest.approx(MOST) and "highest allowed, 20" in at_bound(MOST)


@pytest.mark.parametrize(("video", "audio", "wanted"), [(0.25, 0.45, 0.1833), (0.25, 0.01, 8.25), (0.25, 0.001, 20.0)])
def test_balance_is_right_from_its_first_reading_on(video, audio, wanted):
    """LOS-05: corrected for its start at zero; the first step, which nothing was heard before, has 1."""
    multipliers = run(video, audio, steps=3)
    assert multipliers[0] == 1 and multipliers[1:] == pytest.approx([wanted, wanted], rel=1e-3)


def test_silence_has_no_part_in_the_balance():
    """LOS-14."""
    balance = AudioBalance(torch.device("cpu"))
    balance.add(losses(1.0, 2.0), ONE, ONE)
    balance.step(1)
    before = float(balance.multiplier())
    for _ in range(50):
        balance.add(losses(1.0, 0.0, heard=False), ONE, ONE)
        balance.add(losses(9.0, 9.0), 0 * ONE, 0 * ONE)  # of a dataset that weighs nothing
        balance.step(1)
    assert float(balance.multiplier()) == pytest.approx(before)
    other = AudioBalance(torch.device("cpu"))
    other.load_state_dict(balance.state_dict())
    assert float(other.multiplier()) == float(balance.multiplier())


def supervise(ratio: float, steps: int, **options) -> list[str]:
    watch = AudioSupervision(AudioOptions(**{"audio_supervision_mode": "error"} | options))
    said = []
    for step in range(1, steps + 1):
        watch.add(20, round(20 * ratio))
        if message := watch.check(step, torch.device("cpu"), 1):
            said.append(message)
    return said


def test_strict_sound_stops_after_the_warm_up_with_counts():
    """LOS-09, ERR-07."""
    with pytest.raises(UserError, match=r"step 51: 510 of 1020 items that should have sound had it \(50%\).*0.9"):
        supervise(0.5, 60)
    assert supervise(0.95, 200) == [] and supervise(0.5, 50) == []
    assert len(supervise(0.5, 90, audio_supervision_mode="warn")) == 1
    assert supervise(0.0, 90, audio_supervision_mode="off") == []


@pytest.mark.parametrize(("kind", "wanted"), [("mse", 2.5), ("mae", 1.5), ("huber", 1.0)])
def test_losses_are_their_formulas(kind, wanted):
    """Errors of 1 and 2 by each formula, huber with delta 1: 0.5 and 1.5."""
    error = error_function(kind, 1.0)(torch.tensor([[[1.0, 2.0]]]), torch.zeros(1, 1, 2))
    assert float(masked_mean(error, torch.ones(1, 1))) == pytest.approx(wanted)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["shifted_logit_normal", "uniform", "logit_normal", "stratified"])
def test_weights_are_one_in_the_mean_over_what_is_drawn(scheme, kind):
    settings, generator = SigmaSettings(kind=kind, low=0.1, high=0.9), torch.Generator().manual_seed(3)
    drawn = [draw_sigma(settings, 1500, generator) for _ in range(8000)]
    mean = sum(loss_weight(scheme, sigma, settings, 1500) for sigma in drawn) / len(drawn)
    assert mean == pytest.approx(1.0, abs=0.05)
    assert loss_weight(scheme, 0.2, settings, 1500) != loss_weight(scheme, 0.5, settings, 1500)
    assert loss_weight("none", 0.2, settings, 1500) == 1
    assert min(drawn) >= 0.1 and max(drawn) <= 0.9


def test_a_stratum_is_an_eighth_of_what_is_drawn():
    settings, generator = SigmaSettings(kind="stratified"), torch.Generator().manual_seed(4)
    shares = [max(1e-9, min(1 - 1e-9, place / STRATA)) for place in range(STRATA + 1)]
    edges = [stretched(NormalDist().inv_cdf(share), mu_for_tokens(4096)) for share in shares]
    for stratum in range(STRATA):
        drawn = [draw_sigma(settings, 4096, generator, stratum) for _ in range(200)]
        assert max(drawn) <= edges[stratum + 1]
        assert stratum == 0 or min(drawn) >= edges[stratum]  # the first is reflected at its lower end


def test_settings_of_the_sampler_take_effect():
    generator = torch.Generator().manual_seed(5)

    def mean(**values) -> float:
        return sum(draw_sigma(SigmaSettings(**values), 1024, generator) for _ in range(3000)) / 3000

    assert mean(shift=3.0) > mean() > mean(shift=-1.0)
    assert mean(uniform_prob=1.0) == pytest.approx(0.5, abs=0.02)
    assert mean(kind="logit_normal", mean=2.0) == pytest.approx(expected(SigmaSettings(kind="logit_normal", mean=2.0), 1, float), abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_snr_gamma": 5.0}, "signal-to-noise ratio.*flow matching does not have.*weighting_scheme"),
        ({"min_timestep": 900.0, "max_timestep": 100.0}, "0 <= min < max <= 1000"),
        ({"caption_dropout_rate": 1.5}, "caption_dropout_rate = 1.5: must be a share"),
        ({"huber_delta": 0.0}, "huber_delta"),
        ({"noise_offset": -0.1}, "noise_offset"),
    ],
)
def test_values_out_of_range_are_refused_with_the_reason(options, message):
    with pytest.raises(UserError, match=message):
        validated(LossOptions, options)


def test_sound_options_need_sound():
    for mode, options in (("video", {"audio_supervision_mode": "error"}), ("audio", {"audio_balance": "ema"})):
        with pytest.raises(UserError, match="Give av"):
            check_losses(LossOptions(), AudioOptions(**options), PreservationOptions(), mode)


@pytest.mark.parametrize(
    ("mode", "options"), [("video", {"audio_caption_dropout_rate": 0.1}), ("audio", {"video_caption_dropout_rate": 0.1}),
                          ("audio", {"noise_offset": 0.1})],
)  # fmt: skip
def test_flags_of_a_stream_that_the_mode_lacks_are_refused(mode, options):
    check_losses(LossOptions(**options), AudioOptions(), PreservationOptions(), "av")
    with pytest.raises(UserError, match=f"--ltx_mode {mode} has not"):
        check_losses(LossOptions(**options), AudioOptions(), PreservationOptions(), mode)


@pytest.mark.parametrize(
    ("kind", "argument", "message"),
    [
        ("uniform", "std=1", "unknown to --timestep_sampling uniform; known are none"),
        ("logit_normal", "shift=1", "known are mean, std"),
        ("stratified", "uniform_prob=0.5", "known are eps, shift, std"),
        ("shifted_logit_normal", "std=0", "within 0.01 and 100"),
        ("shifted_logit_normal", "uniform_prob=2", "within 0 and 1"),
        ("shifted_logit_normal", "eps=nan", "within 0 and 0.1"),
    ],
)
def test_arguments_that_a_sampler_does_not_read_are_refused(kind, argument, message):
    with pytest.raises(UserError, match=message):
        sigma_settings(LossOptions(timestep_sampling=kind, timestep_args=(argument,)))


def test_a_batch_of_neither_stream_has_no_loss():
    total = total_loss(ItemLosses(video=None, audio=None, audio_present=None), torch.ones(2), torch.ones(2))
    assert total == 0 and not total.requires_grad
