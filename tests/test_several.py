"Several processes against one: the same losses, the same adapter."

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

os.environ["GLOO_SOCKET_IFNAME"] = "lo"
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import pytest
from forks import fork_logged, import_all, in_fork

import ftnb
import ftnb.checkpoints
import ftnb.demo.project
import ftnb.finetune
import ftnb.jobargs
import ftnb.manifest
import ftnb.preflight
import ftnb.passes
import ftnb.progress
import ftnb.ranks
import ftnb.tiny

pytestmark = pytest.mark.slow

SCRIPT = Path(ftnb.__file__).parent / "finetune.py"
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
TRAINING = {
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "optim": "adamw_torch",
    "logging_steps": 1,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "completion_only_loss": True,
    "ddp_find_unused_parameters": False,
    "report_to": "none",
}
ROWS, TRAINED = 86, 75
STEPS = 20  # in an epoch 9 of 8 rows and one of 3: of four processes one has no row then
BATCHES = {
    1: (4, 2),
    2: (2, 2),
    4: (1, 2),
}  # processes -> rows of a batch on each, batches of a step: always 8 rows
LIMIT = 1e-5  # of losses, and of each number of the adapter


@dataclass(frozen=True)
class Place:
    "A folder with a project that is put back before each run."

    folder: Path
    project: object

    def renew(self):
        shutil.rmtree(self.project.folder)
        shutil.copytree(self.folder / "template", self.project.folder)

    def arguments(self, processes, **training):
        "Of the job, with the same rows a step whatever the number of processes."
        rows, batches = BATCHES[processes]
        asked = (
            TRAINING
            | {
                "per_device_train_batch_size": rows,
                "gradient_accumulation_steps": batches,
                "tokens_per_pass": 600,
            }
            | training
        )
        args = ftnb.jobargs.parse_job_arguments(self.project.job_arguments)
        return ftnb.jobargs.format_job_arguments(
            replace(args, training_arguments_config=json.dumps(asked, separators=(",", ":")))
        )


def make_place(folder, base, **config):
    data = folder / "messages.csv"
    folder.mkdir()
    data.write_text(
        "".join(
            ftnb.demo.project.demo_data().read_text(encoding="utf-8").splitlines(keepends=True)[: ROWS + 1]
        ),
        encoding="utf-8",
    )
    project = ftnb.demo.project.make_demo_project(
        folder / "project", base, data, training=TRAINING, lora=LORA, split=TRAINED / ROWS, **config
    )
    shutil.copytree(project.folder, folder / "template")
    return Place(folder, project)


# A run: one process, or several under torch's elastic agent, forked from one that has imported everything


@dataclass
class Run:
    status: int  # 0, 1 or minus a signal
    printed: str
    seconds: float
    left: list  # processes that are still there
    metrics: list  # lines of metrics.jsonl
    told: dict  # run.json
    adapter: dict  # name -> tensor

    @property
    def losses(self):
        return [(o["step"], k, o[k]) for o in self.metrics for k in ("loss", "eval_loss") if k in o]


def read_run(place, status, printed, seconds, left):
    "What a run has left."
    from safetensors.torch import load_file

    out, metrics = place.project.out_dir, place.project.train_out_dir / "metrics.jsonl"
    lines = [json.loads(o) for o in metrics.read_text().splitlines()] if metrics.exists() else []
    there = (out / "run.json").exists()
    return Run(
        status,
        printed,
        seconds,
        left,
        lines,
        json.loads((out / "run.json").read_text()) if there else {},
        load_file(out / "adapter_model.safetensors") if there else {},
    )


def environment(place, arguments):
    return {"JOB_ARGUMENTS": arguments, "FINE_TUNING_STUDIO_SQLITE_DB": str(place.project.db)}


def job(place, arguments, prepare):
    "The program of each process."
    os.environ |= environment(place, arguments)
    os.chdir(place.project.folder)
    prepare(int(os.environ.get("RANK", "0")))
    ftnb.finetune.run_command([])
    (place.folder / "modules").write_text("\n".join(sys.modules))


def under_agent(processes, *args):
    """What torchrun does, with a function for a program: `job`.

    Addresses are in numbers: a process that is forked while another thread looks up a name can look up none.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    elastic_launch(
        LaunchConfig(
            1,
            1,
            processes,
            run_id="several",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            start_method="fork",
            monitor_interval=0.1,
            max_restarts=0,
        ),
        job,
    )(*args)


def start(place, program):
    def in_its_session():
        os.setsid()
        program()

    return fork_logged(place.folder / "log", in_its_session)


def in_session(session):
    "Processes that are at work in it."
    found = []
    for o in psutil.process_iter(["pid", "status"]):
        with contextlib.suppress(OSError):
            if os.getsid(o.pid) == session and o.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(o.pid)
    return found


def run(place, processes, prepare=lambda rank: None, meanwhile=lambda pid: None, **training):
    "A run from its start to its end; what it left."
    args, began = (place, place.arguments(processes, **training), prepare), time.monotonic()
    pid = start(place, partial(job, *args) if processes == 1 else partial(under_agent, processes, *args))
    meanwhile(pid)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return read_run(
        place, status, (place.folder / "log").read_text(), time.monotonic() - began, in_session(pid)
    )


def command(place, argv, arguments, limit=1500):
    "The same by a command of its own."
    began = time.monotonic()
    done = subprocess.Popen(
        argv,
        env={**os.environ, **environment(place, arguments)},
        cwd=place.project.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = done.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(done.pid, signal.SIGKILL)
        printed = done.communicate()[0] + f"\nit was still there after {limit} s"
    return read_run(place, done.returncode, printed, time.monotonic() - began, in_session(done.pid))


TORCHRUN = ftnb.ranks.local_command(2)


def at_step(step, rank, act, after=0.0):
    "Have one process do something within a step."

    def prepare(own):
        if own != rank:
            return
        real = ftnb.checkpoints.check_finite

        def around(trainer, norm):
            if trainer.state.global_step + 1 == step:
                act()
            return real(trainer, norm)

        ftnb.checkpoints.check_finite = around

    return prepare


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def ask_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


def fail():
    raise RuntimeError("the third law of thermodynamics")


# What is compared


def differences(got, right, processes, limit=LIMIT):
    "In what a run isn't the one of a single process."
    if got.status:
        return [f"it ends with {got.status}:\n{got.printed[-6000:]}"]
    found = [f"processes left: {got.left}"] if got.left else []
    if [o[:2] for o in got.losses] != [o[:2] for o in right.losses]:
        return found + [
            f"other lines: {[o[:2] for o in got.losses]} instead of {[o[:2] for o in right.losses]}"
        ]
    loss = max(abs(a[2] - b[2]) for a, b in zip(got.losses, right.losses))
    adapter = (
        max((got.adapter[k] - v).abs().max().item() for k, v in right.adapter.items())
        if got.adapter.keys() == right.adapter.keys()
        else math.inf
    )
    if not loss <= limit:
        found.append(f"a loss differs by {loss:.2g}")
    if not adapter <= limit:
        found.append(f"a number of the adapter differs by {adapter:.2g}")
    counts = lambda o: [(l["step"], l["rows"], l["tokens_given"]) for l in o.metrics]
    if counts(got) != counts(right):
        found.append(f"rows and tokens given: {counts(got)} instead of {counts(right)}")
    trained = {
        k: abs(got.told["metrics"][k] - right.told["metrics"][k])
        for k in ("train_loss", "eval_loss", "eval_loss_before")
    }
    if max(trained.values()) > limit:
        found.append(f"run.json's losses differ: {trained}")
    if got.told["processes"] != processes:
        found.append(f"run.json says {got.told['processes']} processes")
    return found


def same_as_one(place, right, processes, shared):
    place.renew()
    return differences(run(place, processes, shared_prefix=shared), right[shared], processes)


def left_checkpoint(place, step, stopped):
    "What is wrong with a run that was asked to stop."
    found = (
        []
        if stopped.status and f"at step {step} of {STEPS}; a checkpoint is in" in stopped.printed
        else [f"stopped, it ends with {stopped.status}:\n{stopped.printed[-4000:]}"]
    )
    if why := ftnb.manifest.checkpoint_problem(str(place.project.train_out_dir / f"checkpoint-{step}")):
        found.append(why)
    return found


def resumed(place, right, first, then, step, shared):
    "One process of the first run is asked to stop, and the run goes on with another number of processes."
    place.renew()
    found = left_checkpoint(
        place, step, run(place, first, at_step(step, first - 1, ask_to_stop), shared_prefix=shared)
    )
    again = run(place, then, shared_prefix=shared)
    if f"going on from {place.project.train_out_dir}/checkpoint-{step}" not in again.printed:
        found.append(f"it doesn't go on:\n{again.printed[-3000:]}")
    return found + differences(again, right[shared], then)


def ends(place, rank, act, words, limit=600):
    "One process of two ends in its fifth step; so does the other, soon."
    place.renew()
    moment = place.folder / "moment"

    def mark_and():
        moment.write_text(str(time.time()))
        act()

    done = run(place, 2, at_step(5, rank, mark_and))
    took = time.time() - float(moment.read_text())
    found = [f"it takes {took:.0f} s"] if took > limit else []
    if not done.status:
        found.append("it ends well")
    if done.left:
        found.append(f"processes left: {done.left}")
    return found + [f"{o!r} is not told:\n{done.printed[-4000:]}" for o in words if o not in done.printed]


def refused(place, arguments, words, limit=1000):
    "A job that can't run, by torchrun: the first process says so, once."
    place.renew()
    done, found = command(place, [*TORCHRUN, str(SCRIPT)], arguments), []
    if ftnb.ranks.missed_rendezvous(done.printed):  # which says nothing of the job
        done = command(place, [*TORCHRUN, str(SCRIPT)], arguments)
    if not done.status:
        found.append("it ends well")
    if done.seconds > limit:
        found.append(f"it takes {done.seconds:.0f} s")
    if done.left:
        found.append(f"processes left: {done.left}")
    if done.printed.count("Traceback (most recent call last)") > 2:
        found.append("more than one process complains")  # torchrun has a traceback of its own
    return found + [
        f"{o!r} is told {done.printed.count(o)} times:\n{done.printed[-4000:]}"
        for o in words
        if done.printed.count(o) != 1
    ]


def last_evaluation(rank, where):
    "Have one process fail in the last evaluation: before it, or in its passes."
    import transformers

    def prepare(own):
        if own != rank:
            return
        place = transformers.Trainer if where == "evaluate" else ftnb.passes
        real = getattr(place, where)

        def around(*args, **kwargs):
            trainer, train = args[0], args[-1] is True and where != "evaluate"
            if trainer.state.global_step == trainer.state.max_steps and not train:
                raise RuntimeError("the third law of thermodynamics")
            return real(*args, **kwargs)

        setattr(place, where, around)

    return prepare


def keeps_what_was_trained(place, right, rank, where, shared):
    "The last evaluation fails on one of two processes: that is said, and nothing is lost."
    place.renew()
    done = run(place, 2, last_evaluation(rank, where), shared_prefix=shared)
    if done.status:
        return [f"it ends with {done.status}:\n{done.printed[-6000:]}"]
    weights = max((done.adapter[k] - v).abs().max().item() for k, v in right[shared].adapter.items())
    found = [f"a number of the adapter differs by {weights:.2g}"] if not weights <= LIMIT else []
    if "RuntimeError: the third law of thermodynamics); the adapter is not touched" not in done.printed:
        found.append(f"it isn't said:\n{done.printed[-4000:]}")
    if "eval_loss" in done.told.get("metrics", {"eval_loss": 0}):
        found.append("run.json has a held-out loss, or isn't there")
    return found


def wrong_arguments(place):
    return refused(place, "--base_modl_id 1", ["--base_modl_id is no key"])


def wrong_job(place):
    return refused(
        place, place.arguments(2, learning_rat=1), ["preflight of job", "ftnb.problems.ProblemsError:"]
    )


WAITS_IN_STEP_5 = """"Rank 0 begins with this: it waits in its fifth step until it is asked to stop, and rank 1 for it."
import os
if os.environ.get("RANK") == "0":
    import time
    import ftnb.checkpoints as checkpoints
    real = checkpoints.check_finite
    def check_finite(trainer, norm):
        while trainer.state.global_step == 4 and not trainer.run.stop_asked_by: time.sleep(0.02)
        return real(trainer, norm)
    checkpoints.check_finite = check_finite
"""


def by_torchrun(place, right):
    "The real launcher by path is sent SIGTERM in training; one process goes on."
    place.renew()
    (modules := place.folder / "modules_of_ranks").mkdir()
    (modules / "sitecustomize.py").write_text(WAITS_IN_STEP_5)
    path = os.pathsep.join([str(modules), str(Path(ftnb.__file__).parent.parent)])
    env = {
        **os.environ,
        **environment(place, place.arguments(2)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "900",
        "PYTHONPATH": path,
    }
    with open(place.folder / "log", "w") as log:
        launcher = subprocess.Popen(
            [*TORCHRUN, str(SCRIPT)],
            env=env,
            cwd=place.project.folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    metrics, limit = place.project.train_out_dir / "metrics.jsonl", time.monotonic() + 1200
    while (
        launcher.poll() is None
        and time.monotonic() < limit
        and not (metrics.exists() and metrics.read_text().count('"loss"') >= 3)
    ):
        time.sleep(0.02)
    launcher.terminate()
    status, printed = launcher.wait(), (place.folder / "log").read_text()
    found = (
        []
        if status and "a checkpoint is in" in printed
        else [f"sent SIGTERM, it ends with {status}:\n{printed[-6000:]}"]
    )
    if left := in_session(launcher.pid):
        found.append(f"processes left: {left}")
    return found + differences(run(place, 1), right["auto"], 1)


def by_notebook_launcher(place, right):
    "From a notebook's kernel."
    place.renew()
    program = "\n".join(
        [
            "import os",
            "from accelerate import notebook_launcher",
            "from ftnb.all import finetune, parse_job_arguments",
            "args = parse_job_arguments(os.environ['JOB_ARGUMENTS'])",
            "notebook_launcher(finetune, (args,), num_processes=2)",
        ]
    )
    return differences(command(place, [sys.executable, "-c", program], place.arguments(2)), right["auto"], 2)


def four_bit(place):
    "A 4-bit base: two processes and one."
    place.renew()
    right = run(place, 1, max_steps=6)
    if right.status:
        return [right.printed[-4000:]]
    place.renew()
    return differences(run(place, 2, max_steps=6), right, 2, 1e-4)


FSDP = [
    str(Path(sys.executable).parent / "accelerate"),
    "launch",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--use_fsdp",
    "--fsdp_version",
    "2",
    "--fsdp_auto_wrap_policy",
    "TRANSFORMER_BASED_WRAP",
    "--fsdp_transformer_layer_cls_to_wrap",
    "LlamaDecoderLayer",
]


def by_fsdp(place, program=(SCRIPT,), **training):
    return command(place, [*FSDP, *map(str, program)], place.arguments(2, **training))


def sharded(place, right):
    "FSDP by accelerate's own command: the adapter is whole, and PEFT loads it."
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    place.renew()
    done = by_fsdp(place)
    found = differences(done, right["auto"], 2)
    if done.status:
        return found
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(place.folder.parent / "tiny"), place.project.out_dir
    )
    if not any(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name):
        found.append("PEFT finds nothing that was trained")
    return found


STOPPED_AT = """import os, sys
sys.path.insert(0, sys.argv[1])
import test_several, ftnb.finetune
test_several.at_step(int(sys.argv[2]), 1, test_several.ask_to_stop)(int(os.environ["RANK"]))
ftnb.finetune.run_command([])
"""


def sharded_goes_on(place, right):
    "FSDP is stopped twice: it goes on with FSDP, and then on one process without; and the other way round."
    (place.folder / "stopped_at.py").write_text(STOPPED_AT)

    def stopped_at(step):
        return left_checkpoint(
            place, step, by_fsdp(place, [place.folder / "stopped_at.py", Path(__file__).parent, step])
        )

    place.renew()
    found = stopped_at(7) + stopped_at(13)
    found += differences(run(place, 1), right["auto"], 1)
    place.renew()
    found += left_checkpoint(place, 9, run(place, 1, at_step(9, 0, ask_to_stop)))
    return found + differences(by_fsdp(place), right["auto"], 2)


def sharded_best(place):
    "An earlier checkpoint, taken for the best, is loaded at the end, as by one process."
    more = dict(
        load_best_model_at_end=True,
        save_strategy="epoch",
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    place.renew()
    right = run(place, 1, **more)
    if right.status:
        return [right.printed[-4000:]]
    place.renew()
    return differences(by_fsdp(place, **more), right, 2)


# All of them, on a project that is put back before each run


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "A folder with a tiny base model; made in a fork, so that no thread starts here."
    ftnb.progress.quiet_libraries()
    folder = tmp_path_factory.mktemp("several").resolve()
    in_fork(lambda: ftnb.tiny.save_tiny(folder / "tiny", kind="qwen"))
    return folder


@pytest.fixture(scope="module")
def place(work):
    return in_fork(lambda: make_place(work / "plain", work / "tiny"))


@pytest.fixture(scope="module")
def right(place):
    "What one process leaves, with and without a shared prefix; imports all that it imports, so that later runs begin with it."
    runs = {}
    for shared in ("auto", False):
        place.renew()
        runs[shared] = run(place, 1, shared_prefix=shared)
        if runs[shared].status:
            raise RuntimeError(runs[shared].printed)
        import_all(
            [
                *(place.folder / "modules").read_text().split(),
                "torch.distributed.launcher.api",
                "torch.distributed.elastic.agent.server.local_elastic_agent",
            ]
        )
    return runs


def fine(problems):
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("shared", ["auto", False])
@pytest.mark.parametrize("processes", [2, 4])
def test_same_as_one(place, right, processes, shared):
    fine(same_as_one(place, right, processes, shared))


@pytest.mark.parametrize(
    "first, then, step, shared", [(2, 1, 7, "auto"), (1, 2, 13, "auto"), (2, 1, 10, False), (1, 2, 9, False)]
)
def test_goes_on_with_another_number(place, right, first, then, step, shared):
    fine(resumed(place, right, first, then, step, shared))


def test_4_bit(work, right):
    bnb = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    fine(four_bit(in_fork(lambda: make_place(work / "quantised", work / "tiny", bnb=bnb))))


@pytest.mark.parametrize("rank", [0, 1])
def test_one_is_killed(place, right, rank):
    fine(ends(place, rank, kill_self, ["Signal 9 (SIGKILL)"]))


STOPPING = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "early_stopping_patience": 2,
    "early_stopping_threshold": 10.0,  # which nothing is better by: the run ends after three evaluations
}


def weights_of(place):
    return (place.project.out_dir / "adapter_model.safetensors").read_bytes()


def test_stops_early_and_is_killed(place, right):
    "Two processes; one of them is killed, then the other: the same end, and the same bytes, as without."
    place.renew()
    whole = run(place, 2, **STOPPING)
    assert whole.status == 0, whole.printed
    bytes_of_whole = weights_of(place)
    place.renew()
    for step, rank in ((4, 1), (5, 0)):
        died = run(place, 2, at_step(step, rank, kill_self), **STOPPING)
        assert died.status and "Signal 9 (SIGKILL)" in died.printed, died.printed
    again = run(place, 2, **STOPPING)
    assert again.status == 0, again.printed
    assert max(step for step, *_ in again.losses) == 6 < STEPS
    assert again.losses == whole.losses
    assert weights_of(place) == bytes_of_whole


def test_one_fails(place, right):
    fine(ends(place, 1, fail, ["RuntimeError: the third law of thermodynamics"]))


@pytest.mark.parametrize(
    "rank, where, shared", [(0, "evaluate", "auto"), (1, "evaluate", "auto"), (1, "_flat_passes", "auto"), (1, "_padded_passes", False)]
)
def test_last_evaluation_fails_on_one(place, right, rank, where, shared):
    fine(keeps_what_was_trained(place, right, rank, where, shared))


def test_wrong_arguments(place):
    fine(wrong_arguments(place))


def test_wrong_job(place):
    fine(wrong_job(place))


def test_torchrun_and_sigterm(place, right):
    fine(by_torchrun(place, right))


def test_notebook_launcher(place, right):
    fine(by_notebook_launcher(place, right))


def test_fsdp(place, right):
    fine(sharded(place, right))


def test_fsdp_goes_on(place, right):
    fine(sharded_goes_on(place, right))


def test_fsdp_best_checkpoint(place, right):
    fine(sharded_best(place))
