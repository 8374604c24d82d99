"""Whatever ends the steps of a run early, the last good step is saved first, and the message says how to go on."""

import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from musubi_tuner.memory.pinning import refusal
from musubi_tuner.networks.whole import settled_values
from musubi_tuner.runtime.device import free_memory, is_out_of_host_memory
from musubi_tuner.runtime.disk import reason
from musubi_tuner.runtime.errors import TemporaryFailure
from musubi_tuner.runtime.program import command_line
from musubi_tuner.runtime.signals import Interrupt
from musubi_tuner.training import checkpoint
from musubi_tuner.training.full_finetuning import why_not_streamed
from musubi_tuner.training.run import Outcome, TrainingRun
from musubi_tuner.training.saving import NotSaved, Saving
from musubi_tuner.training.state import state_path

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Restart:
    """The command of a run, as it was typed."""

    prog: str
    argv: Sequence[str]
    autoresume: bool

    def resuming(self, state: Path | None) -> str:
        """The whole command that goes on from `state`; from the start where it is None."""
        kept, words = [], list(self.argv)
        while words:
            word = words.pop(0)
            if word == "--resume":
                words[:1] = []
            elif word != "--overwrite" and not word.startswith("--resume="):
                kept.append(word)
        if state is not None:
            kept = [word for word in kept if word != "--autoresume"] + ["--resume", str(state)]
            kept += ["--no-autoresume"] if self.autoresume and "--autoresume" not in self.argv else []  # a config file asks for it
        return command_line(self.prog, kept)


@contextmanager
def rescue(run: TrainingRun, outcome: Outcome, restart: Restart) -> Iterator[None]:
    """Around the steps: on any exception save the last whole step, and add to the exception where that is and how to go on.

    A second Ctrl-C is none of these: it ends at once.

    Raises:
        TemporaryFailure: in place of an error of memory or of the system; anything else as it was raised.
    """
    try:
        yield
    except Exception as error:
        named = _named(error, run, outcome)
        if run.processes.is_main:
            with Interrupt():  # a launcher that ends the whole group must not cut the save short
                for note in _saved(run, outcome, restart, error):
                    named.add_note(note)
        if named is error:
            raise
        raise named from error


def _named(error: Exception, run: TrainingRun, outcome: Outcome) -> Exception:
    """The error in words, where it is one of memory or of the system."""
    step = outcome.step + 1
    if isinstance(error, torch.OutOfMemoryError):
        return TemporaryFailure(f"step {step}: {run.device} ran out of memory. Cheaper, in this order: {'; '.join(_cheaper(run))}.")
    if (refused := refusal(error)) is not None:
        return TemporaryFailure(
            f"step {step}: {refused} Batches on their way to the card are pinned too: fewer wait with --max_data_loader_n_workers 0."
        )
    if is_out_of_host_memory(error):
        return TemporaryFailure(
            f"step {step}: the machine ran out of memory. Close other programs, give --max_data_loader_n_workers 0, or use a smaller "
            "resolution, fewer frames or batch_size 1 in the dataset file."
        )
    if isinstance(error, OSError):
        return TemporaryFailure(f"step {step}: {f'{error.filename}: ' if error.filename else ''}{reason(error)}")
    return error


def _cheaper(run: TrainingRun) -> list[str]:
    """What takes less memory and has not been asked for, the cheapest first."""
    memory, optimization = run.config.memory, run.config.optimization
    choices = []
    if max(item.spec.batch_size for item in run.items) > 1:
        choices.append("batch_size 1 in the dataset file, with --gradient_accumulation_steps for what it was")
    if memory.attn_mode == "math":
        choices.append("leave --attn_mode math out, which keeps the scores of all pairs of tokens")
    if memory.gradient_checkpointing is False:
        choices.append("leave --no-gradient_checkpointing out")
    if run.weight_steps is not None:
        return [*choices, *_cheaper_whole(run)]
    if optimization.optimizer_type.lower() == "adamw":
        choices.append("--optimizer_type AdamW8bit")
    if run.device.type == "cuda":
        used = torch.cuda.max_memory_allocated(run.device) / 2**30
        choices.append(f"--vram_gb {max(1, int(used) - 2)}, which plans for a smaller card: more recomputation, then streamed blocks")
    if memory.wanted_format in ("auto", "bf16"):
        choices.append("--weight_format nf4")
    choices.append(f"--blocks_to_swap {(memory.blocks_to_swap or 0) + 8} (blocks streamed from host memory)")
    choices.append("a smaller resolution or fewer frames in the dataset file")
    return choices


def _cheaper_whole(run: TrainingRun) -> list[str]:
    """The same, where the model's own weights are trained."""
    optimization = run.config.optimization
    choices = [] if run.updates_within_backward or run.processes.count > 1 else ["--max_grad_norm 0 --fused_backward_pass"]
    if optimization.optimizer_type.lower() == "adamw":
        choices.append("--optimizer_type AdamW8bit")
    if optimization.optimizer_type.lower() != "adafactor" and run.shards == 1:
        choices.append("--optimizer_type Adafactor")
    streamed, blocks = len(run.placement.streamed), len(run.placement.levels)
    if streamed < blocks and why_not_streamed(run.config, run.processes.count) is None:
        choices.append(f"--blocks_to_swap {min(streamed + 8, blocks)} (blocks that wait in host memory with their states)")
    choices.append("a smaller resolution or fewer frames in the dataset file")
    return [*choices, "several cards that share the weights (docs/how-to/full_finetuning.md)"]


def _saved(run: TrainingRun, outcome: Outcome, restart: Restart, error: Exception) -> list[str]:
    """Save the last whole step, and say so in lines; never raises."""
    step, resumed = outcome.step, run.config.saving.resume
    if step == run.start_step:
        again = [f"Go on with:\n  {restart.resuming(resumed)}"] if resumed else []
        return ["No step was complete, so there is nothing to save.", *again]
    folder = state_path(run.output_dir, run.name, step)
    if isinstance(error, NotSaved) and any(file.name == folder.name for file in outcome.files):
        return []  # the error says where the weights are, and how to go on
    exact = next((file for file in reversed(outcome.files) if file.is_dir()), resumed)
    torn = outcome.torn and folder not in outcome.files
    if folder not in outcome.files:
        problem = _problem_of_saving(run, outcome, error)
        if problem is not None:
            lines = [f"Step {step} could not be saved: {problem}"]
            if outcome.files or resumed:
                lines.append(f"The newest file that is good: {outcome.files[-1] if outcome.files else resumed}")
            return lines + ([f"Go on with:\n  {restart.resuming(exact)}"] if exact else [])
    saved = [file for file in outcome.files if f"step{step:08d}" in file.name]
    state = next((file for file in reversed(saved) if file.is_dir()), None)
    lines = [f"Step {step}, the last good one, is saved: {', '.join(map(str, saved))}"]
    if torn:
        lines = [
            f"Step {step + 1} has ended in the middle of its update. What is saved lies between it and step {step}, so that a run which "
            f"goes on from there is not the one that it would have been: {', '.join(map(str, saved))}",
            *([f"The newest state of a whole step: {exact}"] if exact else []),
        ]
    return lines + ([f"Go on with:\n  {restart.resuming(state)}"] if state else [])


def _problem_of_saving(run: TrainingRun, outcome: Outcome, error: Exception) -> str | None:
    """Save LoRA and state of `outcome.step`; returns why that was not possible."""
    if isinstance(error, NotSaved):
        return "see above."
    if run.shards > 1:
        return f"the model is sharded over {run.shards} processes, which can no longer be asked for their parts."
    try:
        if isinstance(error, torch.OutOfMemoryError):
            traceback.clear_frames(error.__traceback__)  # they hold what the step has computed
        for parameter in run.network.parameters():
            parameter.grad = None
        free_memory(run.device)
        if not all(bool(torch.isfinite(value).all()) for value in settled_values(run.network).values()):
            return "its weights are not finite."
        torch.set_rng_state(outcome.random_state)
        outcome.interrupted = True
        Saving(run).save(outcome, checkpoint.lora_path(run.output_dir, run.name, step=outcome.step))
    except Exception as failure:  # the error that ended the run must be seen, whatever else goes wrong
        return f"{type(failure).__name__}: {failure}"
    return None
