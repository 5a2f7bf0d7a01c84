"""mergekit's own flags, dtypes, gradients and paths on one pair: each merge against a plain one, bit for bit."""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mergekit.card
import mergekit.multigpu_executor as multi_gpu
import pytest
import torch
from checkpoints import load, make_source, read, write
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import TensorEntry, TensorGroup, TensorMetadata
from mergekit.options import MergeOptions
from pair import (
    MODULES,
    Pair,
    assert_same,
    make_neurons,
    make_pair,
    merge,
    plan,
    recorded_reads,
    run,
    same_bits,
    source_name,
    target_name,
    write_recipe,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from mergekit_snrf.fusion.fuse import ORDERS, Fusion, fuse
from mergekit_snrf.merge import method
from mergekit_snrf.merge.draft import draft_merge
from mergekit_snrf.merge.session import MergeSession
from mergekit_snrf.neurons.sites import Site

if TYPE_CHECKING:
    from conftest import Accelerator

POSITIONS = "vision_tower.vision_model.embeddings.position_ids"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def plain(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return merge(pair.recipe(), tmp_path_factory.mktemp("plain") / "out")


def fused(pair: Pair, fusions: dict[Site, Fusion] | Fusion, base: Tensors, source: Tensors) -> Tensors:
    """The base with every masked weight fused by hand, without mergekit."""
    expected = dict(base)
    for site, member in pair.neurons.items():
        fusion = fusions if isinstance(fusions, Fusion) else fusions[site]
        name, axis = target_name(site), MODULES[site.projection][1]
        if fusion.beta:
            expected[name] = fuse(base[name], source[source_name(site)], member, axis, fusion).tensor
    return expected


def test_plain_merge_is_the_fusion_of_every_masked_weight(pair: Pair, plain: Tensors) -> None:
    base = read(pair.target)
    assert_same(plain, fused(pair, Fusion(0.5, 4), base, read(pair.source)))
    changed = [name for name in base if not same_bits(base[name], plain[name])]
    assert sorted(changed) == sorted(target_name(site) for site in pair.neurons)


@pytest.mark.parametrize(
    "flags",
    [
        "--low-cpu-memory --clone-tensors --no-safe-serialization",
        "--async-write --write-threads 2 --out-shard-size 20000",
        "--lazy-unpickle --read-to-gpu --device auto",
        "--random-seed 1 --allow-crimes --unsafe-truncate-embeddings",
        "--no-copy-tokenizer --no-write-model-card",
    ],
)
def test_flags_change_no_bit(flags: str, pair: Pair, plain: Tensors, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_same(merge(pair.recipe(), out, *flags.split()), plain)
    load(out)
    assert (len([*out.glob("model-*-of-*.safetensors")]) > 1) is ("shard-size" in flags)
    assert (out / "README.md").exists() is ("--no-write-model-card" not in flags)
    assert (out / "tokenizer.json").exists() is ("--no-copy-tokenizer" not in flags)
    assert (out / "processor_config.json").exists()


@pytest.mark.parametrize(
    ("safe", "shards", "flags"), [(True, 30_000, ""), (False, None, "--lazy-unpickle"), (False, 30_000, "")]
)
def test_layout_of_the_source(
    safe: bool, shards: int | None, flags: str, pair: Pair, plain: Tensors, tmp_path: Path
) -> None:
    source = make_source(tmp_path / "source", "llama", safe=safe, max_shard_size=shards)
    assert (len([*source.glob("*-of-*")]) > 1) is (shards is not None)
    recipe = pair.recipe(models=[{"model": str(source), "parameters": {"beta": 0.5, "rank": 4}}])
    assert_same(merge(recipe, tmp_path / "out", *flags.split()), plain)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_layout_of_the_base(safe: bool, pair: Pair, plain: Tensors, tmp_path: Path) -> None:
    """The output's layout is its own, whatever the base's."""
    target = tmp_path / "target"
    shutil.copytree(pair.target, target)
    write(target, read(target), safe=safe, max_shard_size=30_000)
    assert len([*target.glob("*-of-*")]) > 1
    assert_same(merge(pair.recipe(base_model=str(target)), tmp_path / "out"), plain)
    weights = {file.name for file in (tmp_path / "out").iterdir() if file.name.startswith(("model", "pytorch_model"))}
    assert weights == {"model.safetensors"}


@pytest.mark.parametrize(
    ("source", "parameters"),
    [
        ({"rank": 0}, {}),
        ({"rank": 4}, {"order": ORDERS[1]}),
        ({"rank": None, "drop_rate": 0.7}, {"update": "dare", "seed": 3}),
    ],
)
def test_device_of_the_maths(
    source: dict[str, Any], parameters: dict[str, Any], accelerator: Accelerator, pair: Pair, tmp_path: Path
) -> None:
    """What --cuda does: tensors move to the device, and everything that the kernel makes is there too."""
    recipe = pair.recipe(source=source, parameters=parameters)
    expected = merge(recipe, tmp_path / "cpu")
    with accelerator:
        result = run(recipe, tmp_path / "device", "--device", "meta")
    assert result.exit_code == 0, result.output
    assert_same(read(tmp_path / "device"), expected)
    assert accelerator.operations >= {"aten::sub_", "aten::index_put_", "aten::nonzero"}
    assert ("aten::_linalg_eigh" in accelerator.operations) is (source["rank"] == 4)


def test_cuda_options_plan_as_the_cpu_does(pair: Pair) -> None:
    here, cuda = plan(pair.recipe()), plan(pair.recipe(), gpu_rich=True)
    assert MergeOptions(gpu_rich=True).device == "cuda"
    assert (here.problems, cuda.problems) == ([], [])
    assert here.edits == cuda.edits


@pytest.mark.usefixtures("two_accelerators")
@pytest.mark.parametrize("flags", ["", "--low-cpu-memory --out-shard-size 20000"])
def test_multi_gpu(flags: str, pair: Pair, plain: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, inner = [], method.merge_group

    def recorded(group: TensorGroup, key: str) -> Tensor:
        threads.append(threading.get_ident())
        return inner(group, key)

    monkeypatch.setattr(method, "merge_group", recorded)
    assert_same(merge(pair.recipe(), tmp_path / "out", "--multi-gpu", *flags.split()), plain)
    assert len(set(threads) - {threading.get_ident()}) == 2


class SlowQueue(queue.Queue):  # type: ignore[type-arg]
    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        time.sleep(0.002)
        return super().get(block, timeout)


@pytest.mark.usefixtures("two_accelerators")
def test_multi_gpu_loses_no_result_to_a_slow_main_process(
    pair: Pair, plain: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers are done long before their results are collected."""
    monkeypatch.setattr(multi_gpu.queue, "Queue", SlowQueue)
    assert_same(merge(pair.recipe(), tmp_path / "out", "--multi-gpu"), plain)


def test_two_merges_in_many_threads(pair: Pair, plain: Tensors, tmp_path: Path) -> None:
    """Workers of two merges at once; each finds its own session."""
    base, source = read(pair.target), read(pair.source)
    other = make_pair_of_masks(pair, tmp_path)
    recipes = {path: pair.recipe(parameters={"masks": str(path)}) for path in (pair.mask, other)}
    sessions = {
        path: MergeSession(draft_merge(MergeConfiguration.model_validate(recipe), MergeOptions()).finish(), "")
        for path, recipe in recipes.items()
    }

    def merged(job: tuple[Site, Path]) -> Tensor:
        site, mask = job
        name = target_name(site)
        entries = (TensorEntry("t", base[name], is_base=True), TensorEntry("s", source[source_name(site)]))
        group = TensorGroup(entries=entries, metadata=TensorMetadata(name=name))
        return method.merge_group(group, sessions[mask].key)

    jobs = [(site, mask) for site in pair.neurons for mask in (pair.mask, other)]
    with sessions[pair.mask].running(), sessions[other].running(), ThreadPoolExecutor(8) as pool:
        results = [*pool.map(merged, jobs)]
    reread = merge(recipes[other], tmp_path / "out")
    for (site, mask), result in zip(jobs, results, strict=True):
        assert same_bits(result, (plain if mask == pair.mask else reread)[target_name(site)])


def make_pair_of_masks(pair: Pair, folder: Path) -> Path:
    from mergekit_snrf.neurons.maskfile import write_mask

    write_mask(folder / "other.safetensors", make_neurons(seed=1))
    return folder / "other.safetensors"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapter_on_the_source(pair: Pair, tmp_path: Path) -> None:
    """`model+adapter` equals a source with the adapter merged by hand, whatever folder the paths are relative to."""
    import peft

    source = make_source(tmp_path / "models" / "source", "llama", dtype=torch.float32)
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(source),
        peft.LoraConfig(r=2, lora_alpha=4, target_modules=["k_proj", "up_proj", "down_proj"]),
    )
    generator = torch.Generator().manual_seed(0)
    by_hand = read(source)
    for layer in (0, 1, 2):
        for name in ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
            module = adapted.get_submodule(f"base_model.model.model.layers.{layer}.{name}")
            # Multiples of 1/8 have exact products, so that the order of additions does not matter.
            for part in (module.lora_A, module.lora_B):
                weight = part["default"].weight.data
                weight.copy_(torch.randint(-2, 3, weight.shape, generator=generator) / 8)
            product = module.lora_B["default"].weight.data @ module.lora_A["default"].weight.data
            by_hand[f"model.layers.{layer}.{name}.weight"] += 4 / 2 * product
    adapted.save_pretrained(tmp_path / "models" / "adapter")
    shutil.copytree(source, tmp_path / "by_hand")
    write(tmp_path / "by_hand", by_hand)
    expected = merge(pair.recipe(models=[{"model": str(tmp_path / "by_hand")}]), tmp_path / "expected")
    without = merge(pair.recipe(models=[{"model": str(source)}]), tmp_path / "without")
    assert not same_bits(expected[target_name(Site(0, "attn.k"))], without[target_name(Site(0, "attn.k"))])

    cache = tmp_path / "cache"
    for number, (start, folder) in enumerate((("", tmp_path / "models"), ("models", tmp_path))):
        recipe = pair.recipe(models=[{"model": f"{os.path.join(start, 'source')}+{os.path.join(start, 'adapter')}"}])
        path = write_recipe(folder / "lora.yml", recipe)
        out = merge(path, tmp_path / f"out{number}", "--lora-merge-cache", str(cache))
        assert_same(out, expected)
    with_adapter = f"{source}+{tmp_path / 'models' / 'adapter'}"
    for number, (model, base) in enumerate(((with_adapter, str(source)), (str(source), with_adapter))):
        plain = [str(tmp_path / "by_hand") if name == with_adapter else name for name in (model, base)]
        wanted, out = (
            merge(
                pair.recipe(models=[{"model": one}], parameters={"source_base": other}),
                tmp_path / f"{name}{number}",
                *("--lora-merge-cache", str(cache)),
            )
            for name, (one, other) in (("plain", plain), ("adapted", (model, base)))
        )
        assert_same(out, wanted)
    assert len([*cache.iterdir()]) == 1


@pytest.mark.parametrize(
    ("base", "source"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_output_has_the_dtype_of_the_base(base: torch.dtype, source: torch.dtype, tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "pair", dtype=base, source_dtype=source)
    out = merge(pair.recipe(), tmp_path / "out")
    assert out[target_name(Site(0, "fwd.up"))].dtype == base
    assert_same(out, fused(pair, Fusion(0.5, 4), read(pair.target), read(pair.source)))


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [("float16", None), (None, "float32"), ("float32", "bfloat16")],
)
def test_dtype_and_out_dtype(dtype: str | None, out_dtype: str | None, pair: Pair, tmp_path: Path) -> None:
    def cast(tensors: Tensors, name: str | None) -> Tensors:
        if name is None:
            return tensors
        return {k: t.to(getattr(torch, name)) if t.is_floating_point() else t for k, t in tensors.items()}

    # An out_dtype wider than the checkpoint keeps what the checkpoint's own dtype would round away.
    working = "float32" if out_dtype == "float32" else dtype
    base, source = cast(read(pair.target), working), cast(read(pair.source), working)
    expected = cast(fused(pair, Fusion(0.5, 4), base, source), out_dtype)
    out = merge(pair.recipe(dtype=dtype, out_dtype=out_dtype), tmp_path / "out")
    assert_same(out, expected)
    assert out[POSITIONS].dtype == torch.int64
    assert out[POSITIONS].max() > 256
    assert load(tmp_path / "out").dtype == getattr(torch, out_dtype or dtype or "")


def test_buffers_that_dtype_cannot_express_are_copied_without_it(pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(pair.target, target)
    buffers = {
        "flags": torch.tensor([True, False]),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "scales": torch.tensor([0.5, 448.0]).to(torch.float8_e4m3fn),
    }
    write(target, {**read(target), **buffers})
    out = merge(pair.recipe(base_model=str(target)), tmp_path / "out")
    for name, tensor in buffers.items():
        assert out[name].dtype == tensor.dtype
        assert same_bits(out[name], tensor)


def test_filters_and_gradients_in_them(pair: Pair, tmp_path: Path) -> None:
    beta = [
        {"filter": "self_attn.k_proj", "value": [0.0, 0.5, 0.125]},
        {"filter": "mlp", "value": 1.0},
        {"value": 0.25},
    ]
    rank = [{"filter": "layers.1.", "value": 0}, {"filter": "down_proj", "value": 7}]
    # The top level holds for what the source's own filters leave open, beside the defaults.
    recipe = pair.recipe(source={"beta": beta, "rank": None}, parameters={"rank": rank})
    fusions = {}
    for site in pair.neurons:
        b = {"attn.k": (0.0, 0.5, 0.125)[site.layer], "fwd.up": 1.0, "fwd.down": 1.0}.get(site.projection, 0.25)
        r = 0 if site.layer == 1 else 7 if site.projection == "fwd.down" else 4
        fusions[site] = Fusion(b, r)
    with recorded_reads() as recorded:
        out = merge(recipe, tmp_path / "out")
    reads = recorded[pair.source]
    assert_same(out, fused(pair, fusions, read(pair.target), read(pair.source)))
    assert source_name(Site(0, "attn.k")) not in reads
    assert len(reads) == len(pair.neurons) - 1


def test_source_without_masked_neurons_is_never_read(pair: Pair, plain: Tensors, tmp_path: Path) -> None:
    """Every tensor in a shard of its own, and rubbish in all shards but those of masked weights."""
    source = make_source(tmp_path / "source", "llama", max_shard_size=1)
    needed = {source_name(site) for site in pair.neurons}
    shards = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(shards.values())) == len(shards) > len(needed)
    for name, file in shards.items():
        if name not in needed:
            content = bytearray((source / file).read_bytes())
            start = 8 + int.from_bytes(content[:8], "little")
            content[start:] = b"\xff" * (len(content) - start)
            (source / file).write_bytes(content)
    with recorded_reads() as reads:
        assert_same(merge(pair.recipe(models=[{"model": str(source)}]), tmp_path / "out"), plain)
    assert sorted(reads[source]) == sorted(needed)
    # Neither the loader nor a worker reads a tensor of the target again.
    assert sorted(reads[pair.target]) == sorted(plain)


def test_side_files_and_configuration(pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(pair.target, target)
    extra = ["LICENSE", "added_tokens.json", "merges.txt", "modeling_extra.py", "qwen.tiktoken", "tokenizer.model"]
    own = ["README.md", "mergekit_config.yml", "model.safetensors"]
    left = [".gitattributes", "consolidated.pth", "model.onnx", "training_args.bin"]
    # As another version of transformers wrote it, so that writing it anew would show.
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({"transformers_version": "4.49.0", **config}, indent=4))
    for name in [*extra, *left, "README.md", "mergekit_config.yml"]:
        (target / name).write_text(f"the target's {name}\n")
    recipe = (
        f"# A comment, and  odd   spacing.\nmerge_method: snrf\nbase_model: {target}\nmodels:\n"
        f"- {{model: {pair.source}, parameters: {{rank: 4}}}}\nparameters: {{masks: '{pair.mask}'}}\n"
    )
    path = tmp_path / "snrf.yml"
    path.write_text(recipe)
    merge(path, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {file.name for file in target.iterdir()} - set(left)
    for name in names - set(own):
        assert (tmp_path / "out" / name).read_bytes() == (target / name).read_bytes(), name
    card = (tmp_path / "out" / "README.md").read_text()
    shared = recipe
    for path, name in ((target, target.name), (pair.source, pair.source.name), (f"'{pair.mask}'", pair.mask.name)):
        shared = shared.replace(str(path), name)
    assert (tmp_path / "out" / "mergekit_config.yml").read_text() == shared
    assert shared.strip() in card
    assert "[Shared Neuron Low-Rank Fusion](https://arxiv.org/abs/2602.19058)" in card


def test_chat_template_of_the_recipe(pair: Pair, tmp_path: Path) -> None:
    template = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    chat = [{"role": "user", "content": "2 + 2"}]
    base = AutoTokenizer.from_pretrained(pair.target)
    for recipe, text in ((template, "[user]2 + 2"), ("chatml", "<|im_start|>user\n2 + 2<|im_end|>\n")):
        out = tmp_path / recipe[:6].strip("{% ")
        merge(pair.recipe(chat_template=recipe), out)
        for loaded in (AutoTokenizer.from_pretrained(out), AutoProcessor.from_pretrained(out)):
            assert loaded.apply_chat_template(chat, tokenize=False) == text
        assert AutoTokenizer.from_pretrained(out).get_vocab() == base.get_vocab()


@pytest.fixture
def one_slash(pair: Pair, tmp_path: Path) -> Path:
    """A recipe whose paths are relative to it and look like hub ids."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "models").symlink_to(pair.folder)
    return write_recipe(
        tmp_path / "recipes" / "snrf.yml",
        {
            "merge_method": "snrf",
            "base_model": "models/target",
            "models": [{"model": "models/source", "parameters": {"beta": 0.5, "rank": 4}}],
            "parameters": {"masks": "models/mask.safetensors"},
        },
    )


@pytest.mark.parametrize("folder", ["recipes", "elsewhere"])
def test_relative_paths_never_ask_the_hub(
    folder: str, one_slash: Path, plain: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*args: Any, **options: Any) -> bool:
        raise AssertionError(f"asked the hub for {args}")

    monkeypatch.setattr(mergekit.card.huggingface_hub, "repo_exists", asked)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / folder)
    assert_same(merge(one_slash, tmp_path / "out"), plain)
    assert "base_model:" not in (tmp_path / "out" / "README.md").read_text().split("---\n")[1]
