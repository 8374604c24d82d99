"""LTX-2.5's duration head: from a prompt's contexts to the seconds that its shot naturally lasts.

Every token of either stream's context is projected to one width and told apart by an embedding of its stream; a learned query attends to
them all (four heads), and a small network makes the logarithm of the seconds of what it found. (diffusers 0.42, `LTX2DurationHead`.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.ltxv2.filling import fill
from musubi_tuner.ltxv2.geometry import TEMPORAL_SCALE
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.runtime.errors import UserError

PREFIX = "duration_head."
SHORTEST, LONGEST = 1.0, 20.0
"""Seconds: what is predicted beyond them is brought back to them, as official tools do it."""
HEADS = 4
_PROJECTIONS = ("video_input_proj", "audio_input_proj")
_QUERY, _HIDDEN = "attention_pooler.query_tokens", "mlp_hidden.weight"
_REMEDY = "Give 'ltx-2.5-duration-head-bf16.safetensors' of the release, or the folder of a split pack that it is in."


class _Pooler(nn.Module):
    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(queries, width))
        self.cross_attn = nn.MultiheadAttention(width, HEADS, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """(1, N, width) -> (1, queries, width)"""
        found, _ = self.cross_attn(self.query_tokens[None], tokens, tokens, need_weights=False)
        return found


class DurationHead(nn.Module):
    """Its parameters have the names of the official files."""

    def __init__(self, widths: tuple[int, int], *, width: int, queries: int, hidden: int) -> None:
        """
        Args:
            widths: of the contexts of pictures and sound.
            width: of the tokens in the head.
            hidden: of the network at the end.
        """
        super().__init__()
        self.widths = widths
        self.video_input_proj, self.audio_input_proj = (nn.Linear(own, width) for own in widths)
        self.video_modality_emb, self.audio_modality_emb = (nn.Parameter(torch.empty(width)) for _ in widths)
        self.attention_pooler = _Pooler(width, queries)
        self.mlp_hidden = nn.Linear(queries * width, hidden)
        self.mlp_out = nn.Linear(hidden, 1)

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> "DurationHead":
        """In float32.

        Raises:
            UserError: a file without a duration head, or with one of another form.
        """
        names = duration_names(checkpoint)
        shapes = {name: checkpoint.shape(full) for name, full in names.items()}
        flat = {name: shape for name, shape in shapes.items() if name in (_QUERY, _HIDDEN, *(f"{one}.weight" for one in _PROJECTIONS))}
        if len(flat) != 4 or any(len(shape) != 2 for shape in flat.values()) or shapes[_QUERY][1] % HEADS:
            raise UserError(f"--duration_head {checkpoint.path}: holds no duration head of the form of LTX-2.5's. {_REMEDY}")
        video, audio = (shapes[f"{one}.weight"][1] for one in _PROJECTIONS)
        queries, width = shapes[_QUERY]
        with torch.device("meta"):
            head = cls((video, audio), width=width, queries=queries, hidden=shapes[_HIDDEN][0])
        fill(head, names, checkpoint, device=device, dtype=torch.float32, remedy=_REMEDY)
        return head.requires_grad_(False).eval()

    @torch.inference_mode()
    def seconds(self, video: Tensor | None, audio: Tensor | None) -> float:
        """
        Args:
            video, audio: (1, N, W) contexts of real tokens, of which one may be absent.
        """
        assert video is not None or audio is not None
        tokens = []
        if video is not None:
            tokens.append(self.video_input_proj(video.float()) + self.video_modality_emb)
        if audio is not None:
            tokens.append(self.audio_input_proj(audio.float()) + self.audio_modality_emb)
        pooled = self.attention_pooler(torch.cat(tokens, dim=1)).flatten(1)
        return float(self.mlp_out(F.gelu(self.mlp_hidden(pooled), approximate="tanh")).exp())


def duration_names(checkpoint: Checkpoint) -> dict[str, str]:
    """{official name: full name} of the head's tensors, which have a prefix or, in a file of their own, none.

    Raises:
        UserError: there are none.
    """
    found = checkpoint.with_prefix(PREFIX) or {name: name for name in checkpoint.names() if _QUERY in checkpoint.names()}
    if not found:
        raise UserError(f"--duration_head {checkpoint.path}: holds no duration head (no '{PREFIX}{_QUERY}'). {_REMEDY}")
    return found


def frames_of(seconds: float, fps: float) -> int:
    """The frames, 8n+1, of so many seconds: the most that fit, 1 to 20 s, and one more step where that is less than a second."""
    least, most = round(SHORTEST * fps), round(LONGEST * fps)
    wanted = min(max(round(seconds * fps), least), most) if seconds < LONGEST else most
    frames = (wanted - 1) // TEMPORAL_SCALE * TEMPORAL_SCALE + 1
    return max(frames if frames >= least else frames + TEMPORAL_SCALE, TEMPORAL_SCALE + 1)
