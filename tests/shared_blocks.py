"""Run under torchrun by tests/e2e/test_processes.py: two processes put the blocks of their models into shared memory and run them."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from musubi_tuner.memory.checkpointing import Recompute
from musubi_tuner.memory.engine import BlockEngine
from musubi_tuner.memory.regions import share_regions
from musubi_tuner.memory.streaming import BlockStreamer
from musubi_tuner.runtime.processes import processes
from tests import engine_parts as parts


def main(folder: Path) -> None:
    with processes() as group:
        model, network = parts.make_model(2)
        bulk = torch.nn.Parameter(torch.randn(8_000_000, generator=torch.Generator().manual_seed(1)), requires_grad=False)
        for block in model.transformer_blocks:
            block.bulk = bulk  # so that what is taken shows among the rest
        sizes = [sum(t.numel() * t.element_size() + 512 for t in block.parameters()) for block in model.transformer_blocks]
        regions = share_regions(sizes, group.gather)
        assert regions is not None
        for region, block in zip(regions, model.transformer_blocks, strict=True):
            for name, tensor in list(block.named_parameters()):
                if not tensor.requires_grad and "attn2" not in name:  # attn2 is left to the streamer, as what adapters add is
                    owner, _, leaf = name.rpartition(".")
                    own = tensor.detach() + group.index  # only the first process's values count
                    setattr(block.get_submodule(owner), leaf, torch.nn.Parameter(region.put(own), requires_grad=False))
        group.barrier()
        streamer = BlockStreamer(list(model.transformer_blocks), torch.device("cpu"), slots=1, poison=True, regions=regions)
        group.barrier()
        model.run_block = BlockEngine(model.transformer_blocks, [Recompute.EVERYTHING] * 2, max_rank=parts.RANK, streamer=streamer)
        loss, gradients = parts.step(model, network)
        found = {str(number): gradient for number, gradient in enumerate(gradients)} | {"loss": torch.tensor(loss)}
        save_file(found, folder / f"{group.index}.safetensors")
        group.barrier()  # both have read all of it
        parts_of_pages = sum(group.gather(_part_of_pages()))
        if group.is_main:
            used = sum(region.used for region in regions)
            (folder / "bytes.txt").write_text(f"used {used}\ntaken {parts_of_pages}\n", encoding="utf-8")


def _part_of_pages() -> int:
    """Bytes of this process's anonymous files, each page divided by the number of processes that have it."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split()[0]:
            inside = "memfd:" in line
        elif inside and line.startswith("Pss:"):
            total += 1024 * int(line.split()[1])
    return total


if __name__ == "__main__":
    main(Path(sys.argv[1]))
