"A job on two nodes, which are two network namespaces of this machine."

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import ftnb
from ftnb.demo.project import demo_data, make_demo_project
from ftnb.manifest import checkpoint_problem

pytestmark = [pytest.mark.slow, pytest.mark.root]

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
TRAINING = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_steps": 2,
    "completion_only_loss": True,
    "report_to": "none",
}
ROWS, STEPS, TOKEN = 14, 6, "hf_verysecretindeed"
ADDRESSES = ("10.231.77.1", "10.231.77.2")
SECONDS = 1500  # that a run may take

# What Cloudera does: a script runs as the cell of a kernel, and workers are started by a module of its own

KERNEL = """"Run standard input as the cell of a kernel."
import sys
from jupyter_client.manager import KernelManager
manager = KernelManager(kernel_name="python3")
manager.kernel_spec.argv[:] = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
manager.start_kernel()
client = manager.client()
client.start_channels()
def show(message): print(*(message["content"].get("traceback") or [message["content"].get("text", "")]), sep="\\n", end="", flush=True)
try:
    client.wait_for_ready(timeout=900)
    reply = client.execute_interactive(sys.stdin.read(), timeout=None, output_hook=show)
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
sys.exit(reply["content"]["status"] != "ok")
"""

WORKERS = """"Stands in for Cloudera's module: a worker is a kernel in the second namespace, which has the project's environment and what it is given."
import json, os, signal, subprocess, sys
def note(**what):
    with open(os.environ["STAND_IN_CALLS"], "a") as f: f.write(json.dumps(what) + "\\n")
process = None
def launch_workers(n, cpu, memory, nvidia_gpu=0, kernel="python3", script="", code="", env={}, **more):
    global process
    note(call="launch", n=n, cpu=cpu, memory=memory, nvidia_gpu=nvidia_gpu, script=script, code=code, env=env, more=more)
    if os.environ["STAND_IN"] == "fails": code = "raise ValueError('no such image')"
    if os.environ["STAND_IN"] != "never":
        project = {k: os.environ[k] for k in json.loads(os.environ["STAND_IN_PROJECT"]) if k in os.environ}
        process = subprocess.Popen(["ip", "netns", "exec", os.environ["STAND_IN_NETWORK"], sys.executable, os.environ["STAND_IN_KERNEL"]], env=project | env, cwd="/",
                                   stdin=subprocess.PIPE, stdout=open(os.environ["STAND_IN_LOG"], "a"), stderr=subprocess.STDOUT, text=True, start_new_session=True)
        process.stdin.write(code)
        process.stdin.close()
    return [{"id": "w1", "status": "scheduling", "ip_address": "unknown"}]
def list_workers():
    status = "scheduling" if process is None else {None: "running", 0: "succeeded"}.get(process.poll(), "failed")
    return [{"id": "w1", "status": status, "ip_address": "unknown"}]
def stop_workers(*ids):
    note(call="stop", ids=ids)
    for pid in subprocess.run(["ip", "netns", "pids", os.environ["STAND_IN_NETWORK"]], capture_output=True, text=True).stdout.split():
        try: os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError: pass
    if process is not None: process.wait()
"""

HOOKS = """"Every process here begins with this: rank 1 waits in its third step for a file, fails in it, or would abort as its interpreter ends."
import os
if os.environ.get("RANK") == "1" and os.environ.get("THIRD_STEP") == "aborts":
    class Thread:
        def __del__(self, abort=os.abort): abort()
    thread = Thread()
elif os.environ.get("RANK") == "1" and (task := os.environ.get("THIRD_STEP")):
    import time
    import ftnb.checkpoints as checkpoints
    real = checkpoints.check_finite
    def check_finite(trainer, norm):
        if trainer.state.global_step == 2 and task == "fails": raise ArithmeticError("the third step is too much")
        while trainer.state.global_step == 2 and not os.path.exists(task): time.sleep(0.05)
        return real(trainer, norm)
    checkpoints.check_finite = check_finite
"""

# Two networks, joined by a wire


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def processes_in(network):
    return [int(o) for o in ip("netns", "pids", network).split()]


def clear(network):
    "Kill what runs in a network, if anything."
    with suppress(subprocess.CalledProcessError):
        while found := processes_in(network):
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


def remove(network):
    "Remove a network, with all that runs in it."
    clear(network)
    subprocess.run(["ip", "netns", "del", network], capture_output=True)


@contextmanager
def two_networks():
    "Two namespaces, each with an interface to the other; gone afterwards, with all that runs in them."
    names = [f"ftnb-nodes-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "wire0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "wire1",
            "netns",
            names[1],
        )
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{ADDRESSES[i]}/24", "dev", f"wire{i}")
            for device in ("lo", f"wire{i}"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            remove(name)


def why_not():
    "Why there can't be networks here, or nothing."
    if os.geteuid():
        return "not root"
    try:
        for name in re.findall(r"^ftnb-nodes-\d+-\d", ip("netns", "list"), re.M):
            if not os.path.exists(f"/proc/{name.split('-')[2]}"):
                remove(name)  # of a test that was killed
        with two_networks() as names:
            ip("netns", "exec", names[0], "true")
    except (OSError, subprocess.CalledProcessError) as e:
        return str(getattr(e, "stderr", "") or e).strip()


# A job on them


@dataclass
class Place:
    "Where jobs run."

    folder: Path
    base: Path
    networks: list

    def new(self, name):
        data = self.folder / "messages.csv"
        data.write_text(
            "".join(demo_data().read_text(encoding="utf-8").splitlines(keepends=True)[: ROWS + 1]),
            encoding="utf-8",
        )
        return Job(
            self,
            make_demo_project(
                self.folder / re.sub(r"\W+", "-", name),
                self.base,
                data,
                training=TRAINING,
                lora=LORA,
                split=12 / ROWS,
            ),
        )


@dataclass
class Job:
    "A job that begins on the first node."

    place: Place
    project: object
    process: object = None
    begun: float = 0.0
    seen: set = field(default_factory=set)  # command lines that held the token

    def __getattr__(self, name):
        return (
            self.project.folder
            / {
                "log": "log",
                "workers_log": "workers-log",
                "calls_file": "calls",
                "go": "go",
                "temporary": "temporary",
            }[name]
        )

    def start(self, stand_in="runs", **env):
        "Run the job's script as a cell, as Cloudera would."
        for o in (self.log, self.workers_log, self.calls_file):
            o.write_text("")
        self.temporary.mkdir(exist_ok=True)
        own = {
            "STAND_IN": stand_in,
            "STAND_IN_NETWORK": self.place.networks[1],
            "STAND_IN_CALLS": self.calls_file,
            "STAND_IN_LOG": self.workers_log,
            "STAND_IN_KERNEL": self.place.folder / "kernel.py",
            "STAND_IN_PROJECT": json.dumps(
                ["PATH", "HOME", "LANG", "PYTHONPATH", "THIRD_STEP", "OMP_NUM_THREADS"]
            ),
            "PYTHONPATH": os.pathsep.join(
                [str(self.place.folder / "modules"), str(Path(ftnb.__file__).parent.parent)]
            ),
            "TMPDIR": self.temporary,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "JOB_ARGUMENTS": f"{self.project.job_arguments} --dist_num 2 --dist_cpu 1 --dist_mem 2 --dist_gpu 0 --hf_token {TOKEN}",
            "FINE_TUNING_STUDIO_SQLITE_DB": self.project.db,
            "CDSW_IP_ADDRESS": ADDRESSES[0],
            "CDSW_ENGINE_TYPE": "job",
        }
        clean = {
            k: v
            for k, v in os.environ.items()
            if k not in ("GLOO_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT", "HUGGINGFACE_ACCESS_TOKEN")
        }
        self.process = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                self.place.networks[0],
                sys.executable,
                str(self.place.folder / "kernel.py"),
            ],
            cwd=self.project.folder,
            env=clean | {k: str(v) for k, v in (own | env).items()},
            stdin=subprocess.PIPE,
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
        )
        self.process.stdin.write((Path(ftnb.__file__).parent / "finetune.py").read_bytes())
        self.process.stdin.close()
        self.begun = time.monotonic()
        return self

    def until(self, test):
        "Wait for something, or for the end of the job; all the while command lines are looked at."
        while not test() and self.process.poll() is None:
            if time.monotonic() - self.begun > SECONDS:
                raise TimeoutError(f"after {SECONDS} seconds the run goes on")
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    if TOKEN.encode() in (line := file.read_bytes()):
                        self.seen.add(line)
            time.sleep(0.2)

    def end(self):
        "Wait for the end; returns what the job printed."
        self.until(lambda: False)
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text())

    def checkpoint(self, step):
        return self.project.train_out_dir / f"checkpoint-{step}"

    def kernel(self, node):
        "The process that a signal is sent to."
        for pid in processes_in(self.place.networks[node]):
            with suppress(OSError):
                if b"ipykernel_launcher" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid

    def calls(self):
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]


# One pair of networks; a job a test


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_base):
    if reason := why_not():
        pytest.skip(f"no network namespaces here ({reason})")
    folder = tmp_path_factory.mktemp("nodes").resolve()
    (folder / "modules" / "cml").mkdir(parents=True)
    texts = {
        "kernel.py": KERNEL,
        "modules/cml/__init__.py": "",
        "modules/cml/workers_v1.py": WORKERS,
        "modules/sitecustomize.py": HOOKS,
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    with two_networks() as networks:
        yield Place(folder, tiny_base, networks)


@pytest.fixture
def job(place, request):
    "A job; when its test is over, nothing of it is left and the token is nowhere."
    job = place.new(request.node.name)
    yield job
    deadline = time.monotonic() + 600
    while (left := [pid for o in place.networks for pid in processes_in(o)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    for network in place.networks:
        clear(network)
    if job.process is None:
        return
    print(
        job.log.read_text()[-6000:], "the second node:", job.workers_log.read_text()[-4000:], sep="\n"
    )  # shown where something fails
    assert not left
    assert not [o.name for o in job.temporary.iterdir() if o.name.startswith(("ftnb-", "torchelastic"))], (
        "the first node leaves files"
    )
    assert not job.seen, "the token is on a command line"
    assert TOKEN not in job.log.read_text() + job.workers_log.read_text()


def finishes(job):
    "It ends well, after all steps, with its adapter registered and no worker stopped."
    printed, project = job.end(), job.project
    assert not job.process.returncode, printed
    steps = [
        o["step"]
        for o in map(json.loads, (project.train_out_dir / "metrics.jsonl").read_text().splitlines())
        if "loss" in o
    ]
    assert steps == [*range(1, STEPS + 1)]
    with closing(sqlite3.connect(project.db)) as con:
        rows = con.execute("SELECT count(*) FROM adapters").fetchone()
    assert (project.out_dir / "adapter_model.safetensors").exists() and rows == (1,)
    assert all(o in printed for o in ("node 1 has come", "preflight of job", "loaded back"))
    assert not [o for o in job.calls() if o["call"] == "stop"]
    return printed


def fails(job, words):
    "It ends in these words, and in time."
    printed = job.end()
    assert words in printed
    assert job.process.returncode


def goes_on(job):
    "Run again, it goes on from its checkpoint, and completes."
    assert "going on from" in finishes(job.start())


def in_step_3(job):
    "A run with a checkpoint, in which rank 1 waits in the third step, and rank 0 for rank 1."
    job.start(THIRD_STEP=job.go).until(job.checkpoint(2).exists)
    return job


def test_two_nodes(job):
    finishes(job.start())
    launch = job.calls()[0]
    assert [k for k, v in launch["env"].items() if TOKEN in str(v)] == ["HUGGINGFACE_ACCESS_TOKEN"]
    assert TOKEN not in launch["code"] + launch["script"]
    assert (launch["n"], launch["cpu"], launch["memory"], launch["nvidia_gpu"], launch["more"]) == (
        1,
        1,
        2,
        0,
        {},
    )


def test_the_second_never_comes(job):
    fails(
        job.start("never", FTNB_JOIN_SECONDS=5),
        "node 1 (worker w1, scheduling) didn't join the run within 5 seconds",
    )
    assert job.calls()[-1] == {"call": "stop", "ids": ["w1"]}


def test_the_second_ends_before_it_joins(job):
    fails(job.start("fails"), "node 1 (worker w1, failed) ended before it joined the run")


def test_the_second_is_killed(job):
    clear(in_step_3(job).place.networks[1])
    fails(job, "node 1 (worker w1, failed) was lost during the run")
    goes_on(job)


def test_the_second_is_cut_off(job):
    "No packet comes any more, so that nobody is told."
    second = in_step_3(job).place.networks[1]
    ip("-n", second, "link", "set", "wire1", "down")
    try:
        clear(second)
        fails(job, "node 1 (worker w1, failed) was lost during the run")
    finally:
        ip("-n", second, "link", "set", "wire1", "up")


def test_a_rank_of_the_second_fails(job):
    fails(
        job.start(THIRD_STEP="fails"),
        "rank 1 on node 1 failed, which ended the run: ArithmeticError: the third step is too much",
    )


def test_an_interpreter_that_aborts_as_it_ends(job):
    "As threads of torch can make it; what is done is done."
    finishes(job.start(THIRD_STEP="aborts"))


@pytest.mark.parametrize("node", [0, 1])
def test_sigterm(job, node):
    os.kill(in_step_3(job).kernel(node), signal.SIGTERM)
    job.until(
        lambda: "closing signal SIGTERM" in (job.workers_log if node else job.log).read_text()
    )  # passed on to the rank
    time.sleep(2)  # it is said just before it is done
    job.go.write_text("")
    fails(job, "run the job again with the same arguments to go on")
    step = re.search(
        r"at step ([34]) of 6; a checkpoint is in", job.log.read_text()
    )  # the signal may come as step 3 ends
    assert step and not checkpoint_problem(str(job.checkpoint(step[1])))
    goes_on(job)
