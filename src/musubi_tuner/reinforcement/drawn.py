"""Which streams a rule on stochastic steps is taught: those whose steps were drawn, as the sampler's own have no probability."""

import logging
from collections.abc import Collection, Sequence

from musubi_tuner.reinforcement.advantages import STREAMS, Scored, streams_of
from musubi_tuner.runtime.errors import UserError

log = logging.getLogger(__name__)


def check_drawn(loss: str, rewards: Sequence[Scored], drawn: Collection[str], *, mode: str, where: str) -> None:
    """Warn of each reward that is routed to a stream without stochastic steps.

    Args:
        loss: as `--rl_loss` has it.
        rewards: their scores are not read.
        drawn: streams whose steps are stochastic.
        mode: as `--ltx_mode` has it.
        where: whose steps these are, for messages.

    Raises:
        UserError: no reward teaches any stream that has some.
    """
    there = STREAMS if mode == "av" else ("video",)
    routed = {one.reward: [stream for stream in streams_of(one.route) if stream in there] for one in rewards if one.weight}
    lacking = {name: [stream for stream in streams if stream not in drawn] for name, streams in routed.items()}
    why = f"{where}: stochastic are steps of {' and '.join(drawn) or 'no stream'}, by --rl_sde_streams"
    remedy = f"Make rollouts with --rl_sde_streams {'both' if mode == 'av' else 'video'}, or take nft, awm, rwr or dpo, which need none."
    if routed and lacking == routed:
        names = ", ".join(f"'{name}', which teaches {' and '.join(streams) or 'audio'}" for name, streams in routed.items())
        raise UserError(f"--rl_loss {loss}: learns from stochastic steps alone, so nothing from {names} ({why}). {remedy}")
    for name, streams in lacking.items():
        if streams:
            log.warning("WARNING: --rl_loss %s: %s learns nothing from '%s' (%s). %s", loss, " and ".join(streams), name, why, remedy)
