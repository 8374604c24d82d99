"""Memory of a computation without running it: on tensors without storage (the meta device), what would be alive is counted.

It is what torch's allocator would give to tensors. What kernels take for themselves while they run is not in it.
"""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within it, bytes of the tensors on the meta device: those that are alive, and the most that were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held: set[int] = set()

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor that was made before, or any that is not counted yet."""
        storage = tensor.untyped_storage()
        place = storage._cdata
        if tensor.device.type != "meta" or place in self._held:
            return
        self._held.add(place)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, place, storage.nbytes())

    def _release(self, place: int, size: int) -> None:
        self._held.discard(place)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.hold(value)
        return result
