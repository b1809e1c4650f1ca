"""Every error that accelrt raises on purpose, in one tree.

::

    AccelrtError
    ├── TargetError               a target that cannot be parsed, or names nothing known
    │   └── BackendUnavailable    known and asked for by name, but not usable on this machine
    ├── RegistryError             a plug-in that cannot be registered or loaded
    ├── OptionError               an unknown option, or a value out of its range
    ├── SourceError               a model that is not recognised, or cannot be turned into a graph
    │   ├── ConversionError       its framework's exporter cannot write it as ONNX
    │   └── GraphError            a graph that is not valid ONNX, or reaches outside its folder
    ├── InputError                inputs of `predict` that do not fit the signature
    │   └── CalibrationError      a calibration set that is empty, does not fit the signature, or holds NaN
    ├── UnsupportedNodes          ``fallback="error"`` and some nodes would leave the requested engine
    ├── CompileError              an engine could not compile a segment
    │   ├── NoCandidate           ``auto`` found none that is verified and within the latency budget
    │   └── IsolatedError         the child process that did the work crashed, hung or ran out of memory
    ├── BenchmarkError            a benchmark that cannot be run, or that its driver gave up
    ├── ArtifactError             an artifact that cannot be read, written or trusted
    │   ├── CorruptArtifact       truncated, altered, malformed or hostile
    │   ├── ArtifactVersionError  written by a newer accelrt
    │   ├── IncompatibleProgram   compiled by another toolchain or for another device
    │   └── UntrustedProgram      a file whose programs would run code, and nobody said that it may
    ├── DeviceError               a device that cannot be had or has failed
    │   ├── CoresUnavailable      more devices or cores asked for than there are, or than are free
    │   ├── OutOfDeviceMemory     the program does not fit the device
    │   └── DeviceLost            the device went away while in use
    ├── ExecutionError            a segment failed on every engine that may run it
    ├── VerificationError         outputs that are further from the reference than the tolerance
    ├── BatchError                batch sizes for a model whose rows are not proved to be independent
    ├── RequestTimeout            a request that was not answered in its time
    ├── ServingError              a server that cannot do what was asked of it
    │   ├── RequestError          a request that is malformed, or does not fit its model
    │   │   └── RequestTooLarge   more bytes, elements or levels than the server takes
    │   ├── ModelNotFound         no model, or no version of it, by that name
    │   ├── ModelUnavailable      a model that is known and cannot answer now: not loaded, failed, or restarting
    │   │   └── Overloaded        its queue is full; try again after ``retry_after_s``
    │   └── NotAllowed            switched off, or not open to this client
    └── SessionClosed             the session was closed

Each message says what was asked, what was found and, as ``hint``, what to do next.
"""

from __future__ import annotations

from typing import Any


class AccelrtWarning(UserWarning):
    """Something the user should see once, and may turn into an error."""


class AccelrtError(Exception):
    """Base of every error raised by accelrt.

    Args:
        message: What was asked and what was found.
        hint: What to do next, a sentence or a command.
        backend: Name of the backend or engine concerned, if one is.
    """

    def __init__(self, message: str, *, hint: str | None = None, backend: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.backend = backend

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments are lost by the default reduction; errors cross process boundaries here.
        return (_rebuild, (type(self), self.message, self.hint, self.backend))


def _rebuild(cls: type[AccelrtError], message: str, hint: str | None, backend: str | None) -> AccelrtError:
    return cls(message, hint=hint, backend=backend)


class TargetError(AccelrtError):
    """A target string that cannot be parsed, or names no known backend or engine."""


class BackendUnavailable(TargetError):
    """A backend or engine asked for by name that is not usable on this machine."""


class RegistryError(AccelrtError):
    """A plug-in that cannot be registered or loaded."""


class OptionError(AccelrtError):
    """An option that no chosen engine knows, or a value out of its range."""


class SourceError(AccelrtError):
    """A model that is not recognised, or cannot be turned into a graph."""


class ConversionError(SourceError):
    """A model that its framework's exporter cannot write as ONNX; an engine that takes it whole may still run it."""


class GraphError(SourceError):
    """A graph that is not valid ONNX, or whose external data lies outside its folder."""


class InputError(AccelrtError, ValueError):
    """Inputs of ``predict`` that do not fit the signature."""


class CalibrationError(InputError):
    """A calibration set that is empty, does not fit the signature, or holds NaN or infinities."""


class UnsupportedNodes(AccelrtError):
    """``fallback="error"`` was asked for and some nodes would leave the requested engine."""


class CompileError(AccelrtError):
    """An engine could not compile a segment."""


class NoCandidate(CompileError):
    """``auto`` found no candidate that is verified and within the budget; ``rows`` say why, one a candidate."""

    rows: tuple[Any, ...] = ()


class IsolatedError(CompileError):
    """A child process that crashed, hung, or passed its memory limit while it worked for an engine."""


class BenchmarkError(AccelrtError):
    """A benchmark whose driver or plotter is not installed, or gave no figures."""


class ArtifactError(AccelrtError):
    """An artifact that cannot be read, written or trusted."""


class CorruptArtifact(ArtifactError):
    """An artifact that is truncated, altered, malformed or hostile."""


class ArtifactVersionError(ArtifactError):
    """An artifact whose schema is newer than this accelrt understands."""


class IncompatibleProgram(ArtifactError):
    """A program compiled by another toolchain, or for another device, than the one at hand."""


class UntrustedProgram(ArtifactError):
    """An artifact from a file whose programs would run code when they are loaded; ``trust=True`` lets them."""


class DeviceError(AccelrtError):
    """A device that cannot be had or has failed."""


class CoresUnavailable(DeviceError):
    """More devices or cores asked for than there are, or than are free."""


class OutOfDeviceMemory(DeviceError):
    """A program that does not fit the memory of its device."""


class DeviceLost(DeviceError):
    """A device that went away while in use."""


class ExecutionError(AccelrtError):
    """A segment that failed on every engine that may run it."""


class VerificationError(AccelrtError):
    """Outputs that are further from the reference than the tolerance; ``report`` holds the figures."""

    report: Any = None


class BatchError(AccelrtError):
    """Batch sizes asked for of a model whose rows are not proved to be independent."""


class RequestTimeout(AccelrtError, TimeoutError):
    """A request that was not answered in its time; if its turn had not come, it is not computed."""


class ServingError(AccelrtError):
    """A server that cannot do what was asked of it."""


class RequestError(ServingError):
    """A request that is malformed, or whose tensors do not fit its model."""


class RequestTooLarge(RequestError):
    """A request of more bytes, elements or levels than the server takes."""


class ModelNotFound(ServingError):
    """A model, or a version of one, that the server does not know."""


class ModelUnavailable(ServingError):
    """A model that the server knows and that cannot answer now; ``retry_after_s`` says when to ask again, if ever."""

    retry_after_s: float | None = None


class Overloaded(ModelUnavailable):
    """A model whose queue is full, so that the request was turned away at once."""


class NotAllowed(ServingError):
    """A request for what the server's settings switch off, or that lacks a valid key."""


class SessionClosed(AccelrtError):
    """A session used after it was closed."""
