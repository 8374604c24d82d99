"""What happens within a sampling, for whoever looks for the step and the tensor that go wrong: `--debug_sampling`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from musubi_tuner.config.generation import GenerateConfig
from musubi_tuner.generation.denoise import Watch


@contextmanager
def watching(config: GenerateConfig, stem: str, stage: int) -> Iterator[Watch | None]:
    """Inside, a line of NAME_sampling.jsonl for each prediction: stage, step, noise level, stream, tensor, and its mean, spread and ends.

    Lines are written as they come, so that the last one is what came before an error. None where nothing is to be written.
    """
    if not config.clips.debug_sampling:
        yield None
        return
    path = config.clips.output_dir / f"{stem}_sampling.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w" if stage == 1 else "a", encoding="utf-8", newline="\n") as file:

        def write(step: int, sigma: float, stream: str, tensor: str, values: Tensor) -> None:
            numbers = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
            facts = {"stage": stage, "step": step, "sigma": round(sigma, 6), "stream": stream, "tensor": tensor}
            print(json.dumps(facts | {name: round(float(value), 6) for name, value in numbers.items()}), file=file, flush=True)

        yield write
