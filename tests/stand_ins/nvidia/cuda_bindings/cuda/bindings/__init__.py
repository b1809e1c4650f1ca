"""A stand-in for the package ``cuda-bindings``; see the README beside it."""
