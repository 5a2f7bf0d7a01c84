"""The recipes of the paper in examples/, planned on tiny checkpoints of the real ones' structure, and their pages."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import make_source, make_target, read
from click.testing import CliRunner, Result
from made_moments import sizes_of, write_random_moments

from mergekit_snrf.cli.snrf import main as snrf
from mergekit_snrf.errors import SnrfError
from mergekit_snrf.neurons.maskfile import read_mask
from mergekit_snrf.neurons.sets import Site
from mergekit_snrf.profiling.moments import moments_path
from mergekit_snrf.profiling.settings import load_profile_config

EXAMPLES = Path(__file__).parent.parent / "examples"
HEAD_DIM = 128
# Written down here and not taken from the package: what a merge edits belongs to the oracle.
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Decoder:
    """The text decoder that a target and its source share, as their config.json describe it."""

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool

    def tiny(self, head_dim: int = 16) -> dict[str, int]:
        """The same decoder with one key and value head of few dimensions, and every width scaled down with it."""
        factor = self.kv_heads * HEAD_DIM // head_dim
        assert self.width % factor == self.intermediate % factor == 0
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.width // factor,
            "intermediate_size": self.intermediate // factor,
            "num_attention_heads": self.heads // self.kv_heads,
            "num_key_value_heads": 1,
        }

    def projections(self) -> list[tuple[int, int]]:
        """Outputs and inputs of the five projections of one layer."""
        query, key = self.heads * HEAD_DIM, self.kv_heads * HEAD_DIM
        wide = (self.intermediate, self.width)
        return [(query, self.width), (key, self.width), (key, self.width), wide, wide[::-1]]

    def parameters(self) -> int:
        """Of the text-only model, its embeddings and head included."""
        edited = sum(rows * columns for rows, columns in self.projections())
        others = self.heads * HEAD_DIM * self.width + self.intermediate * self.width + 2 * self.width
        biases = (self.heads + 2 * self.kv_heads) * HEAD_DIM if self.family == "qwen2" else 0
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)
        return self.layers * (edited + others + biases) + embeddings + self.width


QWEN_7B = Decoder("qwen2", 28, 3584, 28, 4, 18944, 152064, tied=False)
QWEN_3B = Decoder("qwen2", 36, 2048, 16, 2, 11008, 151936, tied=True)
LLAMA_8B = Decoder("llama", 32, 4096, 32, 8, 14336, 128256, tied=False)


@dataclass(frozen=True)
class Pair:
    """A row of the paper's table, and what is known of its checkpoints.

    Attributes:
        family: of the tiny target.
        layers: the name on disk of the target's decoder layers.
        shards: sizes of the target's files on the hub in GB.
        tied: whether the target's embeddings are tied.
        profiled: the model in profile.yml where it is not the target itself.
    """

    folder: str
    target: str
    source: str
    rank: int
    ratio: float
    decoder: Decoder
    family: str
    layers: str
    shards: tuple[float, ...]
    tied: bool = False
    dtype: torch.dtype = torch.bfloat16
    remote: bool = False
    profiled: str | None = None

    @property
    def path(self) -> Path:
        return EXAMPLES / self.folder

    @property
    def mask(self) -> str:
        return f"{self.folder}.safetensors"

    @property
    def page(self) -> str:
        return (self.path / "README.md").read_text(encoding="utf-8")

    @property
    def tiny(self) -> dict[str, int]:
        """The decoder of the tiny checkpoints; its smallest projection has a side of at least the rank."""
        return self.decoder.tiny(max(16, self.rank))

    @property
    def trust(self) -> list[str]:
        return ["--trust-remote-code"] if self.remote else []


BETA = 0.5
GRPO, R1 = "Williammsq/Qwen2.5-3B-Instruct-Math-GRPO", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
PAIRS = (
    Pair(
        "qwen2.5-vl-7b--qwen2.5-math-7b", "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-Math-7B", 4, 0.1, QWEN_7B,
        "qwen2_5_vl", "model.layers", (3.9, 3.86, 3.86, 3.86, 1.09),
    ),
    Pair(
        "qwen2.5-vl-3b--qwen2.5-3b-math-grpo", "Qwen/Qwen2.5-VL-3B-Instruct", GRPO, 4, 0.1, QWEN_3B,
        "qwen2_5_vl", "model.layers", (3.98, 3.53), tied=True,
    ),
    Pair(
        "internvl2.5-4b--qwen2.5-3b-math-grpo", "OpenGVLab/InternVL2_5-4B", GRPO, 32, 0.3, QWEN_3B,
        "internvl_chat", "language_model.model.layers", (4.99, 2.43), remote=True, profiled="internvl2_5-4b-hf",
    ),
    Pair(
        "idefics3-8b--deepseek-r1-llama-8b", "HuggingFaceM4/Idefics3-8B-Llama3", R1, 4, 0.3, LLAMA_8B,
        "idefics3", "model.text_model.layers", (4.97, 5.0, 4.92, 2.04),
    ),
    Pair(
        "llava-next-8b--deepseek-r1-llama-8b", "llava-hf/llama3-llava-next-8b-hf", R1, 4, 0.3, LLAMA_8B,
        "llava_next", "language_model.model.layers", (4.96, 4.92, 5.0, 1.84), dtype=torch.float16,
    ),
    Pair(
        "minicpm-v-2.5--deepseek-r1-llama-8b", "openbmb/MiniCPM-Llama3-V-2_5", R1, 4, 0.3, LLAMA_8B,
        "minicpmv", "llm.model.layers", (2.44, 2.42, 2.5, 2.5, 2.42, 2.5, 2.3), dtype=torch.float16, remote=True,
    ),
)  # fmt: skip
MINICPM, INTERNVL = PAIRS[-1], PAIRS[2]
LLM_PAIR = "qwen2.5-7b-instruct--qwen2.5-math-7b"
every_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.folder)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(snrf, list(arguments))


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(f": {old}\n") == 1, f"{path} must name {old} once"
    path.write_text(text.replace(f": {old}\n", f": {new}\n"), encoding="utf-8")


def copied(pair: Pair, folder: Path) -> Path:
    """The example as a user copies it to another machine, with tiny checkpoints in place of the hub's."""
    target = make_target(
        folder / "target", pair.family, "hub",
        dtype=pair.dtype, tied=pair.tied, decoder=pair.tiny, max_shard_size="1MB",
    )  # fmt: skip
    source = make_source(folder / "source", pair.decoder.family, tied=pair.decoder.tied, decoder=pair.tiny)
    example = Path(shutil.copytree(pair.path, folder / "example"))
    replaced(example / "snrf.yml", pair.target, str(target))
    replaced(example / "snrf.yml", pair.source, str(source))
    return example


def test_every_pair_of_the_paper_has_its_folder() -> None:
    folders = {path.name for path in EXAMPLES.iterdir() if "--" in path.name}
    assert folders == {pair.folder for pair in PAIRS} | {LLM_PAIR}
    for pair in PAIRS:
        assert {path.name for path in pair.path.iterdir()} >= {"README.md", "profile.yml", "snrf.yml"}


def test_an_llm_into_an_llm_is_what_init_writes_and_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = EXAMPLES / LLM_PAIR
    models = ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-Math-7B")
    for model in models:
        make_source(tmp_path / model, "qwen2", decoder=QWEN_7B.tiny())
    monkeypatch.chdir(tmp_path)
    assert invoke("init", *models, ".").exit_code == 0
    for name in ("profile.yml", "snrf.yml", "regmean.yml"):
        assert (tmp_path / name).read_text() == (example / name).read_text(), name
    mask = yaml.safe_load((example / "snrf.yml").read_text())["parameters"]["masks"]
    assert invoke("mask", "random", "--model", models[0], "--ratio", "0.1", mask).exit_code == 0
    result = invoke("plan", "snrf.yml", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["problems"] == []


@every_pair
def test_recipe_plans(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, elsewhere = copied(pair, tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    mask = example / pair.mask
    made = invoke("mask", "random", "--model", str(tmp_path / "target"), "--ratio", str(pair.ratio), str(mask))
    assert made.exit_code == 0, made.output
    result = invoke("plan", *pair.trust, str(example / "snrf.yml"), "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["problems"], plan["warnings"]) == ([], [])
    assert plan["mask"] == str(mask)
    assert plan["target"]["decoder"] == f"{pair.layers}."
    assert (plan["target"]["family"], plan["source"]["family"]) == (pair.decoder.family,) * 2
    names = {f"{pair.layers}.{layer}.{module}.weight" for layer in range(pair.decoder.layers) for module in MODULES}
    edited = {entry["target"]: entry for entry in plan["tensors"]["edited"]}
    assert set(edited) == names
    assert plan["tensors"]["unmatched"] == []
    assert {(entry["beta"], entry["rank"]) for entry in edited.values()} == {(BETA, pair.rank)}
    tensors = read(tmp_path / "target")
    assert names <= tensors.keys()
    assert plan["tensors"]["copied"] == len(tensors) - len(names)
    assert sum(entry["neurons"] for entry in edited.values()) == read_mask(mask).neurons.count() > 0
    for name, entry in edited.items():
        assert entry["shape"] == list(tensors[name].shape)
        assert entry["source"] == name.replace(pair.layers, "model.layers")


def test_mask_of_the_converted_internvl_fits_the_checkpoint_of_the_hub(tmp_path: Path) -> None:
    example, converted = copied(INTERNVL, tmp_path), tmp_path / str(INTERNVL.profiled)
    assert f"--input_dir {INTERNVL.target} --output_dir {INTERNVL.profiled}" in INTERNVL.page
    make_target(converted, "internvl", "nested", tied=False, decoder=INTERNVL.tiny)
    made = invoke("mask", "random", "--model", str(converted), "--ratio", "0.3", str(example / INTERNVL.mask))
    assert made.exit_code == 0, made.output
    result = invoke("plan", *INTERNVL.trust, str(example / "snrf.yml"), "--json")
    plan = json.loads(result.stdout)
    assert len(plan["tensors"]["edited"]) == 5 * INTERNVL.decoder.layers
    assert plan["problems"] == []
    (warning,) = plan["warnings"]
    assert "was made for another target: model_type 'internvl' against 'internvl_chat'" in warning


@every_pair
def test_recipe_has_the_settings_of_the_paper(pair: Pair) -> None:
    recipe = yaml.safe_load((pair.path / "snrf.yml").read_text())
    same = {"merge_method": "snrf", "base_model": pair.target}
    of_snrf = {"model": pair.source, "parameters": {"beta": BETA, "rank": pair.rank}}
    assert recipe == {**same, "models": [of_snrf], "parameters": {"masks": pair.mask}}
    if pair is not MINICPM:
        recipe = yaml.safe_load((pair.path / "regmean.yml").read_text())
        parameters = {"update": "regmean", "moments": moments_path(pair.mask).name, "keep": 3}
        assert recipe == {**same, "models": [{"model": pair.source}], "parameters": parameters}


def test_regmean_recipe_reads_the_moments_of_the_profile(tmp_path: Path) -> None:
    pair = PAIRS[1]
    example = copied(pair, tmp_path)
    replaced(example / "regmean.yml", pair.target, str(tmp_path / "target"))
    replaced(example / "regmean.yml", pair.source, str(tmp_path / "source"))
    moments = moments_path(example / pair.mask)
    sizes = sizes_of(pair.decoder.layers, pair.tiny["hidden_size"], pair.tiny["intermediate_size"])
    write_random_moments(moments, sizes, tokens=8, sketches=dict.fromkeys(("attn", "up", "down"), 4))
    result = invoke("plan", str(example / "regmean.yml"), "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["problems"], plan["warnings"]) == ([], [])
    assert len(plan["tensors"]["edited"]) == 5 * pair.decoder.layers


@every_pair
def test_profile_has_the_settings_of_the_paper(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.yml"
    shutil.copy(pair.path / "profile.yml", path)
    monkeypatch.chdir(tmp_path)
    if pair.profiled is not None:
        with pytest.raises(SnrfError, match=f"'{pair.profiled}' does not exist"):
            load_profile_config(path)
        (tmp_path / pair.profiled).mkdir()
    config = load_profile_config(path)
    assert (config.target.model, config.source.model) == (pair.profiled or pair.target, pair.source)
    images, text = config.target.probes, config.source.probes
    assert (images.dataset, images.split) == ("hiyouga/geometry3k", "train")
    assert (images.question, images.images) == ("problem", "images")
    assert (text.dataset, text.config, text.split) == ("openai/gsm8k", "main", "train")
    assert (text.question, text.images) == ("question", None)
    for projection in ("attn.q", "attn.k", "attn.v", "fwd.up", "fwd.down"):
        assert config.select.value(projection) == pair.ratio
    assert config.select.at_least is None
    assert (config.answer.by, config.answer.max_new_tokens) == ("model", 512)
    assert (config.limit, config.seed, config.scoring, config.template) == (100, 0, "exact", None)
    assert config.trust_remote_code is (pair.remote and pair.profiled is None)
    if pair is not MINICPM:
        assert [kind.name for kind in config.keep] == ["vqa", "ocr", "count", "objects"]
        assert all(kind.dataset in (EXAMPLES / "README.md").read_text() for kind in config.keep)


def code_lines(text: str) -> list[str]:
    """The commands of a page, without their comments."""
    lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    return [re.sub(r"\s+#\s.*", "", line) for line in lines]


def test_masks_of_the_released_detection_make_the_mask_of_minicpm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's own commands, on the two files as the released detection writes them: indices over repeated heads."""
    example = copied(MINICPM, tmp_path)
    monkeypatch.chdir(example)
    lines = code_lines(MINICPM.page)
    names = re.findall(r"\S+_ffn0\.3\.json", "\n".join(lines))
    ratios = f"atten{MINICPM.ratio}_ffn{MINICPM.ratio}.json"
    models = (MINICPM.target, "multimodal"), (MINICPM.source, "gsm")
    assert names == [f"{model.split('/')[1]}_{task}_en_{ratios}" for model, task in models]
    # 4 query heads of 16 dimensions share one key and value head: 3, 19, 35 and 51 are the same row.
    for name, members in zip(names, ([3, 20], [51, 5]), strict=True):
        groups: dict[str, Any] = {"attn_k": {"31": members}, "fwd_up": {"0": [1, members[0]]}, "attn_o": {"0": [1]}}
        Path(name).write_text(json.dumps(groups))
    ids = {MINICPM.target: str(tmp_path / "target"), MINICPM.source: str(tmp_path / "source")}
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("snrf mask")]
    assert [command[1] for command in commands] == ["import", "import", "intersect"]
    for command in commands:
        result = invoke(*(ids.get(word, word) for word in command))
        assert result.exit_code == 0, result.output
    found = read_mask(MINICPM.mask).neurons
    rows = {str(site): member.nonzero().flatten().tolist() for site, member in found.nonempty().items()}
    assert rows == {str(Site(31, "attn.k")): [3], str(Site(0, "fwd.up")): [1]}
    result = invoke("plan", *MINICPM.trust, "snrf.yml")
    assert result.exit_code == 0, result.output


@every_pair
def test_page_has_every_command(pair: Pair) -> None:
    lines = code_lines(pair.page)
    flag = "".join(f" {option}" for option in pair.trust)
    assert lines[[line.startswith("cd ") for line in lines].index(True)] == f"cd examples/{pair.folder}"
    wanted = ["snrf plan", "mergekit-yaml", "snrf patch", "snrf lora"]
    for command in wanted:
        assert [line for line in lines if line.startswith(f"{command}{flag} snrf.yml")], command
    if pair is not MINICPM:
        assert f"snrf-profile profile.yml {pair.mask}" in lines
        assert "snrf-profile --dry-run profile.yml" in lines


@every_pair
def test_page_has_what_both_evaluations_need(pair: Pair) -> None:
    (export,) = [line for line in code_lines(pair.page) if line.startswith("export ")]
    variables = dict(word.split("=", 1) for word in shlex.split(export)[1:])
    assert variables["TARGET"] == pair.target
    used = re.findall(r"\$([A-Z]+)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert variables.keys() == set(used) - {"TASKS"}
    name, entry = re.search(r"target is `([^`]+)`.*?^    (\"[^\n]+),$", pair.page, re.DOTALL | re.MULTILINE).groups()  # type: ignore[union-attr]
    assert re.fullmatch(rf'"{re.escape(name)}-snrf": partial\(\w+, model_path="/path/to/merged"[^"]*("V2.0")?\)', entry)
    assert name in (pair.target.split("/")[1], "llava_next_llama3")


def three_digits(value: float) -> str:
    return f"{value:.3g}"


@every_pair
def test_figures_of_the_page_follow_from_the_shapes(pair: Pair) -> None:
    rows = {
        cells[0]: cells[1:]
        for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in pair.page.splitlines())
        if len(cells) > 1
    }
    decoder = pair.decoder
    shape = (
        f"{decoder.layers} layers, width {decoder.width}, {decoder.heads} query and {decoder.kv_heads} key/value heads "
        f"of {HEAD_DIM}, FFN {decoder.intermediate}; on disk `{pair.layers}.N`"
    )
    assert shape in rows["text decoder"][0]
    hub = "https://huggingface.co/"
    assert rows["checkpoint"] == [f"[{model}]({hub}{model})" for model in (pair.target, pair.source)]
    assert rows["settings of the paper's scripts"][0] == f"rank {pair.rank}, beta {BETA}, top ratio {pair.ratio}"
    target, source = (float(cell.removesuffix(" GB")) for cell in rows["weights"])
    assert target == pytest.approx(sum(pair.shards), rel=2e-3)
    assert rows["weights"][1] == f"{three_digits(2 * decoder.parameters() / 1e9)} GB"
    assert float(rows["download"][0].split()[0]) == pytest.approx(target + source, rel=5e-3)
    projections = [shape for shape in decoder.projections() for _ in range(decoder.layers)]
    adapter = 4 * pair.rank * sum(map(sum, projections)) / 1e6
    assert rows["disk for the result"] == [
        f"{three_digits(target)} GB merged, or {three_digits(adapter)} MB as adapter"
    ]
    edited = 2 * sum(rows * columns for rows, columns in projections) / 1e9
    assert f"{three_digits(edited)} GB of the source" in rows["read by a merge"][0]
    assert f"the adapter at most {three_digits(2 * edited)} GB" in rows["read by a merge"][0]
    assert float(rows["time of `mergekit-yaml` (estimate)"][0].split()[0]) == pytest.approx(
        (6 + 6.5 * target) / 60, abs=0.06
    )
    if pair is MINICPM:
        assert not [name for name in rows if "profiling" in name]
        return
    dense, wide = (
        2 * (pair.decoder.width * (pair.decoder.width + 1) + 4 * pair.decoder.width),
        pair.decoder.intermediate,
    )
    sizes = (
        2 * decoder.layers * (dense + 2 * wide * 512) / 1e9,
        4 * decoder.layers * 256 * (2 * decoder.width + wide) / 1e9,
    )
    moments = rows["moments for `regmean.yml`"][0]
    assert [float(number) for number in re.findall(r"([\d.]+) GB", moments)][:2] == pytest.approx(sizes, rel=5e-3)
    neurons = decoder.layers * ((decoder.heads + 2 * decoder.kv_heads) * HEAD_DIM + decoder.intermediate)
    assert f"{three_digits(92 * neurons / 1e6)} MB of statistics" in rows["memory of profiling"][0]
    found = [float(number) for number in re.findall(r"[\d.]+", rows["time of profiling (estimate)"][0])][:3]
    petaflop, terabytes = 200 * 7 * 2 * decoder.parameters() * 512 / 1e15, 13 * 512 * (target + source) / 1e3
    assert found[:2] == pytest.approx([petaflop, terabytes], rel=5e-3)
    assert found[2] == pytest.approx((petaflop * 100 + terabytes) / 60, abs=0.6)


def test_index_is_the_papers_table() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    found = re.findall(
        r"^\| \[([^]]+)\]\(([^)]+)\) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \+", text, re.MULTILINE
    )
    assert [(name, int(rank), float(beta), float(ratio)) for name, _, rank, beta, ratio, _ in found] == [
        (pair.folder, pair.rank, BETA, pair.ratio) for pair in PAIRS
    ]
    for (_, link, *_, weights), pair in zip(found, PAIRS, strict=True):
        assert link == f"{pair.folder}/README.md"
        assert f"| weights | {weights} GB |" in pair.page
