"""The tiny checkpoints that the other tests stand on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import TARGETS, add_tensor, example_inputs, load, make_target, read
from processors import BY_HAND, PROCESSORS, QUESTION, VLMS, example_image, image_inputs, processor_missing


@pytest.mark.parametrize("case", list(TARGETS), ids="-".join)
@torch.no_grad()
def test_target(case: tuple[str, str], tmp_path: Path) -> None:
    """Nothing in it is constant, its decoder is where the layout has it, and a picture reaches the logits."""
    folder = make_target(tmp_path / "target", *case)
    tensors = read(folder)
    assert [name for name, tensor in tensors.items() if tensor.numel() > 1 and tensor.float().std() == 0] == []
    assert f"{TARGETS[case]}.2.mlp.down_proj.weight" in tensors
    model, inputs = load(folder, dtype=torch.float32), example_inputs(folder)
    logits = model(**inputs).logits
    assert logits.isfinite().all()
    if case[0] in VLMS:
        changed = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
        assert (model(**changed).logits[0, -1] - logits[0, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", [name for name in PROCESSORS if name in BY_HAND and not processor_missing(name)])
def test_inputs_made_by_hand_are_the_processors(family: str, tmp_path: Path) -> None:
    folder = make_target(tmp_path / "target", family, "hub")
    by_hand, theirs = (
        image_inputs(folder, family, QUESTION, example_image(), by_hand=by_hand) for by_hand in (True, False)
    )
    assert by_hand.keys() == theirs.keys()
    assert all(torch.equal(by_hand[name], theirs[name]) for name in theirs)


def test_load_refuses_a_tensor_too_many(tmp_path: Path) -> None:
    folder = make_target(tmp_path / "target", "idefics3", "hub")
    add_tensor(folder, "model.text_model.stray", torch.arange(300))
    with pytest.raises(AssertionError, match=r"unexpected_keys.*stray"):
        load(folder)
