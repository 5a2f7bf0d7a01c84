"""Every reader of the package with a whole file for each, made of the tiny checkpoints of the tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from mergekit_snrf.errors import naming
from mergekit_snrf.files.reading import DATA_BYTES, read_bytes

HOSTILE_TEMPLATES = (
    *("{{ 1 / 0 }}", "{{ 'a' * 10**10 }}", "{{ 10**10**8 }}", "{{ '%9999999999d' % 1 }}"),
    *("{{ range(10**9) | list }}", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% include 'x' %}", "{{ ''.__class__.__mro__ }}"),
    *("{{ messages }}", "{{ raise_exception('\x1b[31m' * 999) }}", "{{ messages[9].content }}"),
    *("{% set x = messages.append(1) %}", "{% if", "{{ x.y.z }}"),
)


@dataclass(frozen=True)
class Reader:
    """A reader, the folder that it reads from, and the files in it that are damaged in turn.

    Attributes:
        read: gets the folder and the damaged file.
        share: how many of the files it gets, relative to the others.
        tokens: text that damages its files beside the common tokens.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path, Path], object]
    share: float = 1.0
    tokens: tuple[str, ...] = ()


def readers(folder: Path) -> Iterator[Reader]:
    """Write a whole input for every reader below a folder, and yield the readers."""
    folder.mkdir(parents=True, exist_ok=True)
    yield from _containers(folder)
    yield from _of_models(folder)
    yield from _of_results(folder)
    yield from _of_data(folder)


def _place(folder: Path, name: str) -> Path:
    place = folder / name
    place.mkdir()
    return place


def _containers(folder: Path) -> Iterator[Reader]:
    from made_profiles import impact_profile

    from mergekit_snrf.fusion.regmean import DenseMoment
    from mergekit_snrf.models.moments import (
        INPUTS,
        SETS,
        InputSite,
        MomentsProvenance,
        moment_tensors,
        read_moments,
        write_moments,
    )
    from mergekit_snrf.neurons.lists import read_neurons
    from mergekit_snrf.neurons.maskcard import mask_card, provenance_rows
    from mergekit_snrf.neurons.maskfile import ModelProvenance, Provenance, read_mask, write_mask
    from mergekit_snrf.neurons.sets import NeuronSet
    from mergekit_snrf.neurons.shape import DecoderShape
    from mergekit_snrf.neurons.sites import Site
    from mergekit_snrf.profiling.journal import Journals, Progress, Tally
    from mergekit_snrf.profiling.result.profilefile import read_profile, write_profile
    from mergekit_snrf.profiling.result.selection import select
    from mergekit_snrf.profiling.result.statistics import Statistics

    site = Site(0, "attn.k")
    members = NeuronSet({site: torch.tensor([True, False] * 2), Site(1, "fwd.up"): torch.ones(6, dtype=torch.bool)})
    side = ModelProvenance(path="owner/model", revision="main", model_type="llama", config_sha256="0" * 64)
    place = _place(folder, "mask")
    provenance = Provenance(target=side, source=side, seed=0, probes={"target": {"count": 3}})
    write_mask(place / "m.safetensors", members, provenance)

    def of_mask(place: Path, file: Path) -> None:
        mask = read_mask(place / "m.safetensors")
        provenance_rows(mask)
        mask_card(mask, sha256="0" * 64, fusion={"beta": 0.5})

    yield Reader("mask", place, ("m.safetensors",), of_mask)

    place = _place(folder, "profile")
    impacts = {site: torch.rand(4), Site(1, "fwd.up"): torch.rand(6)}
    write_profile(place / "p.safetensors", impact_profile(impacts, count=3))
    yield Reader("profile", place, ("p.safetensors",), lambda _, file: select([read_profile(file)], top_ratio=0.5))

    place = _place(folder, "moments")
    moments = {}
    for name in INPUTS:
        for which in SETS:
            x = torch.randn(9, 5, dtype=torch.float64)
            moments |= moment_tensors(InputSite(0, name), which, DenseMoment.of(x.mT @ x), 1.5)
    write_moments(place / "m.safetensors", moments, MomentsProvenance(model=side, seed=0, keep=[{"count": 3}]))

    def of_moments(place: Path, file: Path) -> None:
        found = read_moments(place / "m.safetensors")
        for input_site in found.sizes:
            found.moment(input_site, "gain")

    yield Reader("moments", place, ("m.safetensors",), of_moments)

    place = _place(folder, "journal")
    statistics = Statistics({site: 2})
    statistics.update({site: torch.tensor([[1.0, 2.0], [2.0, 4.0]])})
    journals = Journals(place / "m.target", {"seed": 0, "probes": {"count": 2}})
    journals.write(0, Progress(statistics, Tally(tokens=3), {0, 1}))
    yield Reader("journal", place, (journals.path(0).name,), lambda *_: journals.read(lambda: Statistics({site: 2})))

    place = _place(folder, "released")
    shape = DecoderShape(layers=3, hidden_size=8, heads=4, kv_heads=2, head_dim=3, intermediate_size=10)
    neurons = {"attn_k": {"0": [1, 2], "2": [0]}, "fwd_up": {"1": [9, 0]}, "attn_q": {}}
    (place / "r.json").write_text(json.dumps(neurons))
    yield Reader("released json", place, ("r.json",), lambda place, _: read_neurons(place / "r.json", shape))


def _of_models(folder: Path) -> Iterator[Reader]:
    from mergekit.options import MergeOptions
    from pair import make_pair

    from mergekit_snrf.merge.draft import draft_merge
    from mergekit_snrf.merge.folders import output_problem
    from mergekit_snrf.merge.recipefile import load_recipe
    from mergekit_snrf.models.checkpoint import open_checkpoint
    from mergekit_snrf.models.decoder import find_decoder
    from mergekit_snrf.models.loading import load_config, load_processor
    from mergekit_snrf.models.reference import ModelRef

    pair = make_pair(folder / "pair")

    def of_recipe(place: Path, file: Path) -> None:
        draft_merge(load_recipe(place / "r.yml"), MergeOptions(), recipe_folder=str(place)).finish()

    place = _place(folder, "recipe")
    content = pair.recipe(parameters={"order": "mask-then-svd"}, dtype="bfloat16")
    content["models"][0]["parameters"]["beta"] = [{"filter": "mlp", "value": [0, 1]}, {"value": 0.25}]
    (place / "r.yml").write_text(yaml.safe_dump(content))
    yield Reader("recipe", place, ("r.yml",), of_recipe)

    draft = draft_merge(load_recipe(place / "r.yml"), MergeOptions())
    place = _place(folder, "output")
    for kind in ("merge", "adapter"):
        (place / kind).mkdir()
    (place / "merge" / "mergekit_config.yml").write_text(yaml.safe_dump(content))
    (place / "adapter" / "README.md").write_text("---\ntags:\n- snrf\n- lora\n---\n# An adapter\n")

    def of_output(place: Path, file: Path) -> None:
        for kind in ("merge", "adapter"):
            known: Any = {"inputs": draft.inputs, "target": draft.checkpoints.get("target")}
            if (problem := output_problem(str(place / kind), kind, overwrite=True, **known)) is not None:  # type: ignore[arg-type]
                raise problem

    yield Reader("earlier output", place, ("merge/mergekit_config.yml", "adapter/README.md"), of_output, 0.5)

    place = shutil.copytree(pair.target, folder / "checkpoint")
    single = place / "model.safetensors"
    single.rename(place / "model-00001-of-00001.safetensors")
    names = list(open_checkpoint(str(pair.target)).tensors)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))

    def of_checkpoint(place: Path, file: Path) -> None:
        find_decoder(open_checkpoint(str(place)))

    yield Reader("config.json", place, ("config.json",), of_checkpoint, 1.5)
    shards = ("model-00001-of-00001.safetensors", "model.safetensors.index.json")
    yield Reader("weights' headers", place, shards, of_checkpoint, 1.5)

    def of_processor(place: Path, file: Path) -> None:
        ref = ModelRef(model=str(place))
        load_config(ref)
        load_processor(ref, images=True)

    side_files = tuple(name for name in open_checkpoint(str(place)).side_files() if name != "generation_config.json")
    place = shutil.copytree(pair.target, folder / "processor")
    yield Reader("processor", place, side_files, of_processor, 0.25)


def _of_results(folder: Path) -> Iterator[Reader]:
    import made_results as tests_of_evidence
    from made_results import ablation, comparison

    from mergekit_snrf.evidence.compare_samples import compare_runs
    from mergekit_snrf.evidence.results import Study, read_result, write_result
    from mergekit_snrf.evidence.wording import settings_table, study_table

    place = _place(folder, "result")
    write_result(place / "a.json", ablation())
    write_result(place / "c.json", comparison())

    def of_results(place: Path, file: Path) -> None:
        for name in ("a.json", "c.json"):
            result = read_result(place / name)
            settings_table("settings", result.settings)
            for metric in result.items if isinstance(result, Study) else ():
                study_table(result, metric)

    yield Reader("result", place, ("a.json", "c.json"), of_results)

    fixtures = Path(tests_of_evidence.__file__).parent / "fixtures"
    for tool in ("lmms_eval", "lm_eval", "vlmevalkit"):
        place = shutil.copytree(fixtures / tool, folder / tool)
        files = [path.relative_to(place).as_posix() for path in sorted(place.rglob("*.*")) if path.is_file()]
        yield Reader(tool, place, tuple(files), lambda place, _: compare_runs(sorted(place.iterdir())[:2]), 0.25)


def _of_data(folder: Path) -> Iterator[Reader]:
    import datasets
    from PIL import Image
    from transformers import AutoTokenizer

    from mergekit_snrf.evidence.evaluation import load_evaluation
    from mergekit_snrf.profiling.probes.images import decode, image_folders, read_image
    from mergekit_snrf.profiling.probes.render import Renderer
    from mergekit_snrf.profiling.probes.rows import Row, load_rows
    from mergekit_snrf.profiling.probes.source import ProbeSource
    from mergekit_snrf.profiling.settings import load_profile_config

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    datasets.disable_progress_bars()
    place = _place(folder, "images")
    picture = Image.effect_mandelbrot((24, 16), (-2, -1, 1, 1), 20).convert("RGB")
    kinds = ("png", "jpeg", "webp", "gif", "bmp", "tiff", "dds", "ppm", "avif")
    for kind in kinds:
        picture.save(place / f"i.{kind}")

    def of_images(place: Path, file: Path) -> None:
        with naming({}, "rows"):
            decode(read_image(file.name, image_folders(place)))

    yield Reader("image", place, tuple(f"i.{kind}" for kind in kinds), of_images, 1.0)

    place = _place(folder, "rows")
    picture.save(place / "0.png")
    rows = [{"q": f"question, {number}", "a": str(number), "images": ["0.png"]} for number in range(6)]
    (place / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = datasets.Dataset.from_list([{"q": row["q"], "a": row["a"]} for row in rows])
    table.to_csv(place / "r.csv")
    table.to_parquet(place / "r.parquet")

    def of_rows(place: Path, file: Path) -> None:
        for suffix in ("jsonl", "csv", "parquet"):
            images = "images" if suffix == "jsonl" else None
            source = ProbeSource(dataset=str(place / f"r.{suffix}"), question="q", answer="a", images=images)
            found = load_rows(source, answers=True)
            for row in found.rows if images else ():
                found.images(row)

    yield Reader("rows", place, ("r.jsonl", "r.csv", "r.parquet", "0.png"), of_rows, 0.6)

    place = _place(folder, "profile-yml")
    shutil.copy(folder / "rows" / "r.jsonl", place)
    probes = {"dataset": "r.jsonl", "question": "q"}
    profile: dict[str, Any] = {
        side: {"model": str(folder / "pair" / side), "probes": probes} for side in ("target", "source")
    }
    profile |= {"answer": {"by": "model", "max_new_tokens": 4}, "select": {"top_ratio": {"attn": 0.5, "fwd": 0.3}}}
    (place / "p.yml").write_text(yaml.safe_dump({**profile, "seed": 0, "batch_size": 3, "limit": 3}))
    yield Reader("profile.yml", place, ("p.yml",), lambda place, _: load_profile_config(place / "p.yml"))

    place = _place(folder, "evaluation")
    shutil.copy(folder / "rows" / "r.parquet", place)
    metric = {"data": "r.parquet", "template": "{q} =", "answer": "a", "answer_regex": r"# (\d)"}
    (place / "e.yml").write_text(yaml.safe_dump({"metrics": {"calc": metric}, "max_new_tokens": 4, "limit": 3}))
    patterns = (
        "(a{1000}){1000}",
        "((((a{99}){99}){99}){99})",
        "(?P<x>",
        "(a+)+$",
        "[",
        "\\",
        "(?(1)a|b)",
        "{9999999999}",
    )
    yield Reader("evaluation", place, ("e.yml",), lambda place, _: load_evaluation(str(place / "e.yml")), 1.0, patterns)

    place = _place(folder, "template")
    tokenizer = AutoTokenizer.from_pretrained(folder / "pair" / "source")
    template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    (place / "chat_template.jinja").write_text(template)

    def of_template(place: Path, file: Path) -> None:
        tokenizer.chat_template = read_bytes(file, DATA_BYTES).decode("utf-8", "replace")
        with naming({}, "rows"):
            renderer = Renderer(tokenizer, ProbeSource(dataset="x", question="q"))
            renderer.render(Row(0, {"q": "a question"}, "a question"))

    yield Reader("chat template", place, ("chat_template.jinja",), of_template, 0.5, HOSTILE_TEMPLATES)
