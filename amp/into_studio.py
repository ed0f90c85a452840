"""Lets a Fine Tuning Studio that is there train with ftnb: `python amp/into_studio.py install`, `status` or `undo`.

Run it in a session of the Studio's project, with the Studio's own Python (3.10); the standard library is all it needs.
The Studio's environment stays as it is: ftnb gets one of its own, in the folder `.ftnb` of the project.
"""
import argparse
import base64
import contextlib
import ctypes
import fcntl
import glob
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

TEMPLATE_JOB = "Accel_Finetuning_Base_Job"  # the Studio's jobs are copies of this one
STUDIO_SCRIPT = "ft/scripts/accel_fine_tune_base_script.py"  # of that job, as the Studio makes it
HOME = "/home/cdsw"  # where Cloudera ML has a project's files
LEAST = (3, 11)  # the oldest Python that ftnb runs on
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3", "python")  # looked for on the path, in this order
GIGABYTES = 12  # of disk that an environment with CUDA takes while it is made
SECONDS = 30  # that one call of the API may take
TRIES = 4  # of a call that may go well another time
PAUSE = 1.0  # seconds before the second try; each later one is twice as long
LARGEST = 2**24  # bytes of an answer


class Problem(Exception):
    "Something that is wrong, in words."


# Where things are

class Place:
    "A Studio's project, and what this program keeps in it."
    def __init__(self, root, clone):
        self.root = os.path.abspath(root)  # the project: what a job's script is relative to
        self.clone = os.path.abspath(clone)  # of ftnb's repository
        composed = os.path.join(self.root, "fine-tuning-studio")  # the Studio as one of several in a project
        self.studio = composed if os.environ.get("IS_COMPOSABLE") else self.root  # folder that a job works in
        self.folder = os.path.join(self.root, ".ftnb")

    def file(self, name):
        return os.path.join(self.folder, name)

    @property
    def script(self):
        "The job's script, as a job names it."
        return ".ftnb/finetune_job.py"


def find_place(options):
    "The project: the one named, that of Cloudera ML, or the nearest folder that holds a Studio's data."
    clone = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    here = os.getcwd()
    if options.project:
        root = options.project
    elif (here + "/").startswith(HOME + "/"):
        root = HOME
    else:
        root = nearest(here, ".app") or here
    if not os.path.isdir(root):
        raise Problem(f"there is no folder {root}: --project names the Studio's project")
    place = Place(root, clone)
    if os.path.islink(place.folder):
        raise Problem(f"{place.folder} is a link: remove it, since this program deletes what is in that folder")
    return place


def nearest(folder, name):
    "The nearest folder, from here upward, in which there is something of a name; None where there is none."
    while not os.path.exists(os.path.join(folder, name)):
        above = os.path.dirname(folder)
        if above == folder:
            return None
        folder = above
    return folder


# The record: what was done, written before it is done

def read_record(place):
    "What an earlier call of this program has noted; None where there was none."
    try:
        with open(place.file("record.json"), encoding="utf-8") as f:
            record = json.load(f)
    except FileNotFoundError:
        record = None
    except ValueError:
        raise Problem(f"{place.file('record.json')} can't be read: it isn't what this program has written") from None
    if record is None and os.path.isdir(place.folder):
        others = [name for name in sorted(os.listdir(place.folder)) if not re.search(r"\.(part|lock)$|^\.nfs", name)]
        if others:
            raise Problem(f"{place.folder} isn't this program's: it holds {', '.join(others[:3])}, and no record.json")
    return record


def write_record(place, record, **changes):
    "Note something, whole or not at all."
    record.update(changes)
    write_file(place.file("record.json"), json.dumps(record, indent=1) + "\n")


def write_file(path, text):
    "A file that is there whole, or as it was before."
    part = path + ".part"
    with contextlib.suppress(FileNotFoundError):
        os.remove(part)  # of a call that was cut short; a link is never followed
    with open(part, "x", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


@contextlib.contextmanager
def alone(place, name, said):
    "Hold a lock; where another process holds it, say what it does. Where a file system has no locks, go on."
    os.makedirs(place.folder, exist_ok=True)
    with open(place.file(name), "a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(said) from None
        except OSError:
            pass
        yield


def only_one(place):
    "One install or undo at a time."
    return alone(place, "install.lock", "another install or undo is at work in this project")


def no_job(place):
    "No job runs in the environment meanwhile."
    return alone(place, "job.lock", "a job is being trained in ftnb's environment: wait for its end, or stop it")


# A Python that is new enough

PROBE = """
import json, sys
missing = []
for name in ("venv", "ensurepip", "ssl", "sqlite3", "ctypes"):
    try: __import__(name)
    except ImportError: missing.append(name)
print(json.dumps([list(sys.version_info[:3]), missing, getattr(sys, "_base_executable", sys.executable)]))
"""


SECRETS = ("CDSW_APIV2_KEY", "HUGGINGFACE_ACCESS_TOKEN", "HF_TOKEN")  # what packages do while installing needs none


def clean_environment(**more):
    "This process's environment, without secrets and without what leads a Python to another one's libraries."
    left_out = ("VIRTUAL_ENV", "CONDA_PREFIX", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV", *SECRETS)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k not in left_out}
    return {**env, "PYTHONNOUSERSITE": "1", "PIP_USER": "0", **more}


def die_with_parent(libc=ctypes.CDLL(None)):
    "Called in a new process: it ends when this program is killed, instead of going on alone."
    if sys.platform == "linux":
        libc.prctl(1, signal.SIGKILL)


def run(*command, env=None, errors=subprocess.STDOUT, **more):
    "Run a program to its end; its output is a text."
    return subprocess.run(command, env=env or clean_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=errors, universal_newlines=True, preexec_fn=die_with_parent, **more)


def run_shown(*command, env=None):
    "Run a program with its output shown; raises where it fails."
    done = subprocess.run(command, env=env or clean_environment(), stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
    if done.returncode:
        raise Problem(f"exit status {done.returncode} of {' '.join(command)}: its own message is above")


def probe_python(command):
    "(path, version, what is wrong with it) of a Python; the path is None where it doesn't run."
    try:
        done = run(command, "-I", "-c", PROBE, errors=subprocess.DEVNULL, timeout=60)
        version, missing, base = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None, (), "it doesn't run"
    if tuple(version) < LEAST:
        wrong = "too old"
    else:
        wrong = f"it lacks {', '.join(missing)}" if missing else ""
    return base or command, tuple(version), wrong


def find_python(place, options, template):
    "The path of a Python that ftnb runs on."
    seen = []
    if options.python:
        names = [options.python]
    else:
        names = [found for found in map(shutil.which, PYTHONS) if found]
    for name in names:
        path, version, wrong = probe_python(name)
        wrong = wrong or ("" if options.python else elsewhere(place, path, template))
        if path and not wrong:
            return path
        seen.append(f"{name} {'.'.join(map(str, version))}: {wrong}")
    if not options.python:
        path = python_by_uv(place, template, seen)
        if path:
            return path
    least = ".".join(map(str, LEAST))
    raise Problem("\n- ".join([
        f"no Python {least} or newer is found: `pip install uv` and run this again, or name one with --python", *seen]))


def elsewhere(place, path, template):
    "What is wrong with a Python that only this session's image has; the job may run in another image."
    if (os.path.realpath(path) + "/").startswith((place.root + "/", os.path.expanduser("~/"))):
        return ""
    job = re.search(r"python(\d+\.\d+)", template.get("runtime_identifier") or "")
    here = "%d.%d" % sys.version_info[:2]
    if not job or job[1] == here:
        return ""
    return (f"it lies in this session's image, and jobs run in that of Python {job[1]}: "
            "start a session with the Studio's runtime")


def python_by_uv(place, template, seen):
    "A Python that uv has, or fetches into the folder `.ftnb`; None where it can't."
    uv = shutil.which("uv") or shutil.which("uv", path=os.path.expanduser("~/.local/bin"))
    if not uv:
        seen.append("uv: it isn't installed")
        return None
    own = place.file("python")
    env = clean_environment(UV_PYTHON_INSTALL_DIR=own, UV_NO_PROGRESS="1")
    versions = ("3.12", "3.11", "3.13")
    say(f"fetching Python {versions[0]} with {uv}")
    done = run(uv, "python", "install", versions[0], env=env)
    found = sorted(glob.glob(os.path.join(own, "*", "bin", "python3")))
    for version in versions:  # where nothing can be fetched, one that is there will do
        offline = clean_environment(UV_PYTHON_DOWNLOADS="never")
        asked = run(uv, "python", "find", version, env=offline, errors=subprocess.DEVNULL)
        found += asked.stdout.split("\n")[:1] if asked.returncode == 0 else []
    for path in found:
        base, _, wrong = probe_python(path)
        if base and not wrong and not elsewhere(place, base, template):
            return base
    seen.append(f"uv: {last_line(done.stdout)}")
    return None


# ftnb's environment

def package_files(place):
    "What makes up the package: path below the clone -> path."
    package = os.path.join(place.clone, "ftnb")
    needed = (os.path.join(package, "finetune.py"), os.path.join(place.clone, "setup.py"))
    if not all(map(os.path.isfile, needed)):
        raise Problem(f"{place.clone} holds no package ftnb: "
                      "this file must lie in a clone of ftnb's repository, in its folder amp")
    files = {}
    for folder, folders, names in os.walk(package):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            path = os.path.join(folder, name)
            files[os.path.relpath(path, place.clone)] = path
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE", "dev_requirements.txt"):
        path = os.path.join(place.clone, name)
        if os.path.isfile(path):
            files[name] = path
    return files


def fingerprint(files):
    "A hash of files and their names."
    digest = hashlib.sha256()
    for name in sorted(files):
        with open(files[name], "rb") as f:
            digest.update(f"{name}\n".encode() + hashlib.sha256(f.read()).digest())
    return digest.hexdigest()


def environment_python(folder):
    return os.path.join(folder, "bin", "python")


ABOUT = """
import json, sys, ftnb, ftnb.finetune
print(json.dumps([ftnb.__version__, sys.version.split()[0], ftnb.finetune.__file__]))
"""


def about_environment(folder):
    "(version of ftnb, version of Python, path of the job's module) of an environment; raises where it has no ftnb."
    python = environment_python(folder)
    if not os.access(python, os.X_OK):
        raise Problem(f"{folder} is no environment: it has no bin/python")
    done = run(python, "-I", "-c", ABOUT, errors=subprocess.PIPE)
    if done.returncode:
        raise Problem(f"ftnb can't be imported in {folder}: {last_line(done.stderr)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def read_marker(folder):
    "What is noted in an environment that was made to the end; {} where it wasn't."
    try:
        with open(os.path.join(folder, "ftnb.json"), encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError):
        return {}


def works(folder):
    "Can ftnb be imported in an environment?"
    with contextlib.suppress(Problem, OSError):
        return bool(about_environment(folder))
    return False


def make_environment(place, options, template):
    "See to it that `.ftnb/env` is there, with this clone's ftnb."
    folder, files = place.file("env"), package_files(place)
    marker, source = read_marker(folder), fingerprint(files)
    whole = marker and options.python in (None, marker.get("python")) and works(folder)
    if whole and marker.get("source") == source:
        return say(f"environment: {folder} is in place")
    with no_job(place):
        if whole:  # pip brings it up to date
            os.remove(os.path.join(folder, "ftnb.json"))
        else:
            new_environment(place, options, template)
        install_package(place, folder, files)
        version, python, _ = about_environment(folder)
        write_file(os.path.join(folder, "ftnb.json"), json.dumps({"source": source, "python": options.python}))
    say(f"environment: ftnb {version} on Python {python}")


def new_environment(place, options, template):
    "Make an environment with nothing in it."
    folder, free = place.file("env"), shutil.disk_usage(place.folder).free / 2**30
    if os.path.islink(folder):
        os.remove(folder)
    shutil.rmtree(folder, ignore_errors=True)
    if free < GIGABYTES:
        say(f"warning: {free:.1f} GiB of disk are free; with CUDA the environment may take {GIGABYTES}")
    python = find_python(place, options, template)
    say(f"environment: {folder}, with {python}")
    run_shown(python, "-I", "-m", "venv", folder)


def install_package(place, folder, files):
    "Install a copy of the package with pip, so that nothing is written into the clone."
    source = place.file("source")
    shutil.rmtree(source, ignore_errors=True)
    for name, path in files.items():
        os.makedirs(os.path.dirname(os.path.join(source, name)), exist_ok=True)
        shutil.copyfile(path, os.path.join(source, name))
    say("installing ftnb and what it stands on: several minutes, several GB")
    env = clean_environment(PIP_CACHE_DIR=place.file("cache"))
    pip = [environment_python(folder), "-I", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    run_shown(*pip, "--progress-bar", "off", source, env=env)
    for name in ("source", "cache"):
        shutil.rmtree(place.file(name), ignore_errors=True)


# The job's script

JOB = '''"""A job of Fine Tuning Studio that trains with ftnb, in an environment of its own.

Written by into_studio.py, whose `undo` removes it. The Studio's Python runs this, as a file or as the source of a notebook's
cell. It hands over to ftnb's Python, and passes on what that prints, the signals that come, and how it ends.
"""
import codecs
import fcntl
import importlib.util
import os
import selectors
import signal
import subprocess
import sys
import threading
import time

PYTHON = @PYTHON@  # of ftnb's environment
STUDIO = @STUDIO@  # folder that the job works in
FOLDER = @FOLDER@  # where this file is
AGAIN = @AGAIN@
START = """
import ctypes, os, signal, sys
if sys.platform == "linux": ctypes.CDLL(None).prctl(1, signal.SIGINT)  # where its parent dies, this stops with a checkpoint
if os.getppid() != int(sys.argv[1]): raise SystemExit("the process that had started this job is gone")
del sys.argv[1:]
if os.environ.pop("FTNB_JOB_CHECK", ""):
    from ftnb.preflight import check_command as run
else:
    from ftnb.finetune import run_command as run
run()
"""


class JobFailed(RuntimeError):
    "The job didn't end well."


def ftnb_environment():
    "This process's environment, without what leads to the libraries of this Python or tells of its terminal."
    left_out = ("VIRTUAL_ENV", "CONDA_PREFIX", "MPLBACKEND", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "JPY_PARENT_PID")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k not in left_out}
    env["PATH"] = os.path.dirname(PYTHON) + os.pathsep + env.get("PATH", "")
    env.update(PYTHONNOUSERSITE="1", PYTHONSAFEPATH="1", PYTHONUNBUFFERED="1", PYTHONUTF8="1")
    env["FTNB_JOB_SCRIPT"] = os.path.join(FOLDER, "finetune_job.py")  # what a further node of the job begins with
    if importlib.util.find_spec("cml") or importlib.util.find_spec("cdsw"):  # Cloudera's module for workers, only this Python's
        env.update(FTNB_RUNTIME_PYTHON=sys.executable, FTNB_RUNTIME_PATH=os.environ.get("PYTHONPATH", ""))
    return env


def in_use():
    "A lock that says: a job is running here. Where a file system has none, go on without."
    lock = open(os.path.join(FOLDER, "job.lock"), "a")
    for second in range(3600):
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if second == 0:
                print("waiting: into_studio.py is at work in this environment", flush=True)
            time.sleep(1)
        except OSError:
            break
    return lock


class PassedOn:
    "Within this, signals to stop go to the job's process; in the main thread only, which alone can listen."
    def __init__(self):
        self.child, self.early, self.before = None, [], {}

    def send(self, number, frame=None):
        if self.child is None:
            self.early.append(number)
        elif self.child.poll() is None:
            self.child.send_signal(number)

    def follow(self, child):
        self.child = child
        for number in self.early:
            self.send(number)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self.send)
        return self

    def __exit__(self, *error):
        for number, was in self.before.items():
            signal.signal(number, signal.SIG_DFL if was is None else was)


def stream(child):
    "Print what a process prints, as it comes; returns the end of it."
    decode, last = codecs.getincrementaldecoder("utf-8")("replace").decode, ""
    with selectors.DefaultSelector() as ready:
        ready.register(child.stdout, selectors.EVENT_READ)
        while True:
            if ready.select(0.5):
                data = os.read(child.stdout.fileno(), 65536)
                text = decode(data, not data)
                sys.stdout.write(text)
                sys.stdout.flush()
                last = (last + text)[-20000:]
                if not data:
                    break
            elif child.poll() is not None:  # something that it had started still holds the pipe
                break
    return last


def last_error(text):
    "What a program ended with: the message of its last traceback, else its last lines."
    lines = text.rstrip().splitlines()
    begins = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    if lines and lines[-1].startswith("stopped by "):  # a sentence that says how to go on
        return lines[-1]
    if not begins:
        return "\\n".join(lines[-10:])
    after = lines[begins[-1] + 1:]
    while after and not after[0][:1].strip():
        after.pop(0)
    return "\\n".join(after[:60])


def hand_over():
    "Run the job to its end; raises where it fails."
    if not os.access(PYTHON, os.X_OK):
        raise JobFailed("ftnb's environment isn't there any more (" + PYTHON + "): " + AGAIN)
    command = [PYTHON, "-I", "-u", "-X", "utf8", "-c", START, str(os.getpid())]
    with in_use() as lock, PassedOn() as signals:
        child = subprocess.Popen(command, env=ftnb_environment(), cwd=STUDIO, start_new_session=True,
                                 pass_fds=(lock.fileno(),), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT)
        try:
            signals.follow(child)
            said = stream(child)
            code = child.wait()
        finally:
            if child.poll() is None:  # this process itself failed
                child.terminate()
                child.wait()
            child.stdout.close()
    if code < 0:
        why = signal.Signals(-code).name + (" (memory may have run out)" if code == -signal.SIGKILL else "")
        raise JobFailed("the job was ended by " + why + ". Its last words: " + last_error(said))
    if code:
        raise JobFailed(last_error(said) or "the job ended with exit status " + str(code))


hand_over()
'''


def job_script(place, environment):
    "The source of the job's script."
    again = f"run `python {os.path.join(place.clone, 'amp', 'into_studio.py')} install` in a session of this project"
    values = {"PYTHON": environment_python(environment), "STUDIO": place.studio, "FOLDER": place.folder}
    source = JOB.replace("@AGAIN@", repr(again))
    for name, value in values.items():
        source = source.replace(f"@{name}@", repr(value))
    return source


# A dry check: the job's script, run as Cloudera ML does, on a job that is made up, as far as a look at it goes

MADE_UP = """
import sys
from pathlib import Path
from ftnb.demo.project import make_demo_project
from ftnb.tiny import save_tiny
folder = Path(sys.argv[1])
project = make_demo_project(folder/"project", save_tiny(folder/"tiny", kind="qwen"), fraction=0.05)
print(project.job_arguments, project.db, sep="\\n")
"""
AS_A_CELL = """
import sys
with open(sys.argv[1], encoding="utf-8") as f: source = f.read()
exec(compile(source, "cell", "exec"), {"__name__": "__main__"})
"""


def dry_check(place, environment):
    "Would a job run? Raises, with its own words, where not."
    with tempfile.TemporaryDirectory(prefix="ftnb-check-") as folder:
        made = run(environment_python(environment), "-I", "-c", MADE_UP, folder, cwd=folder, errors=subprocess.PIPE)
        if made.returncode:
            raise Problem(f"ftnb doesn't work in {environment}: {last_line(made.stderr)}")
        arguments, database = made.stdout.strip().splitlines()[-2:]
        env = {**os.environ, "JOB_ARGUMENTS": arguments, "FINE_TUNING_STUDIO_SQLITE_DB": database, "FTNB_JOB_CHECK": "1"}
        done = run(sys.executable, "-c", AS_A_CELL, os.path.join(place.root, place.script), cwd=place.root, env=env)
    if done.returncode or "the job can run" not in done.stdout:
        raise Problem(f"the dry check of a job failed:\n{done.stdout[-3000:]}")


# Cloudera ML's API, version 2

THIS_MACHINE = r"(http://)?(localhost|127\.0\.0\.1|\[::1\])(:\d+)?/?"  # the key goes there alone in plain text
VARIABLES = {
    "CDSW_DOMAIN": (rf"(https://)?([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?/?|{THIS_MACHINE}",
                    "the address of the workspace, such as ml-1234abcd.example.com"),
    "CDSW_PROJECT_ID": (r"[\w.-]+", "the project's id, as the API writes it"),
    "CDSW_APIV2_KEY": ("[!-~]+", "an API v2 key, made in User Settings > API Keys")}


class Workspace:
    "The project that the environment names, and the key to it."
    def __init__(self, env=os.environ):
        given = {name: env.get(name, "").strip() for name in VARIABLES}
        wrong = [f"{name} {'can not be right' if given[name] else 'is not set'}: it is {text}"
                 for name, (pattern, text) in VARIABLES.items() if not re.fullmatch(pattern, given[name])]
        if wrong:
            raise Problem("\n- ".join(["Cloudera ML can't be reached from here", *wrong]))
        domain = given["CDSW_DOMAIN"].rstrip("/")
        self.local = bool(re.fullmatch(THIS_MACHINE, domain))
        host = domain.split("://")[-1]
        self.url = f"http{'' if self.local else 's'}://{host}/api/v2/projects/{given['CDSW_PROJECT_ID']}/jobs"
        self.key = given["CDSW_APIV2_KEY"]

    def hide(self, text):
        "A text of the other side, without the key and without what could move a terminal."
        coded = base64.b64encode(self.key.encode()).decode().rstrip("=")
        for form in (self.key, urllib.parse.quote(self.key, safe=""), coded):
            text = text.replace(form, "***")
        return plain(text)[:300]


def plain(text):
    "A text on one line, of printable characters."
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def last_line(text):
    "The last line of what a program said, such as its error."
    return plain((text.strip().splitlines() or ["it said nothing"])[-1])[:300]


class NoRedirect(urllib.request.HTTPRedirectHandler):
    "The key goes to the address that was named, and to no other."
    def redirect_request(self, *args):
        return None


def opener(workspace):
    bundle = os.environ.get("REQUESTS_CA_BUNDLE", "")
    context = ssl.create_default_context(cafile=bundle if os.path.isfile(bundle) else None)
    handlers = [NoRedirect, urllib.request.HTTPSHandler(context=context)]
    if workspace.local:
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)


def ask_once(workspace, method, path, body):
    "(status, data, what was said, seconds to wait) of one call; status 0 where there was no whole answer."
    head = {"Authorization": f"Bearer {workspace.key}", "Accept": "application/json", "Accept-Encoding": "identity",
            "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(workspace.url + path, data=data, headers=head, method=method)
    try:
        answer = opener(workspace).open(request, timeout=SECONDS)
    except urllib.error.HTTPError as e:
        answer = e
    with answer:
        text = answer.read(LARGEST + 1).decode("utf-8", "replace")
        status, after = answer.code, answer.headers.get("Retry-After") or ""
    try:
        found = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        found = None
    found = found if isinstance(found, dict) else None
    said = str((found or {}).get("message") or (found or {}).get("error") or "") or text[:200]
    return status, found, said, float(after) if re.fullmatch(r"\d{1,6}", after) else 0


def within(seconds, call):
    "What a call returns or raises; a TimeoutError where it takes longer, whatever the other side does."
    result = []

    def work():
        try:
            result.append((call(), None))
        except Exception as e:
            result.append((None, e))
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise TimeoutError(f"no whole answer within {seconds:g} s")
    found, error = result[0]
    if error:
        raise error
    return found


def ask(workspace, method, path, body=None):
    "The answer to a call, made again where that may help; raises a `Problem` without the key in it."
    for n in range(TRIES):
        try:
            status, data, said, after = within(SECONDS, lambda: ask_once(workspace, method, path, body))
        except (OSError, ValueError, http.client.HTTPException) as e:
            status, data, said, after = 0, None, str(e) or type(e).__name__, 0
        if 200 <= status < 300 and data is not None:
            return data
        passing = status in (0, 408, 429) or status >= 500 or 200 <= status < 300
        if not passing or n + 1 == TRIES:
            break
        time.sleep(min(after or PAUSE * 2**n, 60))
    what = f"Cloudera ML, {method} jobs{path.split('?')[0]}: {status or 'no answer'} after {n + 1} tries"
    error = Problem(f"{what} ({workspace.hide(said)}){advice(status)}")
    error.status = status
    raise error


def advice(status):
    "What to do about a refusal."
    return {401: ": CDSW_APIV2_KEY must be a key that is valid in this workspace; make one in User Settings > API Keys",
            403: ": the owner of CDSW_APIV2_KEY must be allowed to write to this project",
            404: ": CDSW_PROJECT_ID must name a project that the key's owner can see"}.get(status, "")


def job_path(id):
    if not re.fullmatch(r"[\w-][\w.-]{0,127}", str(id)):
        raise Problem(f"Cloudera ML named a job {plain(str(id))[:60]!r}, which is no id")
    return f"/{id}"


def find_template(workspace):
    "The job that the Studio's jobs are copied from: the first that the API lists, as the Studio takes it."
    query, token = {"search_filter": json.dumps({"name": TEMPLATE_JOB}), "page_size": "100"}, ""
    for _ in range(100):
        page = ask(workspace, "GET", "?" + urllib.parse.urlencode({**query, "page_token": token} if token else query))
        for job in page.get("jobs") or []:
            if isinstance(job, dict) and job.get("name") == TEMPLATE_JOB:
                job_path(job.get("id"))
                return job
        token = page.get("next_page_token")
        if not token:
            break
    raise Problem(f"the project has no job {TEMPLATE_JOB}: "
                  "this must run in the project of Fine Tuning Studio, once that is installed")


def script_of(job):
    "A job's script, as it can be shown."
    return plain(str((job or {}).get("script")))


def template_now(workspace, id):
    "The template job; None where it is gone."
    try:
        return ask(workspace, "GET", job_path(id))
    except Problem as e:
        if getattr(e, "status", 0) == 404:
            return None
        raise


def point(workspace, id, script):
    "Give the template job a script, and see that it has it."
    ask(workspace, "PATCH", job_path(id), {"script": script})
    job = template_now(workspace, id)
    if not job or job.get("script") != script:
        raise Problem(f"Cloudera ML took the change of job {id}, but its script is {script_of(job)!r}")


# install, status, undo

def say(text):
    print(text, flush=True)


def former_script(place, job):
    "The template job's script before ours, where no record tells it."
    if job.get("script") != place.script:
        return job.get("script")
    for folder in (place.root, place.studio):
        if os.path.isfile(os.path.join(folder, STUDIO_SCRIPT)):
            return os.path.relpath(os.path.join(folder, STUDIO_SCRIPT), place.root)
    raise Problem(f"the job {TEMPLATE_JOB} has the script {place.script}, and no record says which it had before: "
                  "give it the Studio's own on its page, then run this again")


def noted_template(place, record, workspace):
    "The template job as it is now, and what the record says of it; raises where somebody else has changed it."
    job = find_template(workspace)
    noted = record.get("template") or {}
    if noted.get("id") != job["id"]:  # none yet, or the Studio was installed anew
        noted = {"id": job["id"], "former": former_script(place, job), "ours": place.script}
    elif job.get("script") not in (noted["former"], noted["ours"]):
        raise Problem(f"somebody has given the job {TEMPLATE_JOB} the script {script_of(job)!r}. "
                      "It is left so: `undo` forgets it, then `install` takes it over")
    return job, noted


def install(place, options):
    "All of it, or what an interrupted install has left to do."
    workspace = Workspace()
    read_record(place)  # or it isn't ours
    with only_one(place):
        record = read_record(place) or {"format": 1}
        job, noted = noted_template(place, record, workspace)
        named = options.env or record.get("environment")  # one that was named stays
        environment = os.path.abspath(named or place.file("env"))
        write_record(place, record, doing="install", environment=environment)
        write_file(place.file(".gitignore"), "*\n")  # the Studio's project is a git repository
        if environment != place.file("env"):
            version, python, where = about_environment(environment)
            say(f"environment: {environment}, with ftnb {version} ({where}) on Python {python}")
        else:
            make_environment(place, options, job)
        write_file(place.file("finetune_job.py"), job_script(place, environment))
        write_record(place, record, template=noted)
        say("checking a job")
        dry_check(place, environment)
        if job.get("script") != place.script:
            point(workspace, noted["id"], place.script)
        write_record(place, record, doing="")
    say(f"done: the Studio's jobs now run {place.script} instead of {noted['former']}; `undo` puts that back")


def status(place, options):
    "What is in place, and whether it works."
    record = read_record(place)
    if record is None:
        raise Problem(f"ftnb isn't installed into the Studio of {place.root}: `install` does that")
    wrong = []

    def look(text, check):
        try:
            found = check()
            say(f"{text}: {found or 'in order'}")
        except Problem as e:
            wrong.append(text)
            say(f"{text}: NOT in order: {e}")

    if record.get("doing"):
        wrong.append("half done")
        say(f"half done: an {record['doing']} was interrupted; run it again")
    environment = record.get("environment") or place.file("env")
    look("environment", lambda: describe_environment(place, environment))
    look("job script", lambda: check_script(place, environment))
    look("template job", lambda: check_template(record))
    if not wrong and not options.quick:
        look("dry check of a job", lambda: dry_check(place, environment))
    if wrong:
        raise Problem(f"not in order: {', '.join(wrong)}")


def describe_environment(place, environment):
    version, python, _ = about_environment(environment)
    text = f"{environment}, ftnb {version} on Python {python}"
    if environment == place.file("env"):
        marker = read_marker(environment)
        if not marker:
            raise Problem(f"{environment} wasn't made to the end")
        with contextlib.suppress(Problem):
            if marker["source"] != fingerprint(package_files(place)):
                text += f"; the clone {place.clone} holds another state of it, which `install` brings over"
    return text


def check_script(place, environment):
    try:
        with open(place.file("finetune_job.py"), encoding="utf-8") as f:
            there = f.read()
    except FileNotFoundError:
        raise Problem(f"{place.file('finetune_job.py')} isn't there") from None
    if f"PYTHON = {environment_python(environment)!r}" not in there:
        raise Problem(f"{place.file('finetune_job.py')} is for another environment")
    return place.file("finetune_job.py")


def check_template(record):
    noted = record.get("template")
    if not noted:
        raise Problem("it hasn't been changed yet")
    job = template_now(Workspace(), noted["id"])
    if job is None:
        raise Problem(f"job {noted['id']} is gone")
    if job.get("script") != noted["ours"]:
        whose = "the Studio's own" if job.get("script") == noted["former"] else "somebody else's"
        raise Problem(f"its script is {whose}, {script_of(job)}")
    return f"{TEMPLATE_JOB} ({noted['id']}) runs {noted['ours']}; before: {noted['former']}"


def undo(place, options):
    "Put everything back; what is back already stays."
    if read_record(place) is None and not os.path.isdir(place.folder):
        return say("nothing of ftnb is in this project")
    with only_one(place):
        record = read_record(place)
        if record and record.get("template"):
            with no_job(place):
                write_record(place, record, doing="undo")
                restore_template(record["template"])
        with no_job(place):
            remove_contents(place)
    for name in os.listdir(place.folder):  # the locks, once nobody has them open
        os.remove(place.file(name))
    os.rmdir(place.folder)
    say(f"undone: {place.folder} is removed")


def restore_template(noted):
    "Give the template job its former script, unless somebody has given it another one."
    workspace = Workspace()
    job = template_now(workspace, noted["id"])
    if job is None:
        say(f"the job {TEMPLATE_JOB} ({noted['id']}) is gone; nothing to put back")
    elif job.get("script") == noted["ours"]:
        point(workspace, noted["id"], noted["former"])
        say(f"the job {TEMPLATE_JOB} runs {noted['former']} again")
    elif job.get("script") != noted["former"]:
        say(f"somebody has given the job {TEMPLATE_JOB} the script {script_of(job)!r}; it is left so")


def remove_contents(place):
    "The record goes last, so that an undo that is cut short can be run again."
    names = [name for name in os.listdir(place.folder) if not name.endswith(".lock")]
    for name in sorted(names, key=lambda name: (name == "record.json", name)):
        path = place.file(name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def read_options(argv):
    parser = argparse.ArgumentParser("into_studio.py", description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("install", "status", "undo"))
    parser.add_argument("--project", help="the Studio's project (default: /home/cdsw, or the nearest folder with .app)")
    parser.add_argument("--python", help="install: the Python for the environment (default: one on the path, or by uv)")
    parser.add_argument("--env", help="install: use this environment, which has ftnb, instead of making one")
    parser.add_argument("--quick", action="store_true", help="status: without the dry check of a job")
    return parser.parse_args(argv)


def main(argv=None):
    options = read_options(argv)
    try:
        place = find_place(options)
        {"install": install, "status": status, "undo": undo}[options.command](place, options)
    except (Problem, OSError) as e:
        print(e, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: run `{options.command}` again", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
