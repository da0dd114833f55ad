"""``sma build``: counts, or a file of untrained weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sma
from sma_models.cli import main

SMALL = ("seqboat_small_lm", "n_layers=3", "d_model=16")


def test_dry_counts_each_part(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["build", *SMALL, "--dry"]) == 0
    rows = {cells[1]: cells[2:5] for line in capsys.readouterr().out.splitlines() if len(cells := line.split("│")) > 4}
    counts = {name.strip(): [int(cell.replace(",", "")) for cell in cells] for name, cells in rows.items()}
    model = sma.build(*SMALL)
    assert [name for name in counts if name.startswith("stack.layers")] == [f"stack.layers.{i}" for i in range(3)]
    total = counts.pop("all")
    assert total[0] == sum(each.numel() for each in model.parameters())
    assert total[1] == sum(each.numel() for each in model.buffers())
    assert total == [sum(column) for column in zip(*counts.values(), strict=True)]


def test_an_untrained_model_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fresh.safetensors"
    assert main(["build", *SMALL, "--to", str(file), "--seed", "3"]) == 0
    assert "parameters" in capsys.readouterr().out
    torch.manual_seed(3)
    expected = sma.build(*SMALL).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in sma.load(file).state_dict().items())
    assert main(["build", *SMALL, "--to", str(file)]) == 2
    assert "--force overwrites it" in capsys.readouterr().err
    assert main(["build", *SMALL, "--to", str(file), "--force"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["n_layers=1000000000", "--dry"], "n_layers: must fit the memory of the device"),
        (["vocab_size=1000000000000", "--to", "never"], "vocab_size: must fit the memory of the device"),
        (["d_model=1180591620717411303424", "--dry"], "d_model: expected an integer of 64 bits"),
        ([], "got neither"),
        (["--dry", "--to", "never"], "got both"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "seqboat_small_lm", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("never").exists()
