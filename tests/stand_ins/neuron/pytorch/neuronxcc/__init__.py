"""A stand-in for the compiler of Inf2, Trn1 and Trn2."""

__version__ = "2.21.18209.0"
