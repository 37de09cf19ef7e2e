"""The house itself: what a file may import and do, and how long functions and pages may be."""

import ast
import functools
import re
from pathlib import Path

import pytest

import vitad
from conftest import ROOT

PACKAGES = ("ablations", "results", "weights")
FILES = [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in ROOT.glob(f"{name}/*.py"))]
FILES = sorted(path.relative_to(ROOT) for path in FILES)
OURS = {path.stem for path in FILES} | set(PACKAGES)
PAGES = [
    "README.md",
    "results/README.md",
    "results/anatomy.md",
    "results/recipe.md",
    "results/speed.md",
    "results/choices.md",
    "weights/README.md",
    "ablations/README.md",
]


@functools.cache
def tree(file):
    return ast.parse((ROOT / file).read_text())


def nodes(parent, *types):
    return [node for node in ast.walk(parent) if isinstance(node, types)]


def imported(parent):
    """The first parts of the names of all modules imported."""
    names = [alias.name for node in nodes(parent, ast.Import) for alias in node.names]
    names += [node.module for node in nodes(parent, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_stand_at_the_top(file):
    for body in nodes(tree(file), ast.FunctionDef, ast.ClassDef):
        assert not imported(body), f"{file}:{body.lineno}: {body.name}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_only_the_last_line_of_a_script_exits(file):
    last_line = "if __name__ == '__main__':\n    sys.exit(main())"
    for statement in tree(file).body:
        if ast.unparse(statement) == last_line:
            continue
        for node in nodes(statement, ast.Name, ast.Attribute):
            name = ast.unparse(node)
            assert name not in ("SystemExit", "sys.exit", "exit"), f"{file}:{node.lineno}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_function_is_longer_than_60_lines(file):
    for node in nodes(tree(file), ast.FunctionDef):
        assert node.end_lineno - node.lineno < 60, f"{file}:{node.lineno}"


KINDS = (ast.FunctionDef, ast.ClassDef)
DEFINED = {node.name for file in FILES for kind in KINDS for node in nodes(tree(file), kind)}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_call_of_ours_has_more_than_four_arguments_without_a_name(file):
    for call in nodes(tree(file), ast.Call):
        name = ast.unparse(call.func).split(".")[-1]
        assert name not in DEFINED or len(call.args) <= 4, f"{file}:{call.lineno}: {name}"


def test_one_file_edits_the_path():
    editors = {
        (ROOT / file).resolve().relative_to(ROOT).as_posix()
        for file in FILES
        if any(ast.unparse(node) == "sys.path" for node in nodes(tree(file), ast.Attribute))
    }
    assert editors == {"weights/_root.py"}


def test_who_imports_whom():
    assert imported(tree("vitad.py")) <= {"math", "itertools", "torch", "vit"}
    assert not imported(tree("vit.py")) & OURS
    assert "results" not in (ROOT / "data.py").read_text()  # neither imported nor read
    for file in FILES:
        assert "ablations" not in imported(tree(file)) or file.parts[0] == "ablations", file
    for name in PACKAGES:
        assert (ROOT / name / "__init__.py").is_file()


def test_importing_sets_nothing(imports):
    """No environment variable, no flag of torch, no random state."""
    assert imports.code == 0, imports.err


# -------------------------------------------------------------------------------------------- pages


def prose(page):
    """A page's lines outside of code and tables, without the targets of links; (number, line)."""
    in_fence = False
    for number, line in enumerate((ROOT / page).read_text().splitlines(), start=1):
        fence = line.startswith("```")
        in_fence ^= fence
        if not (fence or in_fence or line.startswith(("    ", "|"))):
            yield number, re.sub(r"\]\([^)]*\)", "]", line)


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert [line for line in text.splitlines() if len(line) > 110] == []
    assert text.count("../shared") <= 1


@pytest.mark.parametrize("page", PAGES)
def test_prose_has_short_lines_and_short_paragraphs(page):
    paragraph = last = 0
    for number, line in prose(page):
        assert len(line) <= 110, f"{page}:{number}: {len(line)} columns"
        begins = number != last + 1 or re.match(r"[-*] |\d+\. |#", line)
        paragraph = 0 if not line.strip() else 1 if begins else paragraph + 1
        assert paragraph <= 5, f"{page}:{number}: a paragraph of more than five lines"
        last = number


@pytest.mark.parametrize("page", PAGES)
def test_a_tables_head_stands_on_its_rule(page):
    """With a line between them Markdown shows no table."""
    lines = (ROOT / page).read_text().splitlines()
    for number, (above, line) in enumerate(zip(lines, lines[1:], strict=False), start=2):
        if line.startswith("|---"):
            assert above.startswith("|"), f"{page}:{number}: a table without a head"
            assert above.count("|") == line.count("|"), f"{page}:{number}: columns"


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text()):
        assert "://" in link or (ROOT / Path(page).parent / link).exists(), link


def anchors(page):
    """What GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_links_into_pages_lead_to_headings(page):
    for link, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", (ROOT / page).read_text()):
        target = ROOT / Path(page).parent / link if link else ROOT / page
        assert anchor in anchors(target), f"{link}#{anchor}"


def test_the_equation_table_names_what_there_is():
    rows = [line.split("|") for line in (ROOT / "README.md").read_text().splitlines()]
    rows = [row for row in rows if len(row) > 4 and "test_" in row[4]]
    assert len(rows) >= 10
    tests = (ROOT / "tests/test_vitad.py").read_text()
    for *_, code, test, _ in rows:
        for name in re.findall(r"`(\w+)`", code):
            assert hasattr(vitad, name), name
        for name in re.findall(r"`(test_\w+)", test):
            assert f"def {name}" in tests, name
