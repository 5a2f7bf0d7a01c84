"""Neurons: where they are, sets of them, and the files that hold them."""
