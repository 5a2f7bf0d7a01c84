"""Readers of what other tools' evaluations wrote: lmms-eval, lm-evaluation-harness and VLMEvalKit."""
