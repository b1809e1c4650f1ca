"""The HTTP front end: the Open Inference Protocol V2 with Triton's extensions, and two older ways to ask a model."""
