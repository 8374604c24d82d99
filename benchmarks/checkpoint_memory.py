"""How much memory the tools for checkpoints take, and how fast they are: python -m benchmarks.checkpoint_memory FOLDER [--blocks N]

Writes a checkpoint of real block size there (0.9 GB a block) and a LoRA, and runs each tool in a process of its own. Peak memory is the
process's largest resident set, without what the system keeps of files. FOLDER needs room for three and a half checkpoints.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.loading_case import write_checkpoint
from musubi_tuner.ltxv2.versions import transformer_names
from musubi_tuner.ltxv2.weights import open_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=11)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    whole, pack, joined, tree, back, small, baked, lora = (
        folder / name
        for name in (
            "whole.safetensors",
            "pack",
            "joined.safetensors",
            "tree",
            "back.safetensors",
            "small.safetensors",
            "baked.safetensors",
            "lora.safetensors",
        )
    )
    size = write_checkpoint(whole, toy=False, blocks=options.blocks)
    _write_lora(whole, lora)
    print(f"a checkpoint of {size / 1e9:.1f} GB, {options.blocks} blocks; {os.cpu_count()} cores, torch {torch.__version__}")
    print("| | GB at most in memory | s | GB a second, of the checkpoint |\n|---|---|---|---|")
    for words, after in (
        (("verify", whole), ()),
        (("split", whole, "--output_dir", pack), (whole,)),
        (("join", "--checkpoints", pack, "--output", joined), (*pack.glob("*"), pack)),
        (("convert", joined, "--to", "diffusers", "--output_dir", tree), ()),
        (("convert", tree, "--to", "single_file", "--output", back), ()),
        (("compare", joined, back), (back, tree)),
        (("quantize", joined, "--to", "fp8", "--keep_blocks", "1", "--output", small), (small,)),
        (("quantize", joined, "--to", "int8_convrot", "--keep_blocks", "1", "--output", small), ()),
        (("bake", joined, "--lora", lora, "--output", baked), (baked,)),
        (("bake", small, "--lora", lora, "--output", baked), (baked, small, joined, lora)),
    ):
        seconds, peak = _measured(words)
        name = " ".join(str(word) for word in words if not isinstance(word, Path) and not str(word).startswith("--output"))
        print(f"| `{name}` | {peak / 1e9:.2f} | {seconds:.0f} | {size / 1e9 / seconds:.2f} |", flush=True)
        for path in after:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _measured(words: tuple[object, ...]) -> tuple[float, int]:
    """Seconds and peak bytes of one run."""
    code = (
        "import resource, sys\n"
        "from musubi_tuner import ltxv2_checkpoint\n"
        "assert ltxv2_checkpoint.main(sys.argv[1:]) == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    started = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return time.monotonic() - started, int(run.stdout.splitlines()[-1])


def _write_lora(checkpoint: Path, path: Path) -> None:
    """Rank 32 on the attention of all blocks."""
    opened = open_checkpoint(checkpoint)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, full in transformer_names(opened).items():
        module = name.removesuffix(".weight")
        if "attn" in name and module != name and module.rpartition(".")[2] in ("to_q", "to_k", "to_v", "0"):
            rows, columns = opened.shape(full)
            tensors[f"diffusion_model.{module}.lora_A.weight"] = torch.randn(32, columns, generator=generator).bfloat16()
            tensors[f"diffusion_model.{module}.lora_B.weight"] = 0.01 * torch.randn(rows, 32, generator=generator).bfloat16()
    save_file(tensors, path)


if __name__ == "__main__":
    main()
