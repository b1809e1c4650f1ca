"""A stand-in for the XLA plug-in."""

__version__ = "2.2.12677.0"
