"""The world's transformer with its text projection, as it is trained: the product's own model, and a context without its 1024 tokens.

The connectors pass their input through and all registers of a stream are alike, so a context of n real tokens and 1024 - n registers does
the same as n + 1 tokens, the last of which counts 1024 - n times: its attention logits get ln(1024 - n) added.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.ltxv2.geometry import audio_positions, video_positions
from musubi_tuner.ltxv2.text.connectors import CONTEXT_TOKENS
from musubi_tuner.ltxv2.transformer.block import BlockInputs, States
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.modality import Modality, Velocity
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.tiny.world.configs import AUDIO_WIDTH, VIDEO_WIDTH, transformer_section
from musubi_tuner.tiny.world.scenes import FPS
from musubi_tuner.tiny.world.text import STATES, WIDTH

VIDEO_CELLS = (3, 3, 3)
"""Latent frames, rows and columns."""
VIDEO_TOKENS, AUDIO_TOKENS, CHANNELS = 27, 18, 128
TEXT_TOKENS = 15
"""Places for a caption's tokens; with the register's a multiple of 8, which attention kernels like."""
_NOTHING = -1e4
"""Added to the logits of places that hold no token."""


class WorldModel(nn.Module):
    """Transformer, text projection and one register for each stream."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LTXModel(TransformerConfig.from_checkpoint_config(transformer_section()))
        self.projection = nn.ModuleDict(
            {
                "video_aggregate_embed": nn.Linear(WIDTH * STATES, VIDEO_WIDTH),
                "audio_aggregate_embed": nn.Linear(WIDTH * STATES, AUDIO_WIDTH),
            }
        )
        self.video_register = nn.Parameter(torch.randn(VIDEO_WIDTH))
        self.audio_register = nn.Parameter(torch.randn(AUDIO_WIDTH))
        self.register_buffer("video_positions", video_positions(*VIDEO_CELLS, torch.tensor([float(FPS)])), persistent=False)
        self.register_buffer("audio_positions", audio_positions(AUDIO_TOKENS, 1).clone(), persistent=False)
        _start(self.model)

    def forward(self, video: Tensor, audio: Tensor, video_sigma: Tensor, audio_sigma: Tensor, states: Tensor, lengths: Tensor) -> Velocity:
        """Velocity of both streams.

        Args:
            video, audio: (B, 27, 128) and (B, 18, 128) noised tokens.
            video_sigma, audio_sigma: (B,)
            states: (B, 15, 128) normalized hidden states of the captions, index = d * states + state.
            lengths: (B,) tokens of each.
        """
        batch = video.shape[0]
        streams = ((video, video_sigma, self.video_positions), (audio, audio_sigma, self.audio_positions))
        inputs = [
            Modality(latent=tokens, sigma=sigma, levels=sigma[:, None], level_index=None, positions=positions.expand(batch, -1, -1, -1))
            for tokens, sigma, positions in streams
        ]
        return self.of_inputs(inputs[0], inputs[1], states, lengths)

    def of_inputs(self, video: Modality, audio: Modality, states: Tensor, lengths: Tensor) -> Velocity:
        """As `forward`, of inputs without context."""
        places = torch.arange(TEXT_TOKENS, device=states.device)
        bias = torch.where(places[None] < lengths[:, None], 0.0, _NOTHING)
        bias = torch.cat([bias, (CONTEXT_TOKENS - lengths[:, None]).log()], 1)[:, None, None]

        def run_block(block: nn.Module, states: States, inputs: BlockInputs) -> States:
            assert inputs.video is not None and inputs.audio is not None
            mask = bias.to(inputs.video.context.dtype)
            video, audio = (one._replace(context_mask=mask) for one in (inputs.video, inputs.audio))
            return block(states, BlockInputs(video, audio, inputs.skips))

        self.model.run_block = run_block
        return self.model(
            replace(video, context=self._context(states, "video_aggregate_embed", self.video_register)),
            replace(audio, context=self._context(states, "audio_aggregate_embed", self.audio_register)),
        )

    def _context(self, states: Tensor, name: str, register: Tensor) -> Tensor:
        """(B, 16, W)"""
        width = register.shape[0]
        features = self.projection[name](states * math.sqrt(width / WIDTH)).float()
        tokens = torch.cat([features, register.expand(states.shape[0], 1, -1)], 1)
        return F.rms_norm(tokens, (width,), eps=1e-6)

    def matrices(self) -> list[nn.Parameter]:
        """Parameters that Muon trains: linear maps between hidden states."""
        return [one for name, one in self.named_parameters() if _is_hidden_map(name, one)]

    def others(self) -> list[nn.Parameter]:
        return [one for name, one in self.named_parameters() if not _is_hidden_map(name, one)]


def normalized_states(layers: Sequence[Tensor]) -> Tensor:
    """Hidden states (N, 32) of every layer -> (N, 128) as the projection takes them: each of root mean square 1."""
    stacked = torch.stack(list(layers), -1).float()
    return (stacked * torch.rsqrt(stacked.square().mean(1, keepdim=True) + 1e-6)).flatten(1)


def _is_hidden_map(name: str, one: nn.Parameter) -> bool:
    return one.ndim == 2 and one.shape[0] > 8 and not any(part in name for part in ("table", "proj_out", "patchify"))


@torch.no_grad()
def _start(model: LTXModel) -> None:
    """First weights: no modulation yet, gates half open, so that each branch adds a little."""
    for name, one in model.named_parameters():
        if one.ndim == 1:
            one.fill_(1.0 if "norm" in name else 0.0)
        elif "table" in name:
            one.zero_()
            if "prompt" not in name and one.shape[0] > 2:
                gates = [4] if one.shape[0] == 5 else [2, 5, 8]
                one[gates] = 0.5
        elif "to_gate_logits" in name or name.endswith(("single.linear.weight",)):
            one.zero_()
        elif "proj_out" in name:
            one.normal_(0, 0.02)
        elif "to_out" in name or "net.2" in name:
            one.normal_(0, 0.3 / one.shape[1] ** 0.5)
        else:
            one.normal_(0, one.shape[1] ** -0.5)
