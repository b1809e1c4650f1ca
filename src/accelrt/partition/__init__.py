"""Decide which engine runs which node, and cut the graph accordingly: one partitioner for every engine."""
