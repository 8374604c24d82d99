"""The files that data passes, in order, from a trace of real runs: python dev/trace_files.py FOLDER

FOLDER is where `quickstart.py` has left its models, clips, dataset file and prompts. Three walks are printed, as in
docs/development/architecture.md: a clip through caching, a batch through one training step, a sample prompt through a preview; and how many
frames of ours lie between `train` and the first call of an attention kernel in a training step (not in a validation pass).
"""

import argparse
import contextlib
import inspect
import io
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

PACKAGE = "musubi_tuner/"
AROUND = ("config/", "runtime/", "command.py", "ltxv2_")
"""Rooms that no data passes."""


class Trace:
    """Files of ours in the order in which they are first entered, while `recording`."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.recording = True
        self.attention_frames = 0
        self.on_call: Callable[[str, FrameType], None] = lambda name, frame: None

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and getattr(argument, "__name__", "") == "scaled_dot_product_attention" and torch.is_grad_enabled():
            self.attention_frames = self.attention_frames or _frames_since_train(frame)
        if event != "call" or not frame.f_code.co_flags & inspect.CO_OPTIMIZED or (file := _file(frame)) is None:
            return  # neither a function nor one of ours; modules and class bodies are not optimized
        name = frame.f_code.co_qualname
        self.on_call(f"{file}:{name}", frame)
        if self.recording and not file.startswith(AROUND):
            self.files.setdefault(file, name)


def _file(frame: FrameType) -> str | None:
    path = Path(frame.f_code.co_filename).as_posix()
    return path.rpartition(PACKAGE)[2] if PACKAGE in path else None


def _frames_since_train(frame: FrameType | None) -> int:
    count = 0
    while frame is not None:
        if _file(frame) is not None:
            count += 1
            if frame.f_code.co_name == "train":
                return count
        frame = frame.f_back
    return 0


@contextlib.contextmanager
def traced(trace: Trace) -> Iterator[None]:
    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def follow_a_clip(common: list[str], model: Path) -> Trace:
    from musubi_tuner import ltxv2_cache_latents

    trace = Trace()
    with traced(trace):
        assert ltxv2_cache_latents.main([*common, "--vae", str(model), "--no-skip_existing"]) == 0
    return trace


def follow_a_batch(training: list[str]) -> Trace:
    """Of the second of three steps, from the reading of its batch on."""
    from musubi_tuner import ltxv2_train_network

    trace, read = Trace(), 0
    trace.recording = False

    def on_call(name: str, frame: FrameType) -> None:
        nonlocal read
        if name == "dataset/loader.py:_Batches.__getitem__":
            read += 1
            trace.recording = read == 2

    trace.on_call = on_call
    with traced(trace):
        assert ltxv2_train_network.main([*training, "--max_train_steps", "3", "--max_data_loader_n_workers", "0"]) == 0
    return trace


def follow_a_prompt(training: list[str], prompts: Path) -> Trace:
    """From the prompt file to the first preview's files."""
    from musubi_tuner import ltxv2_train_network

    trace = Trace()
    trace.recording = False

    def on_call(name: str, frame: FrameType) -> None:
        inside = frame
        names = set()
        while inside is not None:
            names.add(inside.f_code.co_qualname)
            inside = inside.f_back
        trace.recording = bool(names & {"make_previewer", "Previewer.__call__"})

    trace.on_call = on_call
    with traced(trace):
        previews = ["--sample_prompts", str(prompts), "--sample_at_first", "--sample_steps", "2"]
        assert ltxv2_train_network.main([*training, *previews, "--max_train_steps", "1", "--max_data_loader_n_workers", "0"]) == 0
    return trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    model = folder / "models" / "ltx2_tiny_2.3.safetensors"
    common = ["--dataset_config", str(folder / "dataset.toml"), "--ltx_mode", "av", "--device", "cpu"]
    with tempfile.TemporaryDirectory() as output:
        training = [*common, "--ltxv2_model", str(model), "--ltxv2_timestep_format", "flowmatch_1_1000", "--mixed_precision", "no"]
        training += ["--network_dim", "4", "--output_dir", output, "--overwrite"]
        batch = follow_a_batch(training)
        walks = {
            "a clip": follow_a_clip(common, model),
            "a batch": batch,
            "a sample prompt": follow_a_prompt(training, folder / "prompts.txt"),
        }
    for name, trace in walks.items():
        print(f"\nfollow {name}: {len(trace.files)} files")
        for number, (file, function) in enumerate(trace.files.items(), start=1):
            print(f"  {number:2d}. {file:45s} {function}")
    print(f"\nframes of ours from train to the attention kernel: {batch.attention_frames}")


if __name__ == "__main__":
    main()
