"""One run a job in MLflow, with MLflow itself; skipped where that isn't installed.

`FTNB_MLFLOW` names a folder that holds it (`pip install --target FOLDER mlflow`). It comes last on the path, so that it hides
no library of ours.
"""
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

import ftnb.finetune
import ftnb.preflight
import ftnb.progress
from ftnb.demo.project import make_demo_project
from ftnb.jobargs import format_job_arguments, parse_job_arguments

if "FTNB_MLFLOW" in os.environ:
    sys.path.append(os.environ["FTNB_MLFLOW"])
if there := importlib.util.find_spec("mlflow"):
    import mlflow

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not there, reason="MLflow isn't installed")]

TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 0.01, "eval_strategy": "steps",
            "eval_steps": 2, "report_to": "mlflow"}
BOTH = {"loss", "eval_loss"}
CHILD = """
import itertools, os, signal, sys, time
sys.path.append(os.environ.get("FTNB_MLFLOW", "."))
import ftnb.finetune as finetune
import ftnb.trainer as trainer
if "STOPPED" in os.environ:  # after its second log it waits for the signal
    real, logged, came = trainer.append_metrics, itertools.count(1), []
    def append(*args, **kwargs):
        real(*args, **kwargs)
        if next(logged) != 2: return
        note = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *given: (note(*given), came.append(given)))
        print("LOGGED", flush=True)
        while not came: time.sleep(0.02)
    trainer.append_metrics = append
finetune.run_command([])
"""


@pytest.fixture
def project(tmp_path, tiny_base, monkeypatch):
    "A project, and an MLflow of its own."
    warnings.simplefilter("ignore")
    ftnb.progress.quiet_libraries()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(uri)
    made = make_demo_project(tmp_path/"project", tiny_base, fraction=0.0075)
    monkeypatch.setenv("FINE_TUNING_STUDIO_SQLITE_DB", str(made.db))
    return made


def runs():
    "Experiment -> (status, names of metrics) of each of its runs."
    client, found = mlflow.MlflowClient(), {}
    for experiment in client.search_experiments():
        there = client.search_runs([experiment.experiment_id])
        found[experiment.name] = [(run.info.status, set(run.data.metrics)) for run in there]
    return found


def check_one_run(name, status, metrics=BOTH):
    "One run, ended so, in the experiment of that name, and none in MLflow's own."
    found = runs()
    run, = found[name]
    assert run[0] == status
    assert metrics <= run[1]
    assert not found.get("Default")


def job(project, number=1, **training):
    "The arguments of another job on the same project."
    args = parse_job_arguments(project.job_arguments)
    beside = Path(args.out_dir).parent
    return replace(args, experimentid=f"00000000-0000-4000-8000-00000000000{number}", auto_add_adapter=False,
                   out_dir=str(beside/f"adapter-{number}"), train_out_dir=str(beside/f"train-{number}"),
                   training_arguments_config=json.dumps(TRAINING | training))


def run_here(args):
    "Run a job in this process; the error that it ends with."
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            ftnb.finetune.finetune(args, os.environ, False)
        except Exception as e:
            return e


def as_script(args, stop=False):
    "(exit status, output) of the job script in a process of its own; stopped by SIGTERM at its second log."
    env = os.environ | {"JOB_ARGUMENTS": format_job_arguments(args)} | ({"STOPPED": "1"} if stop else {})
    child = subprocess.Popen([sys.executable, "-c", CHILD], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in child.stdout:
        lines.append(line)
        if line == "LOGGED\n":
            child.send_signal(signal.SIGTERM)
    return child.wait(), "".join(lines)


def test_jobs_in_one_process_have_runs_of_their_own(project):
    for number in (1, 2):
        args = job(project, number)
        assert run_here(args) is None
        check_one_run(args.experimentid, "FINISHED")
    assert mlflow.active_run() is None


def test_within_a_persons_own_run(project):
    "It stays open, and empty."
    args = job(project)
    with mlflow.start_run(experiment_id=mlflow.create_experiment("mine")) as mine:
        assert run_here(args) is None
        check_one_run(args.experimentid, "FINISHED")
        assert mlflow.active_run().info.run_id == mine.info.run_id
        assert runs()["mine"] == [("RUNNING", set())]


def test_the_job_script(project):
    args = job(project)
    code, said = as_script(args)
    assert code == 0, said
    check_one_run(args.experimentid, "FINISHED")


def test_stopped_by_sigterm_and_gone_on_with(project):
    args = job(project)
    code, said = as_script(args, stop=True)
    assert code != 0, said
    check_one_run(args.experimentid, "KILLED", {"loss"})
    code, said = as_script(args)
    assert code == 0, said
    assert sorted(status for status, _ in runs()[args.experimentid]) == ["FINISHED", "KILLED"]


def test_a_job_that_fails_after_training(project, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("the proof fails")
    monkeypatch.setattr(ftnb.finetune, "prove", refuse)
    args = job(project)
    assert "the proof fails" in str(run_here(args))
    check_one_run(args.experimentid, "FAILED")


def test_a_job_that_fails_in_training(project):
    args = job(project, learning_rate=1e20, weight_decay=1e30, max_steps=20)
    assert run_here(args) is not None
    check_one_run(args.experimentid, "FAILED", set())
