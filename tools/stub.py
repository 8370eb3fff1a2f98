"""Make tritoncls/__init__.pyi, from which type checkers and editors learn where a public name lives.

    python tools/stub.py [--check]     --check: only say whether it is up to date
"""
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
STUB = ROOT / "tritoncls" / "__init__.pyi"
sys.path.insert(0, str(ROOT))


def stub() -> str:
    "The public names, each imported from its module."
    import tritoncls

    homes = {name: module for module, names in tritoncls.PUBLIC.items() for name in names}
    lines = [f"from .{homes.get(name, 'runtime')} import {name} as {name}" for name in tritoncls.__all__]
    return "\n".join(["# Made from the table in nbs/60_package.ipynb by tools/stub.py: edit the notebook.", *sorted(lines),
                      "", "__version__: str", "PUBLIC: dict[str, tuple[str, ...]]", ""])


def main() -> None:
    if "--check" not in sys.argv: STUB.write_text(stub(), encoding="utf-8")
    elif not STUB.is_file() or STUB.read_text(encoding="utf-8") != stub():
        sys.exit("not in sync with nbs/60_package.ipynb: tritoncls/__init__.pyi; run `make export`")


if __name__ == "__main__": main()
