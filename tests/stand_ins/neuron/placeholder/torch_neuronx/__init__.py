"""A stand-in for what the public package index serves as torch-neuronx: a name and nothing else."""
