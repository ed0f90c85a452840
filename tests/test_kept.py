"From the last optimizer step on, nothing that only describes a run can lose it."
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import traceback
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import pytest
import transformers

import ftnb
from ftnb import (card, checkpoint_files, checkpoints, estimate, evaluate, finetune, manifest, models, parents, plots,
                  progress, registry, report, runrecord, saving, studio, trainer)
from ftnb.demo.project import demo_data, make_demo_project
from ftnb.jobargs import parse_job_arguments


pytestmark = pytest.mark.slow

TRAINING = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 1,
            "eval_strategy": "epoch", "optim": "adamw_torch", "save_steps": 1, "report_to": "none"}
LORA = {"r": 2, "target_modules": ["q_proj"]}
BEST = {"load_best_model_at_end": True, "save_strategy": "epoch"}
ROWS = 12
KEPT = "what was trained is kept in"
ON_PURPOSE = "RuntimeError: on purpose"


@dataclass(frozen=True)
class Case:
    "A function that fails, and what the log says."
    name: str
    owner: object  # module or class in which the function is looked up
    function: str
    said: str  # in the log or the error
    steps: int = 0  # optimizer steps after which it begins to fail
    ends: str = ""  # how the error begins that the job ends with; "" where it ends well
    published: bool = True  # is the adapter in its place?
    training: dict = field(default_factory=dict)  # arguments that differ


CASES = [
    Case("versions", runrecord, "library_versions", "versions of run.json: failed"),
    Case("a library without metadata", importlib.metadata, "version", "loaded back", steps=2),
    Case("what was used", runrecord, "used_settings", "used of run.json: failed"),
    Case("which rows it has learnt", parents, "write_learnt", "trained_rows.npz: failed", steps=2),
    Case("hashes of the records", studio, "record_hash", "records of run.json: failed", steps=2),
    Case("the model card", card, "card_text", "README.md: failed"),
    Case("the report", report, "write_report", "report.html: failed"),
    Case("the report's picture", plots, "plot_run", "report.html: failed"),
    Case("base against adapter", evaluate, "describe_scores", "base against adapter: failed"),
    Case("making the scorer", evaluate, "make_scorer", "base against adapter: failed"),
    Case("the estimated time", estimate, "estimate_time", "the estimated time: failed"),
    Case("a line of metrics.jsonl", trainer, "append_metrics", "metrics.jsonl: failed", steps=2),
    Case("the last evaluation", transformers.Trainer, "evaluate", "the last evaluation: failed", steps=2),
    Case("the last checkpoint", checkpoint_files, "_write_share", "the checkpoint of the last step, 2: failed", steps=2),
    Case("the last checkpoint's flush", manifest, "flush", "the checkpoint of the last step, 2: failed", steps=2),
    Case("the best checkpoint", checkpoints, "whole_checkpoint", "loading the best checkpoint", training=BEST),
    Case("the tokenizer beside the adapter", saving, "save_tokenizer", "the tokenizer beside the adapter: failed"),
    Case("logits to prove by", saving, "probe_logits", "not proven"),
    Case("the base can't be loaded again", models, "load_base_model", "the adapter's proof: failed", steps=2),
    Case("registering", registry, "register_adapter", "This registers it", ends=ON_PURPOSE),
    Case("publishing", saving, "publish_folder", KEPT, ends=ON_PURPOSE, published=False),
]


class OnPurpose(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def quiet():
    progress.quiet_libraries()


@pytest.fixture
def project(request, tmp_path, tiny_base, monkeypatch):
    "A project of a few rows; the test's parameter says how its training differs."
    case = getattr(request.node, "callspec", None)
    training = case.params["case"].training if case else {}
    lines = demo_data().read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path/"messages.csv").write_text("".join(lines[:ROWS + 1]), encoding="utf-8")
    made = make_demo_project(tmp_path/"project", tiny_base, tmp_path/"messages.csv", training=TRAINING | training,
                             lora=LORA, split=10/ROWS)
    monkeypatch.setenv("FINE_TUNING_STUDIO_SQLITE_DB", str(made.db))
    return made


@dataclass
class Steps:
    "Optimizer steps taken."
    taken: int = 0


@pytest.fixture
def steps(monkeypatch):
    counted, real = Steps(), checkpoints.check_finite

    def counts(trainer, norm):
        real(trainer, norm)
        counted.taken = trainer.state.global_step + 1
    monkeypatch.setattr(checkpoints, "check_finite", counts)
    return counted


def run(project):
    "(what the log and a traceback say, how the error begins that it ends with)"
    ended, last = "", ""
    with redirect_stdout(StringIO()) as log:
        try:
            finetune.finetune(parse_job_arguments(project.job_arguments))
        except Exception as e:
            ended, last = f"{type(e).__name__}: {e}", traceback.format_exc()
    return f"{log.getvalue()}\n{last}", ended


def check_what_is_left(project, log, ended, case):
    out = project.out_dir
    assert case.said in log, log
    assert ended.startswith(case.ends) and bool(ended) == bool(case.ends), log
    if case.published:
        assert (out/"adapter_model.safetensors").is_file(), log
        assert json.loads((out/"run.json").read_text())["adapter_sha256"]
    else:
        assert not out.exists()
        assert Path(f"{out}.not-published", "adapter_model.safetensors").is_file(), os.listdir(out.parent)
    assert not [*out.parent.glob(".*")]  # beside its place


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_function_fails(case, project, steps, monkeypatch):
    real = getattr(case.owner, case.function)

    def fails(*args, **kwargs):
        if steps.taken >= case.steps:
            raise OnPurpose("on purpose")
        return real(*args, **kwargs)
    monkeypatch.setattr(case.owner, case.function, fails)
    log, ended = run(project)
    check_what_is_left(project, log, ended, case)


def test_the_proof_is_wrong(project, steps, monkeypatch):
    def wrong(*args, **kwargs):
        raise saving.NotProven("on purpose")
    monkeypatch.setattr(saving, "prove_adapter", wrong)
    log, ended = run(project)
    case = Case("a wrong proof", saving, "prove_adapter", KEPT, ends=ON_PURPOSE, published=False)
    check_what_is_left(project, log, ended, case)


HIDES_FTNB = """import importlib.metadata as metadata
real = metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name == "ftnb": raise metadata.PackageNotFoundError(name)
    return real(cls, name)
metadata.Distribution.from_name = classmethod(from_name)
"""


def test_not_installed_run_by_its_path(project, tmp_path):
    "A copy of the package's folder, and a Python that has all libraries, and no ftnb among them."
    shutil.copytree(Path(ftnb.__file__).parent, tmp_path/"copied"/"ftnb")
    (tmp_path/"sitecustomize.py").write_text(HIDES_FTNB)
    env = os.environ | {"PYTHONPATH": str(tmp_path), "JOB_ARGUMENTS": project.job_arguments}
    done = subprocess.run([sys.executable, tmp_path/"copied"/"ftnb"/"finetune.py"], env=env, cwd=tmp_path,
                          capture_output=True, text=True)
    ended = "" if done.returncode == 0 else str(done.returncode)
    check_what_is_left(project, done.stdout + done.stderr, ended, Case("not installed", None, "", "registered:"))
    versions = json.loads((project.out_dir/"run.json").read_text())["versions"]
    assert versions["ftnb"] == ftnb.__version__
    assert "?" not in versions.values()
