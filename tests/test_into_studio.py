"A Studio that is there, on Python 3.10 with libraries of 2024, trains with ftnb: `amp/into_studio.py`."
import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from cells import run_cell
from waiting import wait_for

from ftnb.cluster.stand_in import StandIn
from ftnb.demo.project import make_demo_project
from ftnb.jobargs import format_job_arguments, parse_job_arguments

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
KEY = "sesame-0a1b2c3d4e5f"
JOB = ".ftnb/finetune_job.py"
TEMPLATE = "Accel_Finetuning_Base_Job"
FORMER = "ft/scripts/accel_fine_tune_base_script.py"
OLD = ("transformers", "peft", "trl", "torch", "datasets", "bitsandbytes", "accelerate", "sqlalchemy")  # the Studio's own
AS_A_CELL = """
import sys
source = open(sys.argv[1], encoding="utf-8").read()
sys.argv = ["kernel", "-f", "x.json"]
exec(compile(source, "cell", "exec"), {"__name__": "__main__"})
"""


def run(command, env, folder, **more):
    "(exit status, output) of a program."
    done = subprocess.run([*map(str, command)], env=env, cwd=folder, text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)
    return done.returncode, done.stdout


# The Studio's Python, and what its environment holds

def version_of(python):
    "Such as 3.10; nothing where it doesn't run."
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([python, "-c", program], text=True, capture_output=True).stdout.strip()


def python_3_10():
    "One that is here, or None."
    known = [*map(shutil.which, ("python3.10", "python3")), *Path.home().glob(".pyenv/versions/3.10*/bin/python")]
    return next((str(path) for path in known if path and version_of(path) == "3.10"), None)


@pytest.fixture(scope="session")
def python():
    "The Studio's: a Python 3.10; where none is here, this one stands for it."
    return python_3_10() or sys.executable


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    "An environment that leads to the Studio's pinned libraries: whoever imports one has leaked out of ftnb's own."
    folder = tmp_path_factory.mktemp("old")
    versions = {f"lib/python3.{n}/site-packages" for n in (10, sys.version_info[1])}
    for place in (folder/"path", *(folder/"local"/v for v in versions)):
        place.mkdir(parents=True)
        for name in OLD:
            (place/f"{name}.py").write_text(f"raise ImportError('the Studio\\'s own {name} of 2024')\n")
    return {"PYTHONPATH": str(folder/"path"), "PYTHONUSERBASE": str(folder/"local"),
            "VIRTUAL_ENV": str(folder/"venv"), "PYTHONSTARTUP": str(folder/"none.py")}


def tree(folder):
    "Every file below a folder, with a hash of what it holds."
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# A light package in place of ftnb, for what would take long with the real one

FAKE = {
    "__init__.py": '__version__ = "9.1"\n',
    "tiny.py": "def save_tiny(folder, kind): return folder\n",
    "demo/__init__.py": "",
    "demo/project.py": '''
        from types import SimpleNamespace
        def make_demo_project(folder, base, fraction):
            return SimpleNamespace(job_arguments="--check 1", db="a.db")
        ''',
    "preflight.py": '''
        import os
        def check_command(argv=None):
            print("the job can run" if os.environ["JOB_ARGUMENTS"] == "--check 1" else "no")
        ''',
    "finetune.py": '''
        import json, os, signal, sys, time
        def run_command():
            print("first", flush=True)
            words = os.environ["JOB_ARGUMENTS"].split()
            if words[0] == "tell": print(json.dumps([sys.path, dict(os.environ), os.getcwd(), sys.argv]))
            if words[0] == "fail": raise ValueError("no row\\nhas a text")
            if words[0] == "kill": os.kill(os.getpid(), signal.SIGKILL)
            if words[0] == "exit": raise SystemExit("said in words")
            if words[0] == "stop": raise SystemExit("stopped by SIGTERM at step 3 of 9; a checkpoint is there")
            if words[0] == "wait":
                came = []
                for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, lambda n, frame: came.append(n))
                open(words[1], "w").write(str(os.getpid()))
                while not came: time.sleep(0.02)
                time.sleep(1)
                open(words[1] + ".checkpoint", "w").write("whole")
                raise RuntimeError(f"stopped by {signal.Signals(came[0]).name}; a checkpoint is there")
            print("last ü")
        '''}
SETUP = "from setuptools import setup\nsetup(name='ftnb', version='9.1', packages=['ftnb', 'ftnb.demo'])\n"


def fake_clone(folder):
    "A clone with the program under test and the light package."
    (folder/"ftnb"/"demo").mkdir(parents=True)
    (folder/"amp").mkdir()
    for name, text in FAKE.items():
        (folder/"ftnb"/name).write_text(textwrap.dedent(text).lstrip(), encoding="utf-8")
    (folder/"setup.py").write_text(SETUP)
    shutil.copyfile(ROOT/"amp"/"into_studio.py", folder/"amp"/"into_studio.py")
    return folder


@dataclass(frozen=True)
class Light:
    "A clone with the light package, and an environment that has it."
    clone: Path
    env: Path


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    folder = tmp_path_factory.mktemp("light").resolve()
    clone, env = fake_clone(folder/"clone"), folder/"env"
    pip = [env/"bin"/"pip", "install", "-q", "--disable-pip-version-check", clone]
    for command in ([sys.executable, "-m", "venv", env], pip):
        code, said = run(command, None, folder)
        assert code == 0, said
    for name in ("build", "ftnb.egg-info"):
        shutil.rmtree(clone/name, ignore_errors=True)
    return Light(clone, env)


class Studio:
    "A Studio's project, the stand-in for its workspace, and the program under test, run by the Studio's Python."
    def __init__(self, folder, old, clone, python):
        self.folder, self.clone, self.python, self.server = folder, clone, python, StandIn(key=KEY)
        (folder/".app").mkdir(parents=True, exist_ok=True)
        (folder/"ft"/"scripts").mkdir(parents=True, exist_ok=True)
        (folder/FORMER).write_text("raise SystemExit('the script of the Studio itself')\n")
        self.server.add_job("Another_Job", "a.py")
        runtime = f"ml-runtime-pbj-jupyterlab-python{version_of(python)}-cuda:2025.01"
        self.job = self.server.add_job(TEMPLATE, FORMER, runtime_identifier=runtime, cpu=2, memory=8)
        left_out = ("PYTHONPATH", "JOB_ARGUMENTS", "FINE_TUNING_STUDIO_SQLITE_DB")
        env = {k: v for k, v in os.environ.items() if k not in left_out}
        self.env = env | self.server.env | old | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.before = tree(folder)

    def do(self, *argv, program=None, **env):
        "(exit status, output) of install, status or undo; the key is never shown, and nothing is a traceback."
        code, said = run([self.python, *(program or [self.clone/"amp"/"into_studio.py"]), *argv], self.env | env, self.folder)
        assert KEY not in said
        assert "Traceback" not in said, said
        return code, said

    def job_of(self, words):
        "(exit status, output) of a job, by the path of its script."
        return run([self.python, self.folder/JOB], self.env | {"JOB_ARGUMENTS": words}, self.folder)

    @property
    def script(self):
        return self.job["script"]

    def is_back(self):
        "As it was before install?"
        return tree(self.folder) == self.before and self.script == FORMER

    def is_whole(self):
        return self.script == JOB and self.do("status", "--quick")[0] == 0


@pytest.fixture
def open_studio(tmp_path, old, python):
    "Make a Studio with a clone; its server is closed at the end."
    opened = []

    def make(clone, folder=tmp_path/"project", env=old):
        opened.append(Studio(folder.resolve(), env, clone, python))
        return opened[-1]
    yield make
    for studio in opened:
        studio.server.close()


# Which Python

PICK = """
import sys
sys.path.insert(0, sys.argv[1])
import into_studio as program
program.PYTHONS = tuple(sys.argv[4:])
options = program.read_options(["install", "--project", sys.argv[2]])
try: print(program.find_python(program.Place(sys.argv[2], "."), options, {"runtime_identifier": sys.argv[3]}))
except program.Problem as e: print(e)
"""
UV = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/asked"
[ "$2" = install ] && mkdir -p "$UV_PYTHON_INSTALL_DIR/a/bin" && ln -sf PYTHON "$UV_PYTHON_INSTALL_DIR/a/bin/python3"
[ "$2" = install ]
"""
OWN = str(Path(sys._base_executable).resolve())


class Picking:
    "A path with one Python that is too old, one that is new enough, and one that doesn't run."
    def __init__(self, work, old, python):
        self.work, self.project, self.tools, self.session = work, work/"project", work/"tools", python
        for folder in (self.project/".ftnb", self.tools):
            folder.mkdir(parents=True)
        for name, target in (("old", python), ("new", OWN), ("odd", "/bin/false")):
            (self.tools/name).symlink_to(target)
        self.env = {**os.environ, **old, "PATH": f"{self.tools}:/usr/bin:/bin", "HOME": str(work)}
        self.env.pop("PYTHONHOME", None)

    def pick(self, *names, session=None, runtime=""):
        "What is picked of these names, or why none is."
        command = [session or self.session, "-c", PICK, ROOT/"amp", self.project, runtime, *names]
        return run(command, self.env, self.work)[1].strip()


@pytest.fixture
def picking(tmp_path, old, python):
    return Picking(tmp_path.resolve(), old, python)


def test_a_python_that_is_too_old_or_does_not_run_is_passed_over(picking):
    assert str(Path(picking.pick("old", "odd", "missing", "new")).resolve()) == OWN


@pytest.mark.skipif(python_3_10() is None, reason="no Python 3.10 is here")
def test_where_no_python_will_do_each_is_named(picking):
    said = picking.pick("old", "odd")
    assert "too old" in said
    assert "it doesn't run" in said
    assert "pip install uv" in said


def test_a_python_of_another_image_is_not_taken(picking):
    said = picking.pick("new", session=sys.executable, runtime="ml-runtime-python3.1-cuda")
    assert "lies in this session's image" in said


def test_uv_fetches_a_python_into_the_project(picking):
    (picking.tools/"uv").write_text(UV.replace("-sf PYTHON", f"-sf {OWN}"))
    (picking.tools/"uv").chmod(0o755)
    said = picking.pick("missing")
    assert str(Path(said.splitlines()[-1]).resolve()) == OWN
    assert "python install 3.12" in (picking.tools/"asked").read_text()
    assert (picking.project/".ftnb"/"python"/"a").is_dir()


# An environment of its own

def test_own_environment_from_install_to_undo(tmp_path, open_studio):
    clone = fake_clone(tmp_path/"clone")
    studio, clone_before = open_studio(clone), tree(clone)
    code, said = studio.do("status")
    assert code == 1 and "isn't installed" in said, said
    code, said = studio.do("install")
    assert code == 0 and studio.script == JOB and "ftnb 9.1" in said, said
    # nothing but .ftnb is new in the project, nothing in the clone, and no cache stays
    assert {k.split("/")[0] for k in tree(studio.folder).keys() - studio.before.keys()} == {".ftnb"}
    assert tree(clone) == clone_before
    kept = {".gitignore", "env", "finetune_job.py", "install.lock", "job.lock", "record.json"}
    assert {*os.listdir(studio.folder/".ftnb")} == kept
    marker = studio.folder/".ftnb"/"env"/"ftnb.json"
    made = marker.stat().st_mtime_ns
    code, said = studio.do("status")
    assert code == 0 and "dry check of a job: in order" in said and "ftnb 9.1" in said, said
    code, said = studio.do("install")  # again: nothing is made anew
    assert code == 0 and "is in place" in said and marker.stat().st_mtime_ns == made and studio.script == JOB, said
    brought_up_to_date(studio, clone/"ftnb"/"finetune.py")
    left_alone_while_a_job_runs(studio, clone/"ftnb"/"finetune.py")
    damaged_and_mended(studio)
    code, said = studio.do("undo")
    assert code == 0 and studio.is_back() and not (studio.folder/".ftnb").exists(), said
    assert studio.do("undo")[0] == 0  # twice is fine


def brought_up_to_date(studio, finetune):
    "The clone has changed: status says so, and install brings it over."
    text = finetune.read_text(encoding="utf-8")
    finetune.write_text(text.replace('"last ü"', '"newest"'), encoding="utf-8")
    assert "another state" in studio.do("status", "--quick")[1]
    code, said = studio.do("install")
    assert code == 0, said
    assert studio.job_of("none") == (0, "first\nnewest\n")


def left_alone_while_a_job_runs(studio, finetune):
    "While a job runs, its environment is neither changed nor removed."
    place = studio.folder/"busy"
    env = studio.env | {"JOB_ARGUMENTS": f"wait {place}"}
    job = subprocess.Popen([studio.python, studio.folder/JOB], env=env, cwd=studio.folder,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(place.exists)
    code, said = studio.do("undo")
    assert code == 1 and "a job is being trained" in said and studio.script == JOB, said
    finetune.write_text(finetune.read_text(encoding="utf-8") + "# newer\n", encoding="utf-8")
    said = studio.do("install")[1]
    assert "a job is being trained" in said, said
    job.terminate()
    job.communicate()
    for name in (place, Path(f"{place}.checkpoint")):
        name.unlink()
    code, said = studio.do("install")
    assert code == 0, said


def damaged_and_mended(studio):
    "Without its Python an environment is damaged: status and a job say so, and install mends it."
    (studio.folder/".ftnb"/"env"/"bin"/"python").unlink()
    code, said = studio.do("status")
    assert code == 1 and "environment: NOT in order" in said, said
    code, said = studio.job_of("none")
    assert code == 1 and re.search(r"into_studio.py.? install", said), said
    code, said = studio.do("install")
    assert code == 0, said
    code, said = studio.do("status")
    assert code == 0, said


# Killed at every step

KILLED = '''
import os, shutil, signal, sys
sys.path.insert(0, sys.argv[1])
import into_studio
left = int(sys.argv[2])
def counted(function):
    def step(*args, **more):
        tick()
        result = function(*args, **more)
        tick()
        return result
    return step
def tick():
    global left
    left -= 1
    if left == 0: os.kill(os.getpid(), signal.SIGKILL)
for name in ("write_file", "run", "run_shown", "ask"): setattr(into_studio, name, counted(getattr(into_studio, name)))
for place, name in ((os, "remove"), (os, "rmdir"), (os, "replace"), (shutil, "rmtree")):
    setattr(place, name, counted(getattr(place, name)))
sys.exit(into_studio.main(sys.argv[3:]))
'''


def kill_at(studio, step, *argv):
    "Kill the program at a step; False where it has fewer."
    return studio.do(*argv, program=["-c", KILLED, studio.clone/"amp", str(step)])[0] == -signal.SIGKILL


def test_install_killed_at_each_step(light, open_studio):
    "At every second step it isn't gone on with, but taken back."
    studio, install, wrong, step = open_studio(light.clone), ("install", "--env", str(light.env)), [], 1
    while kill_at(studio, step, *install):
        studio.do("status", "--quick")
        if step % 2:
            studio.do("undo")
            good = studio.is_back()
        else:
            good = studio.do(*install)[0] == 0 and studio.is_whole()
        if not good:
            wrong.append((step, studio.script, sorted(tree(studio.folder).keys() - studio.before.keys())))
        studio.do("undo")
        if not studio.is_back():
            wrong.append((step, "undo"))
        step += 1
    assert not wrong
    assert step > 16
    assert studio.is_whole()  # where it isn't killed


def test_undo_killed_at_each_step(light, open_studio):
    "It is gone on with, or installed again."
    studio, install, wrong, step = open_studio(light.clone), ("install", "--env", str(light.env)), [], 1
    studio.do(*install)
    while kill_at(studio, step, "undo"):
        if step % 2 and not (studio.do("undo")[0] == 0 and studio.is_back()):
            wrong.append((step, "undo"))
        if not (studio.do(*install)[0] == 0 and studio.is_whole()):
            wrong.append((step, "install"))
        step += 1
    assert not wrong
    assert step > 11
    assert studio.is_back()  # where it isn't killed


def pip_of(process):
    "The pip that a process has started, once it is there. Other children come and go: what is gone has no command line."
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.Error):
            if "pip" in child.cmdline():
                return child


def is_over(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_install_killed_while_pip_works(tmp_path, light, open_studio):
    "pip ends too, and the next install begins anew."
    studio = open_studio(light.clone)
    with open(tmp_path/"log", "wb") as log:
        process = subprocess.Popen([studio.python, light.clone/"amp"/"into_studio.py", "install"], env=studio.env,
                                   cwd=studio.folder, stdout=log, stderr=log)
    pip = wait_for(lambda: pip_of(process) or process.poll() is not None)
    assert process.poll() is None, (tmp_path/"log").read_text()
    process.kill()
    process.wait()
    wait_for(lambda: is_over(pip))
    code, said = studio.do("status", "--quick")
    assert code == 1 and "half done" in said and studio.script == FORMER, said
    code, said = studio.do("install")
    assert code == 0, said
    code, said = studio.do("status")
    assert code == 0, said


# The API fails, or somebody else has changed the job

QUICK = '''
import sys
sys.path.insert(0, sys.argv[1])
import into_studio
into_studio.SECONDS, into_studio.PAUSE = 2.0, 0.01
sys.exit(into_studio.main(sys.argv[2:]))
'''
LATE = 60.0  # seconds that a late answer takes, or until nobody waits for it any more
KINDS = (400, 401, 403, 404, 302, 429, 500, "late", "garbled", "cut", "drip", "dropped", "lost", "echo")
PASSING = (429, 500, "late", "garbled", "cut", "drip", "dropped", "lost")  # it may go well another time
CALLS = (("list_jobs", "install"), ("update_job", "undo"), ("get_job", "undo"))
FAILURES = [("update_job", "install", kind) for kind in KINDS]
FAILURES += [(call, command, kind) for call, command in CALLS for kind in (403, 404, 500, "lost")]


class Quick:
    "A Studio whose program doesn't wait long for an answer."
    def __init__(self, studio, light):
        self.studio, self.argv = studio, ("install", "--env", str(light.env))
        self.program = ["-c", QUICK, light.clone/"amp"]

    def do(self, *argv, **env):
        return self.studio.do(*argv, program=self.program, **env)

    def install(self, **env):
        return self.do(*self.argv, **env)


@pytest.fixture
def quick(light, open_studio):
    return Quick(open_studio(light.clone), light)


@pytest.mark.parametrize("call, command, kind", [o for o in FAILURES if o[2] in PASSING])
def test_a_call_that_fails_once_is_made_again(quick, call, command, kind):
    code, said = with_failures(quick, call, command, kind, 1)
    assert code == 0, said
    assert quick.studio.script == (JOB if command == "install" else FORMER)
    goes_well(quick, command)


@pytest.mark.parametrize("call, command, kind", [o for o in FAILURES if o != ("get_job", "undo", 404)])
def test_a_call_that_fails_for_good_is_said(quick, call, command, kind):
    code, said = with_failures(quick, call, command, kind, 4)
    assert code == 1 and "Cloudera ML" in said, said
    goes_well(quick, command)


def test_a_template_job_that_is_gone_needs_nothing_put_back(quick):
    code, said = with_failures(quick, "get_job", "undo", 404, 4)
    assert code == 0, said
    quick.studio.job["script"] = FORMER
    goes_well(quick, "undo")


def with_failures(quick, call, command, kind, times):
    "(exit status, output) of a command while a call fails so many times."
    if command == "undo":
        quick.install()
    quick.studio.server.fail(call, *[kind] * times, seconds=LATE)
    done = quick.install() if command == "install" else quick.do("undo")
    quick.studio.server.faults.clear()
    return done


def goes_well(quick, command):
    "Once more, without failures; and in the end the project is as before."
    code, said = quick.install() if command == "install" else quick.do("undo")
    assert code == 0, said
    assert quick.studio.script == (JOB if command == "install" else FORMER)
    quick.do("undo")
    assert quick.studio.is_back()


def test_a_plain_http_address_is_not_asked(quick):
    code, said = quick.install(CDSW_DOMAIN="http://ml.example.com", CDSW_PROJECT_ID="")
    assert code == 1 and "CDSW_DOMAIN" in said and "CDSW_PROJECT_ID" in said, said  # together
    assert not (quick.studio.folder/".ftnb").exists()


def test_a_template_job_that_somebody_has_changed_is_left_so(quick):
    studio = quick.studio
    quick.install()
    studio.job["script"] = "mine.py"
    code, said = quick.install()
    assert code == 1 and "mine.py" in said and studio.script == "mine.py", said
    assert quick.do("status", "--quick")[0] == 1
    code, said = quick.do("undo")
    assert code == 0 and "mine.py" in said and studio.script == "mine.py", said
    assert not (studio.folder/".ftnb").exists()
    quick.install()
    code, said = quick.do("undo")  # puts back what was there before install
    assert code == 0 and studio.script == "mine.py", said


def test_a_record_that_is_lost(quick):
    "The Studio's own script is taken for the former one."
    quick.install()
    shutil.rmtree(quick.studio.folder/".ftnb")
    code, said = quick.install()
    assert code == 0, said
    code, said = quick.do("undo")
    assert code == 0 and quick.studio.script == FORMER, said


def test_no_template_job(quick):
    del quick.studio.server.jobs[quick.studio.job["id"]]
    code, said = quick.install()
    assert code == 1 and f"no job {TEMPLATE}" in said, said


# The script, by each of its doors

@pytest.fixture(scope="session")
def kernel(tmp_path_factory, python):
    "A Python that has ipykernel and is the Studio's version; None where it can't be had."
    venv = tmp_path_factory.mktemp("kernel")/"venv"
    for command in ([python, "-m", "venv", venv], [venv/"bin"/"python", "-m", "pip", "install", "-q", "ipykernel"]):
        if subprocess.run([*map(str, command)], capture_output=True).returncode:
            return None
    return str(venv/"bin"/"python")


class Doors:
    "A Studio with the light package, and the ways in which a job's script is run."
    def __init__(self, studio, light, work, kernel):
        self.studio, self.work, self.kernel = studio, work, kernel
        studio.do("install", "--env", str(light.env))
        self.source = (studio.folder/JOB).read_text(encoding="utf-8")

    def env(self, words):
        return self.studio.env | {"JOB_ARGUMENTS": words, "FTNB_X": "kept", "HUGGINGFACE_ACCESS_TOKEN": "hf_kept"}

    def path(self, words):
        return run([self.studio.python, self.studio.folder/JOB], self.env(words), self.work)

    def cell(self, words):
        return run([self.studio.python, "-c", AS_A_CELL, self.studio.folder/JOB], self.env(words), self.work)

    def in_kernel(self, words, meanwhile=None):
        if self.kernel is None:
            pytest.skip("no ipykernel for the Studio's Python can be had")
        return run_cell(self.kernel, self.source, self.env(words), self.work, meanwhile)

    def start(self, words, out=subprocess.PIPE):
        return subprocess.Popen([self.studio.python, self.studio.folder/JOB], env=self.env(words), cwd=self.work,
                                text=True, stdout=out, stderr=out if out == subprocess.DEVNULL else subprocess.STDOUT)


@pytest.fixture(scope="module")
def doors(tmp_path_factory, old, python, light, kernel):
    "One for all jobs, since they change nothing in it."
    work = tmp_path_factory.mktemp("doors").resolve()
    studio = Studio(work/"project", old, light.clone, python)
    yield Doors(studio, light, work, kernel)
    studio.server.close()


@pytest.fixture(params=["path", "cell", "kernel"])
def job(request, doors):
    "(exit status, output) of a job, by each door."
    def by_kernel(words):
        done = doors.in_kernel(words)
        return int(not done.well), done.out + done.error
    return {"path": doors.path, "cell": doors.cell, "kernel": by_kernel}[request.param]


def test_a_job_ends_by_falling_off_its_end(job):
    assert job("none") == (0, "first\nlast ü\n")


def test_a_job_fails_by_raising_with_its_own_words(job):
    code, said = job("fail")
    assert code == 1 and said.rstrip().endswith("JobFailed: ValueError: no row\nhas a text"), said


def test_a_job_that_is_killed_is_said_to_be(job):
    code, said = job("kill")
    assert code == 1 and "ended by SIGKILL (memory may have run out)" in said, said


def test_a_job_that_ends_with_a_sentence(job):
    code, said = job("exit")
    assert code == 1 and "said in words" in said.splitlines()[-1], said


def test_a_job_that_was_stopped_says_that_alone(job):
    code, said = job("stop")
    assert code == 1 and said.rstrip().endswith("JobFailed: stopped by SIGTERM at step 3 of 9; a checkpoint is there"), said


def test_what_reaches_a_job(job, doors, old):
    "The environment is passed on, but for what leads to other libraries; and no arguments of a kernel."
    path, environ, folder, argv = json.loads(job("tell")[1].splitlines()[1])
    studios = Path(old["PYTHONPATH"]).parent
    assert not [p for p in path if p == "" or str(studios) in p]
    assert folder == str(doors.studio.folder)
    assert len(argv) == 1
    assert environ["FTNB_X"] == "kept"
    assert environ["HUGGINGFACE_ACCESS_TOKEN"] == "hf_kept"
    assert "VIRTUAL_ENV" not in environ
    own = {name for name in environ if name.startswith("PYTHON")}
    assert own == {"PYTHONNOUSERSITE", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "PYTHONUTF8"}


SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


def stopped(number):
    return f"JobFailed: RuntimeError: stopped by {number.name}; a checkpoint is there"


def has_begun(place):
    return place.exists() and place.read_text()


@SIGNALS
def test_a_signal_reaches_the_job_and_its_checkpoint_is_awaited(doors, tmp_path, number):
    place = tmp_path/"place"
    job = doors.start(f"wait {place}")
    assert job.stdout.readline() == "first\n"  # output comes while the job runs
    assert job.poll() is None
    wait_for(lambda: has_begun(place))
    job.send_signal(number)
    said = job.communicate()[0]
    assert job.returncode == 1 and stopped(number) in said, said
    assert Path(f"{place}.checkpoint").exists()


@SIGNALS
def test_a_signal_to_a_kernel_reaches_the_job(doors, tmp_path, number):
    place = tmp_path/"place"

    def send(manager):
        wait_for(lambda: has_begun(place))
        if number == signal.SIGINT:
            manager.interrupt_kernel()
        else:
            os.kill(manager.provisioner.pid, number)
    done = doors.in_kernel(f"wait {place}", send)
    assert not done.well and done.error == stopped(number), done
    assert Path(f"{place}.checkpoint").exists()


def test_a_job_whose_script_is_killed_does_not_go_on_alone(doors, tmp_path):
    place = tmp_path/"orphan"
    job = doors.start(f"wait {place}", subprocess.DEVNULL)
    wait_for(lambda: has_begun(place))
    job.kill()
    job.wait()
    wait_for(Path(f"{place}.checkpoint").exists)


# The real thing: ftnb itself, and a job as the Studio's dispatcher makes it

@dataclass(frozen=True)
class Pressed:
    "What the Studio does when its button is pressed: a job with the template's script, and a run of it."
    studio: Studio
    project: object
    env: dict
    source: str


@pytest.fixture
def pressed(tmp_path, tiny_base, open_studio):
    folder = tmp_path/"project"
    project = make_demo_project(folder, tiny_base, fraction=0.01875)
    (folder/"ftnb").mkdir()  # the clone, as the README says
    studio = open_studio(ROOT, folder)
    code, said = studio.do("install", "--env", sys.prefix)
    assert code == 0 and studio.script == JOB, said
    job = studio.server.add_job(project.experiment_id, studio.script, runtime_identifier=studio.job["runtime_identifier"],
                                cpu=2, memory=8, arguments=project.job_arguments)
    env = studio.env | {"JOB_ARGUMENTS": job["arguments"]}  # the database is below the working folder, as the Studio has it
    return Pressed(studio, project, env, (folder/job["script"]).read_text(encoding="utf-8"))


def test_a_job_of_the_studio_with_ftnb_itself(pressed, kernel):
    project, folder = pressed.project, pressed.studio.folder
    if kernel:
        done = run_cell(kernel, pressed.source, pressed.env, folder)
        assert done.well, done.out[-3000:] + done.error
    else:
        code, said = run([pressed.studio.python, "-c", AS_A_CELL, folder/JOB], pressed.env, folder)
        assert code == 0, said[-3000:]
    with closing(sqlite3.connect(project.db)) as con:
        adapters = con.execute("SELECT name, location, fine_tuning_job_id FROM adapters").fetchall()
    args = parse_job_arguments(project.job_arguments)
    assert adapters == [(args.adapter_name, args.out_dir, args.experimentid)]
    assert (project.out_dir/"adapter_model.safetensors").exists()
    versions = json.loads((project.out_dir/"run.json").read_text())["versions"]
    assert versions["python"].startswith("3.%d" % sys.version_info[1])  # of ftnb's environment
    code, said = pressed.studio.do("undo")
    assert code == 0 and pressed.studio.script == FORMER, said
    assert (project.out_dir/"run.json").exists()  # data and adapter stay


def test_a_wrong_argument_fails_the_job_in_ftnbs_own_words(pressed):
    env, folder = pressed.env | {"JOB_ARGUMENTS": "--base_modl_id 1"}, pressed.studio.folder
    code, said = run([pressed.studio.python, "-c", AS_A_CELL, folder/JOB], env, folder)
    words = "JobFailed: The job's arguments are wrong:\n- --base_modl_id is no key"
    assert code == 1 and words in said, said[-2000:]


# Two nodes: the second is started by Cloudera's module, which only the Studio's Python has, and begins in that Python too

WORKERS = """
import os, subprocess, sys
FOLDER = os.path.dirname(os.path.abspath(__file__))
def pids():
    return open(os.path.join(FOLDER, "pids")).read().split()
def launch_workers(n, cpu, memory, nvidia_gpu=0, code="", env={}, **more):
    log = open(os.path.join(FOLDER, "worker.log"), "wb")
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    with open(os.path.join(FOLDER, "pids"), "a") as f: f.write(f"{process.pid}\\n")
    return [{"id": str(process.pid), "status": "scheduling"}]
def list_workers():
    return [{"id": pid, "status": "running" if os.path.exists(f"/proc/{pid}") else "succeeded"} for pid in pids()]
def stop_workers(*ids):
    for pid in ids: subprocess.run(["kill", pid])
"""


def test_a_job_on_two_nodes(tmp_path, tiny_base, open_studio, old):
    folder, module = tmp_path/"project", tmp_path/"module"
    project = make_demo_project(folder, tiny_base, fraction=0.01875)
    module.mkdir()
    (module/"cdsw.py").write_text(WORKERS)
    studio = open_studio(ROOT, folder, old | {"PYTHONPATH": f"{old['PYTHONPATH']}:{module}"})
    studio.do("install", "--env", sys.prefix)
    args = replace(parse_job_arguments(project.job_arguments), dist_num=2, dist_cpu=1, dist_mem=2, dist_gpu=0)
    env = studio.env | {"JOB_ARGUMENTS": format_job_arguments(args), "CDSW_IP_ADDRESS": "127.0.0.1"}
    code, said = run([studio.python, "-c", AS_A_CELL, folder/JOB], env, folder, timeout=900)
    log = (module/"worker.log").read_text() if (module/"worker.log").exists() else "no worker was started"
    assert code == 0 and "node 1 has come" in said, said[-2000:] + log[-2000:]
    assert (project.out_dir/"adapter_model.safetensors").exists()
