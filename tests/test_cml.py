"A job is sent to Cloudera ML whole or not at all, and nothing shows the key."

import io
import json
import logging
import os
import runpy
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
import types
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch as swap

import pytest
import yaml

import ftnb
import ftnb.cluster.sending as cml
import ftnb.studio as studio
from ftnb.cluster.stand_in import CALLS, StandIn
from ftnb.consts import STUDIO_DB
from ftnb.demo.project import make_demo_project
from ftnb.jobargs import format_job_arguments, parse_job_arguments

ROOT, KEY = Path(__file__).resolve().parent.parent, "sesame-" + "0a1b2c3d" * 4
COMMAND = str(Path(sys.executable).parent / "ftnb_submit")
KINDS = (
    400,
    401,
    403,
    404,
    409,
    429,
    500,
    502,
    "slow",
    "late",
    "garbled",
    "cut",
    "drip",
    "dropped",
    "lost",
    "echo",
)
AGAIN = (429, 500, 502, "garbled", "dropped")  # tried again and again
AWAITED = ("slow", "late", "drip", "lost")  # waited for in vain: it is the wait that is short, and not what an answer may take
FAILURES = [(kind, times) for kind in KINDS for times in ((1, 3) if kind in AGAIN else (1,))]


# What is sent


class Listener(logging.Handler):
    "Keeps all that is logged, at any level, by anybody."

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.heard = []

    def emit(self, record):
        self.heard.append(record.getMessage())


@pytest.fixture(autouse=True)
def heard():
    "What libraries log while a test runs; the key is in none of it."
    listener, root = Listener(), logging.getLogger()
    before = root.level
    root.addHandler(listener)
    root.setLevel(logging.DEBUG)
    yield listener.heard
    root.removeHandler(listener)
    root.setLevel(before)
    assert not any(KEY in line for line in listener.heard)


def shows_key(e):
    "Is the key in an exception, in what it carries along, or in the variables of the calls that it went through?"
    if e is None:
        return False
    said = "".join(traceback.TracebackException.from_exception(e, capture_locals=True).format())
    return KEY in said + repr(vars(e)) or any(shows_key(o) for o in (e.__cause__, e.__context__))


def template(server, script="ftnb/finetune.py"):
    server.add_job(
        cml.TEMPLATE_JOB, script, runtime_identifier="ml-runtime-jupyterlab-python3.11-cuda", cpu=2, memory=8
    )


def near(server, **more):
    return cml.workspace_from_env(server.env, **dict(timeout=60.0, tries=3, pause=0.01) | more)


class Sending:
    "A project, a job of it, and its check, made once."

    def __init__(self, folder, base):
        self.project = make_demo_project(folder, base, fraction=0.01875)
        os.chdir(folder)
        self.env = {STUDIO_DB: str(self.project.db)}
        self.args = replace(
            parse_job_arguments(self.project.job_arguments), dist_cpu=2, dist_mem=4, dist_gpu=0
        )
        self.report = cml.check_sending(self.args, self.env)

    def clear(self):
        with closing(sqlite3.connect(self.project.db)) as con, con:
            con.execute("DELETE FROM fine_tuning_jobs")

    def rows(self):
        return studio.list_rows(self.report.engine, "fine_tuning_jobs")

    def send(self, server, printed=None, **more):
        "(job or None, error or None, what was printed)."
        printed, job, error = printed or io.StringIO(), None, None
        with redirect_stdout(printed), redirect_stderr(printed):
            try:
                job = cml.submit(self.args, near(server, **more), env=self.env, report=self.report)
            except (cml.ClouderaError, ValueError) as e:
                error = e
        return job, error, printed.getvalue()

    def whole(self, server, job):
        "All of a job, or nothing of it?"
        mine, rows = [j for j in server.jobs.values() if j["name"] == self.args.experimentid], self.rows()
        if job is None:
            return not mine and not rows and not server.runs
        return [j["id"] for j in mine] == [r.cml_job_id for r in rows] == [job.job_id] and [*server.runs] == [
            job.run_id
        ]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_base):
    was = os.getcwd()
    yield Sending(tmp_path_factory.mktemp("cml") / "project", tiny_base)
    os.chdir(was)


@pytest.fixture
def sending(made):
    made.clear()
    return made


# The workspace's own client isn't on PyPI: this stands for it, with the methods and the manners of the generated one


class ApiException(Exception):
    def __init__(self, status, reason, body, headers):
        super().__init__(f"({status}) {reason} {headers}")
        self.status, self.reason, self.body, self.headers = status, reason, body, headers


class Model:
    def __init__(self, data):
        self.data = data

    def to_dict(self):
        return self.data


def official_client():
    import urllib3

    def default_client(url=None, cml_api_key=None):
        pool, head = urllib3.PoolManager(), {"Authorization": f"Bearer {cml_api_key}"}

        def method(call):
            verb, path = CALLS[call]

            def make(project_id, body=None, _request_timeout=None, **given):
                fields = {k: v for k, v in given.items() if "{%s}" % k not in path}
                address = f"{url}/api/v2/projects/{project_id}/{path.format(**given)}"
                answer = pool.request(
                    verb,
                    address,
                    headers=head,
                    timeout=_request_timeout,
                    **({"fields": fields} if fields else {"json": body} if body else {}),
                )
                if not 200 <= answer.status < 300:
                    raise ApiException(answer.status, answer.reason, answer.data.decode(), answer.headers)
                return Model(json.loads(answer.data))

            return make

        return types.SimpleNamespace(**{call: method(call) for call in CALLS})

    return types.SimpleNamespace(default_client=default_client)


@pytest.fixture(params=["httpx", "cmlapi"])
def client(request):
    if request.param == "httpx":
        yield "httpx"
        return
    with swap.dict(sys.modules, cmlapi=official_client()):
        yield "cmlapi"


# A server that fails


@pytest.mark.parametrize("call", ["list_jobs", "create_job", "create_job_run"])
@pytest.mark.parametrize("kind, times", FAILURES)
def test_sent_whole_or_not_at_all(sending, client, call, kind, times):
    with StandIn(key=KEY) as server:
        template(server)
        server.fail(call, *[kind] * times, seconds=60)
        job, error, printed = sending.send(server, timeout=2.0 if kind in AWAITED else 60.0)
        if kind == "late":
            time.sleep(1.2)  # what was kept back comes
        assert sending.whole(server, job)
        assert bool(job) != bool(error)
        assert KEY not in printed + repr(job) and not shows_key(error)
        if kind in (400, 401, 403, 404, "echo"):
            assert error and server.calls.count(call) == 1, "it was asked again"
        if kind in ("slow", "dropped", "cut") and times == 1:
            assert job, "it isn't sent in spite of it"


def test_libraries_log_something(sending, heard):
    "Else the look for the key in what they log finds nothing, whatever they do."
    with StandIn(key=KEY) as server:
        template(server)
        assert sending.send(server)[0]
    assert heard


def test_server_goes_away(sending):
    "For good, in the middle; what can't be undone is named."
    server = StandIn(key=KEY)
    template(server)
    answer = server.answer

    def gone(call, *more):
        if call == "create_job_run":
            server.faults[:] = [("*", "lost", 0, "")] * 99
            raise ValueError("gone")
        return answer(call, *more)

    server.answer = gone
    job, error, _ = sending.send(server)
    server.close()
    left = [j["id"] for j in server.jobs.values() if j["name"] == sending.args.experimentid]
    assert not job and not sending.rows() and len(left) == 1
    assert f"job {left[0]} is left" in str(error)
    job, error, _ = sending.send(server)
    assert "no answer after 3 tries" in str(error) and not shows_key(error)


def test_sent_twice_at_once(sending):
    with StandIn(key=KEY) as server:
        template(server)
        barrier, ends = threading.Barrier(2), []

        def one():
            barrier.wait()
            try:
                ends.append(
                    cml.submit(sending.args, near(server), env=sending.env, report=sending.report)
                )
            except (cml.ClouderaError, ValueError) as e:
                ends.append(e)

        threads = [threading.Thread(target=one) for _ in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        jobs = [e for e in ends if isinstance(e, cml.SubmittedJob)]
        assert len(jobs) == 1 and sending.whole(server, jobs[0])


# A database that is in use, or lacks its table


def test_locked_database_is_waited_for(sending):
    "It is free as soon as somebody has said that he waits."

    class Printed(io.StringIO):
        def write(self, text):
            if "waiting for the Studio database" in text and con.in_transaction:
                con.execute("COMMIT")
            return super().write(text)

    with (
        StandIn(key=KEY) as server,
        closing(sqlite3.connect(sending.project.db, isolation_level=None)) as con,
    ):
        template(server)
        con.execute("BEGIN IMMEDIATE")
        job, _, printed = sending.send(server, Printed())
        assert job and sending.whole(server, job) and "waiting for the Studio database" in printed


def test_database_without_the_table(sending):
    "The job that was made is deleted, and the table named."

    def rename(old, new):
        with closing(sqlite3.connect(sending.project.db)) as con, con:
            con.execute(f"ALTER TABLE {old} RENAME TO {new}")

    rename("fine_tuning_jobs", "elsewhere")
    try:
        with StandIn(key=KEY) as server:
            template(server)
            job, error, _ = sending.send(server)
            assert not job and len(server.jobs) == 1 and "has no table fine_tuning_jobs" in str(error)
    finally:
        rename("elsewhere", "fine_tuning_jobs")


# As a person runs it


@pytest.mark.slow
def test_ftnb_submit(sending):
    "The stand-in runs the job."
    with StandIn(launch=True, key=KEY) as server:
        template(server, str(Path(ftnb.__file__).parent / "finetune.py"))
        env = {**os.environ, **server.env, **sending.env, "PYTHONUNBUFFERED": "1"}
        logs = lambda: [p.read_text() for p in Path(server.folder).glob("run-*.log")]

        def run(*argv, **more):
            return subprocess.run(
                [COMMAND, *argv],
                env=env | more,
                cwd=sending.project.folder,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )

        missing = run(CDSW_DOMAIN="", CDSW_PROJECT_ID="", JOB_ARGUMENTS=format_job_arguments(sending.args))
        assert (
            missing.returncode == 1
            and "CDSW_DOMAIN" in missing.stdout
            and "CDSW_PROJECT_ID" in missing.stdout
        )
        done = run("--follow", *format_job_arguments(sending.args).split(" "))
        assert done.returncode == 0, "\n".join([done.stdout, *logs()])
        assert all(o in done.stdout for o in ("the job can run", "/jobs/job-2", " succeeded"))
        assert (sending.project.out_dir / "adapter_model.safetensors").exists()
        again = run(*format_job_arguments(sending.args).split(" "))
        assert again.returncode == 1 and "was sent already" in again.stdout
        shown = "".join([missing.stdout, done.stdout, again.stdout, *logs()])
        assert KEY not in shown and "preflight" in shown


# The project as an AMP: https://docs.cloudera.com/machine-learning/cloud/applied-ml-prototypes/topics/ml-amp-project-spec.html


@pytest.fixture(scope="module")
def amp():
    return yaml.safe_load((ROOT / ".project-metadata.yaml").read_text(encoding="utf-8"))


def test_amp_fields_are_there_and_short_enough(amp):
    limits = {
        "name": 200,
        "description": 2048,
        "author": 64,
        "specification_version": 16,
        "prototype_version": 16,
    }
    assert all(0 < len(str(amp.get(k, ""))) <= n for k, n in limits.items())
    assert isinstance(amp["date"], str) and time.strptime(amp["date"], "%Y-%m-%d")


def test_amp_runtimes_have_a_python_that_ftnb_runs_on(amp):
    minor = lambda runtime: int(runtime["kernel"].split(".")[1])
    assert amp["runtimes"] and all(
        {"editor", "kernel", "edition"} <= r.keys() and minor(r) >= 11 for r in amp["runtimes"]
    )


def test_amp_installs_itself_and_makes_the_template_job(amp):
    tasks = amp["tasks"]
    assert tasks and all(
        t["type"] in ("run_session", "create_job", "run_job", "start_application")
        and (ROOT / t["script"]).is_file()
        for t in tasks
    )
    jobs = [(t["name"], t["script"]) for t in tasks if t["type"] == "create_job"]
    assert "install" in tasks[0]["script"] and jobs == [(cml.TEMPLATE_JOB, "ftnb/finetune.py")]


def test_amp_install_fails_when_pip_does():
    ran = []
    with swap("subprocess.run", lambda command, **more: ran.append((command, more))):
        runpy.run_path(str(ROOT / "amp/install.py"))
    assert (
        ran
        and ran[0][0][1:4] == ["-m", "pip", "install"]
        and ran[0][0][-2:] == ["-e", "."]
        and ran[0][1] == {"check": True}
    )


def test_amp_links_the_tutorials():
    env = {
        **os.environ,
        "CDSW_DOMAIN": "ml.example.com",
        "CDSW_PROJECT_URL": "https://ml.example.com/api/v1/projects/ann/tuning",
    }
    links = subprocess.run(
        [sys.executable, "amp/open_tutorial.py"], cwd=ROOT, env=env, text=True, capture_output=True
    )
    assert links.returncode == 0
    first, *_, last = links.stdout.splitlines()[1:]
    tutorials = "https://ml.example.com/ann/tuning/files/nbs/tutorials"
    assert first.strip() == f"first run: {tutorials}/1_first_run.ipynb"
    assert last.strip() == f"follow a row: {tutorials}/10_follow_a_row.ipynb"
