"""The picture of a run."""

import pytest
import torch
from PIL import Image

from omnimix.recipes.common.report import Row, Shown, confusion, curves, gallery, text, write_report


@pytest.mark.filterwarnings("error:Glyph")
def test_a_report_of_every_panel(tmp_path):
    history = [{"epoch": i + 1, "train/loss": 1 / (i + 1), "val/acc1": i / 5} for i in range(5)]
    names = [f"class-{i}" for i in range(3)]
    shown = [
        Shown(image=torch.rand(c, 8, 8), truth="class-0", prediction=p, probability=0.5)
        for c, p in ((1, "class-0"), (3, "class-1"))
    ]
    assert [item.right for item in shown] == [True, False]
    file = tmp_path / "report.png"
    rows = [
        Row(
            panels=[
                curves(history, {"training": "train/loss", "never logged": "val/loss"}, "loss"),
                curves([], {"top 1": "val/acc1"}, "accuracy", percent=True),
                confusion(torch.eye(3, dtype=torch.int64) * 4, names),
                confusion(torch.eye(40, dtype=torch.int64), [str(i) for i in range(40)]),
            ]
        ),
        Row(panels=[gallery(shown, "images"), gallery([], "none")], height=3.0),
        Row(
            panels=[
                curves([{"step": 3, "lr": 0.1}, {"step": 7, "lr": 1e-5}], {"rate": "lr"}, "rate", over="step"),
                # Nothing of it is a formula, and no font has all of it.
                text("\tif a[$x$] % 2: # \\frac\n" + "long " * 50 + "\n\x00\U0002f800\n" * 40, "after step 7"),
                text("", "of $x_$ nothing"),
            ]
        ),
    ]
    write_report(file, "title", "subtitle", rows)
    with Image.open(file) as image:
        assert image.format == "PNG" and image.width > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
