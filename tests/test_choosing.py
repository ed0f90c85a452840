"A run on several data sets: killed and run again it leaves the same bytes, and another choice is another run."
import json
from dataclasses import replace
from pathlib import Path

import pytest
from same_adapters import JOBS, run_job

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
JOB = next(job for job in JOBS if job.data == "several")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Of the run that nobody stops."
    return tmp_path_factory.mktemp("whole")/"job"


@pytest.fixture(scope="module")
def whole(place, tiny_base):
    return run_job(replace(JOB, killed=False), ROOT, place, tiny_base)


def test_killed_and_gone_on_with(whole, tiny_base, tmp_path):
    "The adapter, its ledger and all metrics are those of a run that nobody stopped."
    killed = run_job(replace(JOB, killed=True), ROOT, tmp_path/"job", tiny_base)
    assert (killed.status, whole.status) == (0, 0)
    assert killed.files == whole.files
    assert killed.metrics == whole.metrics
    assert "goes on" in killed.printed or "checkpoint-2" in killed.printed, killed.printed


def test_what_is_left_tells_of_it(whole, place):
    "Ledger and run.json count what was chosen, and name what was left out."
    run = json.loads((place/"adapter"/"run.json").read_text())
    ledger = json.loads((place/"train"/"ledger.json").read_text())
    assert run["rows"] == ledger
    assert (ledger["held_out"], ledger["tested"], ledger["duplicates"], ledger["overlap"]) == (3, 4, 1, 1)
    assert ledger["repeated"] > 0
    assert {drop["reason"] for drop in ledger["dropped"]} == {"it says the same as an earlier row", "it is held out too"}
    assert run["used"]["training"]["more_data"] == {"older.csv": 1.5}
    assert set(run["rows_sha256"]["data"]) == {"train", "checked.csv", "last.csv", "older.csv"}
    assert run["comparison"]["rows_held_out"] == 4
