"""Models: checkpoints on disk or hub, loaded models, their text decoder and its weights."""
