"""Rules of the house: which file imports which, and what no file may do."""
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = [path for path in (ROOT / "nanomagvlt").rglob("[!_]*.py")]
FILES = [*PACKAGE, *ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")]
ROOMS = ("", "tokenizers", "data", "training", "sampling", "evaluation")  # each imports from itself and from its left


def imported(path: Path) -> set[str]:
    """Full names of all that a file imports, from anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_a_file_imports_from_its_own_folder_and_from_folders_to_its_left():
    for path in PACKAGE:
        *_, folder = ("", *path.relative_to(ROOT / "nanomagvlt").parts[:-1])
        for name in imported(path):
            if name.startswith("nanomagvlt."):
                part = name.split(".")[1]
                assert ROOMS.index(part if part in ROOMS else "") <= ROOMS.index(folder), f"{path} imports {name}"


def test_six_packages_and_no_more():
    allowed = {"torch", "numpy", "PIL", "tqdm", "regex", "ftfy", "nanomagvlt", *sys.stdlib_module_names}
    for path in FILES:
        assert {name.split(".")[0] for name in imported(path)} <= allowed, path


def test_nothing_unsafe_is_called():
    """No code runs from a file: TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD undoes what is not written out."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            unsafe = ("eval", "exec", "pickle.load", "pickle.loads", "torch.jit.load", "yaml.load")
            assert name not in unsafe, f"{path}:{node.lineno}"
            assert all(k.arg != "allow_pickle" for k in node.keywords), f"{path}:{node.lineno}"
            if name == "torch.load":
                options = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert options.get("weights_only") == "True", f"{path}:{node.lineno}"


def test_readable():
    for path in [*FILES, *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text()
        for number, line in enumerate(text.splitlines(), 1):
            assert len(line) <= 120, f"{path}:{number} has {len(line)} columns"
        for node in ast.walk(ast.parse(text)):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            assert not isinstance(node, ast.ExceptHandler) or node.type, f"{where} catches everything"
            if isinstance(node, ast.Call):
                assert not any(k.arg == "strict" and ast.unparse(k.value) == "False" for k in node.keywords), where
                is_lenient = ast.unparse(node.func) == "getattr" and len(node.args) == 3 and path in FILES
                assert not is_lenient, f"{where}: what may be missing, with a default"
            if isinstance(node, ast.FunctionDef) and path in FILES:
                assert node.end_lineno - node.lineno <= 55, f"{path}:{node.name} is long"
