"A job is killed at each of its phases and run again: the same adapter, one row."
import itertools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from forks import fork_logged, import_all, in_fork
from peft import PeftModel
from waiting import wait_for

from ftnb import adapters, chat_rows, checkpoint_files, checkpoints, finetune, manifest, models, progress, prompts, registry, rows as job_rows, saving, stopping, studio
from ftnb import tiny, trainer
from ftnb.demo.project import demo_data, make_demo_project

pytestmark = pytest.mark.slow

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
TRAINING = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "optim": "adamw_torch", "logging_steps": 1,
            "eval_strategy": "epoch", "save_steps": 2, "completion_only_loss": True, "report_to": "none"}
ROWS, STEPS = 14, 6  # of which 11 are trained on, 3 steps an epoch; checkpoints after 2, 4 and 6
ALL = range(1, STEPS + 1)
OF_ANOTHER_PROGRAM = b"of another program"


@dataclass(frozen=True)
class At:
    "A moment of a job: a call of a function."
    owner: object  # module or class in which the function is looked up
    function: str
    after: bool = False  # the call, or before it
    n: int = 1  # which call, of those
    path: str = ""  # with this in one of its arguments


@dataclass(frozen=True)
class Case:
    "A job that is killed, and run again."
    name: str
    deaths: tuple  # of `At`, one a run
    steps: range | tuple  # that the last run takes
    earlier: bool = False  # does out_dir hold an adapter that this job has left before, and a file of another program?


def killed(name, owner, function, steps, after=False, n=1, path="", earlier=False):
    "A job that is killed once."
    return Case(name, (At(owner, function, after, n, path),), steps, earlier)


CASES = [
    killed("looking up the records", studio, "find_records", ALL),
    killed("reading the rows", job_rows, "read_rows", ALL, after=True),
    killed("formatting", prompts, "format_rows", ALL, after=True),
    killed("tokenizing", chat_rows, "tokenize_rows", ALL),
    killed("writing ledger.json", os, "replace", ALL, path="ledger.json"),
    killed("loading the model", models, "load_base_model", ALL),
    killed("the model is loaded", models, "load_base_model", ALL, after=True),
    killed("writing plan.json", os, "replace", ALL, path="plan.json"),
    killed("the first evaluation", checkpoints, "_evaluate_apart", ALL, after=True),
    killed("step 1", checkpoints, "check_finite", ALL),
    killed("after step 1", trainer, "append_metrics", ALL, after=True, n=2),
    killed("step 2", checkpoints, "check_finite", ALL, n=2),
    killed("the first checkpoint's write", checkpoint_files, "_write_share", ALL, after=True),
    killed("step 3", checkpoints, "check_finite", ALL[2:], n=3),
    killed("between two epochs", checkpoints, "_begin_epoch", ALL[2:], n=2),
    killed("step 4", checkpoints, "check_finite", ALL[2:], n=4),
    killed("a checkpoint's write: the weights are there", PeftModel, "save_pretrained", ALL[2:], after=True,
           path=".checkpoint-4.part"),
    killed("a checkpoint's write: half of it is flushed", manifest, "flush", ALL[2:], after=True,
           path=".checkpoint-4.part/optimizer.pt"),
    killed("a checkpoint's write: the manifest is empty", manifest, "_manifest_text", ALL[2:], n=3),
    killed("a checkpoint's write: the manifest is flushed", manifest, "flush", ALL[2:], after=True,
           path=".checkpoint-4.part/manifest.json"),
    killed("before the checkpoint's rename", os, "rename", ALL[2:], path="/checkpoint-4"),
    killed("after the checkpoint's rename", os, "rename", ALL[4:], after=True, path="/checkpoint-4"),
    killed("step 5", checkpoints, "check_finite", ALL[4:], n=5),
    killed("step 6", checkpoints, "check_finite", ALL[4:], after=True, n=6),
    killed("the last checkpoint's write", checkpoint_files, "_write_share", ALL[4:], n=3),
    killed("the oldest checkpoint is out of its place", os, "rename", (), after=True, path=".checkpoint-2.old"),
    killed("the oldest checkpoint is half deleted", os, "unlink", (), after=True, path="optimizer.pt"),
    killed("the last evaluation", checkpoints, "_evaluate_apart", (), n=4),
    killed("training is done", saving, "as_loaded", ()),
    killed("the adapter's write", PeftModel, "save_pretrained", (), after=True, path="/adapters/"),
    killed("the adapter is written", saving, "save_adapter", (), after=True),
    killed("loading the adapter back", models, "load_base_model", (), after=True, n=2),
    killed("the adapter is proven", saving, "prove_adapter", (), after=True),
    killed("writing run.json", os, "replace", (), path="run.json"),
    killed("before the adapter's rename", os, "rename", (), path="/adapters/"),
    killed("after the adapter's rename", os, "rename", (), after=True, path="/adapters/"),
    killed("the earlier adapter is in its place", os, "rename", (), n=2, path="/adapters/", earlier=True),
    killed("the earlier adapter is out of its place", os, "rename", (), after=True, n=2, path="/adapters/", earlier=True),
    killed("the adapter has taken its place", os, "rename", (), after=True, n=3, path="/adapters/", earlier=True),
    killed("deleting the earlier adapter", shutil, "rmtree", (), path="/adapters/", earlier=True),
    killed("drawing the report", os, "replace", (), path="report.html"),
    killed("before the insert", registry, "register_adapter", ()),
    killed("trying to register", registry, "_put_adapter", ALL, after=True),
    killed("the insert, before its commit", registry, "_put_adapter", (), after=True, n=2),
    killed("after the insert", registry, "write_studio", (), after=True, n=2),
    Case("steps 3 and 5", (At(checkpoints, "check_finite", n=3), At(checkpoints, "check_finite", n=3)), ALL[4:]),
    Case("twice before the same rename", (At(os, "rename", path="/checkpoint-4"),)*2, ALL[2:]),
    Case("a checkpoint's write, the adapter's rename, and after the insert",
         (At(checkpoint_files, "_write_share", n=2), At(os, "rename", path="/adapters/"),
          At(registry, "write_studio", after=True, n=2)), ()),
]


# A run is a process of its own, forked from one that has imported everything, with a call in it that is its last

def wrapped(owner, function, around):
    "Put `around(real, *args)` in a function's place."
    real = getattr(owner, function)
    setattr(owner, function, lambda *args, **kwargs: around(lambda: real(*args, **kwargs), *args))


def die_at(at):
    "Let this process be killed there."
    calls = itertools.count(1)

    def around(real, *args):
        paths = " ".join(os.fspath(a) for a in args if isinstance(a, (str, os.PathLike)))
        last = at.path in paths and next(calls) == at.n
        if not last or at.after:
            result = real()
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    wrapped(at.owner, at.function, around)


def note_steps(file):
    "Note each optimizer step in a file."
    def around(real, trainer, *args):
        with open(file, "a") as f:
            f.write(f"{trainer.state.global_step + 1}\n")
        return real()
    wrapped(checkpoints, "check_finite", around)


@dataclass
class Run:
    "A run that has ended."
    status: int  # 0, 1 or minus a signal
    steps: tuple  # taken
    printed: str


@dataclass(frozen=True)
class Place:
    "A folder with a project that is put back before each case, since its place is part of a run."
    folder: Path
    project: object

    @property
    def env(self):
        db = str(self.project.db)
        return {"JOB_ARGUMENTS": self.project.job_arguments, "FINE_TUNING_STUDIO_SQLITE_DB": db}

    @property
    def log(self):
        return (self.folder/"log").read_text()

    @property
    def steps(self):
        "That the last run has taken, so far."
        return tuple(map(int, (self.folder/"steps").read_text().split()))

    def renew(self, earlier=False):
        shutil.rmtree(self.project.folder)
        shutil.copytree(self.folder/"template", self.project.folder)
        if earlier:
            out = self.project.out_dir
            out.mkdir(parents=True)
            for name in ("adapter_model.safetensors", "notes.txt"):
                (out/name).write_bytes(OF_ANOTHER_PROGRAM)
            (out/"run.json").write_text(json.dumps({"experimentid": self.project.experiment_id}))


def demo_lines():
    "Of the demo's messages, as many as are trained on and held out here."
    return demo_data().read_text(encoding="utf-8").splitlines(keepends=True)[:ROWS + 1]


def make_place(folder, base, lines=None, **training):
    "Made in a process of its own; settings are changed, or with None left out."
    settings = {key: value for key, value in (TRAINING | training).items() if value is not None}
    (folder/"messages.csv").write_text("".join(lines or demo_lines()), encoding="utf-8")
    project = make_demo_project(folder/"project", base, folder/"messages.csv", training=settings, lora=LORA, split=12/ROWS)
    shutil.copytree(project.folder, folder/"template")
    return Place(folder, project)


def start(place, prepare=lambda: None):
    "Start a job's run; returns its process id."
    def program():
        os.environ |= place.env
        os.chdir(place.project.folder)
        note_steps(place.folder/"steps")
        prepare()
        finetune.run_command([])
        (place.folder/"modules").write_text("\n".join(sys.modules))

    (place.folder/"steps").write_text("")
    return fork_logged(place.folder/"log", program)


def ended(place, pid):
    "Wait for a run's end."
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Run(status, place.steps, place.log)


def run(place, at=None):
    return ended(place, start(place, lambda: at and die_at(at)))


# What a run leaves

def plain(values):
    return {k: v for k, v in values.items() if not re.search("time|second|memory", k)}


def state(project):
    "All that a finished job leaves, without times and memory; what differs between two projects is left out."
    out, key = project.out_dir, project.experiment_id
    with closing(sqlite3.connect(project.db)) as con:
        rows = con.execute("SELECT id, fine_tuning_job_id = ?, location = ?, name FROM adapters", [key, str(out)]).fetchall()
        job = con.execute("SELECT adapter_id FROM fine_tuning_jobs WHERE id = ?", [key]).fetchall()
    found = {"adapters": [row[1:] for row in rows], "fine_tuning_jobs points to it": [row[:1] for row in rows] == job}
    files = [o.relative_to(project.folder) for o in project.folder.rglob("*")]
    found["files"] = sorted(str(o).replace(key, "KEY") for o in files)
    found |= {o.name: sha256(o.read_bytes()).hexdigest() for o in out.glob("*") if o.name != "run.json"}
    record = json.loads((out/"run.json").read_text())
    found["run.json"] = plain(record["metrics"]) | {k: record[k] for k in ("adapter_sha256", "rows", "rows_sha256", "proof")}
    lines = (project.train_out_dir/"metrics.jsonl").read_text().splitlines()
    found["metrics.jsonl"] = [plain(json.loads(line)) for line in lines]
    return found


def check_the_end(place, right, done, steps, earlier=False):
    "After the last run all is as it should be; then the finished job is run once more, and must do nothing."
    assert done.status == 0, done.printed
    if earlier:
        files = sorted([*right["files"], "adapters/KEY/notes.txt"])
        right = right | {"files": files, "notes.txt": sha256(OF_ANOTHER_PROGRAM).hexdigest()}
    assert list(done.steps) == list(steps)
    assert state(place.project) == right
    record = (place.project.out_dir/"run.json").read_bytes()
    again = run(place)
    assert again.status == 0, again.printed
    assert again.steps == ()
    assert state(place.project) == right
    assert (place.project.out_dir/"run.json").read_bytes() == record


# All of them, on a project that is put back before each case

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Made in forks, so that no thread starts here."
    progress.quiet_libraries()
    folder = tmp_path_factory.mktemp("kill").resolve()
    base = in_fork(lambda: tiny.save_tiny(folder/"tiny", kind="qwen"))
    return in_fork(lambda: make_place(folder, base))


@pytest.fixture(scope="module")
def right(place):
    "What a job leaves that nothing happens to; imports all that it imports, so that later runs begin with it."
    done = run(place)
    assert done.status == 0, done.printed
    assert done.steps == tuple(ALL)
    import_all((place.folder/"modules").read_text().split())
    return state(place.project)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_killed(case, place, right):
    place.renew(case.earlier)
    for at in case.deaths:
        died = run(place, at)
        assert died.status == -signal.SIGKILL, f"{at} is never reached:\n{died.printed}"
    check_the_end(place, right, run(place), case.steps, case.earlier)


def hold(db, ready, go):
    "The Studio writes: a transaction that is open until it is told to go on. A process of its own."
    if pid := os.fork():
        return pid
    try:
        con = sqlite3.connect(db, isolation_level=None)
        con.execute("BEGIN IMMEDIATE")
        con.execute("INSERT INTO configs (id, description) VALUES ('studio', 'by the Studio')")
        ready.write_text("")
        wait_for(go.exists, 3000)
        con.execute("COMMIT")
        con.close()
    finally:
        os._exit(0)


def test_killed_while_it_waits_for_the_studios_writer(place, right):
    "The Studio's writer holds the database; the job waits, is killed by another process, is run again, waits, and registers."
    place.renew()
    ready, go = place.folder/"ready", place.folder/"go"
    for file in (ready, go):
        file.unlink(missing_ok=True)

    def waits():  # to register, not to try it
        return re.search("waiting for the Studio database .* up to 300 s", place.log)
    writer = hold(place.project.db, ready, go)
    try:
        wait_for(ready.exists)
        first = start(place)
        wait_for(waits)
        os.kill(first, signal.SIGKILL)
        died = ended(place, first)
        assert died.status == -signal.SIGKILL, died.printed
        second = start(place)
        wait_for(waits)
        time.sleep(1)
    finally:
        go.write_text("")
        os.waitpid(writer, 0)
    check_the_end(place, right, ended(place, second), ())
    with closing(sqlite3.connect(place.project.db)) as con:
        assert con.execute("SELECT 1 FROM configs WHERE id = 'studio'").fetchall()


def has_ended(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def paused(place):
    "Start a run that waits in its third step for the file `go`; returns its process id."
    place.renew()
    go = place.folder/"go"
    go.unlink(missing_ok=True)

    def in_step_3(real, trainer, *args):
        norm = real()
        if trainer.state.global_step == 2:
            wait_for(go.exists, 3000)
        return norm
    pid = start(place, lambda: wrapped(checkpoints, "check_finite", in_step_3))
    wait_for(lambda: place.steps == (1, 2, 3) or has_ended(pid))
    return pid


def test_sigterm_in_step_3(place, right):
    pid, folder = paused(place), place.project.train_out_dir
    os.kill(pid, signal.SIGTERM)
    (place.folder/"go").write_text("")
    stopped = ended(place, pid)
    assert stopped.status == 1, stopped.printed
    error = (f"stopped by SIGTERM at step 3 of {STEPS}; a checkpoint is in {folder}/checkpoint-3; "
             "run the job again with the same arguments to go on")
    assert error in stopped.printed
    assert not manifest.checkpoint_problem(str(folder/"checkpoint-3"))
    check_the_end(place, right, run(place), ALL[3:])


def test_started_again_while_it_runs(place, right):
    first = paused(place)
    second = run(place)
    assert second.status == 1 and second.steps == (), second.printed
    assert "is in use by process" in second.printed
    (place.folder/"go").write_text("")
    check_the_end(place, right, ended(place, first), ALL[3:])


def test_a_process_of_its_own_is_killed(place, right):
    "Not forked from this one, at any moment after its first checkpoint."
    place.renew()

    def job():
        return subprocess.Popen([sys.executable, "-m", "ftnb.finetune"], env={**os.environ, **place.env}, text=True,
                                cwd=place.project.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    first = job()
    wait_for(lambda: (place.project.train_out_dir/"checkpoint-2").exists() or first.poll() is not None)
    first.kill()
    printed, second = first.communicate()[0], job()
    again = second.communicate()[0]
    assert second.returncode == 0, f"{printed}\n{again}"
    check_the_end(place, right, Run(0, (), again), ())


# Runs that choose their end, or begin with an adapter: killed at random until one gets through

EVERY_TWO = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "num_train_epochs": 4}
ONE_ANSWER = ["message,intent\n", *(f"where is it {i},yes\n" for i in range(12))]  # learnt in some steps, word for word


@dataclass(frozen=True)
class Choice:
    "A run that chooses its end, or begins with an adapter."
    settings: dict  # PARENT, FINISHED and CHECKED are folders and a file of the test's own
    steps: int  # after which it ends
    lines: list | None = None  # of its file; default: the demo's
    spread: float = 0.02  # of the base model's random weights: with more, it learns faster


CHOOSING = {
    "early stopping": Choice(EVERY_TWO | {"early_stopping_patience": 2, "early_stopping_threshold": 10.0}, 6),
    "the best by loss": Choice(
        EVERY_TWO | {"load_best_model_at_end": True, "learning_rate": 0.5, "lr_scheduler_type": "constant"}, 12),
    "the best by answers": Choice(
        EVERY_TWO | {"load_best_model_at_end": True, "metric_for_best_model": "exact_match", "exact_match_rows": 2,
                     "validation": "CHECKED", "learning_rate": 0.01, "lr_scheduler_type": "constant"}, 12, ONE_ANSWER, 0.3),
    "max_seconds": Choice({"max_seconds": 60, "num_train_epochs": 4}, 8),
    "a parent": Choice({"parent_adapter": "PARENT"}, 6),
    "more epochs of a finished run": Choice({"parent_adapter": "FINISHED", "num_train_epochs": 3}, 9),
    "a parent, and max_seconds": Choice({"parent_adapter": "PARENT", "max_seconds": 60, "num_train_epochs": 4}, 8),
}
MOMENTS = (  # of a job, and how often it comes by at most
    (checkpoints, "check_finite", 4), (trainer, "append_metrics", 4), (checkpoint_files, "_write_share", 3), (checkpoints, "_evaluate_apart", 4),
    (models, "load_base_model", 2), (os, "rename", 3), (saving, "prove_adapter", 1))


def make_parent(folder, base):
    "An adapter that has learnt something; made in a process of its own."
    import torch
    model = adapters.apply_lora(models.load_base_model(str(base), models.choose_precision({}, {}, "cpu")), LORA, 7)
    torch.manual_seed(7)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder)


def make_finished(folder, base):
    "A run of the same rows that is over, and stays as it is; returns its project."
    folder.mkdir()
    place = in_fork(lambda: make_place(folder, base))
    done = run(place)
    assert (done.status, done.steps) == (0, tuple(ALL)), done.printed
    return place.project


def paced(at=None):
    "Be killed there; a run with a time budget finds out after its third step that it has time for eight."
    def eight(real, run, pace, ends, step, every):
        return 8 if step >= 3 else 0
    wrapped(stopping, "fitted_steps", eight)
    if at:
        die_at(at)


def check_it_goes_on(project, finished):
    "It begins where the finished run ended, and names it."
    ended, begun = (json.loads((o.out_dir/"run.json").read_text()) for o in (finished, project))
    assert begun["metrics"]["eval_loss_before"] == pytest.approx(ended["metrics"]["eval_loss"], rel=1e-3)
    assert begun["metrics"]["eval_loss"] < ended["metrics"]["eval_loss"]
    parent = begun["parent"]
    assert (parent["experimentid"], parent["sha256"]) == (finished.experiment_id, ended["adapter_sha256"])


def check_the_choice(project):
    "The checkpoint with the most right answers is neither the first nor the last, and its adapter is the one that is there."
    lines = [json.loads(line) for line in (project.train_out_dir/"metrics.jsonl").read_text().splitlines()]
    *each, last = [line for line in lines if "eval_exact_match" in line]
    best = max(each, key=lambda line: line["eval_exact_match"])  # the first of several
    assert each[0]["eval_exact_match"] < best["eval_exact_match"] and best["step"] < each[-1]["step"], each
    assert last["eval_loss"] == pytest.approx(best["eval_loss"]) != each[-1]["eval_loss"]


@pytest.fixture(scope="module", params=CHOOSING)
def choosing(request, right, tmp_path_factory):
    "A project, what its job leaves that nothing happens to, and a choice of moments that is always the same."
    folder, choice = tmp_path_factory.mktemp("choosing").resolve(), CHOOSING[request.param]
    base = in_fork(lambda: tiny.save_tiny(folder/"tiny", kind="qwen", initializer_range=choice.spread))
    in_fork(lambda: make_parent(folder/"parent", base))
    (folder/"checked.csv").write_text("".join(ONE_ANSWER[:3]))
    names = {"PARENT": str(folder/"parent"), "CHECKED": str(folder/"checked.csv")}
    if "FINISHED" in choice.settings.values():
        finished = make_finished(folder/"finished", base)
        names["FINISHED"] = str(finished.out_dir)
    settings = {key: names.get(value, value) for key, value in choice.settings.items()}
    place = in_fork(lambda: make_place(folder, base, choice.lines, **settings))
    done = ended(place, start(place, paced))
    assert (done.status, len(done.steps)) == (0, choice.steps), done.printed
    if settings.get("metric_for_best_model"):
        check_the_choice(place.project)
    if "FINISHED" in names:
        check_it_goes_on(place.project, finished)
    return place, state(place.project), random.Random(request.param)


@pytest.mark.parametrize("number", range(3))
def test_killed_at_random(number, choosing):
    "The same bytes as without."
    place, right, chance = choosing
    place.renew()
    for _ in range(4):
        owner, function, most = chance.choice(MOMENTS)
        at = At(owner, function, chance.random() < 0.5, chance.randint(1, most))
        done = ended(place, start(place, lambda: paced(at)))
        if done.status == 0:  # it never came to that moment
            break
        assert done.status == -signal.SIGKILL, (at, done.printed)
    else:
        done = ended(place, start(place, paced))
    assert done.status == 0, done.printed
    assert state(place.project) == right
