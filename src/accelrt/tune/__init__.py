"""Measure what cannot be known beforehand, and choose by it."""
