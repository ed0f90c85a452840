"A job is killed at each of its phases and run again: the same adapter, one row: `python .ci/kill.py [WORDS OF A CASE ...]`."
import itertools, json, os, pkgutil, re, shutil, signal, sqlite3, subprocess, sys, tempfile, time, traceback
BEGAN = time.monotonic()
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # no threads of the libraries' own when a process is forked
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import ftnb.checkpoints, ftnb.demo.project, ftnb.finetune, ftnb.manifest, ftnb.preflight, ftnb.tiny, ftnb.trainer
sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"tests"))
from forks import import_all, in_fork, time_used

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
TRAINING = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "cosine",
            "optim": "adamw_torch", "logging_steps": 1, "eval_strategy": "epoch", "save_steps": 2, "completion_only_loss": True, "report_to": "none"}
ROWS, STEPS = 14, 6  # of which 11 are trained on, 3 steps an epoch; checkpoints after 2, 4 and 6
ALL = range(1, STEPS + 1)


@dataclass(frozen=True)
class At:
    "A moment of a job: a call of a function."
    function: str  # dotted name
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

def killed(name, function, steps, after=False, n=1, path="", earlier=False): return Case(name, (At(function, after, n, path),), steps, earlier)

CASES = [
    killed("looking up the records", "ftnb.studio.find_records", ALL),
    killed("reading the rows", "ftnb.preflight.read_rows", ALL, after=True),
    killed("formatting", "ftnb.prompts.map_dataset_with_prompt_template", ALL, after=True),
    killed("tokenizing", "ftnb.tokens.tokenize_rows", ALL),
    killed("writing ledger.json", "os.replace", ALL, path="ledger.json"),
    killed("loading the model", "ftnb.models.load_base_model", ALL),
    killed("the model is loaded", "ftnb.models.load_base_model", ALL, after=True),
    killed("writing plan.json", "os.replace", ALL, path="plan.json"),
    killed("the first evaluation", "ftnb.checkpoints._evaluate_apart", ALL, after=True),
    killed("step 1", "ftnb.checkpoints.check_finite", ALL),
    killed("after step 1", "ftnb.trainer.append_metrics", ALL, after=True, n=2),
    killed("step 2", "ftnb.checkpoints.check_finite", ALL, n=2),
    killed("the first checkpoint's write", "ftnb.checkpoints._write_share", ALL, after=True),
    killed("step 3", "ftnb.checkpoints.check_finite", ALL[2:], n=3),
    killed("between two epochs", "ftnb.checkpoints._begin_epoch", ALL[2:], n=2),
    killed("step 4", "ftnb.checkpoints.check_finite", ALL[2:], n=4),
    killed("a checkpoint's write: the weights are there", "peft.PeftModel.save_pretrained", ALL[2:], after=True, path=".checkpoint-4.part"),
    killed("a checkpoint's write: half of it is flushed", "ftnb.manifest.flush", ALL[2:], after=True, path=".checkpoint-4.part/optimizer.pt"),
    killed("a checkpoint's write: the manifest is empty", "ftnb.manifest._manifest_text", ALL[2:], n=3),
    killed("a checkpoint's write: the manifest is flushed", "ftnb.manifest.flush", ALL[2:], after=True, path=".checkpoint-4.part/manifest.json"),
    killed("before the checkpoint's rename", "os.rename", ALL[2:], path="/checkpoint-4"),
    killed("after the checkpoint's rename", "os.rename", ALL[4:], after=True, path="/checkpoint-4"),
    killed("step 5", "ftnb.checkpoints.check_finite", ALL[4:], n=5),
    killed("step 6", "ftnb.checkpoints.check_finite", ALL[4:], after=True, n=6),
    killed("the last checkpoint's write", "ftnb.checkpoints._write_share", ALL[4:], n=3),
    killed("the oldest checkpoint is out of its place", "os.rename", (), after=True, path=".checkpoint-2.old"),
    killed("the oldest checkpoint is half deleted", "os.unlink", (), after=True, path="optimizer.pt"),
    killed("the last evaluation", "ftnb.checkpoints._evaluate_apart", (), n=4),
    killed("training is done", "ftnb.adapters.as_loaded", ()),
    killed("the adapter's write", "peft.PeftModel.save_pretrained", (), after=True, path="/adapters/"),
    killed("the adapter is written", "ftnb.adapters.save_adapter", (), after=True),
    killed("loading the adapter back", "ftnb.models.load_base_model", (), after=True, n=2),
    killed("the adapter is proven", "ftnb.adapters.prove_adapter", (), after=True),
    killed("writing run.json", "os.replace", (), path="run.json"),
    killed("before the adapter's rename", "os.rename", (), path="/adapters/"),
    killed("after the adapter's rename", "os.rename", (), after=True, path="/adapters/"),
    killed("the earlier adapter is in its place", "os.rename", (), n=2, path="/adapters/", earlier=True),
    killed("the earlier adapter is out of its place", "os.rename", (), after=True, n=2, path="/adapters/", earlier=True),
    killed("the adapter has taken its place", "os.rename", (), after=True, n=3, path="/adapters/", earlier=True),
    killed("deleting the earlier adapter", "shutil.rmtree", (), path="/adapters/", earlier=True),
    killed("drawing the report", "os.replace", (), path="report.html"),
    killed("before the insert", "ftnb.registry.register_adapter", ()),
    killed("trying to register", "ftnb.registry._put_adapter", ALL, after=True),
    killed("the insert, before its commit", "ftnb.registry._put_adapter", (), after=True, n=2),
    killed("after the insert", "ftnb.studio.write_studio", (), after=True, n=2),
    Case("steps 3 and 5", (At("ftnb.checkpoints.check_finite", n=3), At("ftnb.checkpoints.check_finite", n=3)), ALL[4:]),
    Case("twice before the same rename", (At("os.rename", path="/checkpoint-4"),)*2, ALL[2:]),
    Case("a checkpoint's write, the adapter's rename, and after the insert", (At("ftnb.checkpoints._write_share", n=2), At("os.rename", path="/adapters/"),
                                                                           At("ftnb.studio.write_studio", after=True, n=2)), ()),
]

# A run is a process of its own, forked from one that has imported everything, with a call in it that is its last

def wrapped(function, around):
    "Put `around(real, *args)` in a function's place."
    place, name = function.rsplit(".", 1)
    owner = pkgutil.resolve_name(place)
    real = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(lambda: real(*args, **kwargs), *args))

def die_at(at):
    "Let this process be killed there."
    calls = itertools.count(1)
    def around(real, *args):
        last = at.path in " ".join(os.fspath(a) for a in args if isinstance(a, (str, os.PathLike))) and next(calls) == at.n
        if not last or at.after: result = real()
        if last: os.kill(os.getpid(), signal.SIGKILL)
        return result
    wrapped(at.function, around)

def note_steps(file):
    "Note each optimizer step in a file."
    def around(real, trainer, *args):
        with open(file, "a") as f: f.write(f"{trainer.state.global_step + 1}\n")
        return real()
    wrapped("ftnb.checkpoints.check_finite", around)

@dataclass
class Run:
    "A run that has ended."
    status: int  # 0, 1 or minus a signal
    steps: tuple  # taken
    printed: str

def start(place, prepare):
    "Start a job's run; returns its process id."
    for name in ("steps", "log"): (place.folder/name).write_text("")
    if pid := os.fork(): return pid
    status = 1
    try:
        log = os.open(place.folder/"log", os.O_WRONLY | os.O_APPEND)
        for number in (1, 2): os.dup2(log, number)
        os.environ |= {"JOB_ARGUMENTS": place.project.job_arguments, "FINE_TUNING_STUDIO_SQLITE_DB": str(place.project.db)}
        os.chdir(place.project.folder)
        note_steps(place.folder/"steps")
        prepare()
        ftnb.finetune.run_command([])
        (place.folder/"modules").write_text("\n".join(sys.modules))
        status = 0
    except BaseException: traceback.print_exc()
    finally:
        for out in (sys.stdout, sys.stderr): out.flush()
        os._exit(status)

def ended(place, pid):
    "Wait for a run's end."
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Run(status, tuple(map(int, (place.folder/"steps").read_text().split())), (place.folder/"log").read_text())

def run(place, at=None): return ended(place, start(place, lambda: at and die_at(at)))

def wait_for(test, seconds=300):
    limit = time.monotonic() + seconds
    while not test():
        if time.monotonic() > limit: raise TimeoutError
        time.sleep(0.01)

# What a run leaves

@dataclass(frozen=True)
class Place:
    "A folder with a project that is put back before each case, since its place is part of a run."
    folder: Path
    project: object
    def renew(self, earlier=False):
        shutil.rmtree(self.project.folder)
        shutil.copytree(self.folder/"template", self.project.folder)
        if earlier:
            self.project.out_dir.mkdir(parents=True)
            for name in ("adapter_model.safetensors", "notes.txt"): (self.project.out_dir/name).write_text("of another program")
            (self.project.out_dir/"run.json").write_text(json.dumps({"experimentid": self.project.experiment_id}))

def make_place(folder, base):
    "Made in a process of its own."
    data = folder/"messages.csv"
    folder.mkdir()
    data.write_text("".join(ftnb.demo.project.demo_data().read_text(encoding="utf-8").splitlines(keepends=True)[:ROWS + 1]), encoding="utf-8")
    project = ftnb.demo.project.make_demo_project(folder/"project", base, data, training=TRAINING, lora=LORA, split=12/ROWS)
    shutil.copytree(project.folder, folder/"template")
    return Place(folder, project)

def plain(values): return {k: v for k, v in values.items() if not re.search("time|second|memory", k)}

def state(project):
    "All that a finished job leaves, without times and memory; what differs between two projects is left out."
    out, key = project.out_dir, project.experiment_id
    with closing(sqlite3.connect(project.db)) as con:
        rows = con.execute("SELECT id, fine_tuning_job_id = ?, location = ?, name FROM adapters", [key, str(out)]).fetchall()
        job = con.execute("SELECT adapter_id FROM fine_tuning_jobs WHERE id = ?", [key]).fetchall()
        found = {"adapters": [row[1:] for row in rows], "fine_tuning_jobs points to it": [row[:1] for row in rows] == job}
    found["files"] = sorted(str(o.relative_to(project.folder)).replace(key, "KEY") for o in project.folder.rglob("*"))
    found |= {f"{o.name}": sha256(o.read_bytes()).hexdigest() for o in out.glob("*") if o.name != "run.json"}
    if (out/"run.json").exists():
        told = json.loads((out/"run.json").read_text())
        found |= {"run.json": plain(told["metrics"]) | {k: told[k] for k in ("adapter_sha256", "rows", "rows_sha256", "proof")}}
    metrics = project.train_out_dir/"metrics.jsonl"
    found["metrics.jsonl"] = [plain(json.loads(line)) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return found

def difference(got, right):
    "Where two states aren't the same, in words."
    if isinstance(got, dict): return "; ".join(f"{k}: {difference(got.get(k), right.get(k))}" for k in {**right, **got} if got.get(k) != right.get(k))
    if isinstance(got, list): return f"{[o for o in got if o not in right]} instead of {[o for o in right if o not in got]}" + f", {len(got)} instead of {len(right)}" * (len(got) != len(right))
    return f"{got} instead of {right}"

def problems(place, right, done, steps, earlier=False):
    "What is wrong after the last run; then the finished job is run once more, and must do nothing."
    if done.status: return [f"run again, it ends with {done.status}:\n{done.printed}"]
    if earlier: right = right | {"files": sorted([*right["files"], "adapters/KEY/notes.txt"]), "notes.txt": sha256(b"of another program").hexdigest()}
    found = [] if list(done.steps) == list(steps) else [f"run again, it takes the steps {[*done.steps]} instead of {[*steps]}"]
    if what := difference(state(place.project), right): found.append(what)
    before = (place.project.out_dir/"run.json").read_bytes()
    once_more = run(place)
    if once_more.status: found.append(f"once it is finished, another run ends with {once_more.status}:\n{once_more.printed}")
    if once_more.steps: found.append(f"once it is finished, another run takes the steps {[*once_more.steps]}")
    if what := difference(state(place.project), right): found.append(f"after another run: {what}")
    if (place.project.out_dir/"run.json").read_bytes() != before: found.append("another run writes run.json anew")
    return found

# Cases: each gives its name and what is wrong

def die_and_go_on(case, place, right):
    place.renew(case.earlier)
    for at in case.deaths:
        died = run(place, at)
        if died.status != -signal.SIGKILL: return [f"{at} is never reached, the run ends with {died.status}:\n{died.printed}"]
    return problems(place, right, run(place), case.steps, case.earlier)

def hold(db, ready, go):
    "The Studio writes: a transaction that is open until it is told to go on. A process of its own."
    if pid := os.fork(): return pid
    con = sqlite3.connect(db, isolation_level=None)
    con.execute("BEGIN IMMEDIATE")
    con.execute("INSERT INTO configs (id, description) VALUES ('studio', 'by the Studio')")
    ready.write_text("")
    wait_for(go.exists)
    con.execute("COMMIT")
    con.close()
    os._exit(0)

def studio_writes(place, right):
    "The Studio's writer holds the database; the job waits, is killed by another process, is run again, waits, and registers."
    place.renew()
    ready, go = place.folder/"ready", place.folder/"go"
    for o in (ready, go): o.unlink(missing_ok=True)
    writer = hold(place.project.db, ready, go)
    try:
        wait_for(ready.exists)
        waits = lambda: re.search("waiting for the Studio database .* up to 300 s", (place.folder/"log").read_text())  # to register, not to try it
        first = start(place, lambda: None)
        wait_for(waits)
        os.kill(first, signal.SIGKILL)
        if (died := ended(place, first)).status != -signal.SIGKILL: return [f"the waiting run ends with {died.status}:\n{died.printed}"]
        second = start(place, lambda: None)
        wait_for(waits)
        time.sleep(1)
    finally:
        go.write_text("")
        os.waitpid(writer, 0)
    found = problems(place, right, ended(place, second), ())
    with closing(sqlite3.connect(place.project.db)) as con:
        if not con.execute("SELECT 1 FROM configs WHERE id = 'studio'").fetchall(): found.append("the Studio's row is lost")
    return found

def paused(place):
    "Start a run that waits in its third step for the file `go`; returns its process id."
    place.renew()
    (go := place.folder/"go").unlink(missing_ok=True)
    def in_step_3(real, trainer, *args):
        norm = real()
        if trainer.state.global_step == 2: wait_for(go.exists)
        return norm
    pid = start(place, lambda: wrapped("ftnb.checkpoints.check_finite", in_step_3))
    wait_for(lambda: (place.folder/"steps").read_text() == "1\n2\n3\n" or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))
    return pid

def sigterm(place, right):
    "A run is told to stop in its third step."
    pid, folder = paused(place), place.project.train_out_dir
    error = f"RunStopped: stopped by SIGTERM at step 3 of {STEPS}; a checkpoint is in {folder}/checkpoint-3; run the job again with the same arguments to go on"
    os.kill(pid, signal.SIGTERM)
    (place.folder/"go").write_text("")
    stopped, found = ended(place, pid), []
    if stopped.status != 1 or error not in stopped.printed: found.append(f"it ends with {stopped.status}, and {error!r} is not in\n{stopped.printed}")
    if why := ftnb.manifest.checkpoint_problem(str(folder/"checkpoint-3")): found.append(why)
    return found + problems(place, right, run(place), ALL[3:])

def twice_at_once(place, right):
    "While a run is at work, the job is started again."
    first, found = paused(place), []
    second = run(place)
    if second.status != 1 or second.steps or "is in use by process" not in second.printed: found.append(f"the second run ends with {second.status}:\n{second.printed}")
    (place.folder/"go").write_text("")
    return found + problems(place, right, ended(place, first), ALL[3:])

def by_its_own_door(place, right):
    "A process of its own, not forked from this one, is killed at any moment after its first checkpoint."
    place.renew()
    env = {**os.environ, "JOB_ARGUMENTS": place.project.job_arguments, "FINE_TUNING_STUDIO_SQLITE_DB": str(place.project.db)}
    job = partial(subprocess.Popen, [sys.executable, "-m", "ftnb.finetune"], env=env, cwd=place.project.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first = job()
    wait_for(lambda: (place.project.train_out_dir/"checkpoint-2").exists() or first.poll() is not None)
    first.kill()
    printed, second = first.communicate()[0], job()
    again = second.communicate()[0]
    if second.returncode: return [f"run again, it ends with {second.returncode}:\n{printed}\n{again}"]
    return problems(place, right, Run(0, (), again), ())

# All of them, on as many processes as there are cores

def undisturbed(place):
    "What a job leaves that nothing happens to; imports all that it imports, so that later runs begin with it."
    done = run(place)
    print(done.printed if done.status or done.steps != tuple(ALL) else f"undisturbed: steps {[*done.steps]}", flush=True)
    import_all((place.folder/"modules").read_text().split())
    return state(place.project)

def work_off(place, right, cases, tasks, results):
    "A worker: takes numbers of cases until there is a None."
    while (i := tasks.get()) is not None:
        name, case = cases[i]
        try: found = case(place, right)
        except Exception: found = [traceback.format_exc()]
        results.put((name, found))

def main(words):
    ftnb.preflight.quiet_libraries()
    cases = [(f"killed: {case.name}", partial(die_and_go_on, case)) for case in CASES]
    cases = [("killed: a process of its own", by_its_own_door), ("killed: waiting for the Studio's writer", studio_writes),
             ("SIGTERM: step 3", sigterm), ("started again while it runs", twice_at_once), *cases]
    cases, passed = [(name, case) for name, case in cases if not words or " ".join(words) in name], 0
    with tempfile.TemporaryDirectory() as folder:
        folder, context, cores = Path(folder).resolve(), get_context("fork"), min(ftnb.trainer.usable_cores(), len(cases))
        base = in_fork(lambda: ftnb.tiny.save_tiny(folder/"tiny", kind="qwen"))
        places = [in_fork(lambda: make_place(folder/str(i), base)) for i in range(cores)]
        right, tasks, results = undisturbed(places[0]), context.SimpleQueue(), context.SimpleQueue()
        workers = [context.Process(target=work_off, args=(place, right, cases, tasks, results)) for place in places]
        for worker in workers: worker.start()
        for i in [*range(len(cases)), *[None]*cores]: tasks.put(i)
        for _ in cases:
            name, found = results.get()
            passed += not found
            print("\n  ".join([f"{'FAILED' if found else 'ok'}: {name}", *found]), flush=True)
        for worker in workers: worker.join()
    print(time_used(BEGAN))
    print(f"{passed} passed, {len(cases) - passed} failed")
    return int(passed < len(cases))

if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
