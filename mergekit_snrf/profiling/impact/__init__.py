"""Impact: how much the output of a layer changes without a neuron."""
