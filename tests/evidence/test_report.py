"""The report as a reader's browser sees it: what it says, that it loads nothing, and that it escapes what it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from chromium import PROGRAM, browser
from click.testing import CliRunner, Result
from made_results import ablation, amplification, comparison, lens, measured_ranks, profile_of, tuning

from mergekit_snrf.cli.snrf import main
from mergekit_snrf.evidence.overlap import overlaps, total
from mergekit_snrf.evidence.report import report
from mergekit_snrf.evidence.results import Amplification, OverlapPairs, Study, write_result
from mergekit_snrf.evidence.wording import without_folders
from mergekit_snrf.files import references
from mergekit_snrf.neurons.maskfile import Mask, ModelProvenance, Provenance, read_mask, write_mask
from mergekit_snrf.neurons.sets import PROJECTIONS, NeuronSet, Site
from mergekit_snrf.profiling.result.profilefile import Profile, write_profile
from mergekit_snrf.profiling.result.selection import select

VOID = {"meta", "link", "br", "img", "input", "hr"}
PROFILES = [profile_of(measured_ranks(seed), name) for seed, name in ((1, "target"), (2, "source"))]
NEURONS = select(PROFILES, top_ratio=0.3)


class Page(HTMLParser):
    """A parsed page: its elements, its text by element, and an error for every element that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.drawn: set[str] = set()
        self.outline: list[str] = []
        self.words: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: Sequence[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attributes}) == len(attributes)
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if "svg" in self._open:
            self.drawn.add(tag)
        else:
            self.outline.append(tag)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Sequence[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append((self._open[-1] if self._open else "", data.strip()))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def said(self, tag: str) -> list[str]:
        return [text for name, text in self.words if name == tag]


def made_mask(folder: Path, provenance: Provenance | None = None) -> Mask:
    known = provenance or Provenance(
        target=ModelProvenance(path="owner/target", revision="abc", model_type="qwen2_5_vl"),
        source=ModelProvenance(path="owner/source", probes={"dataset": "gsm8k", "count": 6}),
        selection={"top_ratio": 0.3, "measure": {"scoring": "exact"}},
        operation="profile",
        inputs=[{"file": "target profile", "sha256": "12" * 32}],
        seed=0,
    )
    write_mask(folder / "mask.safetensors", NEURONS, known)
    return read_mask(folder / "mask.safetensors")


@pytest.fixture
def mask(tmp_path: Path) -> Mask:
    return made_mask(tmp_path)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Mask:
    """The mask of the full report."""
    return made_mask(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def full(shown: Mask) -> str:
    digest = references.sha256(shown.path)
    return report(shown, PROFILES, [ablation(digest), comparison(digest), amplification(), lens(), tuning(True)])


def assert_loads_nothing(page: Page, text: str) -> None:
    """Nothing in the page makes a browser ask for anything: only links, which wait for a reader, lead outside."""
    assert not {"script", "iframe", "object", "embed", "img", "image", "video", "audio", "form", "base"} & {
        tag for tag, _ in page.elements
    }
    for tag, attributes in page.elements:
        assert not {"src", "srcset", "action", "data", "ping", "background"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "xlink:href"):
            if name in attributes:
                allowed = {"a": ("#", "https://arxiv.org/"), "link": ("data:,",)}.get(tag, ("#",))
                assert attributes[name].startswith(allowed)
        assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", attributes.get("style", "")))
    for style in page.said("style"):
        assert "@import" not in style
        assert "url(" not in style
    policy = next(attributes["content"] for attributes in page.all("meta") if "http-equiv" in attributes)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert set(re.findall(r"https?://[^\"<\s]*", text)) == {
        "https://arxiv.org/abs/2602.19058",
        "http://www.w3.org/2000/svg",
    }


def test_full_report(full: str, shown: Mask) -> None:
    page = Page(full)
    assert_loads_nothing(page, full)
    assert page.said("title")[0] == page.said("h1")[0] == "Shared neurons of owner/target and owner/source"
    assert page.said("h2") == [
        "Where the neurons live",
        "Overlap of target and source",
        "Do these neurons matter? (target)",
        "Does the merge beat simpler baselines? (target)",
        "What single neurons promote",
        "What target would predict after each layer",
        "How strongly does RegMean keep?",
        "Where the mask comes from",
    ]
    assert references.sha256(shown.path) in page.said("code")
    for study in (ablation(), comparison()):
        assert page.said("p").count(study.verdict[0]) == 1
    cells = page.said("td")
    assert {"4.2 [1.2, 7.2]", "-26.8 [-29.8, -23.8]", "-18.6 [-23.1, -14.0]", "1.5 %"} <= set(cells)
    assert {"abc", "qwen2_5_vl", "gsm8k"} <= set(cells)
    assert "' sum' 3.10 (41:2)" in " ".join(cells)
    assert cells_of(full, "2.9") == ["2.9", "0.0103", "color", "0.0172", "10.0 %", "0.900", "0.871"]
    assert "therefore" not in full
    assert any("2 of 3 (66.7 %) are math neurons" in sentence for sentence in page.said("p"))
    assert [address["href"] for address in page.all("a")][:-1] == [f"#s{number}" for number in range(1, 9)]
    assert [address["id"] for address in page.all("section")] == [f"s{number}" for number in range(1, 9)]
    assert "Not in this report" not in full
    assert str(Path(shown.path).parent) not in full


def cells_of(text: str, first: str) -> list[str]:
    """Return the cells of the first row that begins with a text."""
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    return next(row for row in rows if row and row[0] == first)


def test_every_figure_has_an_alternative_text(full: str) -> None:
    page = Page(full)
    drawings = page.all("svg")
    # A map, three of the overlap, two metrics and one, two neurons with tokens to show, three of the lens, and keep.
    assert len(drawings) == len(page.all("figure")) == 1 + 3 + 2 + 1 + 2 + 3 + 1
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert re.search(r"\d", drawing["aria-label"])
        assert len(drawing["aria-label"]) > 60
    assert len(page.said("desc")) == len(drawings)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "#767676" not in full


def test_counts_of_the_report(full: str, shown: Mask) -> None:
    rows = re.findall(r"<tr>(.*?)</tr>", full)
    tables = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    for name in PROJECTIONS:
        members = [member for site, member in shown.neurons.items() if site.projection == name]
        count, size = sum(int(member.sum()) for member in members), sum(len(member) for member in members)
        assert [name, str(count), str(size), f"{100 * count / size:.1f} %"] in tables
    by_layer = ["1", *(str(shown.neurons.count(Site(1, name))) for name in PROJECTIONS)]
    assert by_layer in tables
    counts = total(overlaps(PROFILES, top_ratio=0.3)[0].sites)
    assert counts.shared == shown.neurons.count()
    cells = [str(number) for number in (counts.shared, *counts.only, counts.union)]
    assert any(row[:5] == ["all", *cells] for row in tables)


def test_bare_mask_names_the_commands(mask: Mask) -> None:
    text = report(mask)
    page = Page(text)
    assert_loads_nothing(page, text)
    assert page.said("h2") == ["Where the neurons live", "Where the mask comes from", "Not in this report"]
    assert commands(page) == ["overlap", "ablate", "compare", "amplify"]
    pairs = OverlapPairs(pairs=overlaps(PROFILES, top_ratio=0.1))
    assert commands(Page(report(mask, [], [pairs, ablation()]))) == ["compare", "amplify"]


def commands(page: Page) -> list[str]:
    return [code.split()[1] for code in page.said("code") if code.startswith("snrf") and "--json" in code]


def headings(page: Page) -> list[str]:
    return [title for title in page.said("h2") if title.startswith("Overlap")]


def test_what_profiles_and_results_both_say_is_shown_once(mask: Mask) -> None:
    same = overlaps(PROFILES, top_ratio=0.3)
    mirrored = overlaps(PROFILES[::-1], top_ratio=0.3)
    page = Page(report(mask, PROFILES, [*same, OverlapPairs(pairs=mirrored)]))
    assert headings(page) == ["Overlap of target and source"]
    assert page.said("figcaption").count("Overlap by top ratio") == 1
    # Without the profiles, the curve is that of the result which has one.
    page = Page(report(mask, [], [*same, *overlaps(PROFILES, top_ratio=0.3, curve=True)]))
    assert headings(page) == ["Overlap of target and source"]
    assert page.said("figcaption").count("Overlap by top ratio") == 1


def test_overlaps_that_differ_have_titles_that_differ(mask: Mask) -> None:
    other = profile_of(measured_ranks(3), "source")
    third = profile_of(measured_ranks(4), "source")
    results = [
        overlaps([PROFILES[0], one], top_ratio=ratio)[0] for one, ratio in ((other, 0.3), (third, 0.3), (other, 0.1))
    ]
    assert headings(Page(report(mask, PROFILES, results[:1]))) == [
        "Overlap of target and source by top_ratio 0.3, of profiles",
        "Overlap of target and source by top_ratio 0.3, of a result file",
    ]
    assert headings(Page(report(mask, PROFILES, results))) == [
        "Overlap of target and source by top_ratio 0.3, of profiles",
        "Overlap of target and source by top_ratio 0.3, of a result file (1)",
        "Overlap of target and source by top_ratio 0.3, of a result file (2)",
        "Overlap of target and source by top_ratio 0.1",
    ]
    swapped = results[0].model_copy(update={"names": ("source", "target")})
    assert len(headings(Page(report(mask, [], [results[0], swapped])))) == 2


HOME = "/home/alice smith/work"


def test_no_local_folder_is_told(tmp_path: Path) -> None:
    local = ModelProvenance(
        path=f"{HOME}/target", probes={"dataset": f"{HOME}/rows.jsonl", "template": "/no_think/ {q}"}
    )
    known = Provenance(target=local, source=local, inputs=[{"file": "~/a.safetensors", "path": "C:\\Users\\alice\\a"}])
    mask = made_mask(tmp_path, known)
    digest = "ef" * 32
    settings: dict[str, Any] = {"recipe": f"{HOME}/snrf.yml", "source": "owner/source", "base": "../base"}
    settings["profiles"] = {f"{HOME}/target.profile": "12" * 32}
    settings["files"] = {"before": [f"{HOME}/before/20260101_000000_samples_t.jsonl"]}
    changes = {
        "model": f"{HOME}/target+{HOME}/adapter",
        "mask": f"{HOME}/mask.safetensors",
        "mask_sha256": digest,
        "evaluation": f"{HOME}/evaluation.py:board?n=6&data={HOME}/rows.jsonl",
        "settings": settings,
    }
    studies = [study.model_copy(update=changes) for study in (ablation(), comparison())]
    changes = {"model": f"{HOME}/target", "probes": f"{HOME}/rows.jsonl", "classifier": f"{HOME}/own.py:is_math"}
    changes["settings"] = {"mask": "hf://owner/repo@main/m.safetensors"}
    words = amplification().model_copy(update=changes)
    profiles = [profile_of(measured_ranks(1), f"{HOME}/target"), PROFILES[1]]
    text = report(mask, profiles, [*studies, words])
    assert "alice" not in text
    assert HOME.split("/")[1] not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    assert str(tmp_path) not in text
    page = Page(text)
    rows = dict(re.findall(r'<th scope="row">([^<]*)</th><td class="words">([^<]*)</td></tr>', text))
    assert rows["profiles target.profile"] == "12" * 32
    assert rows["mask sha256"] == digest
    shown = ["target+adapter", "mask.safetensors", "evaluation.py:board?n=6&data=rows.jsonl", "snrf.yml"]
    shown += ["owner/source", "../base", '["20260101_000000_samples_t.jsonl"]', "a.safetensors", "/no_think/ {q}"]
    assert {*shown, "hf://owner/repo@main/m.safetensors"} <= set(page.said("td"))
    assert "Shared neurons of target and target" in page.said("h1")
    assert any("(own.py:is_math)" in sentence for sentence in page.said("p"))


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("owner/model", "owner/model"),
        ("examples/board/target", "examples/board/target"),
        ("../target", "../target"),
        ("/target", "target"),
        ("/a/b/target/", "target/"),
        ("file:///home/alice/x", "x"),
        ("D:/models/target", "target"),
        ("~bob/target", "target"),
        ("hf://owner/repo@main/a/b.safetensors", "hf://owner/repo@main/a/b.safetensors"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("package.module:function", "package.module:function"),
        ("lmms-eval: mme, pope", "lmms-eval: mme, pope"),
        ("/", "/"),
        ("", ""),
        ("\\boxed{}", "\\boxed{}"),
        ("\\\\server\\models\\target", "target"),
    ],
)
def test_paths_without_folders(given: str, shown: str) -> None:
    assert without_folders(given) == shown


def test_study_of_other_neurons_is_marked(mask: Mask, tmp_path: Path) -> None:
    """Neurons are compared, not files: the same neurons in another file, with another list of sites, are the same."""
    own = mask.neurons.sha256()
    empty = NeuronSet({**mask.neurons, Site(9, "attn.q"): torch.zeros(4, dtype=torch.bool)})
    write_mask(tmp_path / "again.safetensors", empty)
    again = read_mask(tmp_path / "again.safetensors")
    assert references.sha256(again.path) != references.sha256(mask.path)
    known = {"neurons_sha256": own, "notes": ["Left out: the least important neurons."]}
    study = ablation(references.sha256(mask.path)).model_copy(update=known)
    assert 'class="warning"' not in report(again, [], [study])
    fewer = Mask(NeuronSet({Site(0, "attn.q"): mask.neurons[Site(0, "attn.q")]}), path=again.path)
    warned = Page(report(fewer, [], [study])).said("p")
    assert any("neurons of another mask" in text and str(study.mask_sha256) in text for text in warned)
    assert {*study.verdict, *study.notes} <= set(warned)
    page = Page(report(mask, [], [ablation("cd" * 32)]))
    assert any("another mask file" in text and "may not be" in text and "cd" * 32 in text for text in page.said("p"))


@pytest.mark.parametrize(
    ("selection", "rule"),
    [
        ({"top_ratio": 0.2}, "top_ratio 0.2"),
        ({"sigma": 0.05}, "sigma 0.05"),
        ({"top_ratio": {"attn": 0.5, "fwd": 0.1}, "at_least": 0.5}, "top_ratio attn 0.5 fwd 0.1, at_least 0.5"),
        ({"ratio": 0.5, "at_least": "many"}, "top_ratio 0.1"),
        (None, "top_ratio 0.1"),
    ],
)
def test_profiles_are_selected_by_the_rule_of_the_mask(tmp_path: Path, selection: dict | None, rule: str) -> None:
    mask = made_mask(tmp_path, Provenance(selection=selection))
    assert any(text.startswith(f"By {rule}: ") for text in Page(report(mask, PROFILES)).said("p"))


MARKUP = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;{{ 7 * 7 }}{% raw %}]]>--><!-- "
EVIL = f"{MARKUP}\x00\x1b\u202e\ud800"


def hostile(text: str) -> tuple[Provenance, list[Profile], list[Study | Amplification]]:
    """Put a text wherever a file can hold one; only the JSON of a mask can hold a lone surrogate."""
    plain = text.replace("\ud800", "")
    provenance = Provenance(
        target=ModelProvenance(path=text, revision=text, probes={"dataset": text}),
        source=ModelProvenance(path=text),
        selection={"top_ratio": 0.3, "note": text},
        operation=text,
        inputs=[{"file": text}],
        versions={text: text},
    )
    profiles = [profile_of(measured_ranks(seed), plain) for seed in (1, 2)]
    one = ablation()
    metrics = {plain: one.conditions[0].metrics["reasoning"]}
    conditions = [condition.model_copy(update={"name": plain, "metrics": metrics}) for condition in one.conditions]
    contrasts = [one.contrasts[0].model_copy(update=dict.fromkeys(("left", "right", "metric"), plain))]
    known = {"conditions": conditions, "contrasts": contrasts, "verdict": [plain], "settings": {plain: plain}}
    evil_study = one.model_copy(update={**dict.fromkeys(("model", "mask_sha256", "evaluation"), plain), **known})
    other = amplification()
    tokens = [token.model_copy(update={"token": plain}) for token in other.neurons[0].tokens]
    neurons = [other.neurons[0].model_copy(update={"neuron": plain, "tokens": tokens})]
    evil_words = other.model_copy(update={"model": plain, "classifier": plain, "neurons": neurons, "probes": plain})
    return provenance, profiles, [evil_study, evil_words]


def test_untrusted_text_is_text(tmp_path: Path) -> None:
    """A page with hostile texts has the same elements and the same attributes as one with harmless texts."""
    pages = []
    for text in (EVIL, "harmless"):
        provenance, profiles, results = hostile(text)
        mask = made_mask(tmp_path)
        pages.append(report(Mask(mask.neurons, provenance, mask.path), profiles, results))
    evil, harmless = map(Page, pages)
    assert_loads_nothing(evil, pages[0])
    assert evil.outline == harmless.outline
    assert evil.drawn == harmless.drawn
    names = [{name for _, attributes in page.elements for name in attributes} for page in (evil, harmless)]
    assert names[0] == names[1]
    shown = f"{MARKUP}\\x00\\x1b\\u202e"
    assert shown in evil.said("p")
    assert f"Shared neurons of {shown}\\ud800 and {shown}\\ud800" in evil.said("h1")
    assert "\x00" not in pages[0]
    assert "\u202e" not in pages[0]
    pages[0].encode()


def snrf(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["report", *arguments])


@pytest.fixture
def folder(tmp_path: Path, mask: Mask, monkeypatch: pytest.MonkeyPatch) -> Path:
    for profile in PROFILES:
        write_profile(tmp_path / f"{profile.path}.profile", profile)
    write_result(tmp_path / "ablation.json", ablation(references.sha256(mask.path)))
    write_result(tmp_path / "amplification.json", amplification())
    monkeypatch.chdir(tmp_path)
    return tmp_path


ARGUMENTS = ["mask.safetensors", "--profile", "target.profile", "--profile", "source.profile"]
ARGUMENTS += ["--result", "ablation.json", "--result", "amplification.json"]


def test_command_writes_the_same_bytes_in_every_process(folder: Path) -> None:
    command = [sys.executable, "-c", "from mergekit_snrf.cli.snrf import main; main()", "report", *ARGUMENTS]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "TZ": "UTC+1"}
    run = subprocess.run([*command, "1.html"], cwd=folder, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "1.html\n", "")
    assert snrf(*ARGUMENTS, "2.html").exit_code == 0
    assert (folder / "1.html").read_bytes() == (folder / "2.html").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.safetensors", "r.html"], "nothing.safetensors: no such file"),
        (["target.profile", "r.html"], "snrf-mask"),
        (["mask.safetensors", "--profile", "target.profile", "r.html"], "is the only profile"),
        (["mask.safetensors", "--result", "mask.safetensors", "r.html"], "mask.safetensors: is not JSON"),
        (["mask.safetensors", "no/where.html"], "no/where.html: cannot be written"),
    ],
)
def test_command_errors(folder: Path, arguments: list[str], message: str) -> None:
    result = snrf(*arguments)
    assert (result.exit_code, isinstance(result.exception, SystemExit)) == (1, True)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (folder / "r.html").exists()


def test_empty_masks(tmp_path: Path) -> None:
    for members in ({}, {Site(0, "attn.q"): torch.zeros(4, dtype=torch.bool)}):
        write_mask(tmp_path / "empty", NeuronSet(members))
        page = Page(report(read_mask(tmp_path / "empty")))
        assert page.said("h1") == ["Neurons of empty"]
        assert any("The mask is empty" in text or "holds 0 of 4" in text for text in page.said("p"))


def test_template_is_in_the_wheel() -> None:
    from hatchling.builders.wheel import WheelBuilder

    root = Path(__file__).parents[2]
    packed = {file.distribution_path for file in WheelBuilder(str(root)).recurse_included_files()}
    assert "mergekit_snrf/evidence/report.html.jinja" in packed


needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="needs chromium on the PATH")

# The pairs of texts of one figure whose boxes overlap by more than a pixel.
OVERLAPPING = """[...document.querySelectorAll('figure svg')].flatMap(svg => {
  const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
  const width = (p, q) => Math.min(p.right, q.right) - Math.max(p.left, q.left);
  const height = (p, q) => Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
  const meets = p => ([_, q]) => width(p, q) > 1 && height(p, q) > 1;
  return boxes.flatMap(([a, p], place) => boxes.slice(0, place).filter(meets(p)).map(([b]) => [a, b]));
})"""


@needs_chromium
def test_in_a_browser(full: str, tmp_path: Path) -> None:
    """No console message, no request, no page-wide scrolling on a phone, and dark where the reader wants dark."""
    path = tmp_path / "report.html"
    path.write_text(full)
    with browser() as page:
        for width in (1280, 390):
            backgrounds = []
            for dark in (False, True):
                page.open(path.as_uri(), width, dark)
                assert page.value("document.documentElement.scrollWidth") <= width
                assert page.value("document.querySelectorAll('svg text').length") > 50
                backgrounds.append(page.value("getComputedStyle(document.body).backgroundColor"))
                assert page.value(OVERLAPPING) == []
                ink = "getComputedStyle(document.querySelector('figure svg [id*=\"text_\"] text')).fill"
                assert page.value(ink) == page.value("getComputedStyle(document.body).color")
            assert backgrounds == ["rgb(255, 255, 255)", "rgb(21, 24, 28)"]
        wide = "[...document.querySelectorAll('.box')].some(box => box.scrollWidth > box.clientWidth)"
        assert page.value(wide) is True
        assert page.pdf().startswith(b"%PDF")
        assert page.requested() == [path.as_uri()] * 4
        assert page.messages() == []


@needs_chromium
def test_hostile_texts_in_a_browser(tmp_path: Path) -> None:
    provenance, profiles, results = hostile(EVIL)
    mask = made_mask(tmp_path)
    path = tmp_path / "report.html"
    path.write_text(report(Mask(mask.neurons, provenance, mask.path), profiles, results))
    with browser() as page:
        page.open(path.as_uri(), 375)
        assert page.value("document.images.length + document.scripts.length") == 0
        assert page.value("document.documentElement.scrollWidth") <= 375
        assert page.requested() == [path.as_uri()]
        assert page.messages() == []


@needs_chromium
def test_the_browser_check_sees_requests_and_messages(tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('no')</script>")
    with browser() as page:
        page.open(path.as_uri(), 375)
        assert "http://127.0.0.1:9/x.png" in page.requested()
        assert any("no" in message for message in page.messages())


def test_settings_in_words(mask: Mask) -> None:
    study = comparison()
    settings = {"seeds": [0, 1], "means": {"R": [0.1 + 0.2, 1 / 3]}, "norm": None, "rescale": True, "update": "dare"}
    conditions = [*study.conditions[:1], study.conditions[1].model_copy(update={"settings": settings})]
    changes = {"model": "/a/folder/of/mine", "conditions": conditions, "verdict": ["a", "b", "c"]}
    page = Page(report(mask, [], [study.model_copy(update=changes)]))
    assert "seeds [0, 1], means R [0.3, 0.333333], norm None, rescale True, update dare" in page.said("td")
    assert "Does the merge beat simpler baselines? (mine)" in page.said("h2")
    assert {"a", "b", "c"} <= set(page.said("li"))
