"The report of `run.py`: a part that fails, hangs or dies costs no other part anything."
import json
import subprocess

import pytest
import run

CONFTEST = """
import sys
import pytest
sys.path.insert(0, {folder!r})
from noting import note_figure, pytest_runtest_logreport

@pytest.fixture
def tell():
    return note_figure
"""
TESTS = {
    "passes": "def test_it(tell): tell('a model', 'speed', '3 rows/s')",
    "fails": "def test_it(): assert 1 == 2, 'one is not two'",
    "hangs": "import time\ndef test_it(): time.sleep(7200)",
    "dies": "import os\ndef test_it(tell): tell('a model', 'waits', '4'); os._exit(7)"}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    "Parts of one test each, run as those of a GPU are."
    folder = tmp_path_factory.mktemp("parts")
    (folder/"conftest.py").write_text(CONFTEST.format(folder=str(run.HERE)), encoding="utf-8")
    (folder/"pytest.ini").write_text("[pytest]\nmarkers = gpu\n", encoding="utf-8")
    for name, source in TESTS.items():
        (folder/f"test_{name}.py").write_text(f"import pytest\npytestmark = pytest.mark.gpu\n{source}\n", encoding="utf-8")
    parts = [run.Part(name, 20 if name == "hangs" else 900, (f"test_{name}.py",)) for name in TESTS]
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(run, "HERE", folder)
        done = run.run_all(parts, 7200, folder/"out")
    return {outcome.part.name: outcome for outcome in done}, (folder/"out"/"report.txt").read_text(encoding="utf-8")


def test_each_part_stands_for_itself(outcomes):
    found, _ = outcomes
    assert {name: outcome.well for name, outcome in found.items()} == {"passes": True, "fails": False, "hangs": False, "dies": False}
    assert str(found["passes"]) == "1 passed"
    assert str(found["fails"]) == "1 failed"
    assert found["hangs"].ended == "stopped after 20 s"
    assert found["dies"].ended == "exit status 7"


def test_what_was_found_stays(outcomes):
    found, _ = outcomes
    assert found["passes"].figures == (["a model", "speed", "3 rows/s"],)
    assert found["dies"].figures == (["a model", "waits", "4"],)
    assert found["fails"].tests[0]["reason"] == "AssertionError: one is not two"


def test_report(outcomes):
    _, report = outcomes
    for words in ("the end of the log of fails", "AssertionError: one is not two", "3 rows/s", "stopped after 20 s", "exit status 7"):
        assert words in report


def test_no_time_left(tmp_path):
    done, = run.run_all([run.Part("late", 60, ("test_gpu.py::test_machine",))], 0, tmp_path)
    assert str(done) == "nothing was run; no time was left"
    assert not done.well


def test_each_test_is_in_one_part():
    "What a GPU is needed for is run by `run.py`, and once."
    def collected(command):
        done = subprocess.run([*command, "--collect-only"], cwd=run.HERE.parent.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return [line for line in done.stdout.splitlines() if "::" in line]
    of_parts = [test for part in run.PARTS for test in collected(part.command())]
    assert sorted(of_parts) == sorted(collected(run.Part("all", 60, (".",)).command()))


def test_lines_that_are_whole(tmp_path):
    "A process that is ended in mid-line loses that line only."
    (tmp_path/"lines").write_text(json.dumps({"figure": ["a", "b", "c"]}) + "\n" + '{"figure": ["a"', encoding="utf-8")
    assert run.noted(tmp_path/"lines") == [{"figure": ["a", "b", "c"]}]
