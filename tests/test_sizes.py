"""The size of the house. `python tests/test_sizes.py` prints it."""
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHAPTERS = ("masking", "sequence", "model", "objectives", "decoding")


def count(*paths: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def sizes() -> dict[str, tuple[int, int]]:
    """For each part of the house its lines and the most that they may be."""
    package = ROOT / "nanomagvlt"
    return {"chapters 1 to 5": (count(*(package / f"{name}.py" for name in CHAPTERS)), 1000),
            "top of the package": (count(*package.glob("*.py")), 1700),
            "package and scripts": (count(*package.rglob("*.py"), *ROOT.glob("*.py"), *ROOT.glob("data/*.py")), 8000),
            "tests": (count(*(ROOT / "tests").rglob("*.py")), 4900)}


def test_the_house_stays_small():
    for part, (lines, most) in sizes().items():
        assert lines <= most, f"{part}: {lines} lines, at most {most}"


if __name__ == "__main__":
    for path in sorted((ROOT / "nanomagvlt").rglob("[!_]*.py")):
        print(f"{count(path):6}  {path.relative_to(ROOT)}")
    for part, (lines, most) in sizes().items():
        print(f"{lines:6}  {part} (at most {most:,})")
