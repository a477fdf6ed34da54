"""The documentation: its snippets run, its links resolve, its commands and files exist."""

import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from accelerate.state import AcceleratorState

from lrd import recipe
from lrd.cli.app import app
from lrd.study.schema import StudyFile

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "launch" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```(?P<language>[\w{}-]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")

PROJECT_FILE = re.compile(
    r"(?<![\w/.<>-])(?:recipes|launch|lrd|tests|benchmarks|examples|docs)/[\w./-]*\w(?![\w/*<-])"
)
OPTIONAL_PACKAGES = ("lightning", "pytorch_optimizer", "schedulefree", "transformers")
NOT_IN_THE_REPOSITORY = {
    "docs/_build/html",  # what `make docs` writes
    "recipes/x.yaml",  # stands for any recipe
    "tests/kat_vectors",  # a file of Random123
}


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [match["code"] for match in FENCE.finditer(text) if match["language"] == language]


def snippets(language: str) -> list:
    return [
        pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, code in enumerate(blocks(page, language))
    ]


def heading_anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[str]:
    """What the page has a user type: lines of bash blocks, and inline code."""
    text = page.read_text(encoding="utf-8")
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [*lines, *INLINE_CODE.findall(FENCE.sub("", text))]


@pytest.fixture
def only_rank(monkeypatch, tmp_path):
    """A snippet runs in an empty folder, and as the only rank that torchrun would start."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")  # any free port
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("only_rank")
@pytest.mark.parametrize("code", snippets("python"))
def test_python_snippets_run(code):
    for package in OPTIONAL_PACKAGES:
        if re.search(rf"^import {package}$", code, re.MULTILINE):
            pytest.importorskip(package, reason="`make clients` installs it")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a control that is no learning rate dropout warns
        exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("code", snippets("yaml"))
def test_yaml_snippets_are_recipes_or_studies(code):
    values = yaml.safe_load(code)
    if "arms" in values:
        StudyFile.model_validate(values)
    else:
        recipe.parse(values, "snippet")


def test_there_are_snippets_to_test():
    assert len(snippets("python")) >= 4
    assert len(snippets("yaml")) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for match in LINK.finditer(text):
        file_name, _, anchor = match["target"].partition("#")
        if re.match(r"https?:", file_name):
            continue
        target = page.parent / file_name if file_name else page
        if not target.exists() or (anchor and anchor not in heading_anchors(target)):
            broken.append(match["target"])
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_the_project_that_a_page_names_exist(page):
    named = {path for command in commands(page) for path in PROJECT_FILE.findall(command)}
    missing = {path for path in named if not (ROOT / path).exists()}
    assert missing - NOT_IN_THE_REPOSITORY == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lrd_commands_that_a_page_names_exist(page):
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    lines = [line for line in commands(page) if re.match(r"lrd [a-z]", line)]
    unknown = {shlex.split(line, comments=True)[1] for line in lines} - known
    assert unknown == set()


def test_overrides_that_the_pages_show_are_keys_of_a_recipe():
    sections = "data|model|optimizer|lr_dropout|schedule|trainer|checkpoint|tracking"
    override = re.compile(rf"\b(?P<section>{sections})\.(?P<key>\w+)=\S")
    schedule_keys = {"name", "unit", "warmup_steps"}
    for page in PAGES:
        for command in commands(page):
            for match in override.finditer(command):
                section = recipe.Recipe.model_fields[match["section"]]
                keys = _keys(section.annotation) | schedule_keys
                if match["section"] == "data":  # an argument of examples/one_bad_sample.py
                    keys = keys | {"is_damaged"}
                assert match["key"] in keys, f"{page.name}: {match[0]}"


def _keys(annotation: object) -> set[str]:
    """The keys of a section, which may be given as one of several classes or None."""
    if hasattr(annotation, "model_fields"):
        return set(annotation.model_fields)
    return {key for part in getattr(annotation, "__args__", ()) for key in _keys(part)}


def test_make_targets_that_the_pages_name_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target
        for page in PAGES
        for line in [*commands(page), *re.findall(r"^    make .*$", page.read_text(), re.MULTILINE)]
        for target in re.findall(r"^ *make ([a-z][\w-]*)", line)
    }
    assert named - targets == set()


def test_the_example_continues_where_it_stopped(tmp_path, monkeypatch, capsys):
    example = ROOT / "examples" / "own_loop.py"

    def run(script: Path, state: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / state)])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    lines = run(example, "uninterrupted.pt")
    assert len(lines) == 10
    assert run(example, "uninterrupted.pt") == []  # nothing is left to do

    # A run that stops after 100 of the 200 steps.
    source = example.read_text(encoding="utf-8")
    short = tmp_path / "short.py"
    short.write_text(source.replace("range(first_step, 200)", "range(first_step, 100)"))
    assert run(short, "interrupted.pt") == lines[:5]

    assert run(example, "interrupted.pt") == lines[5:]
