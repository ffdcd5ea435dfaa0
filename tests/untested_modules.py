"""Lists the modules of `cai_cli` that no test file mirrors, and the test files that mirror no module.

`cai_cli/data/jsonl.py` is mirrored by `tests/data/test_jsonl.py`. A module on the first list may still be tested
through others: `python tests/untested_modules.py` shows where to look first.
"""

from pathlib import Path

ROOT = Path(__file__).parent.parent
# Tests of the project, of the whole command, of injected faults and of hostile input concern no single module.
APART = frozenset({"project", "integration", "faults", "hostile", "data/v0.1.0"})


def modules() -> set[str]:
    """Modules by their path without `.py`, such as `data/jsonl`."""
    found = (ROOT / "cai_cli").rglob("*.py")
    return {str(path.relative_to(ROOT / "cai_cli").with_suffix("")) for path in found if not path.stem.startswith("__")}


def mirrored() -> set[str]:
    """What the test files mirror, by the same names."""
    found = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    return {str(path.with_name(path.stem.removeprefix("test_"))) for path in found if path.parts[0] not in APART}


if __name__ == "__main__":
    for name in sorted(modules() - mirrored()):
        print(f"no test file of its own: cai_cli/{name}.py")
    for name in sorted(mirrored() - modules()):
        print(f"mirrors no module: {name}")
