"""Whether a vendor's package is installed and is what its name says; asked in a child process, never in this one."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from accelrt import isolation
from accelrt.backend import Status
from accelrt.errors import AccelrtError

VENDOR_INDEX = "https://pip.repos.neuron.amazonaws.com"
"""The vendor's package index; the public one serves a placeholder by the name of torch-neuronx."""

PROBE_S = 300.0


@dataclass(frozen=True, slots=True)
class Sdk:
    """One of the vendor's packages.

    Attributes:
        module: What is imported.
        distribution: What is installed.
        needs: Functions without which it is not the vendor's package, as paths from the module: ``trace``.
        signatures: Functions whose parameters a report shows, likewise.
        companions: Distributions whose versions its programs depend on.
        install: The vendor's command.
    """

    module: str
    distribution: str
    needs: Sequence[str]
    signatures: Sequence[str]
    companions: Sequence[str]
    install: str

    def installed(self) -> bool:
        """Whether a package of this name can be found, without importing it."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except (ImportError, ValueError, AttributeError):
            return False

    def probe(self) -> dict[str, Any]:
        """Return versions and signatures as a child process sees them, or ``problem`` and ``placeholder``."""
        try:
            facts: dict[str, Any] = isolation.call(
                "accelrt_neuron.sdk:facts_of",
                timeout_s=PROBE_S,
                module=self.module,
                distributions=[self.distribution, *self.companions],
                needs=list(self.needs),
                signatures=list(self.signatures),
            )
            return facts
        except (AccelrtError, OSError) as error:
            problem = error.message if isinstance(error, AccelrtError) else str(error)
            return {"problem": problem, "placeholder": _version(self.distribution) in PLACEHOLDERS}

    def status(self, facts: Mapping[str, Any] | None) -> Status:
        """Return a status; ``facts`` are those of `probe`, None if nothing is installed."""
        if facts is None:
            return Status(False, reason=f"{self.distribution} is not installed", remedy=self.install)
        if facts.get("placeholder"):
            return Status(
                False,
                reason=(
                    f"the {self.distribution} that is installed is the placeholder of the public package index, not "
                    f"the vendor's package: {facts['problem']}"
                ),
                remedy=f"pip uninstall -y {self.distribution} && {self.install}",
            )
        if "problem" in facts:
            return Status(
                False, reason=f"{self.distribution} does not work here: {facts['problem']}", remedy=self.install
            )
        return Status(True, version=facts["versions"][self.distribution])


PLACEHOLDERS = frozenset({"1.0", "1.0.0"})
"""Versions under which the public index serves a package without content; the vendor's have four numbers or more."""


def facts_of(
    module: str, distributions: Sequence[str], needs: Sequence[str], signatures: Sequence[str]
) -> dict[str, Any]:
    """Import a package and look at it; runs in the child process."""
    imported = importlib.import_module(module)
    missing = [path for path in needs if _find(imported, path) is None]
    if missing:
        return {"problem": f"{module} has no {', '.join(missing)}", "placeholder": True}
    versions = {name: _version(name) for name in distributions}
    versions[distributions[0]] = versions[distributions[0]] or str(getattr(imported, "__version__", "unknown"))
    return {
        "versions": {name: text for name, text in versions.items() if text is not None},
        "signatures": {path: signature_text(found) for path in signatures if (found := _find(imported, path))},
    }


def _find(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def signature_text(function: Any) -> str:
    """Return a function's parameters as text, or why they cannot be had."""
    try:
        return str(inspect.signature(function))
    except (TypeError, ValueError) as error:
        return f"not known: {error}"


def accepts(function: Any, parameter: str) -> bool:
    """Whether a function has a parameter of this name; older releases of the vendor lack newer ones."""
    try:
        return parameter in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


TORCH_NEURONX = Sdk(
    module="torch_neuronx",
    distribution="torch-neuronx",
    needs=("trace",),
    signatures=(
        "trace", "dynamic_batch", "lazy_load", "async_load", "analyze", "DataParallel", "PartitionerConfig",
        "set_neuron_cores", "neuron_cores_context", "experimental.set_neuron_cores",
        "experimental.neuron_cores_context", "move_trace_to_device", "replace_weights",
    ),
    companions=("neuronx-cc", "libneuronxla", "torch"),
    install=f"pip install neuronx-cc torch-neuronx --extra-index-url {VENDOR_INDEX}",
)  # fmt: skip
TORCH_NEURON = Sdk(
    module="torch_neuron",
    distribution="torch-neuron",
    needs=("trace",),
    signatures=(
        "trace", "analyze_model", "DataParallel", "is_available", "experimental.set_neuron_cores",
        "experimental.neuron_cores_context",
    ),
    companions=("neuron-cc", "torch"),
    install=f"pip install 'neuron-cc[tensorflow]' torch-neuron 'protobuf<4' --extra-index-url {VENDOR_INDEX}",
)  # fmt: skip
TENSORFLOW_NEURON = Sdk(
    module="tensorflow.neuron",
    distribution="tensorflow-neuron",
    needs=("saved_model.compile",),
    signatures=("trace", "analyze_model", "saved_model.compile"),
    companions=("neuron-cc", "tensorflow"),
    install=f"pip install 'tensorflow-neuron[cc]' 'protobuf<4' --extra-index-url {VENDOR_INDEX}",
)
