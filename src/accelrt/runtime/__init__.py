"""Run artifacts: sessions, their inputs, their metrics, and what they do when an engine fails."""
