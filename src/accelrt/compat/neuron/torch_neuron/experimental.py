"""``torch_neuron.experimental``: placement on cores."""

from accelrt.compat.neuron.placing import multicore_context, neuron_cores_context, set_multicore, set_neuron_cores

__all__ = ["multicore_context", "neuron_cores_context", "set_multicore", "set_neuron_cores"]
