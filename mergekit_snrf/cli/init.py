"""``snrf init``: the files of a new merge."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from mergekit_snrf.cli.common import command_options, path_from, size, table
from mergekit_snrf.errors import SnrfError, naming, os_reason

if TYPE_CHECKING:
    from mergekit_snrf.models.checkpoint import Checkpoint
    from mergekit_snrf.models.costs import Costs

_RANK, _BETA, _TOP_RATIO, _LIMIT, _BATCH, _ANSWER, _KEPT_ANSWER = 4, 0.5, 0.1, 100, 8, 512, 64
_TARGET = {"image-text-to-text": "geometry3k", "text-generation": "gsm8k"}
_KEEP = {"image-text-to-text": ("vqa", "ocr", "count", "objects"), "text-generation": ("instructions", "code")}
_ROLES = ("target", "source", "keep")
_MARK = "| needs |  |"
"""Only the pages that this command writes have it."""


@click.command()
@click.argument("target", metavar="TARGET")
@click.argument("source", metavar="SOURCE")
@click.argument("folder", metavar="[DIR]", type=click.Path(file_okay=False), default=".")
@click.option(
    "--probes",
    multiple=True,
    metavar="ROLE=PROBES",
    help="ROLE is target, source or keep, PROBES a data file or one of geometry3k, gsm8k, vqa, ocr, count, objects, "
    "instructions and code. Repeat it for several kinds to keep; keep= without probes keeps none.",
)
@click.option("--overwrite", is_flag=True, help="Replace files of an earlier init.")
@click.option("--trust-remote-code", is_flag=True, help="The written commands run code that the checkpoints bring.")
@command_options
def init(
    target: str, source: str, folder: str, probes: tuple[str, ...], overwrite: bool, trust_remote_code: bool
) -> None:
    """Begin a merge: write profile.yml, recipes and a README.

    DIR gets profile.yml, snrf.yml and regmean.yml, to move what SOURCE can do into TARGET. Both are folders or hub ids.
    Only their configurations and headers are read: whether they pair, and what profiling and merging will cost. Probes
    are by default those of the paper.
    """
    from mergekit_snrf.files.reading import read_text
    from mergekit_snrf.files.writing import check_writable, write_text
    from mergekit_snrf.models.checkpoint import open_checkpoint
    from mergekit_snrf.models.costs import Costs
    from mergekit_snrf.models.decoder import find_decoder

    models = {"target": open_checkpoint(target), "source": open_checkpoint(source)}
    _check_pair(models["target"], models["source"])
    chosen = _chosen(probes, models)
    costs = Costs.of(
        models["target"], models["source"],
        rank=_RANK, limit=_LIMIT, batch=_BATCH, answer=_ANSWER, keep=[_KEPT_ANSWER] * len(chosen["keep"]),
    )  # fmt: skip
    trust = " --trust-remote-code" if trust_remote_code else ""
    files = _files(models, chosen, costs, Path(folder), trust)
    present = [name for name in files if (Path(folder) / name).exists()]
    if present and not overwrite:
        raise SnrfError(folder, f"already holds {', '.join(present)}", "choose another DIR, or give --overwrite")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise SnrfError(folder, f"cannot be made ({os_reason(error)})", "choose another DIR") from None
    for name in files:
        check_writable(Path(folder) / name)
    page = Path(folder) / "README.md"
    if page.exists() and _MARK not in read_text(page):
        raise SnrfError(page, "is not a page of snrf init", "choose another DIR")
    for name, text in files.items():
        write_text(Path(folder) / name, text)
    decoder = find_decoder(models["target"])
    click.echo(f"{target} and {source} pair: {decoder.family} decoders of {decoder.shape.layers} layers.")
    click.echo(table(("needs", ""), _needs(costs)))
    click.echo(f"Written to {folder}: {', '.join(files)}.")
    click.echo(f"Next: cd {shlex.quote(folder)} && snrf-profile --dry-run{trust} profile.yml")


def _check_pair(target: Checkpoint, source: Checkpoint) -> None:
    from mergekit_snrf.models.decoder import pairing_problems

    if target.pipeline_tag == "text-generation" != source.pipeline_tag:
        what = "reads images, and the target does not: the target is the model that the output is made from"
        raise SnrfError(source.name, what, f"exchange them: snrf init {source.name} {target.name}")
    problems = pairing_problems(target, source)
    if problems:
        with naming({"any_family": "allow_family_mismatch"}):
            raise SnrfError.several(f"{target.name} and {source.name} do not pair", problems)


def _chosen(probes: Sequence[str], models: dict[str, Checkpoint]) -> dict[str, list[dict[str, Any]]]:
    """Return the keys of profile.yml of the probes of each role."""
    from mergekit_snrf.profiling.probes.known import KNOWN, find_probes

    tags = {role: model.pipeline_tag for role, model in models.items()}
    names = {"target": [_TARGET[tags["target"]]], "source": [_TARGET[tags["source"]]], "keep": [*_KEEP[tags["target"]]]}
    given: dict[str, list[str]] = {}
    for one in probes:
        role, separator, name = one.partition("=")
        if role not in _ROLES or not separator or (role != "keep" and (not name or role in given)):
            what = f"{one!r} is not ROLE=PROBES with one of {', '.join(_ROLES)}, of which only keep may be repeated"
            raise SnrfError(None, what, "write, for example, source=gsm8k", field="--probes")
        given.setdefault(role, []).extend([name] if name else [])
    names |= given
    found: dict[str, list[dict[str, Any]]] = {}
    for role, chosen in names.items():
        images = tags["source" if role == "source" else "target"] == "image-text-to-text"
        found[role] = [find_probes(name, images=images) for name in chosen]
    labels = (name if name in KNOWN else Path(name).stem for name in names["keep"])
    found["keep"] = [{"name": label, **keys} for label, keys in zip(labels, found["keep"], strict=True)]
    kinds = [keys["name"] for keys in found["keep"]]
    if twice := next((name for name in kinds if kinds.count(name) > 1), None):
        raise SnrfError(None, f"two kinds to keep are called {twice}", "rename one of the files", field="--probes")
    return found


def _files(
    models: dict[str, Checkpoint], probes: dict[str, list[dict[str, Any]]], costs: Costs, folder: Path, trust: str
) -> dict[str, str]:
    """Return the content of each file to write."""
    paths = {role: path_from(folder, model.name) for role, model in models.items()}
    stem = "--".join(re.sub(r"[^\w.-]+", "-", _short(model).lower()) for model in models.values())
    for keys in (keys for kinds in probes.values() for keys in kinds):
        keys["dataset"] = path_from(folder, keys["dataset"])
    recipe = {"merge_method": "snrf", "base_model": paths["target"]}
    donor = {"model": paths["source"]}
    of_snrf = {
        **recipe,
        "models": [{**donor, "parameters": {"beta": _BETA, "rank": _RANK}}],
        "parameters": {"masks": f"{stem}.safetensors"},
    }
    of_regmean = {
        **recipe,
        "models": [donor],
        "parameters": {"update": "regmean", "moments": f"{stem}.moments.safetensors", "keep": 3},
    }
    files = {"profile.yml": _profile(paths, probes), "snrf.yml": yaml.safe_dump(of_snrf, sort_keys=False)}
    if probes["keep"]:
        files["regmean.yml"] = yaml.safe_dump(of_regmean, sort_keys=False)
    files["README.md"] = _readme(models, costs, stem, bool(probes["keep"]), trust)
    return files


def _short(model: Checkpoint) -> str:
    """Return the name of a model without its owner or folder."""
    return Path(model.name if model.folder is None else os.path.abspath(model.name)).name


def _profile(paths: dict[str, str], probes: dict[str, list[dict[str, Any]]]) -> str:
    def flow(keys: Any) -> str:
        return str(yaml.safe_dump(keys, default_flow_style=True, sort_keys=False, width=10**6)).strip()

    lines = []
    for role, path in paths.items():
        lines += [
            f"{role}:",
            f"  {yaml.safe_dump({'model': path}, width=10**6).strip()}",
            f"  probes: {flow(probes[role][0])}",
        ]
    if probes["keep"]:
        lines.append("keep:    # what update: regmean must not damage; the model's own answers, so no labels are read")
        lines += [f"  - {flow({**keys, 'max_new_tokens': _KEPT_ANSWER})}" for keys in probes["keep"]]
    answer, select = {"by": "model", "max_new_tokens": _ANSWER}, {"top_ratio": {"attn": _TOP_RATIO, "fwd": _TOP_RATIO}}
    lines += [f"answer: {flow(answer)}", f"select: {flow(select)}", f"limit: {_LIMIT}", "seed: 0"]
    return "\n".join(lines) + "\n"


def _readme(models: dict[str, Checkpoint], costs: Costs, stem: str, regmean: bool, trust: str) -> str:
    from mergekit_snrf.models.costs import DEVICES, PROBE_TOKENS

    recipe = "regmean.yml" if regmean else "snrf.yml"
    commands = {
        f"snrf-profile --dry-run{trust} profile.yml": "shows three rendered probes of each side",
        f"snrf-profile{trust} profile.yml {stem}.safetensors": "writes the mask" + (" and moments" if regmean else ""),
        f"snrf plan{trust} {recipe}": "what the merge will change; nothing is written",
        f"mergekit-yaml{trust} {recipe} merged/": "or snrf patch: the same tensors, faster",
        f"snrf compare{trust} {recipe} --eval EVAL": "against simpler merges, on your own evaluation",
    }
    if regmean:
        tune = {f"snrf moments tune{trust} regmean.yml": "chooses keep: without labels"}
        commands = {**dict(list(commands.items())[:2]), **tune, **dict(list(commands.items())[2:])}
    width = max(map(len, commands))
    rates = "; ".join(f"{one.name}: {one.flops:.2g} FLOP/s, {one.bandwidth:.2g} bytes/s" for one in DEVICES)
    names = {role: model.name if model.folder is None else _short(model) for role, model in models.items()}
    return "\n".join(
        [
            f"# {names['target']} from {names['source']}",
            "",
            *(f"    {command:{width}}    # {meaning}" for command, meaning in commands.items()),
            "",
            _MARK,
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in _needs(costs)),
            "",
            f"Times are estimates: {_LIMIT} probes of {PROBE_TOKENS} tokens, answers of {_ANSWER} tokens ({rates}).",
            "Only what the probes show is measured: use probes like the questions that you care about.",
            "",
        ]
    )


def _needs(costs: Costs) -> list[tuple[str, str]]:
    from mergekit_snrf.models.costs import DEVICES

    times = ", ".join(f"{_span(costs.seconds(device))} on a {device.name}" for device in DEVICES)
    return [
        ("download", size(costs.download) if costs.download else "nothing"),
        ("disk", f"{size(costs.merged)} merged, or {size(costs.adapter)} as adapter; moments {size(costs.moments)}"),
        ("memory", f"{size(costs.memory)} to profile, and working memory"),
        ("read by a merge", f"{size(costs.merged)}, and at most {size(costs.read)} of the source"),
        ("time to profile", times),
    ]


def _span(seconds: float) -> str:
    for unit, length in (("days", 172800), ("hours", 7200), ("minutes", 120)):
        if seconds >= length:
            return f"{seconds / (length / 2):.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"
