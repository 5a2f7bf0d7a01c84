"""lmms-eval 0.3 to 0.7: ``{output_path}/{model}/{date}_samples_{task}.jsonl`` beside ``{date}_results.json``."""

from __future__ import annotations

import re

from mergekit_snrf.evidence.readers.harness import Harness

LMMS_EVAL = Harness(
    "lmms-eval",
    re.compile(r"(?!samples_)(?P<run>.*?)_samples_(?P<task>.+)\.jsonl"),
    "{}_results.json".format,
)
