"""What previews load beside the transformer is small in time: one part at a time, freed before the next."""

import gc

import torch


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, as the models are released; float32 on the CPU, where bfloat16 is slow."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def free_memory(device: torch.device) -> None:
    """Give what was let go of back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
