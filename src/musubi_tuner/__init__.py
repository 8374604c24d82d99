"""A cache-first LoRA trainer for LTX-2, 2.3 and 2.5: video and sound."""

__version__ = "0.1.0"
