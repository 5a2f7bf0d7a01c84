"""Measure: the impacts of a live model, captured layer by layer."""
