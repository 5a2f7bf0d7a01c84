"""lm-evaluation-harness 0.4: ``{output_path}/{model}/samples_{task}_{date}.jsonl`` beside ``results_{date}.json``."""

from __future__ import annotations

import re

from mergekit_snrf.evidence.readers.harness import Harness

LM_EVAL = Harness(
    "lm-evaluation-harness",
    re.compile(r"samples_(?P<task>.+)_(?P<run>\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl"),
    "results_{}.json".format,
)
