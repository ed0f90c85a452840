"The README's own run, on a tiny model in the place of the one that it fetches."

import re
from pathlib import Path

import pytest

import ftnb.all

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.mark.slow
def test_a_run_of_your_own(tmp_path, tiny_base, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    teams = ["delivery", "returns", "accounts"]
    Path("tickets.csv").write_text(
        "ticket,team\n" + "".join(f"Please help me with number {i},{teams[i % 3]}\n" for i in range(60))
    )
    monkeypatch.setattr(ftnb.all, "demo_base_model", lambda: tiny_base)
    names = {}
    exec(code, names)
    run = names["run"]
    assert run.record.metrics["eval_loss"] < run.record.metrics["eval_loss_before"]
    assert (run.adapter / "adapter_model.safetensors").exists() and (run.adapter / "run.json").exists()
    assert all((run.report.parent / name).exists() for name in ("report.html", "metrics.jsonl", "ledger.json"))
