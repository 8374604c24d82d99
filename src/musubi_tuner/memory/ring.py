"""A ring of device buffers that take turns at holding what lies in host buffers, numbered in the order of a model's blocks.

Number n always has slot n modulo the number of slots. Copies run on streams of their own, one in each direction, as the bus carries both at
once. What orders them:

    to a slot      waits for what the compute stream still reads or writes of it, for the copy of it to the host that came before, and for
                   the host buffer to be written whole
    to the host    waits for what the compute stream still writes to the slot
    computing      reads a slot once the copy to it is done, and changes it once the last copy of it to the host is, too

The host waits for none of these but where it is to read what was changed (`settle`).

Slots are written through `.data`, whose writes autograd's count of versions does not see (memory/streaming.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class _Slot:
    """One device buffer."""

    buffer: Tensor
    holds: int | None = None
    loaded: torch.cuda.Event | None = None
    """Recorded after the last copy into the buffer."""
    written: torch.cuda.Event | None = None
    """Recorded after the last copy of it to the host."""


class Ring:
    """See the head of this file."""

    def __init__(self, hosts: Sequence[Tensor | None], device: torch.device, *, slots: int, poison: bool = False) -> None:
        """
        Args:
            hosts: (size,) uint8 each; None = not yet there (`set_host`).
            slots: how many device buffers there are, no more than host buffers; each as large as the largest of these. They grow with
                those that are there later, when one of these is brought for the first time.
            poison: fill a slot with NaN bytes as soon as it is free, so that a stale read shows (for tests).
        """
        self._hosts = list(hosts)
        self._device, self._poison = device, poison
        cuda = device.type == "cuda"
        self._to_device = torch.cuda.Stream(device) if cuda else None
        self._to_host = torch.cuda.Stream(device) if cuda else None
        self._written: dict[int, torch.cuda.Event] = {}
        """Recorded after the last copy to each host buffer."""
        size = self._largest()
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(min(slots, len(self._hosts)))]

    @property
    def slots(self) -> int:
        return len(self._slots)

    @property
    def host_bytes(self) -> int:
        return sum(host.numel() for host in self._hosts if host is not None)

    @property
    def device_bytes(self) -> int:
        return sum(slot.buffer.numel() for slot in self._slots)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is on the device."""
        return all(slot.holds is None for slot in self._slots)

    def host(self, number: int) -> Tensor | None:
        return self._hosts[number]

    def buffer(self, number: int) -> Tensor:
        """(size,) uint8 device buffer in which `number` lies while it is there."""
        return self._slot(number).buffer

    def holds(self, number: int) -> bool:
        """Whether it is on the device, or on its way to it."""
        return bool(self._slots) and self._slot(number).holds == number

    def set_host(self, number: int, host: Tensor) -> None:
        """Put another host buffer in the place of one."""
        self._rest()  # copies may read the old one
        self._hosts[number] = host
        if self.holds(number):
            self._slot(number).holds = None

    def use(self, number: int, *, changes: bool = False) -> None:
        """What is computed from here on finds it in its slot.

        Args:
            changes: and changes it there.
        """
        slot = self._slot(number)
        if slot.holds != number:
            self.load(number)
        for event in (slot.loaded, slot.written if changes else None):
            if event is not None:
                torch.cuda.current_stream(self._device).wait_event(event)

    def exchange(self, done: int, wanted: int) -> None:
        """`done` is not read any more in this direction; its slot takes `wanted`."""
        slot = self._slot(done)
        if self._poison:
            if slot.written is not None:
                torch.cuda.current_stream(self._device).wait_event(slot.written)
            slot.buffer.data.fill_(0xFF)
        if done != wanted or self._poison:
            self.load(wanted)

    def load(self, number: int) -> None:
        """Begin to copy it to its slot."""
        slot, host = self._slot(number), self._hosts[number]
        assert host is not None, "there before it is asked for"
        if slot.buffer.numel() < host.numel():
            self._grow()
        slot.holds = number
        if self._to_device is None:
            slot.buffer.data[: host.numel()].copy_(host)
            return
        self._to_device.wait_stream(torch.cuda.current_stream(self._device))  # whatever has read, or had, this memory before
        for event in (slot.written, self._written.get(number)):
            if event is not None:
                self._to_device.wait_event(event)
        with torch.cuda.stream(self._to_device):
            slot.buffer.data[: host.numel()].copy_(host, non_blocking=True)
            slot.loaded = torch.cuda.Event()
            slot.loaded.record(self._to_device)

    def write_back(self, number: int) -> None:
        """Begin to copy what was changed in its slot to the host."""
        slot, host = self._slot(number), self._hosts[number]
        assert slot.holds == number and host is not None, "it is in its slot"
        if self._to_host is None:
            host.copy_(slot.buffer.data[: host.numel()])
            return
        self._to_host.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._to_host):
            host.copy_(slot.buffer.data[: host.numel()], non_blocking=True)
            slot.written = self._written[number] = torch.cuda.Event()
            slot.written.record(self._to_host)

    def settle(self) -> None:
        """Wait until all that was written back lies on the host."""
        if self._to_host is not None:
            self._to_host.synchronize()

    def forget(self) -> None:
        """Host buffers were written to: what is in the slots is old."""
        for slot in self._slots:
            slot.holds = None

    def _slot(self, number: int) -> _Slot:
        return self._slots[number % len(self._slots)]

    def _grow(self) -> None:
        """Slots for the largest host buffer, and nothing in them."""
        self._rest()
        for slot in self._slots:
            slot.buffer, slot.holds = torch.empty(0, dtype=torch.uint8, device=self._device), None
        for slot in self._slots:
            slot.buffer = torch.empty(self._largest(), dtype=torch.uint8, device=self._device)

    def _largest(self) -> int:
        return max((host.numel() for host in self._hosts if host is not None), default=0)

    def _rest(self) -> None:
        """Wait for the copies in both directions."""
        for stream in (self._to_device, self._to_host):
            if stream is not None:
                stream.synchronize()
