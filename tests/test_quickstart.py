"""The notebook of the documentation: its cells are run in turn, in an empty directory, as a kernel would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"
# A kernel shows the value of a cell's last expression: so does this, in a line for each cell.
RUN = """
import ast, json, sys
names = {"__name__": "__main__"}
for number, cell in enumerate(json.load(open(sys.argv[1]))["cells"]):
    if cell["cell_type"] != "code":
        continue
    tree = ast.parse("".join(cell["source"]))
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {number}", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        print("value:", repr(value).replace("\\n", " "))
"""


def test_every_cell_of_the_quick_start_runs(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(NOTEBOOK)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    values = [line.removeprefix("value: ") for line in result.stdout.splitlines() if line.startswith("value: ")]
    opened, reasons, validation, parts, shape, picture = values
    assert "done: download, embed, filter, train" in opened
    assert "exact_copy" in reasons and "cosine_image" in validation and "image_embedding" in parts
    assert shape == "torch.Size([4, 128])" and "256x256" in picture
    assert (tmp_path / "small" / "reports" / "index.html").is_file()
    assert json.loads((tmp_path / "my-prior" / "eclipse.json").read_text())["name"] == "shapes"
