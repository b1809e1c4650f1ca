"""TensorRT's bindings where its libraries are not: what importing them says, word for word, of release 11.4."""

raise ImportError("libnvonnxparser.so.11: cannot open shared object file: No such file or directory")
