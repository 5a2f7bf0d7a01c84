"""The runs whose outputs are pinned: tiny checkpoints, profile files, recipes and the commands that read them.

Everything goes through files and console scripts, so that the same runs work on any version of the package:

    OMP_NUM_THREADS=1 python tests/golden/world.py BIN tests/golden

runs the console scripts in the folder BIN and writes `golden.safetensors` and `golden.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from checkpoints import make_source, make_target, read
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
ROWS = 8
# Neurons of each projection in the decoder of SMALL: 4 query heads and 2 key and value heads of 16.
LLAMA = {"attn.q": 64, "attn.k": 32, "attn.v": 32, "fwd.up": 48, "fwd.down": 48}
# Head size of Qwen2 is hidden_size / heads.
QWEN = {"attn.q": 32, "attn.k": 16, "attn.v": 16, "fwd.up": 48, "fwd.down": 48}

Run = Callable[..., None]


def recipe(target: str, source: str, *, own: dict[str, Any] | None = None, **parameters: Any) -> dict[str, Any]:
    """A recipe with `own` parameters under the source and the others at the top level."""
    return {
        "merge_method": "snrf",
        "base_model": target,
        "models": [{"model": source, "parameters": {"beta": 0.5, **(own or {"rank": 4})}}],
        "parameters": {"masks": f"{target}.mask.safetensors", **parameters},
    }


MERGES: dict[str, dict[str, Any]] = {
    "rank-4": recipe("llava", "llama"),
    "rank-0": recipe("llava", "llama", own={"rank": 0}),
    "mask-then-svd": recipe("llava", "llama", order="mask-then-svd"),
    "dare": recipe("llava", "llama", own={"drop_rate": 0.6}, update="dare", seed=7),
    "source-base": recipe("llava", "llama", source_base="base"),
    "biases": recipe("qwen", "qwen-source", own={"beta": 0.8, "rank": 4}, biases=True),
    "gradient": recipe(
        "llava-bf16", "llama", own={"rank": 3, "beta": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.25}]}
    ),
}
ADAPTED = ("rank-4", "mask-then-svd")
PROFILES: dict[str, dict[str, Any]] = {
    "paper": {"select": {"top_ratio": 0.5}},
    "gradient": {"select": {"top_ratio": {"attn": 0.5, "fwd": 0.3}}, "weight": "gradient", "site": "post_o"},
    "released": {"select": {"top_ratio": 0.5}, "scoring": "released"},
}


def make_inputs(folder: Path) -> str:
    """Write checkpoints, masks, probes, recipes and profile files; return a sha256 of the checkpoints' tensors."""
    single = {"dtype": torch.float32, "decoder": SMALL}
    make_target(folder / "llava", "llava", "hub", **single)
    make_target(folder / "llava-bf16", "llava", "hub", dtype=torch.bfloat16, decoder=SMALL)
    make_source(folder / "llama", "llama", **single)
    make_source(folder / "base", "llama", seed=9, **single)
    make_target(folder / "text", "llama", "hub", **single)
    make_target(folder / "qwen", "qwen2", "hub", **single)
    make_source(folder / "qwen-source", "qwen2", **single)
    for model, neurons in (("llava", LLAMA), ("llava-bf16", LLAMA), ("qwen", QWEN)):
        write_mask(folder / f"{model}.mask.safetensors", neurons)
    for name, content in MERGES.items():
        (folder / f"{name}.yml").write_text(yaml.safe_dump(content, sort_keys=False))
    questions = ["What is the area " * (1 + row % 4) + f"of triangle {row}?" for row in range(ROWS)]
    (folder / "probes.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in questions))
    side = {"probes": {"dataset": "probes.jsonl", "question": "question"}}
    for name, content in PROFILES.items():
        profile = {
            "target": {"model": "text", **side},
            "source": {"model": "llama", **side},
            "answer": {"by": "model", "max_new_tokens": 4},
            "batch_size": 3,
            **content,
        }
        (folder / f"profile-{name}.yml").write_text(yaml.safe_dump(profile, sort_keys=False))
    digest = hashlib.sha256()
    for model in ("llava", "llava-bf16", "llama", "base", "text", "qwen", "qwen-source"):
        for name, tensor in sorted(read(folder / model).items()):
            digest.update(name.encode())
            digest.update(as_bytes(tensor))
    return digest.hexdigest()


def write_mask(path: Path, neurons: dict[str, int]) -> None:
    """A third of the neurons of every site but one, in the format of mask files."""
    generator = np.random.RandomState(0)
    members = {
        f"layers.{layer}.{projection}": torch.from_numpy(generator.random_sample(count) < 1 / 3)
        for layer in range(SMALL["num_hidden_layers"])
        for projection, count in neurons.items()
        if (layer, projection) != (1, "attn.v")
    }
    save_file(members, path, metadata={"format": "snrf-mask", "version": "1"})


def outputs(folder: Path, run: Run) -> dict[str, Tensor]:
    """Run every command in `folder`, which holds the inputs, and return what they wrote."""
    found: dict[str, Tensor] = {}
    for name in PROFILES:
        run("snrf-profile", f"profile-{name}.yml", f"{name}.safetensors", "--device", "cpu")
        for kind in ("", ".target.profile", ".source.profile"):
            found |= prefixed(f"profile/{name}{kind}", tensors(folder / f"{name}{kind}.safetensors"))
    sides = ("paper.target.profile.safetensors", "paper.source.profile.safetensors")
    run("snrf", "mask", "select", *sides, "selected.safetensors", "--top-ratio", "0.5", "--at-least", "0.75")
    found |= prefixed("select/selected", tensors(folder / "selected.safetensors"))
    run("snrf", "mask", "random", "paper.safetensors", "random.safetensors", "--seed", "3")
    found |= prefixed("select/random", tensors(folder / "random.safetensors"))
    for name, content in MERGES.items():
        run("mergekit-yaml", f"{name}.yml", f"merged-{name}", "--quiet")
        found |= prefixed(f"merge/{name}", changed(folder / content["base_model"], folder / f"merged-{name}"))
    run("snrf", "patch", "rank-4.yml", "patched", "--quiet")
    found |= prefixed("patch/rank-4", changed(folder / "llava", folder / "patched"))
    for name in ADAPTED:
        run("snrf", "lora", f"{name}.yml", f"adapter-{name}", "--quiet")
        found |= prefixed(f"lora/{name}", tensors(folder / f"adapter-{name}" / "adapter_model.safetensors"))
    return found


def changed(target: Path, merged: Path) -> dict[str, Tensor]:
    """The tensors that a merge changed; raises AssertionError if it lost one or changed its dtype or shape."""
    before, after = read(target), read(merged)
    assert before.keys() == after.keys()
    assert [
        name for name in before if (before[name].dtype, before[name].shape) != (after[name].dtype, after[name].shape)
    ] == []
    return {name: tensor for name, tensor in after.items() if as_bytes(tensor) != as_bytes(before[name])}


def tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file."""
    with safe_open(file, "pt") as content:
        return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118


def prefixed(prefix: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in found.items()}


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def machine() -> dict[str, str]:
    """What the last bits of float arithmetic depend on."""
    model = next((line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown")
    return {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(), "cpu": model}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main(binaries: Path, out: Path) -> None:
    """Write the golden files with the console scripts of another installation."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def run(command: str, *arguments: str) -> None:
            print(command, *arguments)
            subprocess.run([binaries / command, *arguments], cwd=folder, env=environment, check=True)

        inputs = make_inputs(folder)
        found = outputs(folder, run)
    save_file({name: found[name].contiguous() for name in sorted(found)}, out / "golden.safetensors")
    (out / "golden.json").write_text(json.dumps({"inputs": inputs, "machine": machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
