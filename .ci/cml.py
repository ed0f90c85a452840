"A job is sent to Cloudera ML whole or not at all, and nothing shows the key: `python .ci/cml.py`."
import io, json, logging, os, runpy, sqlite3, subprocess, sys, tempfile, threading, time, traceback, types
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch as swap

import yaml

import ftnb
import ftnb.cml as cml
import ftnb.studio as studio
from ftnb.consts import STUDIO_DB
from ftnb.demo import make_demo_project
from ftnb.jobargs import format_job_arguments, parse_job_arguments
from ftnb.stand_in import CALLS, StandIn
from ftnb.tiny import save_tiny

ROOT, KEY = Path(__file__).resolve().parent.parent, "sesame-" + "0a1b2c3d" * 4
COMMAND = str(Path(sys.executable).parent/"ftnb_submit")
KINDS = (400, 401, 403, 404, 409, 429, 500, 502, "slow", "late", "garbled", "cut", "drip", "dropped", "lost", "echo")
results, heard = [], []


def check(what, right):
    results.append(bool(right))
    print(f"{'ok' if right else 'FAILED'}: {what}", flush=True)

class Listener(logging.Handler):
    "Keeps all that is logged, at any level, by anybody."
    def emit(self, record): heard.append(record.getMessage())

def shows_key(e):
    "Is the key in an exception, in what it carries along, or in the variables of the calls that it went through?"
    if e is None: return False
    said = "".join(traceback.TracebackException.from_exception(e, capture_locals=True).format())
    return KEY in said + repr(vars(e)) or any(shows_key(o) for o in (e.__cause__, e.__context__))

def template(server, script="ftnb/finetune.py"):
    server.add_job(cml.TEMPLATE_JOB, script, runtime_identifier="ml-runtime-jupyterlab-python3.11-cuda", cpu=2, memory=8)

def near(server, **more): return cml.workspace_from_env(server.env, **dict(timeout=0.5, tries=3, pause=0.01) | more)

class Sending:
    "A project, a job of it, and its check, made once."
    def __init__(self, folder):
        self.project = make_demo_project(folder, save_tiny(folder/"tiny", kind="qwen"), fraction=0.05)
        os.chdir(folder)
        self.env, self.args = {STUDIO_DB: str(self.project.db)}, replace(parse_job_arguments(self.project.job_arguments), dist_cpu=2, dist_mem=4, dist_gpu=0)
        self.report = cml.check_sending(self.args, self.env)
        self.clear()

    def clear(self):
        with closing(sqlite3.connect(self.project.db)) as con, con: con.execute("DELETE FROM fine_tuning_jobs")

    def rows(self): return studio.list_rows(self.report.known["engine"], "fine_tuning_jobs")

    def send(self, server, **more):
        "(job or None, error or None, what was printed)."
        printed, job, error = io.StringIO(), None, None
        with redirect_stdout(printed), redirect_stderr(printed):
            try: job = cml.submit(self.args, near(server, **more), env=self.env, report=self.report)
            except (cml.ClouderaError, ValueError) as e: error = e
        return job, error, printed.getvalue()

    def whole(self, server, job):
        "All of a job, or nothing of it?"
        mine, rows = [j for j in server.jobs.values() if j["name"] == self.args.experimentid], self.rows()
        if job is None: return not mine and not rows and not server.runs
        return [j["id"] for j in mine] == [r.cml_job_id for r in rows] == [job.job_id] and [*server.runs] == [job.run_id]

def failures(sending, client):
    "Each kind of failure at each call, once and again and again."
    for call in ("list_jobs", "create_job", "create_job_run"):
        for kind in KINDS:
            for times in (1, 3) if kind in (429, 500, 502, "garbled", "dropped") else (1,):
                with StandIn(key=KEY) as server:
                    template(server)
                    server.fail(call, *[kind] * times, seconds=0.8)
                    job, error, printed = sending.send(server)
                    time.sleep(0.5 if kind == "late" else 0)  # what was kept back comes
                    said = f"{client}: {call}, {kind} {times} times: {'sent' if job else 'not sent'}, whole or nothing, key unseen"
                    check(said, sending.whole(server, job) and bool(job) != bool(error) and KEY not in printed + repr(job) and not shows_key(error))
                    if kind in (400, 401, 403, 404, "echo"): check(f"{said}: asked once", error and server.calls.count(call) == 1)
                    if kind in ("slow", "dropped", "cut") and times == 1: check(f"{said}: in spite of it", job)
                sending.clear()

def broken_off(sending):
    "The server goes away for good in the middle; what can't be undone is named."
    server = StandIn(key=KEY)
    template(server)
    answer = server.answer
    def gone(call, *more):
        if call == "create_job_run": server.faults[:] = [("*", "lost", 0, "")] * 99; raise ValueError("gone")
        return answer(call, *more)
    server.answer = gone
    job, error, _ = sending.send(server)
    server.close()
    left = [j["id"] for j in server.jobs.values() if j["name"] == sending.args.experimentid]
    check("a server that goes away: the row is taken back, and the job that is left is named", not job and not sending.rows() and len(left) == 1 and f"job {left[0]} is left" in str(error))
    job, error, _ = sending.send(server)
    check("a server that isn't there: said so, after 3 tries", "no answer after 3 tries" in str(error) and not shows_key(error))

def at_once(sending):
    "The same job sent twice at the same moment."
    with StandIn(key=KEY) as server:
        template(server)
        barrier, ends = threading.Barrier(2), []
        def one():
            barrier.wait()
            try: ends.append(cml.submit(sending.args, near(server, timeout=20), env=sending.env, report=sending.report))
            except (cml.ClouderaError, ValueError) as e: ends.append(e)
        threads = [threading.Thread(target=one) for _ in range(2)]
        for t in threads: t.start()
        for t in threads: t.join()
        jobs = [e for e in ends if isinstance(e, cml.SubmittedJob)]
        check(f"the same job sent twice at once: {len(jobs)} sent, the other refused, nothing of it left", len(jobs) == 1 and sending.whole(server, jobs[0]))
    sending.clear()

def database(sending):
    "A database that is in use is waited for; one that can't be written costs the job."
    with StandIn(key=KEY) as server, closing(sqlite3.connect(sending.project.db, isolation_level=None, check_same_thread=False)) as con:
        template(server)
        con.execute("BEGIN IMMEDIATE")
        threading.Timer(2, lambda: con.execute("COMMIT")).start()
        job, error, printed = sending.send(server)
        check("a locked database is waited for", job and sending.whole(server, job) and "waiting for the Studio database" in printed)
    sending.clear()
    with closing(sqlite3.connect(sending.project.db)) as con, con: con.execute("ALTER TABLE fine_tuning_jobs RENAME TO elsewhere")
    with StandIn(key=KEY) as server:
        template(server)
        job, error, _ = sending.send(server)
        check("a database without the table: the job that was made is deleted, the table named", not job and len(server.jobs) == 1 and "has no table fine_tuning_jobs" in str(error))
    with closing(sqlite3.connect(sending.project.db)) as con, con: con.execute("ALTER TABLE elsewhere RENAME TO fine_tuning_jobs")

# The workspace's own client isn't on PyPI: this stands for it, with the methods and the manners of the generated one

class ApiException(Exception):
    def __init__(self, status, reason, body, headers):
        super().__init__(f"({status}) {reason} {headers}")
        self.status, self.reason, self.body, self.headers = status, reason, body, headers

class Model:
    def __init__(self, data): self.data = data
    def to_dict(self): return self.data

def official_client():
    import urllib3
    def default_client(url=None, cml_api_key=None):
        pool, head = urllib3.PoolManager(), {"Authorization": f"Bearer {cml_api_key}"}
        def method(call):
            verb, path = CALLS[call]
            def make(project_id, body=None, _request_timeout=None, **given):
                fields = {k: v for k, v in given.items() if "{%s}" % k not in path}
                address = f"{url}/api/v2/projects/{project_id}/{path.format(**given)}"
                answer = pool.request(verb, address, headers=head, timeout=_request_timeout, **({"fields": fields} if fields else {"json": body} if body else {}))
                if not 200 <= answer.status < 300: raise ApiException(answer.status, answer.reason, answer.data.decode(), answer.headers)
                return Model(json.loads(answer.data))
            return make
        return types.SimpleNamespace(**{call: method(call) for call in CALLS})
    return types.SimpleNamespace(default_client=default_client)

def by_command(sending):
    "`ftnb_submit`, as a person runs it; the stand-in runs the job."
    with StandIn(launch=True, key=KEY) as server:
        template(server, str(Path(ftnb.__file__).parent/"finetune.py"))
        env = {**os.environ, **server.env, **sending.env, "PYTHONUNBUFFERED": "1"}
        def run(*argv, **more): return subprocess.run([COMMAND, *argv], env=env | more, cwd=sending.project.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        missing = run(CDSW_DOMAIN="", CDSW_PROJECT_ID="", JOB_ARGUMENTS=format_job_arguments(sending.args))
        check("ftnb_submit: missing variables are named together", missing.returncode == 1 and "CDSW_DOMAIN" in missing.stdout and "CDSW_PROJECT_ID" in missing.stdout)
        done = run("--follow", *format_job_arguments(sending.args).split(" "))
        check("ftnb_submit --follow: report, job, link, end, exit status 0", done.returncode == 0 and all(o in done.stdout for o in ("the job can run", "/jobs/job-2", " succeeded")))
        check("ftnb_submit: the job has trained an adapter", (sending.project.out_dir/"adapter_model.safetensors").exists())
        if done.returncode: print(done.stdout, *[p.read_text()[-3000:] for p in Path(server.folder).glob("run-*.log")], sep="\n")
        again = run(*format_job_arguments(sending.args).split(" "))
        check("ftnb_submit: once more is refused, with exit status 1", again.returncode == 1 and "was sent already" in again.stdout)
        shown = "".join(o.stdout for o in (missing, done, again)) + "".join(p.read_text() for p in Path(server.folder).glob("run-*.log"))
        check("ftnb_submit and the job's log: the key is in neither", KEY not in shown and "preflight" in shown)
    sending.clear()

# The project as an AMP: https://docs.cloudera.com/machine-learning/cloud/applied-ml-prototypes/topics/ml-amp-project-spec.html

def amp():
    said = yaml.safe_load((ROOT/".project-metadata.yaml").read_text(encoding="utf-8"))
    limits = {"name": 200, "description": 2048, "author": 64, "specification_version": 16, "prototype_version": 16}
    check("AMP: the needed fields are there, and short enough", all(0 < len(str(said.get(k, ""))) <= n for k, n in limits.items()))
    check("AMP: its date is text, as YYYY-MM-DD", isinstance(said["date"], str) and time.strptime(said["date"], "%Y-%m-%d"))
    minor = lambda runtime: int(runtime["kernel"].split(".")[1])
    check("AMP: its runtimes have editor, kernel and edition, and a Python that ftnb runs on",
          said["runtimes"] and all({"editor", "kernel", "edition"} <= r.keys() and minor(r) >= 11 for r in said["runtimes"]))
    tasks = said["tasks"]
    check("AMP: each task has a type, and a script that is there", tasks and all(t["type"] in ("run_session", "create_job", "run_job", "start_application") and (ROOT/t["script"]).is_file() for t in tasks))
    jobs = [t for t in tasks if t["type"] == "create_job"]
    check("AMP: it installs itself first, and makes the template job", "install" in tasks[0]["script"] and [(t["name"], t["script"]) for t in jobs] == [(cml.TEMPLATE_JOB, "ftnb/finetune.py")])
    ran = []
    with swap("subprocess.run", lambda command, **more: ran.append((command, more))): runpy.run_path(str(ROOT/"amp/install.py"))
    check("AMP: installing is pip on the project, and fails when pip does", ran and ran[0][0][1:4] == ["-m", "pip", "install"] and ran[0][0][-2:] == ["-e", "."] and ran[0][1] == {"check": True})
    env = {**os.environ, "CDSW_DOMAIN": "ml.example.com", "CDSW_PROJECT_URL": "https://ml.example.com/api/v1/projects/ann/tuning"}
    links = subprocess.run([sys.executable, "amp/open_tutorial.py"], cwd=ROOT, env=env, text=True, capture_output=True)
    check("AMP: the tutorials are linked, the first one first", links.returncode == 0 and links.stdout.splitlines()[1].endswith(": https://ml.example.com/ann/tuning/files/nbs/tutorials/1_first_run.ipynb"))

def main():
    logging.getLogger().addHandler(Listener(logging.DEBUG))
    logging.getLogger().setLevel(logging.DEBUG)
    was = os.getcwd()
    with tempfile.TemporaryDirectory() as work:
        sending = Sending(Path(work).resolve()/"project")
        heard.clear()
        failures(sending, "httpx")
        check(f"httpx and httpcore have logged {len(heard)} lines at every level, none with the key", heard and not any(KEY in line for line in heard))
        for part in (broken_off, at_once, database): part(sending)
        with swap.dict(sys.modules, cmlapi=official_client()): failures(sending, "cmlapi")
        by_command(sending)
        os.chdir(was)
    amp()
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return int(not all(results))

if __name__ == "__main__": sys.exit(main())
