"""The documentation: what it tells you to run runs, and what it says about the code is true."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import json
import re
import sys
from importlib import import_module
from pathlib import Path

import documents
import pytest
import yaml
from documents import DOCS, PAGES, ROOT, Block, blocks, command_lines

import vismem
from vismem.backbones import FAMILIES
from vismem.cli import COMMANDS
from vismem.config import VisMemConfig

ELSEWHERE = ("curl", "git", "cd", "ls", "mkdir")  # programs that are not ours to check


# Code in the pages.


def pages_with(*languages: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, *languages)]


@pytest.mark.parametrize("page", pages_with("python"), ids=documents.name)
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page share their names and run in a folder of their own, on the pocket model."""
    monkeypatch.chdir(tmp_path)
    documents.write_files(tmp_path, page)
    known: dict = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        code = compile(block.text, str(block), "exec")
        check_names(block)
        if block.reason is None:
            exec(code, known)


def check_names(block: Block) -> None:
    """Every name of the package that a block mentions exists."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vismem":
            for alias in node.names:
                found(f"{node.module}.{alias.name}", block)
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "vismem":
                    import_module(alias.name)
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if re.fullmatch(r"vismem(\.\w+)+", dotted):
                found(dotted, block)


def found(dotted: str, where: object) -> object:
    """The object of a dotted name."""
    parts, thing = dotted.split("."), vismem
    for depth, part in enumerate(parts[1:], 2):
        if not hasattr(thing, part):
            with contextlib.suppress(ModuleNotFoundError):
                import_module(".".join(parts[:depth]))
        assert hasattr(thing, part), f"{where}: there is no {dotted}"
        thing = getattr(thing, part)
    return thing


@pytest.mark.parametrize("page", pages_with("bash"), ids=documents.name)
def test_command_lines_are_understood(page, tmp_path, monkeypatch):
    """Every command line is parsed by the command's own parser, and its settings are read; nothing is run."""
    monkeypatch.chdir(tmp_path)
    documents.write_files(tmp_path, page)
    for block in blocks(page, "bash"):
        for words in command_lines(block):
            check_command(words, f"{block}: {' '.join(words)}")
        for inner in re.findall(r"\$\((vismem [^)]*)\)", block.text):
            check_command(inner.split(), f"{block}: {inner}")


def check_command(words: list[str], where: str) -> None:
    """Checks the parts of a command line that are ours."""
    if "-m" in words and words[words.index("-m") + 1] == "vismem.cli":
        for option in ("--config_file",):
            if option in words:
                assert Path(words[words.index(option) + 1]).is_file(), where
        return check_command(["vismem", *words[words.index("-m") + 2 :]], where)
    if words[0] == "taskset":
        return check_command(words[3:], where)
    program, rest = Path(words[0]).name, words[1:]
    if program == "vismem":
        return check_ours(rest, where)
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
        assert {word for word in rest if "=" not in word} <= targets, where
    elif program == "pip":
        check_wheel(rest, where)
    elif program.startswith("python"):
        check_python(rest, where)
    elif program == "lmms-eval" or words[:2] == ["accelerate", "launch"]:
        check_model_arguments(words, where)
    else:
        assert program in ELSEWHERE, f"{where}: what is {program}?"


def check_ours(words: list[str], where: str) -> None:
    """Parses a `vismem` line; for training and tables also reads its settings."""
    command, rest = words[0], words[1:]
    assert command in COMMANDS, where
    try:
        options = import_module(f"vismem.cli.{command}").parse(rest)
    except Exception as error:
        raise AssertionError(f"{where}: {error}") from error
    if command == "train":
        from vismem.training.arguments import STAGES, arguments_for, load_settings

        layers = load_settings(options.file, options.changes)
        for stage in STAGES if options.stage == "all" else (options.stage,):
            arguments_for(stage, layers, use_cpu=True, bf16=False)
    if command == "eval" and options.step == "tables":
        from vismem.evaluation.settings import load_settings as evaluation_settings

        evaluation_settings(options.file, options.changes)


def check_wheel(words: list[str], where: str) -> None:
    """What pip is to install: the extras exist, the wheel has this version."""
    text = " ".join(words)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2], re.M))
    for named in re.findall(r"\[([a-z,]+)\]", text):
        assert set(named.split(",")) <= extras, where
    for version in re.findall(r"vismem-(\d[^-]*)-", text):
        assert version == vismem.__version__, where


def check_python(words: list[str], where: str) -> None:
    """A script or a module of the repository exists."""
    if words[:1] == ["-m"]:
        if words[1] == "vismem.data.converters":
            from vismem.data.converters import main

            with pytest.raises(SystemExit) as stop:
                main([words[2], "--help"])
            assert stop.value.code == 0, where
        else:
            files = [word for word in words[2:] if word.startswith("tests/")]
            assert words[1] in ("pytest", "build", "http.server") and all((ROOT / file).exists() for file in files), (
                where
            )
    else:
        assert (ROOT / words[0]).is_file(), where


def check_model_arguments(words: list[str], where: str) -> None:
    """The model arguments of an lmms-eval line are arguments of our plug-in."""
    from vismem.loading import load_model

    tree = ast.parse((ROOT / "src/vismem/evaluation/lmms/model.py").read_text(encoding="utf-8"))
    (chat,) = (node for node in tree.body if getattr(node, "name", "") == "VisMemChat")
    made = next(node for node in chat.body if getattr(node, "name", "") == "__init__")
    known = {argument.arg for argument in made.args.args} | set(inspect.signature(load_model).parameters)
    given = words[words.index("--model_args") + 1]
    assert {pair.partition("=")[0] for pair in given.split(",")} <= known, where


@pytest.mark.parametrize("page", pages_with("yaml", "json"), ids=documents.name)
def test_files_are_read(page, tmp_path, monkeypatch):
    """Settings are loaded by their command, rows by the data reader."""
    from vismem.data import load_dataset_rows
    from vismem.evaluation.settings import load_settings as evaluation_settings
    from vismem.training.arguments import STAGES, arguments_for, load_settings

    monkeypatch.chdir(tmp_path)
    documents.write_files(tmp_path, page)
    for number, block in enumerate(blocks(page, "yaml", "json")):
        path = tmp_path / (block.title or f"{number}.{'jsonl' if block.language == 'json' else 'yaml'}")
        path.write_text(block.text, encoding="utf-8")
        if block.language == "json":
            lines = [json.loads(line) for line in block.text.splitlines()]
            rows = load_dataset_rows(str(path), strict=True)
            assert [rows[index].id for index in range(len(lines))] and len(rows) == len(lines), str(block)
            continue
        values = yaml.safe_load(block.text)
        if "benchmarks" in values:
            evaluation_settings(path, [])
        elif "include" in values:  # a task of lmms-eval
            assert set(values) >= {"task", "dataset_path"}, str(block)
        else:
            layers = load_settings(path, [])
            for stage in STAGES:
                arguments_for(stage, layers, use_cpu=True, bf16=False, output_dir=str(tmp_path / "out"))


def test_links_of_the_readme_lead_somewhere():
    """On a code host its links are to files, and to headings in them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"(?:\]\(|src=\")([^)\s\"]+)", text):
        if ":" in target:
            continue
        file, _, anchor = target.partition("#")
        path = ROOT / file if file else ROOT / "README.md"
        assert path.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, target


def test_not_run_comments_stand_before_python_blocks():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        marked = sum(block.reason is not None for block in blocks(page, "python"))
        assert text.count("\n<!-- not run:") == marked, f"{page}: a comment that is not before a Python block"


# What pages say of the code.


def rows_of(page: str, columns: int) -> list[list[str]]:
    """Returns the cells of all tables of a page with that many columns, without separator rows."""
    lines = [line for line in (DOCS / page).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if len(row) == columns and not set("".join(row)) <= set("-")]


CODE_LINK = re.compile(r"\]\((?P<file>[^)\s#]*(?:src|tests)/[^)\s#]*\.py)(?:#(?P<name>[\w.]+))?\)")


def test_links_to_code_lead_to_objects_and_tests():
    """Links such as `../src/vismem/tokens.py#MemoryTokens.forbid` lead to what they name, in `tests/` too."""
    links = [(page, match["file"], match["name"]) for page in PAGES for match in CODE_LINK.finditer(page.read_text())]
    assert len(links) > 100
    for page, file, name in links:
        path = (page.parent / file).resolve()
        where = f"{page.name}: {file}#{name}"
        assert path.is_file(), where
        if name and path.is_relative_to(ROOT / "tests"):
            assert re.search(rf"^ *def {name}\(", path.read_text(encoding="utf-8"), re.M), where
        elif name:
            module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
            owner, _, attribute = name.partition(".")
            assert hasattr(import_module(module), owner), where
            if attribute:
                assert is_part(getattr(import_module(module), owner), attribute), where


def test_every_equation_has_its_formula_its_code_and_its_test():
    """Equations 3 to 15 of the paper, each in a section of the method's page."""
    sections = re.split(r"^##+ ", (DOCS / "method.md").read_text(encoding="utf-8"), flags=re.M)
    found = set()
    for section in sections:
        if numbers := re.match(r".*\(Eq\. (\d+)(?:-(\d+))?\)\n", section):
            first, last = int(numbers[1]), int(numbers[2] or numbers[1])
            found |= set(range(first, last + 1))
            for part in ("$$\n", "- **Code** [", "- **Test** [`test_"):
                assert part in section, numbers[0]
    assert found == set(range(3, 16))


def test_equations_are_valid_latex():
    """Each one is converted as the site converts it."""
    from latex2mathml.converter import convert  # of the extra `docs`

    equations = [
        equation.strip()
        for page in PAGES
        for text in re.split(r"^```.*?^```[^\n]*$", page.read_text(encoding="utf-8"), flags=re.M | re.S)[::2]
        for equation in re.findall(r"^\$\$$(.*?)^\$\$$", text, re.M | re.S)
    ]
    assert len(equations) >= 11
    for equation in equations:
        rendered = convert(equation, display="block")
        assert rendered.startswith("<math") and "\\" not in rendered, f"not understood: {equation}"
        assert "<mi>&</mi>" not in rendered, f"an environment that is not understood: {equation}"


def is_part(owner: type, name: str) -> bool:
    """Returns whether a class has a method or field of that name, or sets it in its `__init__`."""
    if hasattr(owner, name) or name in getattr(owner, "__dataclass_fields__", {}):
        return True
    source = Path(sys.modules[owner.__module__].__file__).read_text(encoding="utf-8")
    body = next(node for node in ast.walk(ast.parse(source)) if getattr(node, "name", "") == owner.__name__)
    return f"self.{name}" in ast.unparse(body)


def test_every_setting_is_in_the_configuration_page():
    from transformers import TrainingArguments

    from vismem.evaluation.settings import Benchmark, EvaluationSettings, Method
    from vismem.training.arguments import MemoryTrainingArguments

    said = {
        name: row[1:]
        for columns in (2, 3, 4, 5)
        for row in rows_of("configuration.md", columns)
        for name in re.findall(r"`(\w+)`", row[0])
    }
    inherited = {each.name for each in dataclasses.fields(TrainingArguments)}
    for kind in (VisMemConfig, MemoryTrainingArguments):
        for each in dataclasses.fields(kind):
            if kind is MemoryTrainingArguments and each.name in inherited:
                continue
            assert each.name in said, f"configuration.md lacks {each.name} of {kind.__name__}"
            if isinstance(each.default, (bool, int, float)) or each.default not in ("", None):
                shown = said[each.name][0].strip("`")
                if isinstance(each.default, (bool, int, float, str)):
                    assert shown.lower() == str(each.default).lower(), f"{each.name}: {shown} is not {each.default}"
    for kind in (EvaluationSettings, Method, Benchmark):
        assert {each.name for each in dataclasses.fields(kind)} <= set(said), kind.__name__


def test_every_command_and_family_has_its_place():
    helps = re.findall(r"^<!-- help: vismem ?(.*) -->$", (DOCS / "cli.md").read_text(encoding="utf-8"), re.M)
    assert {each.split()[0] for each in helps if each} == set(COMMANDS)
    models = (DOCS / "models.md").read_text(encoding="utf-8")
    assert all(f"`{kind}`" in models for family in FAMILIES for kind in family.model_types)


def test_figures_are_those_that_the_scripts_draw(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    for name in ("mechanism", "sequence", "stages"):
        drawn = import_module(f"draw_{name}").draw().svg()
        kept = (DOCS / "images" / f"{name}.svg").read_text(encoding="utf-8")
        assert drawn == kept, f"run `make figures`: {name}.svg is old"
