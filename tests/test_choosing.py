"A run on several data sets: killed and run again it leaves the same bytes, and another choice is another run."
import json
from dataclasses import replace
from pathlib import Path

import pytest
from same_adapters import JOBS, run_job

from ftnb.tiny import save_tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
JOB = next(job for job in JOBS if job.data == "several")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base")/"tiny", kind="qwen")


def test_killed_and_gone_on_with(base, tmp_path):
    "The adapter, its ledger and all metrics are those of a run that nobody stopped."
    killed, whole = (run_job(replace(JOB, killed=dies), ROOT, tmp_path/str(dies), base) for dies in (True, False))
    assert (killed.status, whole.status) == (0, 0)
    assert killed.files == whole.files
    assert "goes on" in killed.printed or "checkpoint-2" in killed.printed, killed.printed


def test_what_is_left_tells_of_it(base, tmp_path):
    "Ledger and run.json count what was chosen, and name what was left out."
    run_job(replace(JOB, killed=False), ROOT, tmp_path/"job", base)
    run = json.loads((tmp_path/"job"/"adapter"/"run.json").read_text())
    ledger = json.loads((tmp_path/"job"/"train"/"ledger.json").read_text())
    assert run["rows"] == ledger
    assert (ledger["held_out"], ledger["tested"], ledger["duplicates"], ledger["overlap"]) == (3, 4, 1, 1)
    assert ledger["repeated"] > 0
    assert {drop["reason"] for drop in ledger["dropped"]} == {"it says the same as an earlier row", "it is held out too"}
    assert run["used"]["training"]["more_data"] == {"older.csv": 1.5}
    assert set(run["rows_sha256"]["data"]) == {"train", "checked.csv", "last.csv", "older.csv"}
    assert run["comparison"]["rows_held_out"] == 4
