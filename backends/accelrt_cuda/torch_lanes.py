"""Lanes: each has a stream, its own buffers and its own recordings, and takes one call at a time.

Two lanes keep a device busy: one copies while the other computes. A recording belongs to the shapes of the inputs that
it was made for; a lane keeps a bounded number of them and otherwise launches operator by operator.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from accelrt.errors import InputError
from accelrt_cuda.torch_math import float32_math
from accelrt_cuda.torch_place import Place, Recording
from accelrt_cuda.torch_transfer import Download, Lent, Upload

logger = logging.getLogger("accelrt")

IDLE_CALLS = 64
"""A recording that was not used for so many calls of its lane makes room for another."""
ALIGNMENT = 16
"""Bytes; compiled code loads several values at once, from addresses that it takes for multiples of this."""
ATTEMPTS = 3
_REMEMBERED = 1024
"""Shapes whose calls are counted before they are recorded."""

Key = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Work:
    """What a lane runs.

    Attributes:
        call: Takes the inputs on the device, returns the outputs there, contiguous and of their declared types.
        inputs: torch's types of the inputs.
        outputs: Names of the types of the outputs, as the signature has them.
        held: Where weights lie: a result that lies there too is no copy.
        writes: It may write to its inputs.
        allow_tf32: Multiply float32 by TensorFloat-32.
        recordable: Its launches may be recorded.
        warm_ups: Calls until it does the same each time: kernels chosen, code compiled.
        bytes: What it takes of the device at least.
    """

    call: Callable[[list[Any]], list[Any]]
    inputs: tuple[Any, ...]
    outputs: tuple[str, ...]
    held: frozenset[int] = frozenset()
    writes: bool = False
    allow_tf32: bool = False
    recordable: bool = True
    warm_ups: int = 2
    bytes: int = 0


class _Recorded:
    """A recording with its buffers."""

    def __init__(self, place: Place, work: Work, uploads: list[Upload], recording: Recording, lent: Lent) -> None:
        self.uploads, self.recording = uploads, recording
        self.downloads = [
            Download(place, tuple(result.shape), result.dtype, name, lent)
            for result, name in zip(recording.results, work.outputs, strict=True)
        ]
        self.used = 0


class Lane:
    """One call at a time on a stream of its own.

    Args:
        place: Where it runs.
        work: What it runs.
        graphs: Recordings that it keeps.
        lent: Counts results that callers hold.
    """

    def __init__(self, place: Place, work: Work, graphs: int, lent: Lent) -> None:
        self._place, self._work, self._lent = place, work, lent
        self._limit = graphs if work.recordable else 0
        self._stream = place.stream()
        self._pool = place.pool() if self._limit else None
        self._recorded: OrderedDict[Key, _Recorded] = OrderedDict()
        self._seen: Counter[Key] = Counter()
        self._calls = 0

    @property
    def recorded(self) -> int:
        """Recordings at hand."""
        return len(self._recorded)

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Compute one call, arrays in and arrays out."""
        with self._place.on(self._stream):
            recorded = self._find(tuple([array.shape for array in arrays]), arrays)
            if recorded is None:
                tensors = [self._sent(index, array) for index, array in enumerate(arrays)]
                return self._fetch(self._launch(tensors), self._work.outputs)
            for upload, array in zip(recorded.uploads, arrays, strict=True):
                upload.send(array)
            recorded.recording.replay()
            ways, results = recorded.downloads, recorded.recording.results
            begun = [way.begin(result) for way, result in zip(ways, results, strict=True)]
            self._place.wait(self._stream)
            return [way.end(pinned) for way, pinned in zip(ways, begun, strict=True)]

    def run_resident(
        self, values: Sequence[Any], kept: Collection[int], check: Callable[[Sequence[Any]], None]
    ) -> list[Any]:
        """Compute one call.

        Args:
            values: Arrays, or tensors on the device, of any library.
            kept: The outputs to leave on the device.
            check: Called with arrays and tensors of torch's before any is used.
        """
        with self._place.on(self._stream), torch.no_grad():
            pairs = zip(values, self._work.inputs, strict=True)
            values = [value if isinstance(value, np.ndarray) else self._adopted(value, dtype) for value, dtype in pairs]
            check(values)
            recorded = self._find(tuple(tuple(value.shape) for value in values), values)
            if recorded is None:
                tensors = [
                    value if isinstance(value, torch.Tensor) else self._sent(i, value) for i, value in enumerate(values)
                ]
                given = [tensor.clone() if self._work.writes else tensor for tensor in tensors]
                lent = self._work.held.union(tensor.untyped_storage().data_ptr() for tensor in given)
                results = [
                    result.clone() if result.untyped_storage().data_ptr() in lent else result
                    for result in self._launch(given)
                ]
            else:
                _feed(recorded.uploads, values)
                recorded.recording.replay()
                # The next replay writes over what stays on the device.
                results = [
                    result.clone() if index in kept else result
                    for index, result in enumerate(recorded.recording.results)
                ]
            left = [index for index in range(len(results)) if index not in kept]
            names = [self._work.outputs[index] for index in left]
            arrays = iter(self._fetch([results[index] for index in left], names))
            return [result if index in kept else next(arrays) for index, result in enumerate(results)]

    def warm(self, shapes: Key) -> None:
        """Record for shapes before the first call comes; run once where nothing is recorded."""
        with self._place.on(self._stream):
            if self._limit:
                self._record(shapes)
            else:
                self._launch(self._zeros(shapes))
                self._place.wait(self._stream)

    def close(self) -> None:
        """Free the recordings and their buffers."""
        for recorded in self._recorded.values():
            recorded.recording.forget()
        self._recorded.clear()

    def give_back(self) -> None:
        """Let others have the stream; no call follows."""
        self._place.give_back(self._stream)

    def _adopted(self, value: Any, dtype: Any) -> Any:
        """Return a tensor of torch's in the same memory, if it is on this device and laid out as code expects."""
        tensor = value if isinstance(value, torch.Tensor) else torch.from_dlpack(value)
        if tensor.dtype != dtype:
            if dtype == torch.bool and tensor.dtype == torch.uint8:  # DLPack had no booleans at first
                return self._adopted(tensor.view(torch.bool), dtype)
            raise InputError(f"A tensor of {tensor.dtype} was handed over on the device, and {dtype} is needed.")
        tensor = tensor.detach().to(self._place.device).contiguous()
        return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor

    def _zeros(self, shapes: Key) -> list[Any]:
        pairs = zip(shapes, self._work.inputs, strict=True)
        return [torch.zeros(shape, dtype=dtype, device=self._place.device) for shape, dtype in pairs]

    def _find(self, key: Key, values: Sequence[Any]) -> _Recorded | None:
        if not self._limit:
            return None
        self._calls += 1
        found = self._recorded.get(key)
        if found is None:
            if not self._worth_recording(key):
                return None
            found = self._record(key, values)
            if found is None:
                return None
        elif len(self._recorded) > 1:
            self._recorded.move_to_end(key)
        found.used = self._calls
        return found

    def _worth_recording(self, key: Key) -> bool:
        """Record shapes that come again, while there is room, or something in it has not been used for long."""
        if any(0 in shape for shape in key):
            return False
        if len(self._seen) >= _REMEMBERED:
            self._seen.clear()
        self._seen[key] += 1
        if self._seen[key] < 2:
            return False
        oldest = next(iter(self._recorded.values()), None)
        return len(self._recorded) < self._limit or (oldest is not None and self._calls - oldest.used >= IDLE_CALLS)

    def _record(self, key: Key, values: Sequence[Any] = ()) -> _Recorded | None:
        """Warm up, with values or else zeros, and record; None, and never again, if the work is not recordable."""
        place, work = self._place, self._work
        while len(self._recorded) >= self._limit:
            _, oldest = self._recorded.popitem(last=False)
            oldest.recording.forget()
        uploads = [Upload(place, shape, dtype) for shape, dtype in zip(key, work.inputs, strict=True)]
        for upload in uploads:
            upload.tensor.zero_()  # places in any axis, so that no kernel reads outside
        if values:
            _feed(uploads, values)
        tensors = [upload.tensor for upload in uploads]

        def once() -> list[Any]:
            with torch.no_grad():
                # Work that writes to its inputs must find them at the next replay as they were sent.
                results = work.call([tensor.clone() for tensor in tensors] if work.writes else list(tensors))
                lent = work.held.union(tensor.untyped_storage().data_ptr() for tensor in tensors)
                return [r.clone() if r.untyped_storage().data_ptr() in lent else r for r in results]

        with float32_math(allow_tf32=work.allow_tf32):
            for _ in range(work.warm_ups):
                once()
            place.wait(self._stream)
            recording = self._attempt(once)
        if recording is None:
            self._limit = 0
            self.close()
            return None
        self._recorded[key] = recorded = _Recorded(place, work, uploads, recording, self._lent)
        recorded.used = self._calls
        return recorded

    def _attempt(self, once: Callable[[], list[Any]]) -> Recording | None:
        """Record; None if that fails several times, since another thread may have been what spoilt it."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._place.record(once, self._stream, self._pool)
            except RuntimeError as error:
                if self._place.translated(error, self._work.bytes) is not error:
                    raise
                if not self._recorded:
                    self._pool = self._place.pool()
                if attempt == ATTEMPTS:
                    logger.warning(
                        "cuda/torch runs a program operator by operator, because its launches cannot be recorded: %s",
                        " ".join(str(error).split())[:300],
                    )
        return None

    def _sent(self, index: int, array: np.ndarray[Any, Any]) -> Any:
        upload = Upload(self._place, array.shape, self._work.inputs[index])
        upload.send(array)
        return upload.tensor

    def _launch(self, tensors: list[Any]) -> list[Any]:
        with torch.no_grad(), float32_math(allow_tf32=self._work.allow_tf32):
            return self._work.call(tensors)

    def _fetch(self, results: Sequence[Any], names: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        ways = [
            Download(self._place, tuple(result.shape), result.dtype, name, self._lent)
            for result, name in zip(results, names, strict=True)
        ]
        begun = [way.begin(result) for way, result in zip(ways, results, strict=True)]
        self._place.wait(self._stream)
        return [way.end(pinned) for way, pinned in zip(ways, begun, strict=True)]


def _feed(uploads: Sequence[Upload], values: Sequence[Any]) -> None:
    """Begin to copy arrays, or tensors on the device, to where a recording reads them."""
    for upload, value in zip(uploads, values, strict=True):
        if isinstance(value, torch.Tensor):
            upload.tensor.copy_(value, non_blocking=True)
        else:
            upload.send(value)


class Lanes:
    """The lanes of a program: a call takes the one that was used last, and waits if all are taken."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.all = tuple(lanes)
        self._free = deque(lanes)
        self._room = threading.Semaphore(len(lanes))

    @contextmanager
    def one(self) -> Iterator[Lane]:
        """Lend a lane."""
        self._room.acquire()
        lane = self._free.pop()
        try:
            yield lane
        finally:
            self._free.append(lane)
            self._room.release()
