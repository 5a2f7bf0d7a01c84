"""Runs lmms-eval and lm-evaluation-harness for real and stores their tiny outputs in ``fixtures/``.

    python3 -m venv lmms && lmms/bin/pip install lmms_eval==0.7.3 decord "filelock<4"
    python3 -m venv lm && lm/bin/pip install "lm_eval[hf]" xlsxwriter openpyxl
    python tests/evidence/make_fixtures.py lmms/bin/python lm/bin/python

Both tools need environments of their own. Nothing is downloaded: the tasks have local data, and the models are the
tools' own dummies and tiny checkpoints with random weights. Removed from the results: the environment (which is that of
one machine) and the path of the temporary folder.

VLMEvalKit is not on PyPI. Its tables are written here with the calls of its ``dump`` (``vlmeval/smp/file.py``): they
have its names, columns and formats, but it did not run. The answers are made up.
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


def tables(folder: Path) -> None:
    """Write VLMEvalKit's tables; run in an environment with pandas and xlsxwriter."""
    import csv

    import pandas as pd

    def dump(rows: list[dict[str, Any]], path: Path) -> None:
        data = pd.DataFrame(rows)
        if path.suffix == ".xlsx":
            options = {"options": {"strings_to_formulas": False}}
            with pd.ExcelWriter(path, engine="xlsxwriter", engine_kwargs=options) as writer:
                data.to_excel(writer, index=False)
        elif path.suffix == ".tsv":
            data.to_csv(path, sep="\t", index=False, encoding="utf-8", quoting=csv.QUOTE_ALL)
        else:
            with open(path, "w") as file:
                json.dump(data.to_dict("records"), file, indent=4, ensure_ascii=False)

    for model, shift in (("base-vl", 0), ("merged-vl", 1)):
        place = folder / "vlmevalkit" / model / "T20260102-030405"
        shutil.rmtree(place.parent, ignore_errors=True)
        place.mkdir(parents=True)
        yes_no = ["Yes", "No"]
        mme = [
            {
                "index": 2 * picture + question,
                "category": category,
                "image_path": f"{category}/{picture}.jpg",
                "question": f"Is it {question}?",
                "answer": yes_no[question],
                "prediction": yes_no[question if (picture + question + shift) % 3 else 1 - question] + ".",
            }
            for category, pictures in (("color", range(3)), ("OCR", range(3, 5)), ("code_reasoning", range(5, 7)))
            for picture in pictures
            for question in range(2)
        ]
        pope = [
            {
                "index": index,
                "category": category,
                "question": f"Is there a {index}?",
                "answer": yes_no[index % 2],
                "prediction": yes_no[(index // (2 + shift)) % 2],
            }
            for index, category in enumerate(["adversarial,popular,random", "random", "popular,random", "random"] * 2)
        ]
        for rows in (mme, pope):
            for row in rows:
                row["extracted"] = row["prediction"].strip(".")
        mmmu = [
            {"index": index, "question": f"Q{index}", "answer": "ABCD"[index % 4], "split": split, "prediction": "A"}
            for index, split in enumerate(["dev"] * 3 + ["validation"] * 5)
        ]
        for row in mmmu:
            row["prediction"] = "ABCD"[(row["index"] + row["index"] % (2 + shift)) % 4]
        kinds: list[tuple[str, str, Any, Any, str, Any, str]] = [
            ("multi_choice", "text", "['3/11', '8/11']", "B", "8/11", "B", "B) 8/11"),
            ("multi_choice", "text", "['3/11', '8/11']", "B", "8/11", "8/11", "3/11"),
            ("free_form", "integer", None, None, "14", "14", "14.5"),
            ("free_form", "float", None, None, "1.20", "1.2", "about 1.2"),
            ("free_form", "list", None, None, "[2007, 2008]", "[2007, 2008]", "[2007]"),
        ]
        vista = [
            {
                "index": index,
                "question": f"Q{index}",
                "answer": answer,
                "question_type": question_type,
                "answer_type": answer_type,
                "choices": choices,
                "answer_option": option,
                "task": "geometry",
                "skills": "['arithmetic']",
                "prediction": f"It is {responses[shift]}",
                "res": responses[shift],
                "log": "Succeed",
            }
            for index, (question_type, answer_type, choices, option, answer, *responses) in enumerate(kinds)
        ]
        extracted = {"score": lambda row: row["answer"] == row["extracted"]}
        hit = {"hit": lambda row: int(row["answer"] == row["prediction"]), "log": lambda _: "match"}
        half = {"eval_score": lambda row: 0.5 * (row["answer"] == row["prediction"])}
        verified = {"verifier_score": lambda row: row["answer"] == row["prediction"]}
        scored: list[tuple[str, str, str, list[dict[str, Any]], dict[str, Any]]] = [
            ("MME", "_auxmatch", ".xlsx", mme, extracted),
            ("POPE", "_auxmatch", ".tsv", pope, extracted),
            ("MMMU_DEV_VAL", "_exact_matching_result", ".xlsx", mmmu, hit),
            ("ChartQA_TEST", "_results", ".json", mmmu, half),
            ("MathVision", "_detailed_results", ".xlsx", mmmu, verified),
            ("MathVista_MINI", "_gpt-4o-mini", ".xlsx", vista, {}),
        ]
        columns = {"extracted", "res", "log"}
        for name, kind, suffix, rows, functions in scored:
            asked = [{key: value for key, value in row.items() if key not in columns} for row in rows]
            dump(asked, place / f"{model}_{name}{suffix}")
            judged = [{**row, **{key: function(row) for key, function in functions.items()}} for row in rows]
            dump(judged, place / f"{model}_{name}{kind}{suffix}")
        status = {"schema_version": "1.0", "eval_id": place.name, "model_name": model, "datasets": {}}
        (place / "status.json").write_text(json.dumps(status, indent=2))


def versions(python: str, *packages: str) -> dict[str, str]:
    code = "import sys, json\nfrom importlib.metadata import version as of\n"
    code += "print(json.dumps({name: of(name) for name in sys.argv[1:]}))"
    return json.loads(subprocess.run([python, "-c", code, *packages], check=True, capture_output=True).stdout)


def write_versions(lmms: str, lm: str) -> None:
    known = {
        "lmms_eval": versions(lmms, "lmms_eval", "torch", "transformers"),
        "lm_eval": versions(lm, "lm_eval", "torch", "transformers"),
        "vlmevalkit (not run)": versions(lm, "pandas", "xlsxwriter"),
    }
    (FIXTURES / "versions.json").write_text(json.dumps(known, indent=1) + "\n")


def main(lmms: str, lm: str) -> None:
    sys.path.insert(0, str(HERE.parent))
    from checkpoints import make_source, make_target

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
    subprocess.run([lm, __file__, "--tables", str(FIXTURES)], check=True)
    write_versions(lmms, lm)


if __name__ == "__main__":
    if sys.argv[1] == "--tables":
        tables(Path(sys.argv[2]))
    else:
        main(*sys.argv[1:3])
