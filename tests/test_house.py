"""Rules of the house: who imports whom, and what no file may do."""
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = {path.stem: path for path in (ROOT / "nanomagvlt").glob("[!_]*.py")}
FILES = [*PACKAGE.values(), *ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")]

MAY_IMPORT = {
    "config": "masking", "masking": "", "bpe": "files", "shapes": "", "vqloss": "files", "chance": "", "files": "",
    "sequence": "config", "vqgan": "config", "argvlt": "chance objectives sequence masking",
    "model": "config sequence", "objectives": "sequence masking", "decode": "chance sequence masking",
    "readers": "chance shapes", "data": "bpe chance files readers",
    "checkpoint": "bpe config files model vqgan", "published": "bpe checkpoint config model vqgan",
    "metrics": "shapes chance data edit sequence", "captions": "files", "field": "", "inception": "files",
    "photos": "chance data readers", "chunks": "files",
    "protocols": "bpe captions chance checkpoint chunks clip data edit field files generate inception photos",
    "compare": "files", "speed": "argvlt config decode model sequence",
    "clip": "bpe", "edit": "bpe", "watch": "bpe decode model sequence",
    "parallel": "", "budget": "bpe config loop model parallel sequence speed update",
    "update": "argvlt bpe chance config data loop model objectives parallel sequence speed",
    "loop": "config", "vqtrain": "chance checkpoint config data loop model shapes vqgan vqloss",
    "generate": "argvlt bpe checkpoint config data decode model published sequence vqgan",
}


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


def test_who_imports_whom():
    assert set(MAY_IMPORT) == set(PACKAGE)
    for room, path in PACKAGE.items():
        ours = {name.split(".")[1] for name in imported(path) if name.startswith("nanomagvlt.")}
        assert ours <= set(MAY_IMPORT[room].split()), room


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
    for path in [*FILES, *(ROOT / "tests").glob("*.py")]:
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
