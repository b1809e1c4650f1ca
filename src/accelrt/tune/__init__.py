"""Measure what cannot be known beforehand, and choose by it: cuts that pay, and what ``auto`` means."""
