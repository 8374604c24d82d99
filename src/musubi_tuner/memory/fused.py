"""Chains of small operations as one kernel each, where the machine can compile one; as they are elsewhere."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from musubi_tuner.memory.compiling import compiles_for

Given = ParamSpec("Given")
Result = TypeVar("Result")


def fused(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """One kernel in place of `function`, whose first argument is a tensor; at any size."""
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True))

    @functools.wraps(function)
    def run(*arguments: Given.args, **named: Given.kwargs) -> Result:
        return (compiled() if compiles_for(arguments[0]) else function)(*arguments, **named)

    return run
