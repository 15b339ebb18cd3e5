"""The documentation: its blocks run, its tables and plots are those of the results, and it names what there is.

Blocks of Python and `mlp-fusion` commands of a page run in order, in a folder where tiny models and texts lie under the
names that pages use. Blocks of one page share their variables.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import runpy
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import command_page
import companion_tables
import draw_accuracy
import draw_fusion
import draw_language_model
import draw_large
import draw_recovery
import matplotlib
import option_tables
import pytest
import recovery_tables
import results_tables
import site_hooks
import torch
import yaml

import checkpoints as ck
import fusion_kernels
import mlp_fusion
from fusion_kernels import library
from mlp_fusion import cli
from mlp_fusion.choices import METHODS
from mlp_fusion.settings import fields

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WITH_BLOCKS = [ROOT / "README.md", *PAGES]

#: Blocks of Python that cannot run here: page -> (words of the block, reason).
NOT_RUN: dict[str, tuple[str, str]] = {}

_BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)|(?:src|srcset|href)=\"([^\"#]+)\"")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """Language, text and line of every block of a page."""
    text = page.read_text(encoding="utf-8")
    return [(found[1], found[2], text[: found.start()].count("\n") + 2) for found in _BLOCK.finditer(text)]


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pages name: tiny models, sentences, and labelled rows."""
    folder = tmp_path_factory.mktemp("docs")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}
    for path, family, options in (
        ("roberta-base", "roberta", {"num_hidden_layers": 12, "task": "MaskedLM"}),
        ("roberta-base-sst2", "roberta", {"num_hidden_layers": 12, "id2label": {0: "0", 1: "1"}}),
        ("all-MiniLM-L6-v2", "bert", {"task": "Model"}),
        ("SmolLM2-135M-Instruct", "llama", {"task": "CausalLM"}),
    ):
        ck.add_tokenizer(ck.save_tiny(folder / path, family, **options), **special)
    sentences = [f"the cat sat {'a cat ' * (n % 5)}the {'sat ' * (n % 3)}".strip() for n in range(40)]
    (folder / "sentences.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    for file, rows in (("train.tsv", sentences[:24]), ("dev.tsv", sentences[24:])):
        lines = [f"{row}\t{n % 2}\n" for n, row in enumerate(rows)]
        (folder / file).write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def at(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A page's own folder, in which the furnished things lie."""
    place = tmp_path / "page"
    place.mkdir()
    for thing in furnished.iterdir():
        (place / thing.name).symlink_to(thing)
    monkeypatch.chdir(place)
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in WITH_BLOCKS if blocks(page)], ids=name)
def test_blocks_run(page: Path, at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A page may declare an operator, which `backends()` is not to list afterwards.
    monkeypatch.setattr(library, "_OPERATORS", dict(library._OPERATORS))
    variables: dict[str, Any] = {"__name__": "page"}
    for language, text, line in blocks(page):
        if language == "python":
            if name(page) in NOT_RUN and NOT_RUN[name(page)][0] in text:
                continue
            # Padded, so that a traceback names the page's own line; and with no `annotations` of this file's own.
            exec(compile("\n" * (line - 1) + text, page, "exec", dont_inherit=True), variables)
            continue
        for command in text.splitlines():
            words = shlex.split(command, comments=True)
            if words[:1] == ["mlp-fusion"]:
                _run(words[1:], f"{name(page)}: {command}")


def _run(words: list[str], what: str) -> None:
    try:
        cli.cli(words, standalone_mode=False)
    except (click.ClickException, SystemExit, mlp_fusion.InputError) as error:
        pytest.fail(f"{what}: {error}")


def test_blocks_are_seen_and_the_list_of_others_is_short() -> None:
    languages = [language for page in WITH_BLOCKS for language, _, _ in blocks(page)]
    assert languages.count("python") >= 15
    assert languages.count("sh") >= 4
    assert len(NOT_RUN) <= 3
    for page, (words, reason) in NOT_RUN.items():
        assert any(words in text for _, text, _ in blocks(ROOT / page)), page
        assert reason


def test_the_recipe_of_a_method_shows_its_code_as_it_stands() -> None:
    page = (DOCS / "develop" / "add-a-method.md").read_text(encoding="utf-8")
    file = METHODS["random"].file
    code = (ROOT / "python" / "mlp_fusion" / "methods" / f"{file}.py").read_text(encoding="utf-8")
    assert f"```python\n{code}```\n" in page
    assert f'    "random": MethodEntry("{file}", "{METHODS["random"].does}"),\n' in page


def test_no_block_is_in_a_language_that_is_not_run() -> None:
    known = {"python", "sh", "text", "json", "toml", "cpp", "yaml"}
    for page in WITH_BLOCKS:
        opened = re.findall(r"^```(\S+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(opened) <= known, name(page)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md"])
def test_links_of_pages_outside_the_site_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in _LINK.finditer(text):
        target = found[1] or found[2]
        if not re.match(r"[a-z]+:", target):
            assert ((ROOT / page).parent / target).exists(), target


def test_the_readme_is_short_and_begins_with_what_it_is() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 7000
    for command in ("make demo", "make test"):
        assert command in text
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    pages = [text, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), *(p.read_text("utf-8") for p in PAGES)]
    for page in pages:
        for target in re.findall(r"`make ([a-z]+)[` ]", page):
            assert target in targets


def test_every_public_name_stands_in_the_reference() -> None:
    for package in (mlp_fusion, fusion_kernels):
        text = (DOCS / "reference" / f"{package.__name__}.md").read_text(encoding="utf-8")
        named = re.findall(rf"^::: {package.__name__}\.(?:\w+\.)*(\w+)$", text, flags=re.MULTILINE)
        assert set(package.__all__) <= set(named)


def documented() -> dict[str, Any]:
    """Every public name and everything else on the pages of the reference, and how modules are made and merged."""
    found: dict[str, Any] = {}
    for package in (mlp_fusion, fusion_kernels):
        found |= {f"{package.__name__}.{key}": getattr(package, key) for key in package.__all__}
        page = (DOCS / "reference" / f"{package.__name__}.md").read_text(encoding="utf-8")
        for place in re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE):
            module, _, key = place.rpartition(".")
            found[place] = getattr(importlib.import_module(module), key)
    for cls in (mlp_fusion.FusedMLP, mlp_fusion.FusedGLU, mlp_fusion.FusedExperts):
        for key in ("from_mlp", "from_bundle", "from_experts", "merge_scale"):
            if hasattr(cls, key):
                found[f"mlp_fusion.{cls.__name__}.{key}"] = getattr(cls, key)
    return found


DOCUMENTED = documented()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", sorted(DOCUMENTED))
def test_every_public_docstring_has_an_example_that_runs(place: str, at: Path) -> None:
    text = inspect.getdoc(DOCUMENTED[place]) or ""
    section = re.search(r"^Examples:\n((?:    .*\n|\n)+)", f"{text}\n", flags=re.MULTILINE)
    assert section is not None, "no example"
    names = {"torch": torch, "mlp_fusion": mlp_fusion, "fusion_kernels": fusion_kernels}
    test = doctest.DocTestParser().get_doctest(section[1], names, place, None, None)
    assert any(example.want for example in test.examples)
    said: list[str] = []
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)


def test_examples_of_verbs_survive_the_options_that_are_put_into_their_docstrings() -> None:
    for verb in option_tables.VERBS:
        text = inspect.getdoc(getattr(mlp_fusion, verb)) or ""
        assert "\n    options: " not in text
        titles = re.findall(r"^(Args|Returns|Raises|Examples):$", text, flags=re.MULTILINE)
        assert titles == ["Args", "Returns", "Raises", "Examples"], verb


@pytest.mark.parametrize("package", [mlp_fusion, fusion_kernels], ids=lambda p: p.__name__)
def test_docstrings_explain_arguments_that_exist(package: Any) -> None:
    # mkdocs cannot look after this: arguments that go together share an entry, whose name is none of theirs.
    functions = [getattr(package, name) for name in package.__all__]
    for cls in [function for function in functions if inspect.isclass(function)]:
        functions += [member for key, member in inspect.getmembers(cls) if not key.startswith("_") and callable(member)]
    checked = 0
    for function in functions:
        if not inspect.isroutine(function) or package.__name__ not in str(getattr(function, "__module__", "")):
            continue
        section = re.search(r"^Args:\n((?:    .*\n|\n)*)", f"{inspect.getdoc(function)}\n", flags=re.MULTILINE)
        if section is None:
            continue
        named = re.findall(r"^    (\w+(?:, \w+)*):", section[1], flags=re.MULTILINE)
        known = list(inspect.signature(function).parameters)
        assert named, function
        for argument in ", ".join(named).split(", "):
            assert argument in known, (function.__qualname__, argument)
        checked += 1
    assert checked >= 8


@pytest.mark.parametrize(("title", "floors"), [("fusion_kernels", "KERNELS"), ("python/mlp_fusion", "PRODUCT")])
def test_the_layout_page_lists_every_floor_in_the_order_that_imports_keep(title: str, floors: str) -> None:
    order = runpy.run_path(str(ROOT / "tests" / "test_layers.py"))[floors]
    page = (DOCS / "develop" / "layout.md").read_text(encoding="utf-8")
    section = page.split(f"### {title}: ")[1].split("\n##")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    named = [name.rstrip("/").removesuffix(".py") for row in rows for name in re.findall(r"`([\w./]+)`", row)]
    assert named == list(order)


def test_lint_builds_the_site_so_that_warnings_count() -> None:
    (line,) = [text for text in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines() if "mkdocs build" in text]
    assert "--strict" in line
    # mkdocs counts the warnings that it shows: with --quiet, --strict means nothing.
    assert "quiet" not in line
    assert " -q" not in line


def test_every_page_stands_in_the_navigation() -> None:
    def files(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [file for part in (entry.values() if isinstance(entry, dict) else entry) for file in files(part)]

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(files(navigation)) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def test_every_generated_part_stands_on_a_page_and_every_place_is_filled() -> None:
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    places = {place for text in pages for place in re.findall(r"<!-- generated: (.+?) -->", text)}
    assert places - {"NAME"} == set(site_hooks.GENERATED)
    for text in pages:
        left = re.findall(r"^<!-- generated: .*", site_hooks.with_generated(text), flags=re.MULTILINE)
        assert left == []
    with pytest.raises(KeyError, match="nothing"):
        site_hooks.with_generated("<!-- generated: nothing -->")


@pytest.mark.parametrize("page", [page.relative_to(DOCS).as_posix() for page in PAGES])
def test_tables_in_pages_are_those_of_the_results(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert site_hooks.refreshed(text) == text, "run: python docs/scripts/site_hooks.py"
    # What is not kept in a page stands on one that is made of docstrings.
    for part in set(re.findall(r"<!-- generated: ([\w-]+) -->", text)):
        assert f"<!-- end of {part} -->" in text or page.startswith("reference/")


def test_an_old_table_is_made_anew_and_the_site_shows_no_marks() -> None:
    fresh = f"<!-- generated: methods -->\n\n{site_hooks.GENERATED['methods']()}\n\n<!-- end of methods -->"
    for old in ("\n| old |\n\n", ""):
        page = f"# A page\n\n<!-- generated: methods -->\n{old}<!-- end of methods -->\n\nmore\n"
        assert site_hooks.refreshed(page) == f"# A page\n\n{fresh}\n\nmore\n"
        assert site_hooks.with_generated(page) == f"# A page\n\n{site_hooks.GENERATED['methods']()}\n\nmore\n"
    assert site_hooks.refreshed("<!-- generated: methods -->\n") == "<!-- generated: methods -->\n"


def test_every_table_has_rows_of_one_length() -> None:
    for title, make in {**results_tables.TABLES, **recovery_tables.TABLES, **companion_tables.TABLES}.items():
        lines = make().splitlines()
        assert len(lines) > 3, title
        assert len({line.count("|") for line in lines}) == 1, title


def test_figures_are_those_of_the_results() -> None:
    runs = results_tables.fine_tunes("sst2")
    assert set(runs) <= set(results_tables.MODES)
    accuracies = [100 * run["final"]["accuracy"] for run in runs["prune"]]
    row = next(line for line in results_tables.sst2().splitlines() if line.startswith("| `prune`, calibrated and ref"))
    assert row == "| `prune`, calibrated and refitted | a quarter | **86.9 %** | 86.6, 87.3, 86.8 |"
    assert round(sum(accuracies) / 3, 1) == 86.9
    assert "| the full model | 70.80 → 70.59 | 53.32 → 52.81 |" in results_tables.language_models()
    assert "| 1536, 384, 769 | 0.014 s | 63× | 4.3× | 0.036 s | 250× | 0.036 s |" in results_tables.kmeans()


def test_figures_of_the_readme_are_those_of_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    means = {
        mode: sum(100 * run["final"]["accuracy"] for run in runs) / len(runs)
        for mode, runs in results_tables.fine_tunes("sst2").items()
    }
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    for words, modes in {
        "no text": ("fusion, no data", "published"),
        "a few hundred sentences": ("auto", "fusion", "select, sequential"),
        "a model trained on the task": ("fusion, late, layerwise, logits",),
    }.items():
        assert re.findall(r"\d\d\.\d %", rows[words]) == [f"{means[mode]:.1f} %" for mode in modes]
    assert f"(whole: {means['full']:.1f} %)" in text
    assert f"once both are refitted** ({means['prune']:.1f} %" in text
    speeds = results_tables.results("train-cpu")["tokens_per_second"]
    assert f"{speeds['fused'] / speeds['original']:.1f} times as fast" in text
    bert = results_tables.results("kmeans-cpu")["shapes"]["bert"]["ours"]["hartigan"]["seconds"]
    assert f"3,072 neurons into 768 in {bert:.2f} s" in text


def test_the_page_of_the_command_line_has_every_command_and_option() -> None:
    page = command_page.command_line()
    for title, command in cli.cli.commands.items():
        section = page.split(f"## {title} ")[1].split("\n## ")[0]
        for option in command.params:
            if isinstance(option, click.Option):
                assert max(option.opts, key=len) in section, (title, option.name)


@pytest.mark.parametrize("verb", sorted(option_tables.VERBS))
def test_the_reference_shows_every_option_below_its_verb(verb: str) -> None:
    record, command = option_tables.VERBS[verb]
    rows = {line.split(" | ")[0]: line for line in site_hooks.GENERATED[f"options-{verb}"]().splitlines()[2:]}
    for field in fields(record):
        row = rows.pop(f"| `{field.name}`")
        assert field.option.help in row
        flag = next(option for option in cli.cli.commands[command].params if option.name == field.name).opts[0]  # type: ignore[attr-defined]
        assert row.split(" | ")[-1].startswith(f"`{flag}")
    assert rows == {}
    page = (DOCS / "reference" / "mlp_fusion.md").read_text(encoding="utf-8")
    section = page.split(f"::: mlp_fusion.{verb}\n")[1].split("\n::: ")[0]
    assert f"<!-- generated: options-{verb} -->" in section


def test_tables_of_options_say_types_defaults_and_bounds() -> None:
    table = site_hooks.GENERATED["options-finetune"]()
    assert "| `warmup` | `float` | `0.06` | a number from 0 to 1 | " in table
    assert "| `task` | `str` | must be given | classification or lm | " in table
    assert "| `checkpoint_steps` | `int` or `None` | one after each epoch | an integer from 1 on | " in table
    assert "| `layers` | `Iterable[int]` or `str` or `None` | `'all'` |  | " in site_hooks.GENERATED["options-plan"]()
    assert "| `select` | keeps neurons by greedy choice of what they do on the text | yes | yes |" in (
        site_hooks.GENERATED["methods"]()
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pictures_are_as_their_scripts_draw_them(theme: str) -> None:
    assert (DOCS / "images" / f"fusion-{theme}.svg").read_text(encoding="utf-8") == draw_fusion.draw(theme)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("accuracy", draw_accuracy.draw),
        ("language-model", draw_language_model.draw),
        ("large", draw_large.draw),
        ("recovery", draw_recovery.draw),
    ],
)
def test_plots_are_those_of_the_results(name: str, draw: Callable[[str], str], theme: str) -> None:
    kept = (DOCS / "images" / f"{name}-{theme}.svg").read_text(encoding="utf-8")
    assert "<dc:date>" not in kept
    if f"Matplotlib v{matplotlib.__version__}," not in kept:
        pytest.skip("another matplotlib drew the plot that is kept")
    assert kept == draw(theme)


def test_the_format_page_names_the_version_and_every_key() -> None:
    page = (DOCS / "reference" / "checkpoint-format.md").read_text(encoding="utf-8")
    assert "It describes **format 1**" in page
    for key in ("format", "method", "parameterization", "fused_layers", "base", "kinds", "widths"):
        assert f"| `{key}` |" in page


@pytest.mark.parametrize("variable", ["FUSION_KERNELS_MLP_BACKEND", "FUSION_KERNELS_EXPERTS_BACKEND"])
def test_named_environment_variables_are_read(variable: str) -> None:
    assert variable in (DOCS / "reference" / "environment.md").read_text(encoding="utf-8")


def test_every_environment_variable_that_code_reads_is_named() -> None:
    page = (DOCS / "reference" / "environment.md").read_text(encoding="utf-8")
    read = re.compile(r"environ(?:\.get\(|\[)[\"']([A-Z][A-Z0-9_]+)[\"']")
    files = [ROOT / "setup.py", *(ROOT / "python").rglob("*.py"), *(ROOT / "fusion_kernels").rglob("*.py")]
    found = {variable for file in files for variable in read.findall(file.read_text(encoding="utf-8"))}
    assert len(found) >= 5
    assert [variable for variable in sorted(found) if f"`{variable}`" not in page] == []


def test_the_version_is_one() -> None:
    for file, pattern in (("pyproject.toml", r'^version = "(.+)"$'), ("CITATION.cff", r"^version: (.+)$")):
        found = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert found is not None, file
        assert found[1] == mlp_fusion.__version__, file
    assert f"## [{mlp_fusion.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= set(citation)
    (paper,) = citation["references"]
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2307.08941"}]
    assert inspect.getdoc(mlp_fusion.fuse)
