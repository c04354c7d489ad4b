"""What is shipped: the wheel and the source archive, what they need, and what a plain installation can do.

The wheel is built here, from the source archive, without a network. What a plain installation can do is tested on the
unpacked wheel, in processes that see only the packages it needs.
"""

from __future__ import annotations

import ast
import email
import importlib.metadata as installed
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.xdist_group("packaging")  # one wheel, one plain installation
ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "vismem"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# Who may use what, beyond what every installation has.
USES = {
    "analysis": {"app", "eval"},
    "app": {"app"},
    "audit": {"eval"},
    "cli/app.py": {"app"},
    "cli/serve.py": {"serve", "replicas"},
    "data": {"train"},
    "evaluation": {"eval"},
    "pocket": {"pocket"},
    "serving": {"serve", "replicas"},
    "training": {"train"},
}
# Declared but imported nowhere: used by transformers or others, or required by a pin (see pyproject.toml).
UNSEEN = {
    "accelerate",
    "torchvision",
    "antlr4-python3-runtime",
    "latex2sympy2",
    "tensorboard",
    "bitsandbytes",
    "torchao",
}
HEAVY = (
    "bitsandbytes datasets easy_vqa fastapi gradio lmms_eval math_verify matplotlib pandas prometheus_client pyarrow "
    "ray sklearn tensorboard torchao trl uvicorn wandb"
)
LATER = "accelerate peft sympy torch._dynamo torch.distributed.tensor torchvision transformers.modeling_utils"


def requirements(lines: list[str]) -> Iterator[Requirement]:
    """Those of a list, and of the extras of this package that it names."""
    for line in lines:
        found = Requirement(line)
        if canonicalize_name(found.name) == "vismem":
            for extra in sorted(found.extras):
                yield from requirements(EXTRAS[extra])
        else:
            yield found


def names(lines: list[str]) -> set[str]:
    return {canonicalize_name(found.name) for found in requirements(lines)}


# The archives.


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the source archive of this tree, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as found:
        yield found


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    wheel.extractall(folder)
    return folder


def shipped() -> set[str]:
    """The files of the package in this tree."""
    files = (path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if "__pycache__" not in path.parts and path.suffix != ".partial"}


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    found = {name for name in wheel.namelist() if not name.endswith("/")}
    assert {name for name in found if ".dist-info/" not in name} == shipped()
    for name in (
        "py.typed",
        "pocket/weights/base/model.safetensors",
        "pocket/weights/base/tokenizer.json",
        "pocket/weights/memory/vismem.safetensors",
        "cli/configs/Qwen2.5-VL-7B.json",
        "audit/templates/report.html",
        "evaluation/lmms/tasks/multitrust/_multitrust_yaml",
        "app/examples/examples.json",
    ):
        assert f"vismem/{name}" in found
    assert any(re.fullmatch(r"vismem/app/examples/.*\.png", name) for name in found)
    assert sum(each.file_size for each in wheel.infolist()) < 30 * 2**20
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in found)


def test_the_wheels_metadata_is_right(wheel, built):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    says = email.message_from_bytes(wheel.read(name))
    assert (says["Name"], says["License-Expression"]) == ("vismem", "Apache-2.0")
    assert says["Version"] == version_here()
    assert {line.partition(", ")[0] for line in says.get_all("Project-URL")} == set(PROJECT["urls"])
    assert set(says.get_all("Provides-Extra")) == set(EXTRAS)
    plain = {canonicalize_name(r.name) for r in map(Requirement, says.get_all("Requires-Dist")) if not r.marker}
    assert plain == names(PROJECT["dependencies"])
    (points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(points).decode()
    assert "[console_scripts]\nvismem = vismem.cli:main" in text
    assert "[lmms_eval.models]\nvismem = vismem.evaluation.lmms:manifest" in text


def test_the_source_archive_has_all_that_its_tests_and_documents_read(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("src", "tests", "docs", "examples", "benchmarks", "experiments", "configs", "results"):
        here = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file()}
        here = {name for name in here if "__pycache__" not in name and "_cache/" not in name}
        assert not {name for name in here if name not in found and not ignored(name)}
    pages = {"README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "SECURITY.md"}
    assert pages | {".ci/run", "Makefile", "pyproject.toml", "constraints.txt"} <= found
    assert not {name for name in found if name.startswith(("runs/", "dist/", ".venv/"))}


def ignored(name: str) -> bool:
    """What .gitignore excludes in those folders."""
    folders = set(Path(name).parts[:-1])
    return name.endswith(".partial") or bool(folders & {"build", "dist", "runs"}) or ".egg-info/" in name


# A plain installation.

PRELUDE = """
import contextlib, io, json, sys
hidden = set({hidden!r})
class Plain:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Plain(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
sys.path.insert(0, {site!r})
import vismem
assert vismem.__file__.startswith({site!r}), vismem.__file__
"""


def closure(lines: list[str]) -> set[str]:
    """Names of all packages that installing those brings here, and pip's own."""
    found, waiting = {"vismem", "pip", "setuptools"}, [Requirement(line) for line in lines]
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        if name in found and not one.extras:
            continue
        found.add(name)
        try:
            needs = installed.requires(name) or []
        except installed.PackageNotFoundError:
            continue
        for text in needs:
            need = Requirement(text)
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in ("", *one.extras)):
                waiting.append(need)
    return found


@lru_cache(maxsize=1)
def homes() -> dict[str, set[str]]:
    """From a top-level name to the packages here that provide it."""
    found: dict[str, set[str]] = {}
    for package in installed.distributions():
        listed = (package.read_text("top_level.txt") or "").split()  # their files tell too, since not all have one
        parts = [
            file.parts[0] for file in package.files or () if file.suffix in (".py", ".so") and ".." not in file.parts
        ]
        for name in {*listed, *(part.partition(".")[0] for part in parts)}:
            found.setdefault(name, set()).add(canonicalize_name(package.metadata["Name"]))
    return found


def plain_python(site: Path, code: str, tmp_path: Path, *extras: str) -> subprocess.CompletedProcess[str]:
    """Runs code as an installation of the wheel would: other packages of this environment are hidden."""
    shown = closure([*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])])
    hidden = sorted(name for name, packages in homes().items() if not packages & shown)
    prelude = PRELUDE.format(hidden=hidden, site=str(site))
    done = subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def plain(unpacked, tmp_path_factory):
    """What one process of a plain installation finds, from its first import to answers; and the folder it ran in."""
    folder = tmp_path_factory.mktemp("plain")
    picture = next((unpacked / "vismem" / "app" / "examples").glob("*.png"))
    code = f"""
found = {{"torch": "torch" in sys.modules}}
from vismem import *
found["early"] = sorted(set({LATER.split()}) & set(sys.modules))
from vismem.cli import main
from vismem.cli import COMMANDS
def run(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()
found |= {{"version": run("--version"), "help": [run(name, "--help")[0] for name in COMMANDS]}}
found["app"] = run("app", "--no-browser", "--port", "0")
found["serve"] = run("serve", "--port", "0")
found["audit"] = run("audit", "--data", "pocket:late")
found["tables"] = run("eval", "tables", "main", "preset=pocket")
found["sample"] = run("pocket", "sample", "--out", "drawn")
found["train"] = run("train", "stage1", "base=pocket", "data=owner/name", "output_dir=out", "max_steps=1")
found["ask"] = run("ask", {str(picture)!r}, "What does row 1 cost with its promotion?", "--seed", "0")
found["info"] = run("info")
print(json.dumps(found))
"""
    return json.loads(plain_python(unpacked, code, folder).stdout.splitlines()[-1]), folder


def test_imports_wait_until_they_are_needed(plain):
    found, _ = plain
    assert not found["torch"]  # `vismem --help` does not wait for it
    assert found["early"] == []


def test_a_plain_installation_asks_and_says_what_else_needs(plain):
    """The demo, every command's help, and one line that names the extra where a package is lacking."""
    found, folder = plain
    assert found["version"][:2] == [0, f"vismem {version_here()}\n"]
    assert set(found["help"]) == {0}
    extras = {"app": "app", "serve": "serve", "audit": "eval", "tables": "eval", "sample": "pocket", "train": "train"}
    for name, extra in extras.items():
        code, _, err = found[name]
        last = err.strip().splitlines()[-1]
        assert code == 1, (name, err)
        assert re.search(rf"pip install ['\"]vismem\[{extra}\]['\"]", last), (name, err)
    assert not (folder / "drawn").exists() and not (folder / "results").exists()
    assert found["ask"][0] == 0, found["ask"]
    assert "◆short" in found["ask"][1] or "●long" in found["ask"][1]
    assert found["info"][0] == 0
    assert "3,417,632" in found["info"][1]


def test_the_extra_of_evaluation_has_all_that_the_pockets_tables_need(unpacked, tmp_path):
    """Every benchmark of the preset, one question each, with only the packages of `eval`."""
    code = """
from vismem.cli import main
words = ["preset=pocket", "n=1", "limit=1", "max_new_tokens=2", "methods=[{name: vanilla}]"]
print(main(["eval", "tables", "main", *words]))
"""
    assert plain_python(unpacked, code, tmp_path, "eval").stdout.splitlines()[-1] == "0"
    answers = tmp_path / "results" / "evaluation" / "answers" / "vanilla"
    assert len(list(answers.iterdir())) == 8
    pocket, own = ({Requirement(line).name: line for line in EXTRAS[extra]} for extra in ("pocket", "eval"))
    assert all(own[name] == pocket[name] for name in pocket.keys() & own.keys())


def version_here() -> str:
    return re.search(r'__version__ = "(.*)"', (PACKAGE / "__init__.py").read_text(encoding="utf-8"))[1]


def test_nothing_optional_is_loaded_where_everything_is_installed(tmp_path):
    """All extras are installed here, and answering a question imports none of them."""
    picture = str(ROOT / "examples" / "shelf.png")
    code = f"""
import sys
def loaded():
    return set({HEAVY.split()}) & {{name.partition(".")[0] for name in sys.modules}}
# What transformers and peft look into by themselves, wherever it is installed, is theirs.
import peft
from transformers import AutoProcessor, Idefics3ForConditionalGeneration
theirs = loaded()
from vismem import *
from vismem.cli import main
assert main(["ask", {picture!r}, "What does row 1 cost?"]) == 0
print()
print(*sorted(loaded() - theirs), "|", *sorted(loaded()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, _, everything = done.stdout.splitlines()[-1].partition("|")
    assert not ours.split()
    assert not {"gradio", "fastapi", "ray", "lmms_eval", "trl", "tensorboard", "matplotlib"} & {*everything.split()}


# What is declared.


# Parts of another package, which always installs them and exports them under its own name.
PARTS = {"pyarrow": "datasets", "pydantic_core": "pydantic"}


def imported(path: Path) -> set[str]:
    """Top-level names of what a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"vismem"}


def test_what_is_imported_is_declared():
    seen: set[str] = set()
    undeclared: list[str] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).as_posix()
        extras = set().union(*(e for place, e in USES.items() if own == place or own.startswith(f"{place}/")))
        allowed = names(PROJECT["dependencies"] + [line for extra in extras for line in EXTRAS[extra]])
        for name in imported(path):
            if (ROOT / "experiments" / name).exists():  # in a checkout only
                continue
            name = PARTS.get(name, name)
            packages = {canonicalize_name(found) for found in homes().get(name, [name])}
            if not packages & allowed:
                undeclared.append(f"{own} imports {name}, which neither the package nor {sorted(extras)} asks for")
            seen |= packages
    assert not undeclared, "\n".join(sorted(set(undeclared)))
    mine = names([*PROJECT["dependencies"], "vismem[all]"])
    assert mine - seen <= UNSEEN, "declared, but imported nowhere"


def test_extras_are_for_users_or_for_developers():
    """`all` has every extra for users; no extra for users needs a tool of the developers."""
    (all_extras,) = map(Requirement, EXTRAS["all"])
    assert all_extras.extras == set(EXTRAS) - {"all", "dev", "docs"}
    assert not names(EXTRAS["all"]) & names(EXTRAS["dev"] + EXTRAS["docs"])


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_once(python):
    """constraints.txt has one version for each package of each extra, and one that pyproject.toml allows."""
    place = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "extra": ""}
    pins: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(place):
                (exact,) = pin.specifier
                assert exact.operator == "==", line
                assert pins.setdefault(canonicalize_name(pin.name), Version(exact.version)) == Version(exact.version)
    everything = [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
    for needed in requirements(everything):
        if needed.marker is None or needed.marker.evaluate(place):
            name = canonicalize_name(needed.name)
            assert name in pins, f"{needed} has no pin for Python {python}"
            assert needed.specifier.contains(pins[name]), f"{needed}, but constraints.txt has {pins[name]}"


def test_supported_pythons_are_listed():
    said = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert said == set(PYTHONS)
    assert all(SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.0") for python in PYTHONS)
    assert "Typing :: Typed" in PROJECT["classifiers"]
