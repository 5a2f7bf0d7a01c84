"""Probes: from the rows of a data set to batches that a model takes."""
