"""Make README.md and its pictures from nbs/index.ipynb.

    python tools/readme.py [--check]     --check: only say whether they are up to date
"""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
PICTURES = "README_files"


def shown(source: str) -> str:
    "What a reader sees of a cell: its code without directives, or nothing where it says `#| echo: false`."
    return "" if "#| echo: false" in source else re.sub(r"^#\|.*\n?", "", source, flags=re.M)


def render() -> dict[Path, bytes]:
    "README.md and its pictures, path -> content."
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not re.match(r"#\|\s*hide", cell.source)]
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "code": cell.source = shown(cell.source)
    exporter = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    text, resources = exporter.from_notebook_node(notebook)
    text = text.replace("![svg](output_", f"![plot]({PICTURES}/output_").replace("```python\n\n```", "")
    text = re.sub(r"\n(\s*\n){2,}", "\n\n", text).strip() + "\n"
    header = "<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n"
    pictures = {ROOT / PICTURES / name: content for name, content in resources["outputs"].items()}
    return {ROOT / "README.md": (header + text).encode(), **pictures}


def main() -> None:
    files = render()
    old = {path for path in (ROOT / PICTURES).glob("*")} - set(files)
    if "--check" in sys.argv:
        stale = [path for path, content in files.items() if not path.is_file() or path.read_bytes() != content]
        if stale or old:
            names = ", ".join(str(path.relative_to(ROOT)) for path in sorted([*stale, *old]))
            sys.exit(f"not in sync with nbs/index.ipynb: {names}; run `make readme`")
        return
    for path in old: path.unlink()
    (ROOT / PICTURES).mkdir(exist_ok=True)
    for path, content in files.items(): path.write_bytes(content)


if __name__ == "__main__": main()
