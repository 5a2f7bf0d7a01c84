"""Fusion: the tensor maths of one weight, without files and without mergekit."""
