"""What ``auto`` means: candidates, trials in child processes, measurement and choice."""
