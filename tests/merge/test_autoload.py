"""The plugin in fresh virtual environments, where nothing of this checkout is importable but what was installed there.

An environment sees the packages of the one that runs the tests, mergekit-snrf excepted, so that torch and mergekit
need not be installed again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_target, read
from pair import Pair, assert_same, merge, write_recipe

CHECKOUT = Path(__file__).parents[2]
OURS = ("mergekit_snrf", "mergekit_snrf_autoload")

# Imports what is slow once, then tries every snippet of the command line in a fork of its own. A snippet sets `result`.
FORKS = """
import json, os, sys, warnings
import torch, transformers, peft
assert not [name for name in sys.modules if name.partition(".")[0] in ("mergekit", "mergekit_snrf")]
for snippet in sys.argv[1:]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        names = {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", message=".*mergekit-snrf")
            try:
                exec(snippet, names)
                outcome = {"result": names["result"]}
            except BaseException as error:
                outcome = {"error": f"{type(error).__name__}: {error}"}
        outcome["warnings"] = [str(w.message) for w in caught if "mergekit-snrf" in str(w.message)]
        os.write(writer, json.dumps(outcome).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        print(pipe.read())
    os.waitpid(child, 0)
"""
# What a process knows of the plugin once mergekit is imported.
STATE = """
import sys
import mergekit.merge, mergekit.scripts.run_yaml, mergekit.scripts.multimerge
from mergekit.merge_methods import registry
function = mergekit.merge.run_merge
result = {
    "method": "snrf" in registry._METHODS,
    "wrapped": getattr(function, "__snrf__", False),
    "wrapped once": not hasattr(getattr(function, "__wrapped__", None), "__snrf__"),
    "bound": mergekit.scripts.run_yaml.run_merge is mergekit.scripts.multimerge.run_merge is function,
    "others": len(registry._METHODS) > 15,
    "finders": sum(type(finder).__module__ == "mergekit_snrf_autoload" for finder in sys.meta_path),
    "loader": type(registry.__loader__).__name__,
}
"""
LOADED = {
    "method": True,
    "wrapped": True,
    "wrapped once": True,
    "bound": True,
    "others": True,
    "finders": 0,
    "loader": "SourceFileLoader",
}
WITHOUT = LOADED | {"method": False, "wrapped": False}


@dataclass(frozen=True)
class Environment:
    """A virtual environment, started in an empty folder and with nothing inherited that could show it the checkout."""

    folder: Path

    @property
    def site_packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", "venv", {"base": str(self.folder)}))

    def run(self, *command: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment's bin folder."""
        hidden = ("PYTHON", "VIRTUAL_ENV", "TORCH_DEVICE_BACKEND_AUTOLOAD")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        clean |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        (self.folder / "empty").mkdir(exist_ok=True)
        return subprocess.run(
            [self.folder / "bin" / command[0], *command[1:]],
            cwd=self.folder / "empty",
            env=clean | environ,
            capture_output=True,
            text=True,
        )

    def pip(self, *arguments: str | Path) -> None:
        result = self.run("python", "-m", "pip", *arguments)
        assert result.returncode == 0, result.stdout + result.stderr

    def python(self, program: str, *options: str, **environ: str) -> Any:
        """Run a program that prints one JSON value last."""
        result = self.run("python", *options, "-c", program, **environ)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    def forks(self, *snippets: str, **environ: str) -> list[dict[str, Any]]:
        """The outcomes of snippets: `result` or `error`, and our `warnings`."""
        result = self.run("python", "-c", FORKS, *snippets, **environ)
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to all that is installed, but for mergekit-snrf."""
    folder = tmp_path_factory.mktemp("packages")
    for site in sys.path:
        if Path(site).name in ("site-packages", "dist-packages") and os.path.isdir(site):
            for entry in Path(site).iterdir():
                if "mergekit_snrf" not in entry.name.replace("-", "_") and not (folder / entry.name).is_symlink():
                    (folder / entry.name).symlink_to(entry)
    assert (folder / "torch").exists()
    assert (folder / "mergekit").exists()
    return folder


@pytest.fixture(scope="session")
def new_environment(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Environment]:
    def make() -> Environment:
        environment = Environment(tmp_path_factory.mktemp("environment"))
        venv.create(environment.folder, with_pip=not (packages / "pip").exists(), symlinks=True)
        (environment.site_packages / "packages.pth").write_text(f"{packages}\n")
        return environment

    return make


def copy_checkout(folder: Path) -> Path:
    """What a build needs, and no more."""
    folder.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "mergekit_snrf_autoload.py"):
        shutil.copy(CHECKOUT / name, folder)
    shutil.copytree(CHECKOUT / "mergekit_snrf", folder / "mergekit_snrf", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


# An environment with hatchling builds without network.
BUILD = ["--no-deps", *(["--no-build-isolation"] if importlib.util.find_spec("hatchling") else [])]


@pytest.fixture(scope="session")
def wheel(new_environment: Callable[[], Environment], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    new_environment().pip("wheel", *BUILD, "--wheel-dir", folder, copy_checkout(folder / "checkout"))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, new_environment: Callable[[], Environment]) -> Environment:
    """An environment with the wheel, which no test changes."""
    environment = new_environment()
    environment.pip("install", "--no-deps", "--no-index", wheel)
    return environment


def test_wheel_holds_the_package_and_the_autoload_module_beside_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        text = archive.read(entry_points).decode()
    sources = {p.relative_to(CHECKOUT).as_posix() for p in (CHECKOUT / "mergekit_snrf").rglob("*.py")}
    templates = ("evidence/report.html.jinja", "evidence/lens.html.jinja")
    data = {f"mergekit_snrf/{name}" for name in ("py.typed", "evidence/math_words.txt", *templates)}
    assert names == sources | data | {"mergekit_snrf_autoload.py"}
    assert "[torch.backends]\nmergekit_snrf = mergekit_snrf_autoload:autoload\n" in text


def test_program_without_torch_imports_nothing_of_ours(installed: Environment) -> None:
    program = (
        "import json, sys, email, sqlite3; print(json.dumps([sorted(sys.modules), [str(f) for f in sys.meta_path]]))"
    )
    modules, finders = installed.python(program)
    assert not [name for name in modules if name.partition(".")[0] in OURS]
    assert "snrf" not in str(finders)


def test_autoload_module_needs_the_standard_library_alone(installed: Environment) -> None:
    program = (
        "import sys, json; before = {*sys.modules}; import mergekit_snrf_autoload;"
        "print(json.dumps([name.partition('.')[0] for name in {*sys.modules} - before]))"
    )
    modules = {*installed.python(program, "-S", PYTHONPATH=str(installed.site_packages))}
    assert modules - {"mergekit_snrf_autoload"} <= sys.stdlib_module_names
    assert "mergekit_snrf_autoload" in modules


def test_torch_alone_imports_no_mergekit(installed: Environment) -> None:
    """With warnings as errors, and autoload called twice more."""
    modules, finders = installed.python(
        "import json, sys, torch, mergekit_snrf_autoload as a; a.autoload(); a.autoload();"
        "print(json.dumps([sorted(sys.modules), [type(f).__module__ for f in sys.meta_path]]))",
        "-Werror",
    )
    assert "mergekit_snrf_autoload" in modules
    assert not [name for name in modules if name.partition(".")[0] in ("mergekit", "mergekit_snrf", "transformers")]
    assert finders.count("mergekit_snrf_autoload") == 1


def test_any_module_first_and_a_broken_package(installed: Environment, tmp_path: Path) -> None:
    modules = ("mergekit.merge", "mergekit.merge_methods.registry", "mergekit_snrf.merge", "mergekit_snrf.merge.patch")
    twice = "import mergekit_snrf_autoload; mergekit_snrf_autoload.autoload(); mergekit_snrf_autoload.autoload()\n"
    again = "import mergekit_snrf.merge; mergekit_snrf.merge.install(); mergekit_snrf.merge.install()\n"
    # As where a dependency of mergekit is missing at first.
    failing = (
        "import sys\nsys.modules['mergekit.merge_methods.karcher'] = None\n"
        "try:\n    import mergekit.merge\n    raise SystemExit('imported')\nexcept ImportError:\n    pass\n"
        "del sys.modules['mergekit.merge_methods.karcher']\n"
    )
    light = "".join(f"import mergekit_snrf.merge.{name}\n" for name in ("guard", "folders", "tally"))
    working = [f"import {name}\n{STATE}" for name in modules]
    working += [twice + STATE + twice + STATE, again + STATE, failing + STATE]
    (tmp_path / "mergekit_snrf" / "merge").mkdir(parents=True)
    (tmp_path / "mergekit_snrf" / "__init__.py").touch()
    (tmp_path / "mergekit_snrf" / "merge" / "__init__.py").write_text("def (")
    broken = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    removed = "import sys; sys.path = [place for place in sys.path if not place.endswith('site-packages')]\n"
    strict = "import warnings; warnings.simplefilter('error', RuntimeWarning)\n"
    torch_works = "import torch\nresult['torch'] = torch.ones(2).sum().item()\n"
    *outcomes, loaded, syntax, strictly, missing = installed.forks(
        *working,
        f"import sys\n{light}result = 'mergekit' in sys.modules",
        *(wrong + STATE + torch_works for wrong in (broken, broken + strict, removed)),
    )
    for snippet, outcome in zip(working, outcomes, strict=True):
        assert outcome == {"result": LOADED, "warnings": []}, snippet
    assert loaded["result"] is False
    for outcome in (syntax, strictly, missing):
        assert outcome["result"] == WITHOUT | {"torch": 2.0}
    assert strictly["warnings"] == []
    for outcome, reason in ((syntax, "SyntaxError: "), (missing, "ModuleNotFoundError: No module named")):
        (warning,) = outcome["warnings"]
        assert warning.startswith(f"mergekit-snrf could not be loaded ({reason}")
        assert "pip install --force-reinstall mergekit-snrf" in warning


def test_merge_in_a_process_that_imports_mergekit_first(installed: Environment, pair: Pair, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "snrf.yml", pair.recipe())
    state = installed.python(
        f"import json, mergekit.architecture\n{STATE}\n"
        f"mergekit.scripts.run_yaml.main([{str(recipe)!r}, {str(tmp_path / 'out')!r}], standalone_mode=False)\n"
        "print(json.dumps(result))"
    )
    assert state == LOADED
    assert_same(read(tmp_path / "out"), merge(pair.recipe(), tmp_path / "expected"))


def test_autoload_switched_off(installed: Environment, pair: Pair, tmp_path: Path) -> None:
    """mergekit does not know the method; a call of autoload after its import still teaches it, once."""
    target = make_target(tmp_path / "target", "llama", "hub")
    recipe = write_recipe(tmp_path / "snrf.yml", pair.recipe(base_model=str(target)))
    command = (
        "import sys; from mergekit.scripts.run_yaml import main\n"
        f"main([{str(recipe)!r}, {str(tmp_path / 'out')!r}], standalone_mode=False)\nresult = None"
    )
    by_hand = "import mergekit_snrf_autoload as a; a.autoload(); a.autoload()\n"
    # Our own commands register the method themselves.
    patch = (
        "import contextlib, io; from mergekit_snrf.cli.snrf import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    main(['patch', {str(recipe)!r}, {str(tmp_path / 'patched')!r}, '--quiet'], standalone_mode=False)\n"
        "result = 'patched'"
    )
    merged = (
        "import sys; from mergekit_snrf.cli.merge import main\n"
        f"sys.argv = ['mergekit-snrf', {str(recipe)!r}, {str(tmp_path / 'merged')!r}, '--quiet']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    result = end.code or 'merged'"
    )
    snippets = (command, STATE, STATE + by_hand + STATE, patch, merged)
    outcomes = installed.forks(*snippets, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    first, *others = outcomes
    assert first["error"] == "RuntimeError: Unimplemented merge method snrf"
    assert [outcome.get("result") for outcome in others] == [WITHOUT, LOADED, "patched", "merged"]
    assert not any(outcome["warnings"] for outcome in outcomes)
    assert not (tmp_path / "out").exists()
    assert_same(read(tmp_path / "merged"), read(tmp_path / "patched"))
    assert (installed.folder / "bin" / "mergekit-snrf").exists()


def test_editable_install_and_a_checkout_that_moves_away(
    new_environment: Callable[[], Environment], tmp_path: Path
) -> None:
    environment = new_environment()
    checkout = copy_checkout(tmp_path / "checkout")
    environment.pip("install", *BUILD, "--editable", checkout)
    where = "import mergekit_snrf; result['where'] = mergekit_snrf.__file__\n"
    move = f"import os; os.rename({str(checkout)!r}, {str(tmp_path / 'moved')!r})\n"
    before, after = environment.forks(STATE + where, move + STATE)
    assert before == {"result": LOADED | {"where": str(checkout / "mergekit_snrf" / "__init__.py")}, "warnings": []}
    assert after["result"] == WITHOUT
    (warning,) = after["warnings"]
    assert warning.startswith(
        "mergekit-snrf could not be loaded (ModuleNotFoundError: No module named 'mergekit_snrf')"
    )
