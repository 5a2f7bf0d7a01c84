"""Shared Neuron Low-Rank Fusion (SNRF) for mergekit.

Importing this package imports neither torch nor mergekit.
"""

__version__ = "0.1.0"
