"""examples/tour.ipynb runs, cell after cell, and what it says of its task holds."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

TOUR = Path(__file__).parents[2] / "examples" / "tour.ipynb"


def test_runs_and_learns(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    scope = {"__name__": "__main__"}
    code = [cell for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in code if "print(" in "".join(cell["source"]))
    for number, cell in enumerate(code, start=1):
        exec(compile("".join(cell["source"]), f"{TOUR.name}, cell {number}", "exec"), scope)
    soft, hard = (row[-1].item() for row in scope["curves"][0.1][1:])
    assert soft > 0.95
    assert 0 < soft - hard < 0.2
    assert scope["accuracy"](scope["routed"], hard=True) > 0.95
