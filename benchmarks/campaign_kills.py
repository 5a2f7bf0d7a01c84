"""Kills of merge, patch, lora and profile at random moments, and what they leave.

The process that forks has imported everything and computed nothing, so a run costs what its work costs.
"""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import yaml

Files = dict[str, str]


@dataclass(frozen=True)
class Case:
    """A command that is killed: its words before the output, and what must come of it.

    Attributes:
        over: the words of another run whose output is there before; None: nothing is.
        again: options of the run after the kill.
    """

    name: str
    words: tuple[str, ...]
    over: tuple[str, ...] | None = None
    options: tuple[str, ...] = ()
    again: tuple[str, ...] = ()

    def output(self, folder: Path) -> Path:
        """Return what the command writes in a folder."""
        return folder / ("m.safetensors" if self.words[0] == "profile" else "out")


def kills(folder: Path, number: int, seed: int, commands: Sequence[str] = ()) -> int:
    """Kill every command at random moments; print what came of it and return the number of failures."""
    _import_everything()
    folder.mkdir()
    log = folder / "log.txt"
    _write_inputs(folder)
    generator, failed = np.random.default_rng(seed), 0
    cases = [case for case in _cases(folder) if not commands or case.words[0] in commands]
    for case in cases[::2]:
        # Once in this process, so that no child loads modules or compiles expressions.
        with suppress(SystemExit):
            _run(case.words, case.output(folder / "first" / case.name), ())
    gc.freeze()
    for command in dict.fromkeys(case.words[0] for case in cases):
        found: Counter[str] = Counter()
        start = time.monotonic()
        of_command = [case for case in cases if case.words[0] == command]
        usual = {case.name: _usual(case, folder / "whole" / case.name, log) for case in of_command}
        for index in range(number):
            case = of_command[index % len(of_command)]
            whole, earlier, seconds = usual[case.name]
            place = folder / "runs" / f"{command}-{index}"
            for what in _killed(case, place, whole, earlier, float(generator.uniform(0, seconds)), log):
                found[what.partition(":")[0]] += 1
                if what.startswith("WRONG"):
                    failed += 1
                    click.echo(f"  {case.name}: {what}")
            shutil.rmtree(place)
        took = ", ".join(f"{name} {seconds:.1f} s" for name, (_, _, seconds) in usual.items())
        summary = "; ".join(f"{count} {what}" for what, count in sorted(found.items()))
        click.echo(f"{command:8} {number} kills ({took}): {summary}; {time.monotonic() - start:.0f} s")
    return failed


def _import_everything() -> None:
    import datasets
    import pair  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.models.llava.modeling_llava  # noqa: F401

    import mergekit_snrf.cli.profile
    import mergekit_snrf.cli.snrf
    import mergekit_snrf.merge.lora
    import mergekit_snrf.merge.patch  # noqa: F401

    torch.set_num_threads(1)
    datasets.disable_progress_bars()


def _write_inputs(folder: Path) -> None:
    from checkpoints import make_source, make_target
    from pair import make_pair
    from probing import lines

    pair = make_pair(folder / "pair")
    for name, beta in (("new", 1.0), ("old", 0.5)):
        (folder / f"{name}.yml").write_text(yaml.safe_dump(pair.recipe(source={"beta": beta})))
    make_target(folder / "text", "llama", "hub", decoder={"num_hidden_layers": 2})
    make_source(folder / "other", "llama", decoder={"num_hidden_layers": 2})
    lines(folder / "rows.jsonl", [{"q": f"What is {number} and {number}?"} for number in range(8)])
    side = {"probes": {"dataset": "rows.jsonl", "question": "q"}}
    content = {
        "target": {"model": str(folder / "text"), **side},
        "source": {"model": str(folder / "other"), **side},
        "answer": {"by": "model", "max_new_tokens": 2},
        "select": {"top_ratio": 0.5},
        "batch_size": 2,
    }
    (folder / "profile.yml").write_text(yaml.safe_dump(content))


def _cases(folder: Path) -> list[Case]:
    new, old = str(folder / "new.yml"), str(folder / "old.yml")
    cases = [Case("merge", ("merge", new)), Case("merge over", ("merge", new), ("merge", old))]
    for command in ("patch", "lora"):
        cases.append(Case(command, (command, new)))
        cases.append(Case(f"{command} over", (command, new), (command, old), ("--overwrite",), ("--overwrite",)))
    words = ("profile", str(folder / "profile.yml"))
    return [
        *cases,
        Case("profile", words, again=("--resume",)),
        Case("profile, journals", words, options=("--journal-every", "0"), again=("--resume", "--journal-every", "0")),
    ]


def _run(words: Sequence[str], output: Path, options: Sequence[str]) -> None:
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    from mergekit_snrf.cli.profile import main as profile
    from mergekit_snrf.cli.snrf import main as snrf
    from mergekit_snrf.merge import install

    output.parent.mkdir(parents=True, exist_ok=True)
    command, *arguments = [*words, str(output), "--quiet", *options]
    if command == "merge":
        install()
        mergekit_yaml(arguments)
    elif command == "profile":
        profile(arguments)
    else:
        snrf([command, *arguments])


def _forked(function: Callable[[], object], log: Path, kill_after: float | None = None) -> int | None:
    """Run a function in a process of its own; return its exit code, None where the kill came first."""
    child = os.fork()
    if not child:
        code = 1
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                try:
                    returned = function()
                    code = returned if isinstance(returned, int) else 0
                except SystemExit as error:
                    code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    code = 99
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _usual(case: Case, folder: Path, log: Path) -> tuple[Files, Files, float]:
    """Return the files of a run that nobody kills, those that are there before it, and its usual seconds."""
    seconds, whole, earlier = [], {}, {}
    for turn in range(3):
        place = folder / str(turn)
        output = case.output(place)
        if case.over is not None:
            _must(_forked(lambda output=output: _run(case.over or (), output, ()), log), log)
            earlier = _hashes(place)
        start = time.monotonic()
        _must(_forked(lambda output=output: _run(case.words, output, case.options), log), log)
        seconds.append(time.monotonic() - start)
        if whole and whole != _hashes(place):
            sys.exit(f"{case.name}: two runs write other bytes")
        whole = _hashes(place)
    return whole, earlier, statistics.median(seconds)


def _must(code: int | None, log: Path) -> None:
    if code != 0:
        sys.exit(log.read_text()[-3000:])


def _killed(case: Case, place: Path, whole: Files, earlier: Files, after: float, log: Path) -> list[str]:
    """Kill one run and start it again; return what was found."""
    output = case.output(place)
    if case.over is not None:
        _must(_forked(lambda: _run(case.over or (), output, ()), log), log)
    code = _forked(lambda: _run(case.words, output, case.options), log, kill_after=after)
    if code not in (None, 0):
        return [f"WRONG: ended with {code} before the kill: {log.read_text()[-300:]}"]
    found = ["killed" if code is None else "done before the kill"]
    left = _hashes(place)
    if case.words[0] == "profile":
        # A journal or partial file is neither mask nor profile.
        wrong = [name for name, sha256 in left.items() if name in whole and whole[name] != sha256]
        found += [f"WRONG: {name} after the kill at {after:.2f} s" for name in wrong]
        found += ["left journals"] if any("journal" in name for name in left) else []
    else:
        found += _loads_wrong(place, output, whole, earlier, log)
    options = case.again
    if case.words[0] in ("patch", "lora") and output.exists():
        # It was complete before the kill, or an earlier one.
        options = ("--overwrite",)
    code = _forked(lambda: _run(case.words, output, options), log)
    if code != 0:
        ending = f"ends with {code}: {log.read_text()[-300:]!r}"
        return [*found, f"WRONG: the rerun after the kill at {after:.2f} s {ending}"]
    again = _hashes(place)
    if again != whole:
        differing = sorted(name for name in again.keys() | whole.keys() if again.get(name) != whole.get(name))
        return [*found, f"WRONG: after the rerun (kill at {after:.2f} s) these differ: {differing[:5]}"]
    return [*found, "reran to the same bytes"]


def _loads_wrong(place: Path, output: Path, whole: Files, earlier: Files, log: Path) -> list[str]:
    found = []
    for folder in (output, place / ".out.partial" / "new"):
        # What is being built lies in a folder of its own.
        hashes = _hashes(folder) if folder.exists() else {}
        files = {f"out/{name}": sha256 for name, sha256 in hashes.items() if ".snrf-unfinished" not in name}
        if files in ({}, whole, earlier):
            continue
        loaded = _forked(lambda folder=folder: _loads(folder), log)
        if loaded == 99:
            continue
        weights = [name for name in files if name.endswith((".safetensors", ".bin"))]
        right = any(all(files[name] == complete.get(name) for name in weights) for complete in (whole, earlier))
        lacking = sorted(whole.keys() - files.keys())
        others = sorted(name for name in files if name in whole and files[name] not in (whole[name], earlier.get(name)))
        what = f"{folder.name} lacks {lacking[:4]}, other {others[:4]}"
        found.append(f"WRONG: a folder that loads {'and is not complete' if right else 'with other weights'}: {what}")
    return found


def _loads(folder: Path) -> None:
    from checkpoints import load

    if (folder / "adapter_config.json").exists():
        from peft import PeftConfig
        from safetensors.torch import load_file

        PeftConfig.from_pretrained(folder)
        load_file(folder / "adapter_model.safetensors")
        return
    load(folder)


def _hashes(folder: Path) -> Files:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }
