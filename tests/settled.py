"""Keeps libraries out of the sight of Python's garbage collector, which the programs call whenever a model comes or goes."""

import gc
import sys


class Settled:
    """A million objects of torch and others take the collector up to half a second each time. A training loop freezes what exists when it
    begins; here that stays frozen after its end, which would bring the libraries back."""

    MODULES, LOOPS = 100, 50
    """So many more than at the last look are a library, or leftovers, and worth the next look."""

    def __init__(self) -> None:
        self._modules = self._loops = 0
        self._unfreeze = gc.unfreeze
        gc.unfreeze = self._end_of_loop

    def _end_of_loop(self) -> None:
        self._loops += 1

    def look(self) -> None:
        """Collect what is left over and freeze the rest, where much has come since the last time."""
        if len(sys.modules) >= self._modules + self.MODULES or self._loops >= self.LOOPS:
            self._unfreeze()
            gc.collect()
            gc.freeze()
            self._modules, self._loops = len(sys.modules), 0

    def end(self) -> None:
        gc.unfreeze = self._unfreeze
