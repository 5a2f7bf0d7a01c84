"""The whole path with pictures on a tiny Qwen2.5-VL; its processor needs torchvision (``make pictures``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from checkpoints import make_source, make_target, read
from PIL import Image
from processors import processor_missing
from transformers import AutoModelForImageTextToText, AutoProcessor

from mergekit_snrf.models.moments import InputSite, read_moments

pytestmark = pytest.mark.skipif(bool(processor_missing("qwen2_5_vl")), reason="torchvision is not installed")

# Held-out probes of a kind begin behind the first LIMIT rows; tune wants 96 of them.
LIMIT, ROWS = 8, 104
QUESTIONS = {
    "gain": "What is the area of the triangle?",
    "vqa": "What is in the image?",
    "ocr": "How many clips did she sell?",
}


def write_kind(folder: Path, name: str, rows: int) -> None:
    """Write questions about pictures that differ, also in size."""
    (folder / name).mkdir()
    random = np.random.default_rng([len(name), rows])
    lines = []
    for row in range(rows):
        shape = (int(random.integers(10, 40)), int(random.integers(10, 40)), 3)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(folder / name / f"{row}.png")
        lines.append(json.dumps({"question": f"{QUESTIONS[name]} {row}", "image": f"{name}/{row}.png"}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines))


def run(folder: Path, module: str, *words: str) -> str:
    """Run a command as its script does, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", f"from {module} import main; main()", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("layout", ["hub", "nested"])
def test_from_profile_yml_to_answers_of_the_merge(layout: str, tmp_path: Path) -> None:
    make_target(tmp_path / "target", "qwen2_5_vl", layout)
    make_source(tmp_path / "source", "qwen2")
    for name, rows in (("gain", LIMIT), ("vqa", ROWS), ("ocr", ROWS)):
        write_kind(tmp_path, name, rows)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"question": f"{n} + 1?"}) for n in range(LIMIT)))
    kept = [{"name": name, "dataset": f"{name}.jsonl", "question": "question", "images": "image"} for name in QUESTIONS]
    profile = {
        "target": {"model": "target", "probes": {key: kept[0][key] for key in ("dataset", "question", "images")}},
        "source": {"model": "source", "probes": {"dataset": "text.jsonl", "question": "question"}},
        "keep": [{**kind, "limit": LIMIT, "max_new_tokens": 3} for kind in kept[1:]],
        "answer": {"by": "model", "max_new_tokens": 4},
        "select": {"top_ratio": 0.5},
        "device": "cpu",
    }
    (tmp_path / "profile.yml").write_text(yaml.safe_dump(profile))
    (tmp_path / "regmean.yml").write_text(
        "merge_method: snrf\nbase_model: target\nmodels: [{model: source}]\n"
        "parameters: {update: regmean, moments: mask.moments.safetensors, keep: 3}\n"
    )
    run(tmp_path, "mergekit_snrf.cli.profile", "profile.yml", "mask.safetensors")
    moments = read_moments(tmp_path / "mask.moments.safetensors")
    assert [kind["name"] for kind in moments.provenance.keep or ()] == ["vqa", "ocr"]
    # A picture of 10 to 40 pixels has at least four tokens beside those of the question and of the answer.
    for kind in (moments.provenance.gain, *(moments.provenance.keep or ())):
        assert kind is not None
        assert (kind["images"], kind["count"]) == ("image", LIMIT)
        assert kind["tokens"] > 15 * LIMIT
    assert InputSite(0, "attn") in moments.sizes

    tuned = run(tmp_path, "mergekit_snrf.cli.snrf", "moments", "tune", "regmean.yml", "--max-kl", "0.01", "--quiet")
    assert "held-out probes (96 vqa, 96 ocr)" in tuned
    run(tmp_path, "mergekit.scripts.run_yaml", "regmean.yml", "out", "--quiet")

    before, after = read(tmp_path / "target"), read(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 3 * 5
    assert not any("visual" in name for name in changed)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    picture = Image.open(tmp_path / "vqa" / "0.png")
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTIONS["vqa"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    answers, logits = {}, {}
    for name in ("target", "out"):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
        with torch.no_grad():
            logits[name] = model(**inputs).logits
            answers[name] = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert answers["out"].shape[1] > inputs["input_ids"].shape[1]
    assert bool(logits["out"].isfinite().all())
    assert not torch.equal(logits["target"], logits["out"])
