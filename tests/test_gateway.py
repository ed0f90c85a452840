"The job script as Cloudera ML runs it, in kernels of a Jupyter Kernel Gateway."

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from uuid import uuid4

import psutil
import pytest
import requests
import websocket
from jupyter_client.jsonutil import json_default
from jupyter_client.session import Session
from waiting import wait_for

import ftnb
from ftnb.demo.project import make_demo_project
from ftnb.jobargs import parse_job_arguments
from ftnb.manifest import checkpoint_problem

pytestmark = pytest.mark.slow

SCRIPT = Path(ftnb.__file__).parent / "finetune.py"
TOKEN, KEY = (
    "hf_CANARYcanary0123456789abcdef",
    "CANARYcanary0123456789abcdef.apiv2",
)  # secrets of every kernel, to be found nowhere
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
TRAINING = {
    "num_train_epochs": 5,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_steps": 10,
    "completion_only_loss": True,
    "report_to": "none",
}
STEPS, STOP_AFTER = 60, 12  # of a run; of a run that is stopped, at least
HOOKS = f""""Each kernel begins with this: while its project holds a file `held`, the job goes no further than this step before it is asked to stop."
import os, time
import ftnb.checkpoints as checkpoints
real = checkpoints.check_finite
def check_finite(trainer, norm):
    while os.path.exists("held") and trainer.state.global_step >= {STOP_AFTER} and not trainer.run.stop_asked_by: time.sleep(0.02)
    return real(trainer, norm)
checkpoints.check_finite = check_finite
"""


# The gateway, and what it starts


def engine_env():
    "What every engine of Cloudera ML has in its environment (https://docs.cloudera.com/machine-learning/cloud/runtimes/topics/ml-engine-environment-variables-runtimes.html)."
    return {
        "CDSW_ENGINE_TYPE": "python",
        "CDSW_ENGINE_ID": "engine",
        "CDSW_MASTER_ID": "engine",
        "CDSW_MASTER_IP": "127.0.0.1",
        "CDSW_IP_ADDRESS": "127.0.0.1",
        "CDSW_PROJECT": "project",
        "CDSW_PROJECT_ID": "project",
        "CDSW_DOMAIN": "ml.example.com",
        "CDSW_APIV2_KEY": KEY,
        "HUGGINGFACE_ACCESS_TOKEN": TOKEN,
    }


def free_port():
    with closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Gateway:
    "A gateway in a process of its own; the kernels' working directories are below its own."

    def __init__(self, folder):
        self.folder, self.url, self.auth = (
            folder,
            f"127.0.0.1:{free_port()}",
            {"Authorization": f"token {uuid4().hex}"},
        )
        self.pids, self.lock = set(), Lock()
        own = {
            name: str(folder / name.lower())
            for name in (
                "IPYTHONDIR",
                "JUPYTER_RUNTIME_DIR",
                "JUPYTER_CONFIG_DIR",
                "JUPYTER_DATA_DIR",
                "TMPDIR",
            )
        }
        for path in own.values():
            os.makedirs(path)
        (modules := folder / "modules").mkdir()
        (modules / "sitecustomize.py").write_text(HOOKS)
        search = os.pathsep.join([str(modules), *filter(None, [os.environ.get("PYTHONPATH")])])
        passed = {**os.environ, **own, **engine_env(), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": search}
        for name in ("JOB_ARGUMENTS", "FINE_TUNING_STUDIO_SQLITE_DB"):
            passed.pop(name, None)
        env = passed | {
            "KG_AUTH_TOKEN": self.auth["Authorization"].split()[1],
            "KG_ENV_PROCESS_WHITELIST": ",".join(passed),
            "KG_ENV_WHITELIST": "JOB_ARGUMENTS,FINE_TUNING_STUDIO_SQLITE_DB",
        }
        command = [
            sys.executable,
            "-m",
            "kernel_gateway",
            "--KernelGatewayApp.api=kernel_gateway.jupyter_websocket",
            f"--KernelGatewayApp.port={self.url.split(':')[1]}",
            "--KernelGatewayApp.port_retries=0",
            "--KernelManager.shutdown_wait_time=120",
        ]
        self.log = folder / "gateway.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def ask(self, method, path, /, **body):
        "One request; returns what its answer says."
        answer = requests.request(
            method, f"http://{self.url}/api{path}", headers=self.auth, json=body or None, timeout=600
        )
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def ready(self):
        if self.process.poll() is not None:
            raise RuntimeError(f"the gateway ended: {self.log.read_text()}")
        with suppress(requests.ConnectionError):
            return self.ask("GET", "")

    def stop(self):
        "End it, and all that it started; returns the processes that it left."
        self.pids |= {o.pid for o in psutil.Process(self.process.pid).children(recursive=True)}
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(300)
        left = [o for o in (self.process.pid, *self.pids) if alive(o)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return left


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Reply:
    "What a kernel said to a cell."

    content: dict  # of its execute_reply
    out: str  # standard output
    err: str  # standard error
    raw: str  # every message

    @property
    def ok(self):
        return self.content["status"] == "ok"

    @property
    def error(self):
        return f"{self.content.get('ename')}: {self.content.get('evalue')}"

    @property
    def traceback(self):
        return re.sub(r"\x1b\[[\d;]*m", "", "\n".join(self.content.get("traceback", [])))


class Kernel:
    "A kernel for one engine, and the websocket that Cloudera ML would hold."

    def __init__(self, gateway, project, arguments=None):
        self.gateway, self.session, self.heard = gateway, Session(), []
        env = {
            "JOB_ARGUMENTS": project.job_arguments if arguments is None else arguments,
            "FINE_TUNING_STUDIO_SQLITE_DB": str(project.db),
        }
        with gateway.lock:
            self.id = gateway.ask(
                "POST",
                "/kernels",
                name="python3",
                path=str(project.folder.relative_to(gateway.folder)),
                env=env,
            )["id"]
        self.connect()

    def connect(self):
        self.socket = websocket.create_connection(
            f"ws://{self.gateway.url}/api/kernels/{self.id}/channels", header=self.gateway.auth, timeout=1500
        )

    @property
    def pid(self):
        "Of its process."
        found = [
            o.pid
            for o in psutil.process_iter(["ppid", "cmdline"])
            if o.info["ppid"] == self.gateway.process.pid
            and any(self.id in word for word in o.info["cmdline"] or ())
        ]
        self.gateway.pids |= set(found)
        return found[0]

    def send(self):
        "The job script's source, as one cell."
        message = self.session.msg(
            "execute_request",
            dict(
                code=SCRIPT.read_text(encoding="utf-8"),
                silent=False,
                store_history=True,
                user_expressions={},
                allow_stdin=False,
                stop_on_error=True,
            ),
        )
        self.socket.send(json.dumps(message | {"channel": "shell"}, default=json_default))
        self.sent = message["header"]["msg_id"]

    def reply(self):
        "What it says to the cell, until it is idle again."
        heard, content, idle = [], None, False
        while content is None or not idle:
            text = self.socket.recv()
            self.heard.append(text)
            message = json.loads(text)
            if message["content"].get("execution_state") in ("restarting", "autorestarting", "dead"):
                raise RuntimeError("the kernel died")
            if message["parent_header"].get("msg_id") != self.sent:
                continue
            heard.append(message)
            if message["msg_type"] == "execute_reply":
                content = message["content"]
            idle = idle or message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"
        out, err = (
            "".join(
                o["content"]["text"]
                for o in heard
                if o["msg_type"] == "stream" and o["content"]["name"] == name
            )
            for name in ("stdout", "stderr")
        )
        return Reply(content, out, err, "".join(self.heard))

    def run(self):
        self.send()
        return self.reply()

    def ask(self, what):
        return self.gateway.ask("POST", f"/kernels/{self.id}/{what}")

    def end(self):
        self.socket.close()
        self.gateway.ask("DELETE", f"/kernels/{self.id}")


@contextmanager
def kernel(*args):
    k = Kernel(*args)
    try:
        _ = k.pid  # noted, so that it is looked for at the end
        yield k
    finally:
        with suppress(requests.HTTPError):
            k.end()  # it may be gone


# What a job leaves


def metrics(project):
    "The lines of metrics.jsonl that are whole."
    with suppress(FileNotFoundError):
        return [
            json.loads(o)
            for o in (project.train_out_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
            if o.endswith("\n")
        ]
    return []


def adapter(project):
    "The bytes of its files; raises where it isn't what run.json says."
    from hashlib import sha256

    files = {
        name: (project.out_dir / name).read_bytes()
        for name in ("adapter_model.safetensors", "adapter_config.json", "run.json")
    }
    if (
        sha256(files["adapter_model.safetensors"]).hexdigest()
        != json.loads(files.pop("run.json"))["adapter_sha256"]
    ):
        raise ValueError("the adapter isn't what run.json says")
    return files


def registered(project):
    "Is exactly one adapter registered, with the job's row pointing to it?"
    args = parse_job_arguments(project.job_arguments)
    with closing(sqlite3.connect(project.db)) as con:
        found = con.execute("SELECT id, name, location, fine_tuning_job_id FROM adapters").fetchall()
        job = con.execute(
            "SELECT adapter_id FROM fine_tuning_jobs WHERE id = ?", [project.experiment_id]
        ).fetchone()
    return [o[1:] for o in found] == [(args.adapter_name, args.out_dir, args.experimentid)] and job == found[
        0
    ][:1]


def nothing_of_it(project):
    "Is there neither an adapter nor a row of one?"
    with closing(sqlite3.connect(project.db)) as con:
        rows = con.execute("SELECT count(*) FROM adapters").fetchone()[0]
    return not rows and not project.out_dir.exists() and not [*project.out_dir.parent.glob("*")]


def in_training(k, project):
    "Send the job, and wait until it trains, and is held there until it is disturbed; returns the kernel's process id."
    (project.folder / "held").touch()
    k.send()
    wait_for(lambda: any(o["step"] >= STOP_AFTER for o in metrics(project)))
    return k.pid


# One gateway; a project and a kernel a test


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    "When all is done, no process is left, and no file holds a secret."
    folder = tmp_path_factory.mktemp("gateway").resolve()
    gateway = Gateway(folder)
    try:
        wait_for(gateway.ready)
        yield gateway
    finally:
        left = gateway.stop()
    assert not left
    assert not [
        o
        for o in folder.rglob("*")
        if o.is_file() and any(s.encode() in o.read_bytes() for s in (TOKEN, KEY))
    ]


@pytest.fixture(scope="module")
def make_project(gateway, tiny_base):
    def make(name, **training):
        return make_demo_project(
            gateway.folder / name, tiny_base, training=TRAINING | training, lora=LORA, fraction=0.01875
        )

    return make


@pytest.fixture
def project(make_project, request):
    return make_project(re.sub(r"\W", "_", request.node.name))


@pytest.fixture(scope="module")
def undisturbed(gateway, make_project):
    "A run that nothing happens to: its project, and what the kernel said."
    project = make_project("undisturbed")
    with kernel(gateway, project) as k:
        return project, k.run()


def goes_on(k, project, undisturbed):
    "The same job, sent again, ends in the adapter of a run that nothing happens to, byte for byte."
    (project.folder / "held").unlink(missing_ok=True)
    reply = k.run()
    assert reply.ok, reply.error + reply.out
    assert f"going on from {project.train_out_dir}/checkpoint-" in reply.out
    assert adapter(project) == adapter(undisturbed[0]) and registered(project)
    holds_no_secret(reply)


def holds_no_secret(reply):
    assert TOKEN not in reply.raw and KEY not in reply.raw


def leaves_checkpoint(signal_name, project, reply):
    "The kernel says where the job stopped, and the checkpoint is there."
    said = re.search(
        rf"RunStopped: stopped by {signal_name} at step (\d+) of {STEPS}; a checkpoint is in (\S+); run the job again with the same arguments to go on",
        reply.error,
    )
    assert said, reply.error
    assert reply.traceback.strip() == reply.content["evalue"]
    step, folder = int(said[1]), project.train_out_dir / f"checkpoint-{said[1]}"
    assert said[2] == str(folder) and not checkpoint_problem(str(folder))
    assert nothing_of_it(project) and step < STEPS and metrics(project)[-1]["state"] == "stopped"


def test_ends_well(undisturbed):
    project, reply = undisturbed
    assert reply.ok, reply.error + reply.traceback
    assert not re.search(r"[\r\x1b\b]", reply.out), "a bar or a colour is in the log"
    assert not reply.err
    assert metrics(project)[-1]["step"] == STEPS and adapter(project) and registered(project)
    holds_no_secret(reply)


def test_wrong_arguments(gateway, project):
    "Said at once, in a short traceback that ends with the message, and nothing is made."
    with kernel(gateway, project, f"--base_modl_id 1 --hf_token {TOKEN}") as k:
        start, reply = time.monotonic(), k.run()
    assert not reply.ok and re.search("--base_modl_id is no key.*base_model_id", reply.error)
    assert time.monotonic() - start < 300
    assert not reply.out + reply.err
    assert (
        reply.traceback.strip().endswith(reply.content["evalue"].strip())
        and len(reply.traceback.splitlines()) < 60
    )
    assert nothing_of_it(project) and not project.train_out_dir.exists()
    holds_no_secret(reply)


def test_fails_while_it_trains(gateway, make_project):
    project = make_project("fails", learning_rate=1e30)
    with kernel(gateway, project) as k:
        reply = k.run()
    assert not reply.ok and re.search(
        r"FloatingPointError: the (loss|weights|gradient)\D* at step \d+; .*row.*learning_rate", reply.error
    ), reply.error + reply.traceback
    assert reply.traceback.strip().endswith(reply.content["evalue"].strip())
    assert metrics(project)[-1]["state"] == "failed" and nothing_of_it(project)
    holds_no_secret(reply)


def test_sigterm(gateway, project, undisturbed):
    "The kernel lives on."
    with kernel(gateway, project) as k:
        pid = in_training(k, project)
        os.kill(pid, signal.SIGTERM)
        leaves_checkpoint("SIGTERM", project, k.reply())
        assert k.pid == pid
    with kernel(gateway, project) as k:
        goes_on(k, project, undisturbed)


def test_interrupted(gateway, project, undisturbed):
    "And sent again in the same kernel."
    with kernel(gateway, project) as k:
        in_training(k, project)
        k.ask("interrupt")
        leaves_checkpoint("SIGINT", project, k.reply())
        goes_on(k, project, undisturbed)


def test_restarted(gateway, project, undisturbed):
    with kernel(gateway, project) as k:
        pid = in_training(k, project)
        k.socket.close()
        k.ask("restart")
        k.connect()
        assert not alive(pid) and k.pid != pid
        assert nothing_of_it(project)
        goes_on(k, project, undisturbed)


def test_shut_down(gateway, project, undisturbed):
    "It has time to stop, and is gone within seconds."
    with kernel(gateway, project) as k:
        pid = in_training(k, project)
        k.gateway.ask("DELETE", f"/kernels/{k.id}")
        assert not alive(pid)
    assert metrics(project)[-1].get("state") == "stopped" and nothing_of_it(project)
    assert not any(checkpoint_problem(str(o)) for o in project.train_out_dir.glob("checkpoint-*"))
    with kernel(gateway, project) as k:
        goes_on(k, project, undisturbed)
