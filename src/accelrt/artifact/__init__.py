"""Artifacts: what compiling yields, on disk and in the cache. The only package that touches the disk format."""
