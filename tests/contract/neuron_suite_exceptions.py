"""Cases of ONNX's suite that a core which rounds to bfloat16 answers otherwise."""

EXCEPTIONS: dict[str, str] = {}
