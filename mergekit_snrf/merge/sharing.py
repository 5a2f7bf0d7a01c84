"""The folder of a merge or an adapter before it is shared: its license, its mask, and what is still missing."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath

import safetensors

from mergekit_snrf.errors import SnrfError, first_line
from mergekit_snrf.files.markdown import front_matter
from mergekit_snrf.files.reading import open_regular, parse_yaml, read_text
from mergekit_snrf.files.references import sha256
from mergekit_snrf.files.writing import write_text
from mergekit_snrf.merge.cards import AGAIN, HUB_ID, LICENSE, NO_LICENSE, THIS_LICENSE
from mergekit_snrf.merge.folders import KIT
from mergekit_snrf.merge.portable import portable
from mergekit_snrf.models.checkpoint import open_checkpoint
from mergekit_snrf.models.moments import MOMENTS
from mergekit_snrf.models.shards import read_header

_RECIPE = re.compile(rf"^{AGAIN}$.*?^(`{{3,}})yaml\n(?P<recipe>.*?\n)\1$", re.DOTALL | re.MULTILINE)
_LICENSE_KEYS = re.compile(r"^license(_name|_link)?:.*\n(?:[ -].*\n)*", re.MULTILINE)
_LICENSE_LINE = re.compile(f"^({re.escape(NO_LICENSE)}|{THIS_LICENSE.format('.*')})$", re.MULTILINE)
_VOCABULARIES = {"tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"}
_TEXT_BYTES = 10_000_000
# An absolute path of two parts or more, or one below the home folder.
_PATH = re.compile(r"(?<![\w.:/~<\\-])(?:/[\w.@+-]+(?:/[\w.@+-]+)+|~/[\w.@+-]*\w|[A-Za-z]:\\{1,2}[\w.@+-]+)")
_HOMES = ("/home/", "/Users/", "/root/")
_SYSTEM = {"bin", "dev", "etc", "lib", "lib64", "opt", "proc", "sbin", "sys", "usr"}


def with_license(card: str, license: str) -> str:
    """Return a card that states a license, in place of what it stated; ``SnrfError``: it cannot be one's id."""
    if not LICENSE.fullmatch(license):
        remedy = "give an id of the hub's list, such as apache-2.0, cc-by-nc-4.0 or other"
        raise SnrfError(None, f"{license!r} is not the id of a license", remedy, field="license")
    front, separator, page = card.removeprefix("---\n").partition("\n---\n")
    front = f"license: {license}\n{_LICENSE_KEYS.sub('', front + chr(10))}".rstrip("\n")
    return f"---\n{front}{separator}{_LICENSE_LINE.sub(THIS_LICENSE.format(license), page, count=1)}"


def add_kit(folder: Path, card: str, path: Path) -> list[str]:
    """Copy what makes a merge again into a folder inside it: recipe, mask and the profile.yml beside the mask.

    Moments are large: their profile.yml makes them again. Returns the names of the files written. ``SnrfError``: the
    card does not name the file ``path``, a mask or moments, by its sha256.
    """
    if sha256(path) not in card:
        raise SnrfError(path, "is not the file whose sha256 the card has", "give the mask or moments of the recipe")
    recipe = _RECIPE.search(card)
    if recipe is None:
        raise SnrfError(folder / "README.md", "has no recipe", "give the folder of a merge or an adapter")
    with safetensors.safe_open(path, framework="pt") as file:
        is_mask = file.metadata().get("format") != MOMENTS.name
    kit, commands = folder / KIT, {"mergekit-yaml snrf.yml merged/": "makes this model again"}
    texts = {"snrf.yml": recipe["recipe"]}
    if (profile := path.with_name("profile.yml")).is_file():
        texts["profile.yml"] = portable(read_text(profile))
        mask, made = (path.name, "mask") if is_mask else (path.name.replace(".moments.", "."), "moments")
        commands = {f"snrf-profile profile.yml {mask}": f"makes the {made} again", **commands}
    texts["README.md"] = "".join(f"    {command}    # {meaning}\n" for command, meaning in commands.items())
    kit.mkdir(exist_ok=True)
    for name, text in texts.items():
        write_text(kit / name, text)
    if not is_mask:
        return sorted(texts)
    written = str(parse_yaml(recipe["recipe"], None).get("parameters", {}).get("masks", path.name))
    plain = "://" not in written and ".." not in PurePath(written).parts and not os.path.isabs(written)
    name = written if plain else PurePath(written).name
    (kit / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, kit / name)
    return sorted([*texts, name])


def problems(folder: str) -> Iterator[tuple[str, str | None]]:
    """Yield (what was looked at, what is wrong with it or None) for everything that a shared folder needs."""
    adapter = os.path.exists(os.path.join(folder, "adapter_config.json"))
    checks: dict[str, Callable[[str], Iterable[str]]] = {
        "weights and configuration": _adapter if adapter else _model,
        "card": _card,
        "local paths": _local_paths,
    }
    for what, check in checks.items():
        try:
            found: list[str | None] = [*check(folder)]
        except SnrfError as error:
            found = [str(error)]
        yield from ((what, one) for one in found or [None])


def _model(folder: str) -> list[str]:
    checkpoint = open_checkpoint(folder)
    if not checkpoint.needs_remote_code:
        checkpoint.text_config  # noqa: B018
    return []


def _adapter(folder: str) -> list[str]:
    from peft import PeftConfig

    try:
        PeftConfig.from_pretrained(folder)
    except Exception as error:  # Whatever peft and json raise.
        raise SnrfError(f"{folder}/adapter_config.json", f"PEFT cannot read it ({first_line(error)})") from None
    read_header(Path(folder) / "adapter_model.safetensors")
    return []


def _card(folder: str) -> list[str]:
    page = read_text(os.path.join(folder, "README.md"))
    front, ids = front_matter(page), front_matter(page).get("base_model")
    ids = [ids] if isinstance(ids, str) else ids if isinstance(ids, list) else []
    found = []
    if not front.get("license"):
        found.append(f"no license: snrf card {folder} --license ID")
    elif front["license"] == "other" and not front.get("license_name"):
        found.append("license: other needs license_name and license_link: write them into the head of README.md")
    if not ids or not all(HUB_ID.fullmatch(str(one)) for one in ids):
        found.append("no hub ids under base_model: write those of the models into the head of README.md")
    if "\n## Evaluation\n" not in page:
        found.append(f"no evaluation: snrf compare RECIPE --json R.json, then snrf card {folder} --result R.json")
    return found


def _local_paths(folder: str) -> Iterator[str]:
    for path in sorted(Path(folder).rglob("*")):
        if not path.is_file() or path.name in _VOCABULARIES:
            continue
        name = path.relative_to(folder).as_posix()
        local = next(filter(_is_local, (match[0] for match in _PATH.finditer(_text(path)))), None)
        if local is not None:
            yield f"{name} holds {local}: {_REMEDIES.get(path.name, 'remove it')}"


_REMEDIES = {"adapter_config.json": "give snrf lora --base-model OWNER/REPO, or write the target's hub id there"}


def _text(path: Path) -> str:
    """Return the text of a small file, of safetensors their metadata, and nothing of another."""
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return json.dumps(file.metadata())
        except (safetensors.SafetensorError, OSError):
            return ""
    with open_regular(path) as opened:
        content = opened.read(_TEXT_BYTES + 1)
    try:
        return content.decode() if len(content) <= _TEXT_BYTES else ""
    except UnicodeDecodeError:
        return ""


def _is_local(path: str) -> bool:
    """Tell whether a path is of somebody's home, or of this machine."""
    if path.startswith(_HOMES) or not path.startswith("/"):
        return True
    first, second = PurePath(path).parts[1:3]
    return first not in _SYSTEM and os.path.exists(f"/{first}/{second}")
