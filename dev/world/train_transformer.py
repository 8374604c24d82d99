"""The transformer, from nothing: minutes on a card, two core hours without.

python -m dev.world.train_transformer FOLDER --seconds N [--device cuda] [--batch 128] [--clips 40000] [--evaluate 96]

FOLDER holds what the other stages left. Every half minute `transformer.safetensors` (the moving average, in float16) is written into --out,
and into FOLDER `transformer-state.pt`, from which the same command goes on. Clips are drawn and encoded at the start. On a card the whole
step is one CUDA graph, so that it is not bound by launches, and products are in TF32; on a processor they are in bfloat16.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dev.world.cached import Captions, Clips, Encoders, caption_list, load_captions, make_clips
from dev.world.muon import Muon
from dev.world.transformer import AUDIO_TOKENS, VIDEO_TOKENS, WorldModel
from musubi_tuner.flow.path import add_noise, velocity_target
from musubi_tuner.flow.sigma import SigmaSettings, draw_sigma

RATE, OTHER_RATE, DECAY = 0.012, 1.5e-3, 0.02
WARMUP, FALL = 100, 0.45
"""Steps; share of the time in which the rate falls."""
AUDIO_WEIGHT = 0.5
_NO_CAPTION, _NO_VOICE = 0.1, 0.08
"""Shares of steps' clips without a caption, and with one that does not say the voice."""
_SAME_LEVEL = 0.7
"""Share of clips whose sound is as noisy as their pictures."""
_LEVELS = 2**16
_AVERAGE = 0.999
_CHECK_EVERY = 20
"""Steps between two looks at the clock, for which the device is waited for."""
_WARM_STEPS = 3
_TELL_SECONDS = 10.0


class Training:
    """Model, its moving average, optimizer, and one step of training as a function without arguments."""

    def __init__(self, captions: Captions, clips: Clips, batch: int, seed: int) -> None:
        device = clips.video.device
        torch.manual_seed(seed)
        self._captions, self._clips, self._batch, self._device = captions, clips, batch, device
        self.model = WorldModel().to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = Muon(self.model.matrices(), self.model.others(), rate=RATE, other_rate=OTHER_RATE, decay=DECAY)
        self.losses = torch.zeros(2, device=device)
        """Of video and sound, summed since they were last read."""
        self._pull = torch.ones((), device=device)
        """How much of the model goes into its average at a step."""
        self._levels = torch.stack([_level_table(tokens, seed) for tokens in (VIDEO_TOKENS, AUDIO_TOKENS)]).to(device)
        self._run: Callable[[], None] = self._step

    def load(self, weights: dict[str, Tensor]) -> None:
        """Begin with weights of an earlier training."""
        for model in (self.model, self.average):
            model.load_state_dict(weights)

    def step(self, number: int, share: float) -> None:
        """One update.

        Args:
            number: of steps before.
            share: of the learning rates.
        """
        self.optimizer.set_share(share)
        self._pull.fill_(1 - min(_AVERAGE, (number + 1) / (number + 20)))
        self._run()

    def capture(self) -> None:
        """Make a step one CUDA graph. Its first steps are run, at a learning rate of 0."""
        self.optimizer.set_share(0.0)
        self._pull.fill_(0.0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._run = graph.replay
        self.losses.zero_()

    def _step(self) -> None:
        self.optimizer.zero_grad()
        video_loss, audio_loss = self._loss()
        (video_loss + AUDIO_WEIGHT * audio_loss).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            mine: list[Tensor] = list(self.model.parameters())
            kept: list[Tensor] = list(self.average.parameters())
            change = torch._foreach_sub(mine, kept)
            torch._foreach_mul_(change, self._pull)
            torch._foreach_add_(kept, change)
            self.losses += torch.stack([video_loss.detach(), audio_loss.detach()])

    def _loss(self) -> tuple[Tensor, Tensor]:
        """Mean squared error of the velocity of each stream, on clips and noise that are drawn on the device."""
        device, batch = self._device, self._batch
        chosen = torch.randint(len(self._clips.captions), (batch,), device=device)
        clean = [tokens[chosen].float() for tokens in (self._clips.video, self._clips.audio)]
        lot = torch.rand(batch, device=device)
        caption = torch.where(lot < _NO_CAPTION + _NO_VOICE, self._clips.sights[chosen], self._clips.captions[chosen])
        caption = torch.where(lot < _NO_CAPTION, len(self._captions.lengths) - 1, caption)
        states, lengths = self._captions.of(caption)
        drawn = torch.randint(_LEVELS, (2, batch), device=device)
        video_sigma = self._levels[0][drawn[0]]
        audio_sigma = torch.where(torch.rand(batch, device=device) < _SAME_LEVEL, video_sigma, self._levels[1][drawn[1]])
        noise = [torch.randn_like(one) for one in clean]
        sigmas = (video_sigma[:, None, None], audio_sigma[:, None, None])
        noised = [add_noise(x, n, sigma) for x, n, sigma in zip(clean, noise, sigmas, strict=True)]
        with _precision(device):
            predicted = self.model(noised[0], noised[1], video_sigma, audio_sigma, states, lengths)
        targets = [velocity_target(x, n) for x, n in zip(clean, noise, strict=True)]
        video_loss, audio_loss = ((v.float() - target).square().mean() for v, target in zip(predicted, targets, strict=True))
        return video_loss, audio_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the weights; FOLDER itself unless given")
    parser.add_argument("--start", type=Path, help="weights to begin with, an earlier transformer.safetensors; nothing unless given")
    parser.add_argument("--seconds", type=float, required=True, help="of training, those of runs before included")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--clips", type=int, default=40000)
    parser.add_argument("--eager", action="store_true", help="on a card: launch each kernel by itself, several times slower")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="of a processor; 0: as many as torch takes")
    parser.add_argument("--save_seconds", type=float, default=30)
    parser.add_argument("--evaluate", type=int, default=96, help="samples to score at the end; 0: none")
    parser.add_argument("--guidance", type=float, nargs="+", default=(1.0, 2.0, 3.0))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.evaluate:
        # Missing, it shall be missed before the work and not after.
        from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video  # noqa: F401
        from diffusers.pipelines.ltx2 import LTX2VocoderWithBWE  # noqa: F401
    torch.backends.cudnn.allow_tf32 = False  # in encoders and decoders; the transformer's products are set below
    started = time.monotonic()
    captions = load_captions(options.folder).to(device)
    clips = make_clips(Encoders(options.folder, device), options.clips, options.seed, caption_list())
    print(f"{options.clips} clips on {device} after {time.monotonic() - started:.1f} s", flush=True)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    training = Training(captions, clips, options.batch, options.seed)
    if options.start:
        training.load(load_file(options.start))
    if device.type == "cuda" and not options.eager:
        training.capture()
        print(f"the step is a graph after {time.monotonic() - started:.1f} s", flush=True)
    out = options.out or options.folder
    train(training, options.folder, out, options.seconds, options.save_seconds)
    if options.evaluate:
        from dev.world.evaluate import evaluate

        torch.set_float32_matmul_precision("highest")
        evaluate(options.folder, out, device, options.evaluate, options.guidance)
    print(f"done after {time.monotonic() - started:.1f} s", flush=True)


def train(training: Training, folder: Path, out: Path, seconds: float, save_seconds: float) -> None:
    """As many steps as fit.

    Args:
        folder: of the state.
        out: of the weights.
        seconds: of training in all; the state in `folder` says how many have gone by.

    Raises:
        SystemExit: the loss is no longer finite; what was kept before stays.
    """
    state = folder / "transformer-state.pt"
    step, before = _resume(training, state)
    device = training.losses.device
    began = told = saved = time.monotonic()
    told_step, elapsed = step, before
    while elapsed < seconds:
        training.step(step, _share(step, elapsed / seconds))
        step += 1
        if step % _CHECK_EVERY and device.type == "cuda":
            continue
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.monotonic()
        elapsed = before + now - began
        if now - told > _TELL_SECONDS or elapsed >= seconds:
            video, audio = (training.losses / (step - told_step)).tolist()
            rate = (step - told_step) / (now - told)
            print(f"{elapsed:.0f} s, step {step}: video {video:.4f}, sound {audio:.4f}, {rate:.1f} steps a second", flush=True)
            if not math.isfinite(video + audio):
                raise SystemExit(f"the loss is not finite at step {step}; {out / 'transformer.safetensors'} is from before")
            training.losses.zero_()
            told, told_step = now, step
            if now - saved > save_seconds:
                _save(training, out, state, step, elapsed)
                saved = now
    _save(training, out, state, step, elapsed)


def _share(step: int, gone: float) -> float:
    """Of the learning rates: up over the first steps, even, and down over the last of the time."""
    return min(1.0, (step + 1) / WARMUP) * min(1.0, max(0.0, 1 - gone) / FALL + 0.005)


def _save(training: Training, out: Path, state: Path, step: int, elapsed: float) -> None:
    """The average as it is exported, and all that going on needs."""
    average = training.average.state_dict()
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / "transformer.tmp"
    save_file({name: tensor.half().contiguous() for name, tensor in average.items()}, temporary)
    temporary.replace(out / "transformer.safetensors")
    whole = {"model": training.model.state_dict(), "average": average, "optimizer": training.optimizer.state_dict()}
    temporary = state.with_suffix(".tmp")
    torch.save({"step": step, "seconds": elapsed, **whole}, temporary)
    temporary.replace(state)


def _resume(training: Training, state: Path) -> tuple[int, float]:
    """Steps and seconds of the runs before. Noise and clips go on with fresh draws."""
    if not state.exists():
        return 0, 0.0
    saved = torch.load(state, map_location="cpu", weights_only=True)
    training.model.load_state_dict(saved["model"])
    training.average.load_state_dict(saved["average"])
    training.optimizer.load_state_dict(saved["optimizer"])
    torch.manual_seed(saved["step"])
    return saved["step"], saved["seconds"]


def _level_table(tokens: int, seed: int) -> Tensor:
    """(2^16,) noise levels, drawn as the product draws them for a stream of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor([draw_sigma(SigmaSettings(), tokens, generator) for _ in range(_LEVELS)])


def _precision(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16) if device.type == "cpu" else nullcontext()


if __name__ == "__main__":
    main()
