"""Two examples for every command, shown at the end of its help."""

from __future__ import annotations

import click

_EXAMPLES = """
ablate MODEL --mask mask.safetensors --eval evaluation.yml
ablate MODEL --mask mask.safetensors --eval evaluation.yml --draws 10 --json ablation.json
amplify MODEL --neuron fwd.up.L14.N12953 --probes probes.jsonl
amplify MODEL --mask mask.safetensors --pick 20 --probes profile.yml --figures figures/
card merged/ --result comparison.json
card merged/
compare snrf.yml --eval evaluation.yml --draws 10 --json comparison.json
compare regmean.yml --eval evaluation.yml --base BASE --figures figures/
domains ablate MODEL domains.safetensors --eval evaluation.yml
domains ablate MODEL domains.safetensors --eval evaluation.yml --module vision --json matrix.json
domains select domains.safetensors masks/ --top 0.01
domains select domains.safetensors masks/ --top 0.01 --percentile 0.95 --tokens image --assign exclusive
domains show domains.safetensors
domains show domains.safetensors --figures figures/
frank BASE TARGET SOURCE -o frank.yml
frank BASE TARGET SOURCE --lens lens.json --mask mask.safetensors -o frank.yml
init Qwen/Qwen2.5-VL-7B-Instruct Qwen/Qwen2.5-Math-7B merge/
init my-vlm my-llm merge/ --probes source=problems.jsonl --probes keep=ocr
lens MODEL --probes profile.yml -o lens.json --figures figures/
lens MODEL --probes probes.jsonl --images image --tokens 0 -o tokens.html
lora snrf.yml adapter/
lora regmean.yml adapter/ --rank 64 --dtype bfloat16
mask card mask.safetensors
mask card mask.safetensors > README.md
mask export mask.safetensors shared.json --model MODEL
mask export hf://owner/repo@main/mask.safetensors shared.json --model MODEL
mask import shared.json mask.safetensors --model MODEL
mask import attention.json mask.safetensors --model Qwen/Qwen2.5-Math-7B
mask intersect a.safetensors b.safetensors both.safetensors
mask intersect a.safetensors hf://owner/repo@main/mask.safetensors both.safetensors
mask random mask.safetensors control.safetensors --seed 0
mask random --model MODEL --ratio 0.1 control.safetensors
mask select a.profile.safetensors b.profile.safetensors out.safetensors --sigma 0.05
mask select a.profile.safetensors b.profile.safetensors out.safetensors --top-ratio 0.2 --at-least 0.9
mask show mask.safetensors --layers
mask show hf://owner/repo@main/mask.safetensors
mask subtract a.safetensors b.safetensors only-a.safetensors
mask subtract all.safetensors a.safetensors b.safetensors rest.safetensors
mask union a.safetensors b.safetensors either.safetensors
mask union a.safetensors b.safetensors c.safetensors any.safetensors
merge snrf.yml merged/
merge regmean.yml merged/ --cuda
moments show target.moments.safetensors
moments show target.moments.safetensors --layers
moments take profile.yml target.moments.safetensors
moments take profile.yml target.moments.safetensors --limit 16 --resume
moments tune regmean.yml --max-kl 0.01
moments tune regmean.yml --eval evaluation.yml --figures figures/ --dry-run
overlap mask.target.profile.safetensors mask.source.profile.safetensors --curve
overlap a.profile.safetensors b.profile.safetensors --top-ratio 0.3 --json overlap.json
patch snrf.yml merged/
patch snrf.yml merged/ --hard-links --overwrite
plan snrf.yml
plan snrf.yml --certify --out merged/
profile --dry-run profile.yml
profile profile.yml mask.safetensors --limit 32 --resume
report mask.safetensors report.html --result comparison.json
report mask.safetensors report.html --profile a.profile.safetensors --profile b.profile.safetensors
sweep snrf.yml --eval evaluation.yml --set beta=0.25,0.5,1 --set rank=4,16
sweep regmean.yml --eval evaluation.yml --set keep=1,3,10 --json sweep.json --figures figures/
"""


def add_examples(group: click.Group) -> None:
    """End the help of every command of a group with its examples."""
    for example in _EXAMPLES.strip().splitlines():
        command: click.Command = group
        for word in example.split():
            if not isinstance(command, click.Group):
                break
            command = command.commands[word]
        command.epilog = (command.epilog or "\b\nExamples:") + f"\n  snrf {example}"
