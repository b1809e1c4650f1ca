"""The interfaces of the Neuron SDK on any backend: ``torch_neuronx``, ``torch_neuron``, ``tensorflow_neuron``.

A script written for Inf1 or Inf2 runs on what ``ACCELRT_BACKEND`` says once its import line reads
``from accelrt.compat.neuron import torch_neuronx``. Nothing of the vendor's is imported, and
nothing heavy until one of the modules is.
"""
