"""Result: statistics over probes, profile files, and the selection of neurons."""
