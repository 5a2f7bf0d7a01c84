"""Two examples for every command, shown at the end of its help."""

from __future__ import annotations

import click

EXAMPLES: dict[str, tuple[str, str]] = {
    "ablate": (
        "snrf ablate MODEL --mask mask.safetensors --eval evaluation.yml",
        "snrf ablate MODEL --mask mask.safetensors --eval evaluation.yml --draws 10 --json ablation.json",
    ),
    "amplify": (
        "snrf amplify MODEL --neuron fwd.up.L14.N12953 --probes probes.jsonl",
        "snrf amplify MODEL --mask mask.safetensors --pick 20 --probes profile.yml --figures figures/",
    ),
    "card": (
        "snrf card merged/ --result comparison.json",
        "snrf card merged/",
    ),
    "compare": (
        "snrf compare snrf.yml --eval evaluation.yml --draws 10 --json comparison.json",
        "snrf compare regmean.yml --eval evaluation.yml --base BASE --figures figures/",
    ),
    "domains ablate": (
        "snrf domains ablate MODEL domains.safetensors --eval evaluation.yml",
        "snrf domains ablate MODEL domains.safetensors --eval evaluation.yml --module vision --json matrix.json",
    ),
    "domains select": (
        "snrf domains select domains.safetensors masks/ --top 0.01",
        "snrf domains select domains.safetensors masks/ --top 0.01 --percentile 0.95 --tokens image --assign exclusive",
    ),
    "domains show": (
        "snrf domains show domains.safetensors",
        "snrf domains show domains.safetensors --figures figures/",
    ),
    "frank": (
        "snrf frank BASE TARGET SOURCE -o frank.yml",
        "snrf frank BASE TARGET SOURCE --lens lens.json --mask mask.safetensors -o frank.yml",
    ),
    "init": (
        "snrf init Qwen/Qwen2.5-VL-7B-Instruct Qwen/Qwen2.5-Math-7B merge/",
        "snrf init my-vlm my-llm merge/ --probes source=problems.jsonl --probes keep=ocr",
    ),
    "lens": (
        "snrf lens MODEL --probes profile.yml -o lens.json --figures figures/",
        "snrf lens MODEL --probes probes.jsonl --images image --tokens 0 -o tokens.html",
    ),
    "lora": ("snrf lora snrf.yml adapter/", "snrf lora regmean.yml adapter/ --rank 64 --dtype bfloat16"),
    "mask card": ("snrf mask card mask.safetensors", "snrf mask card mask.safetensors > README.md"),
    "mask export": (
        "snrf mask export mask.safetensors shared.json --model MODEL",
        "snrf mask export hf://owner/repo@main/mask.safetensors shared.json --model MODEL",
    ),
    "mask import": (
        "snrf mask import shared.json mask.safetensors --model MODEL",
        "snrf mask import attention.json mask.safetensors --model Qwen/Qwen2.5-Math-7B",
    ),
    "mask intersect": (
        "snrf mask intersect a.safetensors b.safetensors both.safetensors",
        "snrf mask intersect a.safetensors hf://owner/repo@main/mask.safetensors both.safetensors",
    ),
    "mask random": (
        "snrf mask random mask.safetensors control.safetensors --seed 0",
        "snrf mask random --model MODEL --ratio 0.1 control.safetensors",
    ),
    "mask select": (
        "snrf mask select a.profile.safetensors b.profile.safetensors out.safetensors --sigma 0.05",
        "snrf mask select a.profile.safetensors b.profile.safetensors out.safetensors --top-ratio 0.2 --at-least 0.9",
    ),
    "mask show": ("snrf mask show mask.safetensors --layers", "snrf mask show hf://owner/repo@main/mask.safetensors"),
    "mask subtract": (
        "snrf mask subtract a.safetensors b.safetensors only-a.safetensors",
        "snrf mask subtract all.safetensors a.safetensors b.safetensors rest.safetensors",
    ),
    "mask union": (
        "snrf mask union a.safetensors b.safetensors either.safetensors",
        "snrf mask union a.safetensors b.safetensors c.safetensors any.safetensors",
    ),
    "merge": ("snrf merge snrf.yml merged/", "snrf merge regmean.yml merged/ --cuda"),
    "moments show": (
        "snrf moments show target.moments.safetensors",
        "snrf moments show target.moments.safetensors --layers",
    ),
    "moments take": (
        "snrf moments take profile.yml target.moments.safetensors",
        "snrf moments take profile.yml target.moments.safetensors --limit 16 --resume",
    ),
    "moments tune": (
        "snrf moments tune regmean.yml --max-kl 0.01",
        "snrf moments tune regmean.yml --eval evaluation.yml --figures figures/ --dry-run",
    ),
    "overlap": (
        "snrf overlap mask.target.profile.safetensors mask.source.profile.safetensors --curve",
        "snrf overlap a.profile.safetensors b.profile.safetensors --top-ratio 0.3 --json overlap.json",
    ),
    "patch": ("snrf patch snrf.yml merged/", "snrf patch snrf.yml merged/ --hard-links --overwrite"),
    "plan": ("snrf plan snrf.yml", "snrf plan snrf.yml --certify --out merged/"),
    "profile": ("snrf profile --dry-run profile.yml", "snrf profile profile.yml mask.safetensors --limit 32 --resume"),
    "report": (
        "snrf report mask.safetensors report.html --result comparison.json",
        "snrf report mask.safetensors report.html --profile a.profile.safetensors --profile b.profile.safetensors",
    ),
    "sweep": (
        "snrf sweep snrf.yml --eval evaluation.yml --set beta=0.25,0.5,1 --set rank=4,16",
        "snrf sweep regmean.yml --eval evaluation.yml --set keep=1,3,10 --json sweep.json --figures figures/",
    ),
}


def add_examples(group: click.Group, prefix: str = "") -> None:
    """End the help of every command of a group with its examples."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            add_examples(command, f"{prefix}{name} ")
        elif prefix + name in EXAMPLES:
            lines = "\n".join(f"  {line}" for line in EXAMPLES[prefix + name])
            command.epilog = f"\b\nExamples:\n{lines}"
