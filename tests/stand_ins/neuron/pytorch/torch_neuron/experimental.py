"""Placement on cores."""

from __future__ import annotations

import neuron_stand_in as runtime


def set_neuron_cores(trace, start_nc=-1, nc_count=-1):
    runtime.place("set_neuron_cores", start_nc, nc_count, 1)


def set_multicore(trace):
    runtime.place("set_multicore", 0, runtime.cores(), 1)


def neuron_cores_context(start_nc=-1, nc_count=-1):
    return runtime.context("neuron_cores_context", start_nc, nc_count)


def multicore_context():
    return runtime.context("multicore_context", 0, runtime.cores())
