"""Functions on tensors that compute ONNX's operators with torch's, exactly as ONNX defines them.

Inputs come in the operator's order, None where an optional one is absent; attributes as keyword arguments of their
names. What older versions of an operator have as an attribute and newer ones as an input bears one name here, so that
both reach the same parameter. Inputs that the table lists as ``numbers`` are Python numbers. Besides, a kernel may
ask for ``dtype`` (torch's type of the first output), ``device``, ``version`` (the operator's since-version),
``outputs`` (how many it is to return) and ``onnx_dtype`` (ONNX's name of the first output's type).

Each function is called by a node of a ``torch.fx`` graph: it must not branch on the values of tensors, unless the
table says so in ``depends``, and must never write to its inputs.
"""
