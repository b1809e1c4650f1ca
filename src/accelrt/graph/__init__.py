"""The one intermediate form, ONNX, and the only package that knows onnx-ir.

``types`` and ``node`` are plain data and cost nothing to import; ``model`` brings in the graph libraries.
"""
