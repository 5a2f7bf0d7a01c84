"""Runs lmms-eval and lm-evaluation-harness for real and stores their tiny outputs in ``fixtures/``.

    python3 -m venv lmms && lmms/bin/pip install lmms_eval==0.7.3 decord "filelock<4"
    python3 -m venv lm && lm/bin/pip install "lm_eval[hf]"
    python tests/evidence/make_fixtures.py lmms/bin/python lm/bin/python

Both tools need environments of their own. Nothing is downloaded: the tasks have local data, and the models are the
tools' own dummies and tiny checkpoints with random weights. Removed from the results: the environment (which is that of
one machine) and the path of the temporary folder.

VLMEvalKit is not on PyPI and did not run. Its tables in ``fixtures/vlmevalkit`` have the names, columns and formats of
its ``dump`` (``vlmeval/smp/file.py``, pandas 3.1.1 and xlsxwriter 3.3.1) and made-up answers. No script makes them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
DROPPED = (
    "pretty_env_info",
    "git_hash",
    "git_branch",
    "upper_git_hash",
    "system_instruction_sha",
    "throughput",
    "usage",
)

# The second filter has an answer where the model ends with a word and a full stop.
COLORS = """\
task: colors
dataset_path: json
dataset_kwargs: {data_files: {test: colors.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {UNTIL, do_sample: false}
filter_list:
  - name: strict-match
    filter: [{function: take_first}]
  - name: flexible-extract
    filter: [{function: regex, regex_pattern: "([a-z]+)"}, {function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""

# MME and POPE of lmms-eval itself, on local pictures.
PICTURES = """\
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: pictures.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.picture
doc_to_text: "{{question}}"
doc_to_target: "answer"
generation_kwargs: {max_new_tokens: 4, do_sample: false}
process_results: !function utils.NAME_process_results
metric_list:
METRICS
"""
POPE = "\n".join(
    f"  - {{metric: pope_{name}, aggregation: !function utils.pope_aggregate_{name}, higher_is_better: true}}"
    for name in ("accuracy", "precision", "recall", "f1_score", "yes_ratio")
)
MME = "\n".join(
    f"  - {{metric: mme_{name}_score, aggregation: !function utils.mme_aggregate_results, higher_is_better: true}}"
    for name in ("perception", "cognition")
)
UTILS = """\
from PIL import Image
from lmms_eval.tasks.mme.utils import mme_aggregate_results, mme_process_results
from lmms_eval.tasks.pope.utils import (
    pope_aggregate_accuracy, pope_aggregate_f1_score, pope_aggregate_precision, pope_aggregate_recall,
    pope_aggregate_yes_ratio, pope_process_results,
)

def no_pictures(doc):
    return []

def picture(doc):
    return [Image.open(doc["image_path"]).convert("RGB")]
"""
CHOICES = """\
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
"""
# lmms-eval imports torchvision, of which PyPI has no build for torch without CUDA: its operators are left out.
LMMS = """\
import runpy, sys, torch
real = torch.library.register_fake
torch.library.register_fake = (
    lambda op, *a, **k: (lambda f: f) if str(op).startswith("torchvision::") else real(op, *a, **k)
)
sys.argv[0] = "lmms_eval"
runpy.run_module("lmms_eval", run_name="__main__")
"""


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tasks(folder: Path) -> None:
    from PIL import Image

    for tool in ("lmms", "lm"):
        (folder / tool).mkdir()
    until = {"lmms": "max_new_tokens: 4", "lm": 'max_gen_toks: 4, until: ["."]'}
    for tool, name in until.items():
        visual = "doc_to_visual: !function utils.no_pictures\n" if tool == "lmms" else ""
        (folder / tool / "colors.yaml").write_text(visual + COLORS.replace("UNTIL", name))
    (folder / "lm" / "choices.yaml").write_text(CHOICES)
    (folder / "lmms" / "utils.py").write_text(UTILS)
    for name, metrics in (("mme", MME), ("pope", POPE)):
        text = PICTURES.replace("METRICS", metrics).replace("NAME", name)
        (folder / "lmms" / f"{name}.yaml").write_text(text.replace(f"task: {name}", f"task: local_{name}"))
    answers = ["green", "no, green.", "yes", "lol", "lol", "blue"]
    lines(folder / "colors.jsonl", [{"question": f"Colour {n}?", "answer": answer} for n, answer in enumerate(answers)])
    lines(
        folder / "choices.jsonl",
        [
            {"question": f"Larger than {n}?", "choices": [f" {n + 1}", f" minus {n}", " none"], "answer": n % 3}
            for n in range(8)
        ],
    )
    Image.new("RGB", (56, 56), "green").save(folder / "picture.png")
    places = [("color", "1.png"), ("color", "2.png"), ("color", "3.png"), ("OCR", "1.png"), ("code_reasoning", "1.png")]
    rows = [
        {
            "question": f"Is it {color}?",
            "question_id": picture,
            "category": category,
            "answer": answer,
            "image_path": str(folder / "picture.png"),
            "image_source": picture,
        }
        for place, (category, picture) in enumerate(places)
        # Of the second and the last picture both right answers are the same.
        for color, answer in (("green", "Yes" if place % 2 == 0 else "No"), ("red", "No"))
    ]
    lines(folder / "pictures.jsonl", rows)


def evaluate(command: list[str], folder: Path, out: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # The environments of the tools have their own packages.
    environment.pop("PYTHONPATH", None)
    subprocess.run(
        [*command, "--batch_size", "1", "--log_samples", "--output_path", str(out)],
        cwd=folder,
        env=environment,
        check=True,
    )


def store(source: Path, target: Path, folder: Path) -> None:
    """Copy what a tool wrote, without what is of this machine."""
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted(source.rglob("*.json*")):
        # A model's folder is called after its path.
        named = re.compile(rf"\w*{re.escape(folder.name)}__")
        place = target / named.sub("", str(path.relative_to(source)))
        place.parent.mkdir(parents=True, exist_ok=True)
        text = named.sub("", path.read_text().replace(f"{folder}/", ""))
        if path.suffix == ".json":
            content = {key: value for key, value in json.loads(text).items() if key not in DROPPED}
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        place.write_text(text)


def versions(python: str, *packages: str) -> dict[str, str]:
    code = "import sys, json\nfrom importlib.metadata import version as of\n"
    code += "print(json.dumps({name: of(name) for name in sys.argv[1:]}))"
    return json.loads(subprocess.run([python, "-c", code, *packages], check=True, capture_output=True).stdout)


def main(lmms: str, lm: str) -> None:
    sys.path.insert(0, str(HERE.parent))
    from checkpoints import make_source, make_target

    tools = {"lmms_eval": lmms, "lm_eval": lm}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder)
        (folder / "run_lmms.py").write_text(LMMS)
        tiny, llama = folder / "tiny-vl", folder / "tiny-llm"
        make_target(tiny, "qwen2_5_vl", "hub")
        make_source(llama, "llama")
        lmms_eval = [lmms, "run_lmms.py", "--include_path", "lmms", "--tasks", "colors,local_mme,local_pope"]
        models = {
            "target": ["--model", "dummy", "--model_args", "response=yes"],
            "merged": ["--model", "dummy", "--model_args", "response=no green."],
            "tiny": ["--model", "qwen2_5_vl", "--model_args", f"pretrained={tiny},device=cpu,device_map=cpu"],
        }
        for model, arguments in models.items():
            evaluate([*lmms_eval, *arguments], folder, folder / "lmms_eval" / model)
            store(folder / "lmms_eval" / model, FIXTURES / "lmms_eval" / model, folder)
        lm_eval = [lm, "-m", "lm_eval", "--include_path", "lm", "--tasks", "colors,choices", "--seed", "0"]
        models = {
            "target": ["--model", "dummy"],
            "merged": ["--model", "hf", "--model_args", f"pretrained={llama}", "--device", "cpu"],
        }
        for model, arguments in models.items():
            evaluate([*lm_eval, *arguments], folder, folder / "lm_eval" / model)
            store(folder / "lm_eval" / model, FIXTURES / "lm_eval" / model, folder)
    versions_file = FIXTURES / "versions.json"
    known = json.loads(versions_file.read_text())
    known |= {name: versions(python, name, "torch", "transformers") for name, python in tools.items()}
    versions_file.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
