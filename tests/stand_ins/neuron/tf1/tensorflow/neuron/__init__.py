"""A stand-in for tensorflow-neuron 1.15."""

from . import saved_model as saved_model
