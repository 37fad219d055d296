"""Every python block of the pages in docs/ runs in order, with the output that the page shows.

A ```python block that is followed by a ```text block must print that text, or raise it if the text
begins with the name of an error or a warning. "..." matches anything, and line breaks are ignored.
"""

import doctest
import inspect
import io
import re
import socket
from contextlib import redirect_stdout
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

import sktransfer
from sktransfer.cli.main import cli

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
# Pages that take most of the time of all pages; `make test-slow` runs them.
LONG_PAGES = {
    "backbones.md",
    "domains.md",
    "export.md",
    "fine_tuning.md",
    "input_formats.md",
    "out_of_core.md",
    "recipes.md",
    "saving.md",
    "several_gpus.md",
    "strategy.md",
}
BLOCK = re.compile(r"^```(?:python|text)\n(?P<code>.*?)^```$", re.M | re.S)
ERROR = re.compile(r"\w+(?:Error|Warning): ")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page):
    """List the python blocks of a page: line, code, and the text block after it or None."""
    text = (DOCS / page).read_text()
    matches = list(BLOCK.finditer(text))
    listed = []
    for block, following in zip_longest(matches, matches[1:]):
        if not block.group().startswith("```python"):
            continue
        follows = (
            following is not None
            and following.group().startswith("```text")
            and not text[block.end() : following.start()].strip()
        )
        line = text[: block.start()].count("\n") + 1
        listed.append((line, block["code"], following["code"] if follows else None))
    return listed


def run(line, code, expected, page, namespace):
    """Run a block, and compare its output or error."""
    printed = io.StringIO()
    compiled = compile("\n" * line + code, str(DOCS / page), "exec")
    raises = expected is not None and ERROR.match(expected)
    try:
        with redirect_stdout(printed):
            exec(compiled, namespace)
        got = printed.getvalue()
    except Exception as error:
        if not raises:
            raise
        got = f"{type(error).__name__}: {error}\n"
    if expected is not None:
        assert doctest.OutputChecker().check_output(expected, got, FLAGS), (
            f"{page}:{line} says\n{expected}\nbut gave\n{got}"
        )


@pytest.fixture
def offline(monkeypatch, folder):
    """Work in an empty folder, without a network, and with one thread.

    On shared cores, threads that wait for each other cost more than they save.
    """

    def refuse(*args, **kwargs):
        raise OSError("the documentation must run without a network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in LONG_PAGES else [])
        for page in PAGES
        if blocks(page)
    ],
)
def test_python_blocks_print_the_documented_output(page, offline):
    namespace = {"__name__": "__main__"}
    for line, code, expected in blocks(page):
        run(line, code, expected, page, namespace)
    if page == "input_formats.md":
        check_containers(namespace)


def check_containers(namespace):
    """Check that every container in the table gives the same embeddings."""
    table = (DOCS / "input_formats.md").read_text().partition("## Containers")[2]
    examples = re.findall(r"^\| .* \| `(.*)` \|$", table.partition("\n## ")[0], re.M)
    assert len(examples) > 15
    expected = namespace["PretrainedFeatureExtractor"]().fit_transform(["a.png", "b.png"])
    for example in examples:
        X = eval(example, namespace)
        embeddings = namespace["PretrainedFeatureExtractor"](cache=None).fit_transform(X)
        np.testing.assert_allclose(embeddings, expected, atol=1e-4, err_msg=example)


def test_pages_have_python_blocks():
    assert sum(len(blocks(page)) for page in PAGES) > 40


def test_every_public_name_is_in_the_reference():
    pages = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    for name in sktransfer.__all__:
        if name != "__version__":
            assert f":: sktransfer.{name}\n" in pages


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text()
    for page in PAGES:
        assert page == "index.md" or re.search(f"^{page.removesuffix('.md')}$", index, re.M), page


def test_links_between_pages_resolve():
    for page in PAGES:
        text = (DOCS / page).read_text()
        for target in re.findall(r"\]\(([^)#:]+\.md)\)", text):
            assert (DOCS / page).parent.joinpath(target).resolve().is_file(), (page, target)


def test_parameters_named_in_pages_exist():
    known = set(inspect.signature(sktransfer.PretrainedFeatureExtractor).parameters)
    for page in PAGES:
        text = (DOCS / page).read_text()
        for call in re.findall(r"PretrainedFeatureExtractor\(([^()]*)\)", text):
            assert set(re.findall(r"(\w+)=", call)) <= known, (page, call)


@pytest.mark.parametrize("command", cli.commands)
def test_command_line_page_names_every_option(command):
    subcommands = getattr(cli.commands[command], "commands", {command: cli.commands[command]})
    options = {
        name
        for subcommand in subcommands.values()
        for option in subcommand.params
        for name in (*option.opts, *option.secondary_opts)
        if name.startswith("--")
    }
    page = (DOCS / "command_line.md").read_text()
    section = page.partition(f"\n## {command}\n")[2].partition("\n## ")[0]
    assert options == set(re.findall(r"--[a-z][a-z-]*", section))
