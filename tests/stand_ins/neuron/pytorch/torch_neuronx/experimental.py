"""Where the placement functions were until SDK 2.25."""

from __future__ import annotations

import neuron_stand_in as runtime


def set_neuron_cores(trace, start_nc=-1, nc_count=-1):
    runtime.place("experimental.set_neuron_cores", start_nc, nc_count, 1)


def set_multicore(trace):
    runtime.place("experimental.set_multicore", 0, runtime.cores(), 1)


def neuron_cores_context(start_nc=-1, nc_count=-1):
    return runtime.context("experimental.neuron_cores_context", start_nc, nc_count)


def multicore_context():
    return runtime.context("experimental.multicore_context", 0, runtime.cores())
