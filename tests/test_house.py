"""The house as docs/design.md states it: imports go down its floors, files import in no circle, nothing is hidden.

The checkers read the source and run nothing: import statements, those inside functions and under TYPE_CHECKING
included; and the lengths of files, classes and functions.
"""

import ast
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prunetrain_kernels.graph import Flow, rules
from tests import times

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/design.md"
PACKAGE = "prunetrain_kernels"
OUTSIDE = ("bench", "plots")


@dataclass(frozen=True)
class Import:
    """One file of the project that imports another; `hidden` where only type checkers see the import."""

    importer: str
    imported: str
    line: int
    hidden: bool


def floors(page: str) -> dict[str, int]:
    """Every room and the floor that the page's table puts it on; 0 is the ground."""
    section = page.split("\n## 3. ", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", section, re.MULTILINE)
    return {room: int(floor) for floor, rooms in rows for room in re.findall(r"`([\w./]+)`", rooms)}


def room_of(file: str) -> str:
    """A folder or single file of the package, or a folder beside it: `prune`, `errors.py`, `bench`."""
    top, _, below = file.partition("/")
    return below.partition("/")[0] if top == PACKAGE else top


def sources(root: Path) -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    paths = (path for folder in (PACKAGE, *OUTSIDE) for path in sorted((root / folder).rglob("*.py")))
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imports(root: Path) -> list[Import]:
    """All imports of one file of the project by another, wherever in the file they stand."""
    modules = sources(root)
    statements = []
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        hidden = {id(node) for guard in _statements(tree) if _is_guard(guard) for node in _statements(guard)}
        for node in _statements(tree):
            for name in _names(node, module if path.name == "__init__.py" else module.rpartition(".")[0]):
                imported = name if name in modules else name.rpartition(".")[0]  # a module, or something in one
                if imported in modules and imported != module:
                    files = (modules[each].relative_to(root).as_posix() for each in (module, imported))
                    statements.append(Import(*files, getattr(node, "lineno", 0), id(node) in hidden))
    return statements


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement inside a node; expressions, of which there are many more, are not looked into."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield child
            yield from _statements(child)


def _is_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _names(node: ast.AST, package: str) -> Iterator[str]:
    """The dotted names that an import statement may stand for; relative ones are resolved against `package`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        above = parts[: len(parts) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)


def upward(statements: list[Import], floor: Mapping[str, int]) -> list[str]:
    """Imports of a room that does not lie on a lower floor, in words."""
    faults = []
    for each in statements:
        rooms = [room_of(file) for file in (each.importer, each.imported)]
        below, above = (floor.get(room) for room in rooms[::-1])
        if rooms[0] != rooms[1] and (below is None or above is None or below >= above):
            faults.append(f"{each.importer}, line {each.line}: {rooms[0]} ({above}) imports {rooms[1]} ({below})")
    return faults


def circles(statements: list[Import]) -> list[frozenset[str]]:
    """Largest sets of files in which each imports all the others, directly or through others."""
    reach = {
        file: {each.imported for each in statements if each.importer == file}
        for file in {i.importer for i in statements}
    }
    changed = True
    while changed:
        changed = False
        for file, seen in reach.items():
            more = set().union(*(reach.get(each, set()) for each in seen)) - seen
            changed |= bool(more)
            reach[file] = seen | more
    rings = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in reach if a in reach[a]}
    return sorted(rings, key=sorted)


# Longest that a file, a class and a function may be, in lines.
FILE_LINES, CLASS_LINES, FUNCTION_LINES = 700, 250, 60
# Operators with their kernels stand in one file each, so that a kernel can be read beside its reference.
LONG_FILES = {"prunetrain_kernels/ops/conv2d.py"}
# Functions that do nothing but add options to a parser: as long as the options are many.
OPTION_TABLES = {"prunetrain_kernels/cli.py: _add_train"}


def too_long(text: str, file: str) -> list[str]:
    """A file itself, and its classes and functions, of more lines than they may have, decorators not counted.

    Args:
        text: the file's source.
        file: its name, with which every entry begins: "a.py", or "a.py: function".
    """
    names = [file] if len(text.splitlines()) > FILE_LINES else []
    for node in _statements(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            limit = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
            if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > limit:
                names.append(f"{file}: {node.name}")
    return names


def attributes_of_flow(text: str) -> list[str]:
    """The attributes of a `flow` that a file reads or writes and that are no methods, as source."""
    attributes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    of_flow = [each for each in attributes if isinstance(each.value, ast.Name) and each.value.id == "flow"]
    public = {name for name in dir(Flow) if not name.startswith("_")}
    return [ast.unparse(each) for each in of_flow if each.attr not in public or not isinstance(each.ctx, ast.Load)]


# -- the project -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project_imports() -> list[Import]:
    return imports(ROOT)


@pytest.fixture(scope="module")
def floor() -> dict[str, int]:
    return floors(PAGE.read_text(encoding="utf-8"))


def test_every_room_has_a_floor(floor: dict[str, int]) -> None:
    rooms = {room_of(path.relative_to(ROOT).as_posix()) for path in sources(ROOT).values()}
    assert rooms - set(floor) == set(), "rooms that the table of docs/design.md, section 3, does not name"


def test_imports_go_down(project_imports: list[Import], floor: dict[str, int]) -> None:
    assert len(project_imports) > 500
    assert upward(project_imports, floor) == []


def test_no_circle_of_files(project_imports: list[Import]) -> None:
    assert [sorted(ring) for ring in circles(project_imports)] == []


def test_no_import_is_hidden_from_those_who_run_the_code(project_imports: list[Import]) -> None:
    assert [f"{i.importer}, line {i.line}, imports {i.imported}" for i in project_imports if i.hidden] == []


def test_rules_touch_a_flow_only_through_its_methods() -> None:
    files = [path for path in (ROOT / PACKAGE).rglob("*.py") if "flow: Flow" in path.read_text(encoding="utf-8")]
    names = {path.name for path in files}
    assert {"functions.py", "shapes.py", "layers.py", "rules.py", "batch_norm.py", "branches.py"} <= names
    rules_of = {path: path.read_text(encoding="utf-8") for path in files if path.name not in ("walk.py", "direct.py")}
    assert {path.name: reached for path, text in rules_of.items() if (reached := attributes_of_flow(text))} == {}


def test_files_classes_and_functions_are_short() -> None:
    paths = [path for folder in (PACKAGE, *OUTSIDE, "tests") for path in (ROOT / folder).rglob("*.py")]
    files = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    long = {name for file, text in files.items() for name in too_long(text, file)}
    assert long == LONG_FILES | OPTION_TABLES, "split what is too long; take from the lists what no longer is"


def test_flags_are_keywords_by_ruffs_rules() -> None:
    """Ruff looks for positional booleans everywhere but in the files that pyproject.toml names."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    assert "FBT" in settings["select"]
    exempt = [name for name, rules in settings["per-file-ignores"].items() if "FBT" in rules]
    assert not [name for name in exempt if name.startswith(OUTSIDE)]


# -- pages -------------------------------------------------------------------------------------------------------------


PAGES = [PAGE, ROOT / "docs/README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench/README.md", ROOT / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"({path.name}" not in index] == ["README.md"]


def test_sections_of_the_design_that_the_code_names_are_there() -> None:
    headings = set(re.findall(r"^## (\d+)\. ", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    folders = (PACKAGE, *OUTSIDE, "tests")
    texts = [path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py")]
    named = {number for text in texts for number in re.findall(r"design,? section (\d+)", text)}
    assert named
    assert named <= headings


def test_make_help_names_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())  # type: ignore[index]
    assert targets == set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))
    assert targets == set(re.findall(r"^#   make ([a-z-]+) ", text, re.MULTILINE))


def test_the_quick_tests_are_there() -> None:
    lines = (ROOT / "tests/quick.txt").read_text(encoding="utf-8").splitlines()
    names = [line for line in lines if not line.startswith("#")]
    assert names
    for name in names:
        path, _, function = name.partition("::")
        assert (ROOT / path).exists(), name
        assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8") or not function, name


def test_the_long_tests_are_there() -> None:
    """A test that was renamed would run in `make test` again, whatever it takes."""
    texts: dict[str, str] = {}
    for name in times.read_list():
        path, _, case = name.partition("::")
        function = case.partition("[")[0]
        text = texts.setdefault(path, (ROOT / path).read_text(encoding="utf-8"))
        assert f"def {function}(" in text, f"{name}: make test-all, then python -m tests.times"
    assert texts


def test_what_is_long_is_chosen_by_its_time() -> None:
    seconds = {
        "t.py::a[1]": 2.0,
        "t.py::a[2]": 1.0,
        "t.py::a[3]": 0.1,
        "t.py::b": 2.0,
        "t.py::c": 9.0,
        "t.py::d[x]": 0.6,
    }
    assert times.chosen(seconds).keys() == {"t.py::a[1]", "t.py::a[2]", "t.py::c"}
    always = sorted(times.ALWAYS)[0]
    assert not times.chosen({always: 1000.0})


def test_the_walk_through_a_rule_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code blocks of CONTRIBUTING.md's first walk, put together, are a rule and a test that passes."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    walk = page.split("## Walk: a rule for a module")[1].split("\n## ")[0]
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^(?: {4,}.*)?\n)+", walk, re.MULTILINE)]
    parts = ("class Scale2d", "def _scale2d", "def test_")
    code = "".join(block for part in parts for block in blocks if part in block)
    monkeypatch.syspath_prepend(ROOT / "tests/prune")
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    namespace["test_a_factor_per_channel_is_cut_with_its_space"]()


# -- the checker itself ------------------------------------------------------------------------------------------------


HOUSE = """# Design

## 3. The house

| floor | rooms | |
|---|---|---|
| 2 | `bench` | |
| 1 | `train`, `nn` | |
| 0 | `errors.py` | |

## 4. More

| 3 | `attic.py` | a table of another section |
"""


def planted(root: Path, more: Mapping[str, str] | None = None) -> list[Import]:
    """Imports of a small sound project, with `more` files beside its own or in their place."""
    files = {
        "prunetrain_kernels/errors.py": "",
        "prunetrain_kernels/train/__init__.py": "from prunetrain_kernels.train.loop import run\n",
        "prunetrain_kernels/train/loop.py": "from prunetrain_kernels import errors\nrun = errors\n",
        "prunetrain_kernels/nn/fuse.py": "from ..errors import x\n",
        "bench/rows.py": "import typing\nimport prunetrain_kernels.train.loop\n",
    }
    for name, text in (files | dict(more or {})).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return imports(root)


def test_a_sound_project_has_no_faults(tmp_path: Path) -> None:
    statements = planted(tmp_path)
    assert {(i.importer, i.imported) for i in statements} == {
        ("prunetrain_kernels/train/__init__.py", "prunetrain_kernels/train/loop.py"),
        ("prunetrain_kernels/train/loop.py", "prunetrain_kernels/errors.py"),
        ("prunetrain_kernels/nn/fuse.py", "prunetrain_kernels/errors.py"),
        ("bench/rows.py", "prunetrain_kernels/train/loop.py"),
    }
    assert upward(statements, floors(HOUSE)) == []
    assert circles(statements) == []
    assert not any(each.hidden for each in statements)


@pytest.mark.parametrize(
    "text",
    [
        "from prunetrain_kernels.train.loop import run\n",
        "import prunetrain_kernels.train.loop as loop\n",
        "from .train import loop\n",
        "def f():\n    from prunetrain_kernels.train import loop\n    return loop\n",
        "try:\n    import bench.rows\nexcept ImportError:\n    pass\n",
    ],
)
def test_a_planted_upward_import_is_a_fault(text: str, tmp_path: Path) -> None:
    statements = planted(tmp_path, {"prunetrain_kernels/errors.py": text})
    assert [fault.split(",")[0] for fault in upward(statements, floors(HOUSE))] == ["prunetrain_kernels/errors.py"]


def test_a_room_of_the_same_floor_and_one_without_a_floor_are_faults(tmp_path: Path) -> None:
    statements = planted(
        tmp_path,
        {
            "prunetrain_kernels/nn/fuse.py": "from prunetrain_kernels.train import loop\n",
            "prunetrain_kernels/attic.py": "from prunetrain_kernels import errors\n",
        },
    )
    faults = upward(statements, floors(HOUSE))
    assert [fault.split(",")[0] for fault in faults] == ["prunetrain_kernels/attic.py", "prunetrain_kernels/nn/fuse.py"]


@pytest.mark.parametrize("late", [False, True])
def test_a_planted_circle_is_a_fault(late: bool, tmp_path: Path) -> None:
    text = "from bench.suites import cases\n"
    statements = planted(
        tmp_path,
        {
            "bench/suites/kernels.py": f"def run():\n    {text}" if late else text,
            "bench/suites/cases.py": "from bench.suites.shapes import a\n",
            "bench/suites/shapes.py": "from bench.suites.kernels import run\n",
        },
    )
    assert circles(statements) == [frozenset(f"bench/suites/{name}.py" for name in ("kernels", "cases", "shapes"))]


@pytest.mark.parametrize("guard", ["TYPE_CHECKING", "typing.TYPE_CHECKING", "not TYPE_CHECKING", "TYPE_CHECKING or x"])
def test_a_planted_hidden_import_is_a_fault(guard: str, tmp_path: Path) -> None:
    text = f"if {guard}:\n    import pandas\n    from prunetrain_kernels.train.loop import run\n"
    statements = planted(tmp_path, {"bench/rows.py": text})
    assert [(i.imported, i.hidden) for i in statements if i.importer == "bench/rows.py"] == [
        ("prunetrain_kernels/train/loop.py", True)
    ]


@pytest.mark.parametrize("line", ["flow.layers[name] = x", "x = flow.ids.frozen", "flow.passes = x"])
def test_a_planted_rule_that_reaches_into_a_flow_is_a_fault(line: str) -> None:
    text = (
        f"def rule(flow: Flow, node, name, module):\n    {line}\n    return flow.passes(node) and other(flow, node)\n"
    )
    assert len(attributes_of_flow(text)) == 1


@pytest.mark.parametrize(
    ("lines", "kind"),
    [(FILE_LINES, "file"), (CLASS_LINES, "class"), (FUNCTION_LINES, "function"), (FUNCTION_LINES, "method")],
)
def test_a_planted_long_file_class_or_function_is_a_fault(lines: int, kind: str) -> None:
    def planted_text(count: int) -> str:
        if kind == "file":
            return "x = 1\n" * count
        head = "class Long:" if kind == "class" else "async def long():" if kind == "function" else "def long(self):"
        body = head + "\n" + "    x = 1\n" * (count - 1)
        return "class Outer:\n" + textwrap.indent(body, "    ") if kind == "method" else "@decorator\n" + body

    name = {"file": "a.py", "class": "a.py: Long"}.get(kind, "a.py: long")
    assert too_long(planted_text(lines), "a.py") == []
    assert too_long(planted_text(lines + 1), "a.py") == [name]


def test_a_hidden_import_closes_a_circle_too(tmp_path: Path) -> None:
    text = "if TYPE_CHECKING:\n    from prunetrain_kernels.train import loop\n"
    assert len(circles(planted(tmp_path, {"prunetrain_kernels/errors.py": text}))) == 1
