"""Which neurons a model uses on a corpus of probes."""
