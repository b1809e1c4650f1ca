"""One module a framework: recognise a source, and turn it into a graph."""
