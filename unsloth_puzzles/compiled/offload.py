"""Tensors that wait for the backward in pinned CPU memory, copied on a stream of their own."""

import weakref

import torch


class Store:
    """Tensors that wait, taken back last in first out. The last stays on the GPU; the next one is fetched ahead.

    Attributes:
        offload: False leaves all of them on the GPU.
        closed: True once the layers are restored, so that no backward may use the tensors any more.
    """

    def __init__(self, offload: bool):
        self.offload, self.closed, self._waiting = offload, False, []

    def put(self, tensor: torch.Tensor) -> "OffloadedTensor":
        """Keep `tensor`; the one that was put before it starts its way to the CPU."""
        while self._waiting and self._waiting[-1]() is None:
            self._waiting.pop()
        if self._waiting and self.offload:
            self._waiting[-1]().leave()
        kept = OffloadedTensor(tensor.detach())
        self._waiting.append(weakref.ref(kept))  # a graph that is dropped takes its own with it
        return kept

    def take(self, kept: "OffloadedTensor") -> torch.Tensor:
        """The tensor; RuntimeError if it has been taken."""
        tensor = kept.take()
        self._waiting = [other for other in self._waiting if other() not in (None, kept)]
        if self._waiting:
            self._waiting[-1]().fetch()
        return tensor


class OffloadedTensor:
    """A tensor on the GPU or, since it had to leave, in pinned memory."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor, self._pinned, self._arrived = tensor, None, None

    def leave(self) -> None:
        """Start the way to the CPU, if the tensor is on a GPU."""
        if self._tensor is not None and self._tensor.is_cuda:
            self._device = self._tensor.device
            self._pinned = torch.empty(self._tensor.shape, dtype=self._tensor.dtype, pin_memory=True)
            _copy(self._pinned, self._tensor)
            self._tensor = None

    def fetch(self) -> None:
        """Start the way back to the GPU, if that has not been done."""
        if self._pinned is not None and self._tensor is None:
            self._tensor = torch.empty(self._pinned.shape, dtype=self._pinned.dtype, device=self._device)
            self._arrived = _copy(self._tensor, self._pinned)

    def take(self) -> torch.Tensor:
        """The tensor on its device, once; RuntimeError after that."""
        self.fetch()
        if self._tensor is None:
            raise RuntimeError("backward must run once for each forward of a checkpointed layer, got a second one")
        if self._arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived)
        tensor, self._tensor, self._pinned = self._tensor, None, None
        return tensor


def _copy(target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
    """Copy on the stream for copies, after what has been enqueued so far; the event says when it is done."""
    on_gpu = source if source.is_cuda else target
    stream = _copy_stream(on_gpu.device)
    stream.wait_stream(torch.cuda.current_stream(on_gpu.device))
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    on_gpu.record_stream(stream)
    return stream.record_event()


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
