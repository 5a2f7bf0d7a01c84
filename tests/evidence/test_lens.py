"""The logit lens against hidden states, attentions and logits that transformers returns, in float64 numpy."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, example_inputs, load, make_source, make_target
from click.testing import CliRunner
from processors import VLMS
from profiling.probing import options, write_data
from transformers import PreTrainedModel

from mergekit_snrf.cli.snrf import main
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.asked import Asked
from mergekit_snrf.evidence.lens import Lensed, LensSums, Positions, add_batch, lens
from mergekit_snrf.evidence.lens_tokens import Place, TokenGrid, grid_html, grid_text
from mergekit_snrf.evidence.results import KINDS, Lens, read_result
from mergekit_snrf.models.live import find_live_decoder, find_live_head
from mergekit_snrf.profiling.probes.answers import Answer, append_answers, with_positions
from mergekit_snrf.profiling.probes.batches import ProbeBatch

ROOT = Path(__file__).parents[2]
BOARD = ROOT / "examples" / "board"
MODELS = [("target", family) for family in FAMILIES] + [("source", "gemma"), ("source", "gemma2")]
ANSWER = (7, 31, 8, 31, 90, 12)


def answered(model: Any, folder: Path) -> ProbeBatch:
    """A prompt, with an image where the model takes one, and an answer behind it."""
    inputs, mask = append_answers(example_inputs(folder), [Answer(ANSWER)], 0)
    inputs = with_positions(model, inputs)
    floats = {name: one.double() for name, one in inputs.items() if one.is_floating_point()}
    return ProbeBatch((3,), {**inputs, **floats}, inputs["attention_mask"], mask)


def image_token(folder: Path) -> int | None:
    config = json.loads((folder / "config.json").read_text())
    names = ("image_token_id", "image_token_index", "img_context_token_id", "img_token_id")
    return next((config[name] for name in names if name in config), None)


def soft(scores: np.ndarray) -> np.ndarray:
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def spaced(places: np.ndarray, limit: int) -> np.ndarray:
    if not limit or len(places) <= limit:
        return places
    return places[[int((i + 0.5) * len(places) / limit) for i in range(limit)]]


class Oracle:
    """Log-probabilities of every layer and position of one probe, and its attentions, by numpy."""

    def __init__(self, model: Any, folder: Path, batch: ProbeBatch) -> None:
        with torch.no_grad():
            out = model(**batch.inputs, output_hidden_states=True, output_attentions=True, use_cache=False)
        norm = model.get_submodule(find_live_decoder(model).path.rpartition(".")[0]).norm
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        # A tied head has no parameter of its own on disk.
        (head,) = [name for name in names if name.endswith("lm_head.weight")]
        weight = model.get_parameter(head).detach().numpy()
        scale = norm.weight.detach().numpy() + ("gemma" in folder.name)
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        cap = json.loads((folder / "config.json").read_text()).get("final_logit_softcapping")
        self.logs = []
        for hidden in out.hidden_states[:-1]:
            x = hidden[0].numpy()
            logits = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale @ weight.T
            self.logs.append(soft(logits if cap is None else cap * np.tanh(logits / cap)))
        self.logs.append(soft(out.logits[0].numpy()))
        ids, self.answer = batch.inputs["input_ids"][0].numpy(), batch.answer_mask[0].numpy()
        self.following = np.append(ids[1:], 0)
        self.image = ids == image_token(folder)
        places = np.arange(len(ids))
        start = len(ids) - len(ANSWER)
        of = [places[self.image], places[~self.image & (places < start - 1)], places[start - 1 : -1]]
        self.places = dict(zip(KINDS, of, strict=True))
        self.attentions = [one[0].numpy() for one in out.attentions if one is not None]

    def shares(self, limit: int) -> list[float]:
        """The attention of text to images by layer; a limit takes four text tokens for each position."""
        rows = spaced((~self.image).nonzero()[0], 4 * limit)
        return [float(one[:, rows][:, :, self.image].sum(-1).mean()) for one in self.attentions]

    def means(self, kind: str, limit: int) -> dict[str, list[float]]:
        places = spaced(self.places[kind], limit)
        last = self.logs[-1][places]
        found: dict[str, list[Any]] = {name: [] for name in ("entropy", "kl", "agrees", "rank", "probability", "hits")}
        for log in (one[places] for one in self.logs):
            target = log[np.arange(len(places)), self.following[places]]
            found["entropy"].append(-(np.exp(log) * log).sum(-1).mean())
            found["kl"].append((np.exp(last) * (last - log)).sum(-1).mean())
            found["agrees"].append((log.argmax(-1) == last.argmax(-1)).mean())
            rank = 1 + (log > target[:, None]).sum(-1)
            found["rank"].append(rank.mean())
            found["probability"].append(np.exp(target).mean())
            found["hits"].append((rank == 1).mean())
        return found


@pytest.mark.parametrize(("kind", "family"), MODELS)
def test_the_lens_shows_the_hidden_states_of_every_family(kind: str, family: str, tmp_path: Path) -> None:
    folder = tmp_path / family
    made = make_target(folder, family, "hub") if kind == "target" else make_source(folder, family)
    model = load(made, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = "eager"
    batch = answered(model, folder)
    oracle = Oracle(model, folder, batch)
    for limit in (0, 3):
        lensed = Lensed.of(model, limit, family)
        sums = LensSums(3, lensed.head.vocabulary)
        add_batch(sums, lensed, batch)
        assert sums.with_images == (family in VLMS)
        assert not any(module._forward_pre_hooks for module in model.modules())
        for index, name in enumerate(KINDS):
            count = min(len(oracle.places[name]), limit or 10**6)
            assert int(sums.tokens[index]) == count
            if not count:
                continue
            expected = oracle.means(name, limit)
            for which in ("entropy", "kl", "agrees"):
                found = getattr(sums, which)[:, index].double().numpy() / count
                np.testing.assert_allclose(found, expected[which], rtol=2e-4, atol=2e-6, err_msg=f"{name} {which}")
            assert np.array_equal(sums.tops[:, index].sum(-1), [count] * 4)
        answers = sums.answer.numpy() / int(sums.tokens[2])
        expected = oracle.means("answer", limit)
        for column, which in enumerate(("rank", "probability", "hits")):
            np.testing.assert_allclose(answers[:, column], expected[which], rtol=2e-4, atol=2e-6, err_msg=which)
        if family in VLMS:
            np.testing.assert_allclose(sums.attention.numpy(), oracle.shares(limit), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llava")
    target, data = make_target(folder / "target", "llava", "hub"), write_data(folder)
    return options(target, data / "images.jsonl", images="images", answer={"max_new_tokens": 6})


def test_batches_and_dtypes_do_not_matter(llava: Any) -> None:
    def curves(size: int, dtype: str = "float64") -> Lens:
        model, processor = llava.load(dtype)
        return lens(llava.rows(), model, processor, Asked(llava.ref, llava.source, llava.rule, size))

    one, four = curves(1), curves(4)
    assert [kind.tokens for kind in one.kinds] == [kind.tokens for kind in four.kinds]
    assert one.count == four.count == 6
    for first, second in zip(one.kinds, four.kinds, strict=True):
        assert first.top == second.top
        for which in ("entropy", "kl", "agrees"):
            np.testing.assert_allclose(getattr(first, which), getattr(second, which), rtol=1e-6, atol=1e-7)
    assert one.answer is not None
    assert four.answer is not None
    np.testing.assert_allclose(one.answer.probability, four.answer.probability, rtol=1e-6)
    np.testing.assert_allclose(one.image_attention, four.image_attention, rtol=1e-6)
    # Greedy answers: the last layer's most probable token.
    assert one.answer.hits[-1] == 1.0
    assert one.answer.rank[-1] == 1.0
    assert one.kinds[0].kl[-1] == 0.0
    half = curves(4, "bfloat16")
    np.testing.assert_allclose(half.kinds[0].entropy, one.kinds[0].entropy, rtol=0.05)


def test_a_head_that_is_not_understood_is_refused(llava: Any) -> None:
    model, processor = llava.load("float32")
    asked = Asked(llava.ref, llava.source, llava.rule)
    model.lm_head.register_forward_hook(lambda module, args, out: out * 1.5 if out.shape[1] == 1 else out)
    with pytest.raises(SnrfError, match="do not follow from its final norm and head"):
        lens(llava.rows(), model, processor, asked)
    model, processor = llava.load("float32")
    lensed = replace(Lensed.of(model, 0, "x"), images=(399,))
    with pytest.raises(SnrfError, match="no token of an image that its configuration names"):
        add_batch(LensSums(3, lensed.head.vocabulary), lensed, llava.batches(*llava.load("float32"))[0])
    with pytest.raises(SnrfError, match="no final norm and linear head"):
        find_live_head(model.model, find_live_decoder(model.model))


def test_positions_are_evenly_spaced_and_independent_of_the_batch() -> None:
    ids = torch.tensor([[1, 9, 9, 9, 9, 9, 2, 3, 4, 5, 6], [1, 9, 9, 2, 3, 4, 0, 0, 0, 0, 0]])
    mask = (ids != 0).long()
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[0, 8:], answer[1, 4:6] = True, True
    batch = ProbeBatch((0, 1), {"input_ids": ids}, mask, answer)
    found = Positions.of(batch, (9,), lambda tokens: 2)
    triples = list(zip(*(one.tolist() for one in (found.probe, found.place, found.kind, found.next)), strict=True))
    assert triples == [
        (0, 2, 0, 9), (0, 4, 0, 9), (0, 0, 1, 9), (0, 6, 1, 3), (0, 7, 2, 4), (0, 9, 2, 6),
        (1, 1, 0, 9), (1, 2, 0, 2), (1, 0, 1, 9), (1, 3, 2, 3), (1, 4, 2, 4),
    ]  # fmt: skip


def run(*words: str | Path) -> Any:
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result


def test_the_command_writes_what_the_report_shows(tmp_path: Path) -> None:
    words = ("lens", BOARD / "target", "--probes", BOARD / "profile.yml", "--limit", "4", "--quiet")
    result = run(*words, "-o", tmp_path / "lens.json", "--figures", tmp_path / "figures")
    found = read_result(tmp_path / "lens.json")
    assert isinstance(found, Lens)
    assert [(one.kind, one.tokens) for one in found.kinds][:2] == [("image", 36), ("prompt", 8)]
    assert f"{found.kinds[0].entropy[0]:.3f}" in result.output
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"{name}.{kind}" for name in ("lens", "answer", "attention") for kind in ("svg", "png")}
    drawn = (tmp_path / "figures" / "lens.svg").read_text()
    assert all(f"{one.kind} ({one.tokens} positions)" in drawn for one in found.kinds)
    mask = ROOT / "neuron_masks" / "board.safetensors"
    run("report", mask, tmp_path / "report.html", "--result", tmp_path / "lens.json")
    assert "would predict after each layer" in (tmp_path / "report.html").read_text()
    changed = json.loads((tmp_path / "lens.json").read_text()) | {"layers": 3}
    (tmp_path / "other.json").write_text(json.dumps(changed))
    with pytest.raises(SnrfError, match="curves are not of 3 layers"):
        read_result(tmp_path / "other.json")


def test_the_tokens_of_one_probe(tmp_path: Path) -> None:
    words = ("lens", BOARD / "target", "--probes", BOARD / "profile.yml", "--quiet", "--tokens")
    result = run(*words, "3", "-o", tmp_path / "tokens.html")
    page = (tmp_path / "tokens.html").read_text()
    lines = result.output.splitlines()
    assert lines[0].split() == ["position", "kind", "token", "0", "1", "2", "3", "4"]
    # The model's own greedy answer: the last layer predicts the token of the next line.
    rows = [re.split(r"\s{2,}", line) for line in lines[1:]]
    following = [row[2] for row in rows][1:]
    for row, token in zip(rows, following, strict=False):
        if row[1] == "answer":
            assert row[-1].split()[0] == token
    assert page.count('<th scope="col">') == len(rows)
    assert len(re.findall(r"<td", page)) == 5 * len(rows)
    refused = CliRunner().invoke(main, list(map(str, (*words, "999"))))
    assert refused.exit_code == 1
    assert "--tokens: row 999 is not among the 64 probes" in refused.output
    assert CliRunner().invoke(main, list(map(str, (*words, "3", "--figures", tmp_path)))).exit_code == 2


HOSTILE = (
    "<script>alert(1)</script>",
    "\u202egnp.exe",
    "\x1b[31m\x00",
    "'\"><img src=x>",
    "&amp;",
    "a" * 200,
    "\u2066{{7*7}}",
)


def test_hostile_tokens_are_shown_as_escapes() -> None:
    places = tuple(Place(index, "prompt", token, token) for index, token in enumerate(HOSTILE))
    grid = TokenGrid("/home/someone/<b>model", 0, HOSTILE[0], places, (tuple((token, 0.5) for token in HOSTILE),) * 2)
    header, rows = grid_text(grid)
    text = "\n".join(map(" ".join, [header, *rows]))
    page = grid_html(grid)
    for written in (text, page):
        assert not re.search(r"[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\x7f]", written)
        assert "\\u202egnp.exe" in written

    tags: set[str] = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.add(tag)  # type: ignore[method-assign]
    parser.feed(page)
    assert "td" in tags
    assert not tags & {"script", "img", "b"}
    assert "/home/someone" not in page
    assert "{{7*7}}" in page
