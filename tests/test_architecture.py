"""The form of the house: which room may import which, and how large things may get."""

import ast
import io
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up: a room imports itself and rooms above it in this list. Rooms in one line do
# not import each other.
FLOORS = (
    ("version", "errors", "escape"),
    ("files", "jsontext"),
    ("jsonl", "pictures"),
    ("config",),
    ("kernels",),
    ("kvcache",),
    ("model",),
    ("weights",),
    ("inputs",),
    ("methods",),
    ("inference",),
    ("engine",),
    ("loader",),
    ("cli", "flops", "distributed"),
    ("world",),
    ("data",),
    ("evaluate",),
    ("train", "benchmark", "doctor"),
)
# Entries are run, not imported.
ENTRIES = ("__main__", "generate", "kernels.report")
CORE = ("kernels", "kvcache", "model", "weights", "inputs", "methods", "inference", "engine")
FUNCTION_LINES, FORWARD_LINES, ENGINE_LINES = 60, 25, 300
CORE_CODE, PACKAGE_CODE, ENTERED_FILES = 6383, 16767, 28


def sources():
    """Every module of the package by its name inside it."""
    folders = {"": ROOT / "nanoglimpse", "kernels": ROOT / "kernels", "weights": ROOT / "weights"}
    for prefix, folder in folders.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [*filter(None, [prefix]), *file.relative_to(folder).with_suffix("").parts]
            yield ".".join(part for part in parts if part != "__init__"), file


@cache
def trees():
    return [(name, ast.parse(file.read_text("utf-8"))) for name, file in sources()]


def floor(name):
    room = name.split(".")[0]
    floors = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert floors, f"{name}: this room has no floor"
    return floors[0]


def imported(tree):
    """Modules of the package that a module imports, and the line of each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are absolute"
            if node.module == "nanoglimpse":
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif (node.module or "").startswith("nanoglimpse."):
                yield node.module.removeprefix("nanoglimpse."), node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("nanoglimpse"):
                    yield alias.name.removeprefix("nanoglimpse").lstrip("."), node.lineno


def is_entry(name):
    return name in ENTRIES or name.endswith("__main__")


@pytest.mark.slow
def test_rooms_import_downwards_only():
    wrong = []
    for name, tree in trees():
        if not name or is_entry(name):
            continue
        own = name.split(".")[0]
        for other, line in imported(tree):
            room = other.split(".")[0]
            if room != own and floor(other) >= floor(name):
                wrong.append(f"{name}, line {line}, imports {other}")
    assert not wrong


def test_nothing_hides_an_import_to_break_a_circle():
    """Imports inside functions are for packages that are slow or may be missing, never ours."""
    # These import Triton.
    lazy = {
        ("kernels.backends", "kernels.triton_ops.registry"),
        ("kernels.report", "doctor.resources"),
    }
    wrong = []
    for name, tree in trees():
        assert "TYPE_CHECKING" not in {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                found = [(name, other) for other, _ in imported(function)]
                wrong += [pair for pair in found if pair not in lazy]
    assert not wrong


def test_no_two_rooms_import_each_other():
    """Not even inside one floor: the modules of the package have an order."""
    graph = {name: {other for other, _ in imported(tree)} for name, tree in trees()}
    names = set(graph)
    graph = {
        name: {next((m for m in (o, o.rpartition(".")[0]) if m in names), o) for o in others}
        for name, others in graph.items()
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done or name not in graph:
            return
        path.append(name)
        for other in sorted(graph[name] - {name, ""}):
            visit(other)
        done.add(path.pop())

    for name in sorted(names - {""}):
        visit(name)


@cache
def code_lines(file):
    """Lines that hold a token, without docstrings, comments and blank lines."""
    source = file.read_text("utf-8")
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout | {tokenize.ENDMARKER}:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_sizes():
    """Of the core, of the package, of engine.py: what later changes must keep."""
    sizes = {name: code_lines(file) for name, file in sources()}
    core = sum(n for name, n in sizes.items() if name.split(".")[0] in CORE)
    assert core <= CORE_CODE
    assert sum(sizes.values()) <= PACKAGE_CODE
    engine = (ROOT / "nanoglimpse" / "engine.py").read_text("utf-8")
    assert len(engine.splitlines()) <= ENGINE_LINES


@pytest.mark.slow
def test_functions_are_short():
    """Kernels apart, and functions that declare the options of a command line."""
    wrong = []
    for name, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or name.startswith("kernels.triton_ops"):
                continue
            size = node.end_lineno - node.lineno + 1
            if node.name == "forward" and size - documented(node) > FORWARD_LINES:
                wrong.append(f"{name}.forward: {size}")
            options = "parser" in node.name or "add_" in node.name or "options" in node.name
            if size > FUNCTION_LINES and not options:
                wrong.append(f"{name}.{node.name}: {size}")
    assert not wrong


def documented(function):
    """Lines of a function's docstring."""
    first = function.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first.end_lineno - first.lineno + 1 if is_text else 0


LOADED = """
import sys
import nanoglimpse
print(*[name for name in sys.modules if name.startswith("nanoglimpse")])
entered = set()

def profile(frame, event, arg):
    if event == "call":
        entered.add(frame.f_code.co_filename)

engine = nanoglimpse.load("nano")
picture = sys.argv[1]
sys.setprofile(profile)
engine.ask(picture, "Which number does the diamond show?")
sys.setprofile(None)
print(*[name for name in sys.modules if name.startswith("nanoglimpse")])
folders = ("nanoglimpse", "kernels", "weights")
print(*[f for f in entered if any(f"{sys.argv[2]}/{folder}/" in f for folder in folders)])
"""


@pytest.fixture(scope="module")
def answer():
    picture = ROOT / "weights" / "nano" / "examples" / "scene_000003.png"
    command = [sys.executable, "-c", LOADED, str(picture), str(ROOT)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_an_answer_loads_nothing_of_the_upper_floors(answer):
    for loaded in answer[:2]:
        rooms = {name.split(".")[1] for name in loaded if "." in name}
        assert not rooms & {"serve", "evaluate", "train", "world", "benchmark", "data", "cli"}
        assert rooms >= {"model", "kvcache", "inference", "kernels"}


@pytest.mark.slow
def test_an_answer_enters_few_files(answer):
    assert 0 < len(answer[2]) <= ENTERED_FILES


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tests", "bench", "README"])
def test_a_checkout_is_not_part_of_the_package(name):
    code = f"import nanoglimpse.{name}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert f"No module named 'nanoglimpse.{name}'" in done.stderr


# A path is written by `files` alone. These methods write, of a path or of `os` and `shutil`.
WRITING = {"write_text", "write_bytes", "rename", "unlink", "mkdir", "makedirs", "touch", "rmdir"}
WRITING |= {"rmtree", "copy2", "copyfile", "copytree", "move", "save_file"}
OF_SYSTEM = {"os.replace", "os.remove", "os.truncate", "shutil.copy"}
# Objects of ours with a `save` of their own.
SAVED = {"session", "self.session", "task"}


def writes(tree):
    """Calls that write to a path, by line."""
    nodes = list(ast.walk(tree))
    buffers = {name for n in nodes if isinstance(n, ast.Assign) for name in buffers_of(n)}
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    return {node.lineno: ast.unparse(node) for node in calls if is_write(node, buffers)}


def buffers_of(node):
    """Names that an assignment gives to a BytesIO, by itself or among others."""
    names, values = node.targets[0], node.value
    pairs = [(names, values)]
    if isinstance(names, ast.Tuple) and isinstance(values, ast.Tuple):
        pairs = zip(names.elts, values.elts, strict=True)
    return [ast.unparse(name) for name, value in pairs if ast.unparse(value) == "io.BytesIO()"]


def is_write(node, buffers):
    name, text = ast.unparse(node.func), ast.unparse(node)
    owner, _, method = name.rpartition(".")
    given = [*node.args, *(key.value for key in node.keywords)]
    if method == "save" and owner:
        return owner not in SAVED and not {ast.unparse(value) for value in given} & buffers
    if method == "open":
        modes = [str(v.value) for v in given if isinstance(v, ast.Constant)]
        opens = any(set(m) <= set("rwxabt+") and set(m) & set("wxa+") for m in modes if m)
        return opens or ("os.O_WRONLY" in text and "os.devnull" not in text)
    if method == "replace" and owner and len(given) == 1:  # that of a text has two arguments
        return True
    return method in WRITING or name in OF_SYSTEM


def test_only_files_writes_paths():
    wrong = [
        f"{name}, line {line}: {call}"
        for name, tree in trees()
        if name != "files"
        for line, call in writes(tree).items()
    ]
    assert not wrong


@pytest.mark.parametrize(
    "line",
    [
        "path.write_text('x')",
        "path.write_bytes(b'x')",
        "open(path, 'w')",
        "open(path, mode='ab')",
        "path.open('a')",
        "os.replace(a, b)",
        "path.replace(other)",
        "image.save(path)",
        "image.save(path, 'PNG')",
        "torch.save(state, path)",
        "save_file(tensors, path)",
        "os.open(path, os.O_WRONLY)",
        "shutil.copytree(a, b)",
    ],
)
def test_a_write_is_found(line):
    assert writes(ast.parse(line))


@pytest.mark.parametrize(
    "line", ["text.replace('a', 'b')", "data = io.BytesIO()\nimage.save(data, 'PNG')", "open(path)"]
)
def test_what_does_not_write_is_allowed(line):
    assert not writes(ast.parse(line))


def test_nothing_is_copied_to_a_device_but_by_upload():
    """A copy from pageable memory waits for the GPU; `kernels.varlen.upload` does not."""
    for name, tree in trees():
        if name.split(".")[0] in CORE and name != "kernels.varlen":
            for node in ast.walk(tree):
                made = isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.tensor"
                placed = made and any(key.arg == "device" for key in node.keywords)
                assert not placed, f"{name}: line {node.lineno} needs upload"
