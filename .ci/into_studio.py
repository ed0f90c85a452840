"A Studio that is there, on Python 3.10 with libraries of 2024, trains with ftnb: `python .ci/into_studio.py [WORDS OF A PART ...]`."
import hashlib, json, os, re, shutil, signal, sqlite3, subprocess, sys, tempfile, textwrap, time
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import psutil
from jupyter_client.manager import KernelManager
from transformers import logging

from ftnb.demo.project import make_demo_project
from ftnb.jobargs import format_job_arguments, parse_job_arguments
from ftnb.cluster.stand_in import StandIn
from ftnb.tiny import save_tiny

ROOT, KEY, JOB, TEMPLATE = Path(__file__).resolve().parent.parent, "sesame-0a1b2c3d4e5f", ".ftnb/finetune_job.py", "Accel_Finetuning_Base_Job"
FORMER = "ft/scripts/accel_fine_tune_base_script.py"
OLD = ("transformers", "peft", "trl", "torch", "datasets", "bitsandbytes", "accelerate", "sqlalchemy")  # of the Studio's own environment
results = []


def check(what, right, told=""):
    results.append(bool(right))
    print(f"{'ok' if right else 'FAILED'}: {what}{'' if right else told and f': {told}'}", flush=True)

def wait_for(test, seconds=300):
    limit = time.monotonic() + seconds
    while not (found := test()):
        if time.monotonic() > limit: raise TimeoutError(f"waited {seconds} s in vain")
        time.sleep(0.02)
    return found

def run(command, env, folder, **more):
    "(exit status, output) of a program."
    done = subprocess.run([*map(str, command)], env=env, cwd=folder, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)
    return done.returncode, done.stdout

# The Studio's Python, and what its environment holds

def studio_python():
    "A Python 3.10, or this one where there is none."
    known = [*map(shutil.which, ("python3.10", "python3")), *Path.home().glob(".pyenv/versions/3.10*/bin/python")]
    for path in filter(None, known):
        version = subprocess.run([path, "-c", "import sys; print(sys.version.split()[0])"], text=True, capture_output=True).stdout.strip()
        if version.startswith("3.10."): return str(path), version
    return sys.executable, sys.version.split()[0]

def version_of(python):
    "Such as 3.10."
    return subprocess.run([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True, capture_output=True, check=True).stdout.strip()

def old_libraries(folder):
    "Modules that stand for the Studio's pinned libraries: whoever imports one has leaked out of ftnb's environment."
    versions = {f"lib/python3.{n}/site-packages" for n in (10, sys.version_info[1])}
    for place in (folder/"path", *(folder/"local"/v for v in versions)):
        place.mkdir(parents=True)
        for name in OLD: (place/f"{name}.py").write_text(f"raise ImportError('the Studio\\'s own {name} of 2024')\n")
    return {"PYTHONPATH": str(folder/"path"), "PYTHONUSERBASE": str(folder/"local"), "VIRTUAL_ENV": str(folder/"venv"), "PYTHONSTARTUP": str(folder/"none.py")}

def tree(folder):
    "Every file below a folder, with a hash of what it holds."
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file() and "__pycache__" not in p.parts}

# A light package in place of ftnb, for what would take long with the real one

FAKE = {
    "__init__.py": '__version__ = "9.1"\n',
    "tiny.py": "def save_tiny(folder, kind): return folder\n",
    "demo/__init__.py": "",
    "demo/project.py": "from types import SimpleNamespace\ndef make_demo_project(folder, base, fraction): return SimpleNamespace(job_arguments='--check 1', db='a.db')\n",
    "preflight.py": "import os\ndef check_command(argv=None): print('the job can run' if os.environ['JOB_ARGUMENTS'] == '--check 1' else 'no')\n",
    "finetune.py": '''
        import json, os, signal, sys, time
        def run_command():
            print("first", flush=True)
            words = os.environ["JOB_ARGUMENTS"].split()
            if words[0] == "tell": print(json.dumps([sys.path, dict(os.environ), os.getcwd(), sys.argv]))
            if words[0] == "fail": raise ValueError("no row\\nhas a text")
            if words[0] == "kill": os.kill(os.getpid(), signal.SIGKILL)
            if words[0] == "exit": raise SystemExit("said in words")
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
    (folder/"ftnb"/"demo").mkdir(parents=True), (folder/"amp").mkdir()
    for name, text in FAKE.items(): (folder/"ftnb"/name).write_text(textwrap.dedent(text).lstrip(), encoding="utf-8")
    (folder/"setup.py").write_text(SETUP)
    shutil.copyfile(ROOT/"amp"/"into_studio.py", folder/"amp"/"into_studio.py")
    return folder

class Studio:
    "A Studio's project, the stand-in for its workspace, and the program under test, run by the Studio's Python."
    def __init__(self, folder, old, clone, python, former=FORMER):
        self.folder, self.clone, self.python, self.server = folder, clone, python, StandIn(key=KEY)
        (folder/".app").mkdir(parents=True, exist_ok=True)
        (folder/"ft"/"scripts").mkdir(parents=True, exist_ok=True)
        (folder/FORMER).write_text("raise SystemExit('the script of the Studio itself')\n")
        self.server.add_job("Another_Job", "a.py")
        self.job = self.server.add_job(TEMPLATE, former, runtime_identifier=f"ml-runtime-pbj-jupyterlab-python{version_of(python)}-cuda:2025.01", cpu=2, memory=8)
        left_out = ("PYTHONPATH", "JOB_ARGUMENTS", "FINE_TUNING_STUDIO_SQLITE_DB")
        self.env = {k: v for k, v in os.environ.items() if k not in left_out} | self.server.env | old | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def __enter__(self): return self
    def __exit__(self, *_): self.server.close()

    def do(self, *argv, program=None, **env):
        "(exit status, output) of install, status or undo."
        code, said = run([self.python, *(program or [self.clone/"amp"/"into_studio.py"]), *argv], self.env | env, self.folder)
        check(f"{' '.join(map(str, argv[:1]))}: the key isn't shown, and nothing is a traceback", KEY not in said and "Traceback" not in said, said) if KEY in said or "Traceback" in said else None
        return code, said

    @property
    def script(self): return self.job["script"]

# 0. Which Python

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

def which_python(work, old, python):
    project, tools = work/"project", work/"tools"
    for folder in (project/".ftnb", tools): folder.mkdir(parents=True)
    own = str(Path(sys._base_executable).resolve())
    for name, target in (("old", python), ("new", own), ("odd", "/bin/false")): (tools/name).symlink_to(target)
    env = {**os.environ, **old, "PATH": f"{tools}:/usr/bin:/bin", "HOME": str(work)}
    env.pop("PYTHONHOME", None)
    pick = lambda *names, session=python, runtime="": run([session, "-c", PICK, ROOT/"amp", project, runtime, *names], env, work)[1].strip()
    right = lambda said: Path(said).resolve() == Path(own)
    check("a Python that is too old, or doesn't run, is passed over", right(pick("old", "odd", "missing", "new")))
    if python != sys.executable:
        said = pick("old", "odd")
        check("none: each that was looked at is named, and what to do", "too old" in said and "it doesn't run" in said and "pip install uv" in said, said)
    said = pick("new", session=sys.executable, runtime="ml-runtime-python3.10-cuda")
    check("one of another image than that of jobs isn't taken", "lies in this session's image" in said, said)
    (tools/"uv").write_text(UV.replace("-sf PYTHON", f"-sf {own}"))
    (tools/"uv").chmod(0o755)
    said = pick("missing")
    check("else uv fetches one, into .ftnb", right(said.splitlines()[-1]) and "python install 3.12" in (tools/"asked").read_text() and (project/".ftnb"/"python"/"a").is_dir(), said)

# 1. An environment of its own: made, made again, brought up to date, taken away

def own_environment(work, old, python):
    clone = fake_clone(work/"clone")
    with Studio(work/"project", old, clone, python) as studio:
        before, clone_before = tree(studio.folder), tree(clone)
        code, said = studio.do("status")
        check("status before install: says that nothing is there", code == 1 and "isn't installed" in said, said)
        code, said = studio.do("install")
        check("install: makes an environment, and the template job points to it", code == 0 and studio.script == JOB and "ftnb 9.1" in said, said)
        check("install: nothing but .ftnb is new in the project, nothing in the clone", {k.split("/")[0] for k in tree(studio.folder).keys() - before.keys()} == {".ftnb"} and tree(clone) == clone_before)
        check("install: neither a cache nor a copy of the package stays", {*os.listdir(studio.folder/".ftnb")} == {".gitignore", "env", "finetune_job.py", "install.lock", "job.lock", "record.json"}, os.listdir(studio.folder/".ftnb"))
        marker = studio.folder/".ftnb"/"env"/"ftnb.json"
        made = marker.stat().st_mtime_ns
        code, said = studio.do("status")
        check("status: in order, with a dry check of a job", code == 0 and "dry check of a job: in order" in said and "ftnb 9.1" in said, said)
        code, said = studio.do("install")
        check("install twice: nothing is made again", code == 0 and "is in place" in said and marker.stat().st_mtime_ns == made and studio.script == JOB, said)
        finetune = clone/"ftnb"/"finetune.py"
        finetune.write_text(finetune.read_text(encoding="utf-8").replace('"last ü"', '"newest"'), encoding="utf-8")
        check("status: says that the clone has changed", "another state" in studio.do("status", "--quick")[1])
        code, said = studio.do("install")
        job = run([python, studio.folder/JOB], studio.env | {"JOB_ARGUMENTS": "none"}, studio.folder)
        check("install with a changed clone: the environment has the new code", code == 0 and job == (0, "first\nnewest\n"), said + job[1])
        busy(studio, finetune)
        (studio.folder/".ftnb"/"env"/"bin"/"python").unlink()
        code, said = studio.do("status")
        check("status: a damaged environment is said", code == 1 and "environment: NOT in order" in said, said)
        job = run([python, studio.folder/JOB], studio.env | {"JOB_ARGUMENTS": "none"}, studio.folder)
        check("a job without its environment says what to do", job[0] == 1 and re.search(r"into_studio.py.? install", job[1]), job[1])
        code, said = studio.do("install")
        check("install: mends it", code == 0 and studio.do("status")[0] == 0, said)
        code, said = studio.do("undo")
        check("undo: the project and the template job are as before", code == 0 and tree(studio.folder) == before and studio.script == FORMER and not (studio.folder/".ftnb").exists(), said)
        check("undo twice is fine", studio.do("undo")[0] == 0)

def busy(studio, finetune):
    "While a job runs, its environment is neither changed nor removed."
    place = studio.folder/"busy"
    job = subprocess.Popen([studio.python, studio.folder/JOB], env=studio.env | {"JOB_ARGUMENTS": f"wait {place}"}, cwd=studio.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(place.exists)
    code, said = studio.do("undo")
    check("undo while a job runs: refused, in words", code == 1 and "a job is being trained" in said and studio.script == JOB, said)
    finetune.write_text(finetune.read_text(encoding="utf-8") + "# newer\n", encoding="utf-8")
    check("install of a changed clone while a job runs: refused, in words", "a job is being trained" in studio.do("install")[1])
    job.terminate()
    job.communicate()
    for name in (place, Path(f"{place}.checkpoint")): name.unlink()
    check("and afterwards it goes on", studio.do("install")[0] == 0)

# 2. Killed at every step

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
for place, name in ((os, "remove"), (os, "rmdir"), (os, "replace"), (shutil, "rmtree")): setattr(place, name, counted(getattr(place, name)))
sys.exit(into_studio.main(sys.argv[3:]))
'''

def killed(work, old, python, clone, env):
    "SIGKILL at each step of an install and of an undo; run again, it's as if nothing had been."
    with Studio(work/"project", old, clone, python) as studio:
        before, install = tree(studio.folder), ("install", "--env", str(env))
        def kill(n, *argv): return studio.do(*argv, program=["-c", KILLED, clone/"amp", str(n)])[0] == -signal.SIGKILL
        def whole(): return studio.script == JOB and studio.do("status", "--quick")[0] == 0
        def back(): return tree(studio.folder) == before and studio.script == FORMER
        steps = wrong = 0
        while kill(steps + 1, *install):
            steps += 1
            studio.do("status", "--quick")
            if steps % 2: studio.do("undo")  # at every second step it isn't gone on with, but taken back
            good = back() if steps % 2 else studio.do("install")[0] == 0 and whole()
            if not good: print(f"step {steps}: {studio.script} {sorted(tree(studio.folder).keys() - before.keys())}")
            wrong += not good
            studio.do("undo")
            wrong += not back()
        check(f"install killed at each of {steps} steps: gone on with, or taken back", steps > 15 and not wrong, f"{wrong} wrong")
        check("and where it isn't killed, it is whole", whole())
        steps = wrong = 0
        while kill(steps + 1, "undo"):
            steps += 1
            if steps % 2: wrong += not (studio.do("undo")[0] == 0 and back())
            wrong += not (studio.do(*install)[0] == 0 and whole())
        check(f"undo killed at each of {steps} steps: gone on with, or installed again", steps > 10 and not wrong, f"{wrong} wrong")
        check("and where it isn't killed, everything is back", back())

def pip_of(process):
    "The pip that a process has started, once it is there. Other children come and go meanwhile: one that is gone, or a zombie, has no command line."
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.Error):
            if "pip" in child.cmdline(): return child

def over(process):
    try: return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return True

def killed_while_installing(work, old, python, clone):
    "SIGKILL while pip is at work: pip ends too, and the next install begins anew."
    with Studio(work/"project", old, clone, python) as studio:
        with open(work/"log", "wb") as log: process = subprocess.Popen([python, clone/"amp"/"into_studio.py", "install"], env=studio.env, cwd=studio.folder, stdout=log, stderr=log)
        pip = wait_for(lambda: pip_of(process) or process.poll() is not None)
        check("pip is at work", process.poll() is None, (work/"log").read_text())
        if process.poll() is not None: return
        process.kill()
        process.wait()
        wait_for(lambda: over(pip))
        code, said = studio.do("status", "--quick")
        check("install killed while pip works: status says half done", code == 1 and "half done" in said and studio.script == FORMER, said)
        check("and it can be run again", studio.do("install")[0] == 0 and studio.do("status")[0] == 0)

# 3. The API fails, or somebody else has changed the job

QUICK = '''
import sys
sys.path.insert(0, sys.argv[1])
import into_studio
into_studio.SECONDS, into_studio.PAUSE = 2.0, 0.01
sys.exit(into_studio.main(sys.argv[2:]))
'''
KINDS = (400, 401, 403, 404, 302, 429, 500, "late", "garbled", "cut", "drip", "dropped", "lost", "echo")
FAILURES = [("update_job", "install", kind) for kind in KINDS] + [
    (call, command, kind) for call, command in (("list_jobs", "install"), ("update_job", "undo"), ("get_job", "undo")) for kind in (403, 404, 500, "lost")]
PASSING = (429, 500, "late", "garbled", "cut", "drip", "dropped", "lost")

def api(work, old, python, clone, env):
    with Studio(work/"project", old, clone, python) as studio:
        before, quick, install = tree(studio.folder), ["-c", QUICK, clone/"amp"], ("install", "--env", str(env))
        def do(*argv, **more): return studio.do(*argv, program=quick, **more)
        for call, command, kind in FAILURES:
            for times in (1, 4) if kind in PASSING else (4,):
                if command == "undo": do(*install)
                argv, done = (install, JOB) if command == "install" else (("undo",), FORMER)
                studio.server.fail(call, *[kind] * times, seconds=3.0)
                code, said = do(*argv)
                studio.server.faults.clear()
                gone = (call, kind) == ("get_job", 404)  # then there is nothing to put back
                well = code == 0 and (studio.script == done or gone)
                failed = code == 1 and "Cloudera ML" in said
                right = well if times == 1 or gone else failed
                if gone: studio.job["script"] = FORMER
                check(f"{command}, {call} fails with {kind}, {times} times: {'in spite of it' if times == 1 else 'said'}, and once more it goes well",
                      right and do(*argv)[0] == 0 and studio.script == done, f"{code} {said}")
                do("undo")
        check("and in the end the project is as before", tree(studio.folder) == before)
        code, said = do(*install, CDSW_DOMAIN="http://ml.example.com", CDSW_PROJECT_ID="")
        check("a plain http address isn't asked, and what is wrong is said together", code == 1 and "CDSW_DOMAIN" in said and "CDSW_PROJECT_ID" in said and not (studio.folder/".ftnb").exists(), said)
        changed_by_others(studio, do, install)

def changed_by_others(studio, do, install):
    do(*install)
    studio.job["script"] = "mine.py"
    code, said = do(*install)
    check("install: a template job that somebody has changed is said, and left so", code == 1 and "mine.py" in said and studio.script == "mine.py", said)
    check("status: so it is there", do("status", "--quick")[0] == 1)
    code, said = do("undo")
    check("undo: so it is there, and the rest is taken away", code == 0 and "mine.py" in said and studio.script == "mine.py" and not (studio.folder/".ftnb").exists(), said)
    do(*install)
    check("undo puts back what was there before install", do("undo")[0] == 0 and studio.script == "mine.py")
    studio.job["script"] = FORMER
    do(*install)
    shutil.rmtree(studio.folder/".ftnb")
    check("the record is lost: the Studio's own script is taken for the former one", do(*install)[0] == 0 and do("undo")[0] == 0 and studio.script == FORMER)
    del studio.server.jobs[studio.job["id"]]
    code, said = do(*install)
    check("no template job: said", code == 1 and f"no job {TEMPLATE}" in said, said)

# 4. The script, by each of its doors

def in_kernel(python, source, env, folder, after=None):
    "(did it end well?, what it printed, its error) of one cell; `after` is called with the manager while it runs."
    manager, out, error = KernelManager(kernel_name="python3"), [], []
    manager.kernel_spec.argv[:] = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager.start_kernel(env=env, cwd=str(folder), stderr=subprocess.DEVNULL)
    client = manager.client()
    client.start_channels()
    def show(message):
        content = message["content"]
        if "text" in content: out.append((time.monotonic(), content["text"]))
        if "evalue" in content: error.append(f"{content['ename']}: {content['evalue']}")
        if out and after and not told: told.append(after(manager))
    told = []
    try:
        client.wait_for_ready(timeout=180)
        reply = client.execute_interactive(source, timeout=600, output_hook=show)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return reply["content"]["status"] == "ok", "".join(text for _, text in out), "".join(error)

def kernel_python(work, python):
    "A Python that has ipykernel and is the Studio's version; None where it can't be had."
    venv = work/"kernel"
    done = [subprocess.run([*map(str, command)], capture_output=True) for command in ((python, "-m", "venv", venv), (venv/"bin"/"pip", "install", "-q", "ipykernel"))]
    return str(venv/"bin"/"python") if not any(d.returncode for d in done) else None

AS_A_CELL = "import sys; source = open(sys.argv[1], encoding='utf-8').read(); sys.argv = ['kernel', '-f', 'x.json']; exec(compile(source, 'cell', 'exec'), {'__name__': '__main__'})"

def doors(work, old, python, clone, env, kernel):
    with Studio(work/"project", old, clone, python) as studio:
        studio.do("install", "--env", str(env))
        source = (studio.folder/JOB).read_text(encoding="utf-8")
        def asked(words): return studio.env | {"JOB_ARGUMENTS": words, "FTNB_X": "kept", "HUGGINGFACE_ACCESS_TOKEN": "hf_kept"}
        by_path = lambda words: run([python, studio.folder/JOB], asked(words), work)
        as_cell = lambda words: run([python, "-c", AS_A_CELL, studio.folder/JOB], asked(words), work)
        def by_kernel(words):
            well, out, error = in_kernel(kernel, source, asked(words), work)
            return int(not well), out + error
        for door, job in {"path": by_path, "cell": as_cell} .items() | ({("kernel", by_kernel)} if kernel else set()):
            check(f"{door}: ends by falling off its end, output as it is", job("none") == (0, "first\nlast ü\n"), job("none"))
            code, said = job("fail")
            check(f"{door}: fails by raising, with the job's own words", code == 1 and said.rstrip().endswith("JobFailed: ValueError: no row\nhas a text"), said)
            code, said = job("kill")
            check(f"{door}: a job that is killed is said to be", code == 1 and "ended by SIGKILL (memory may have run out)" in said, said)
            code, said = job("exit")
            check(f"{door}: so is one that ends with a sentence", code == 1 and "said in words" in said.splitlines()[-1], said)
            path, environ, folder, argv = json.loads(job("tell")[1].splitlines()[1])
            own = {p for p in environ if p.startswith("PYTHON")}
            check(f"{door}: no path of the Studio's, its folder, and no arguments of a kernel", not any(str(work/"old") in p or p == "" for p in path) and folder == str(studio.folder) and len(argv) == 1, (path, folder, argv))
            check(f"{door}: the environment is passed on, but for what leads to other libraries", environ["FTNB_X"] == "kept" and environ["HUGGINGFACE_ACCESS_TOKEN"] == "hf_kept" and "VIRTUAL_ENV" not in environ
                  and own == {"PYTHONNOUSERSITE", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "PYTHONUTF8"}, own)
        signals(work, studio, python, source, asked, kernel)

def signals(work, studio, python, source, asked, kernel):
    "A signal reaches the job, its checkpoint is awaited, and its word is the error."
    for number in (signal.SIGTERM, signal.SIGINT):
        name, place = number.name, work/number.name
        job = subprocess.Popen([python, studio.folder/JOB], env=asked(f"wait {place}"), cwd=work, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        first = job.stdout.readline()
        check(f"{name}: output comes while the job runs", first == "first\n" and job.poll() is None, first)
        wait_for(lambda: place.exists() and place.read_text())
        job.send_signal(number)
        said = job.communicate()[0]
        check(f"{name}: passed on, the checkpoint awaited, the exit too", job.returncode == 1 and f"JobFailed: RuntimeError: stopped by {name}; a checkpoint is there" in said and Path(f"{place}.checkpoint").exists(), said)
        if not kernel: continue
        place = work/f"kernel{name}"
        def send(manager):
            wait_for(lambda: place.exists() and place.read_text())
            if number == signal.SIGINT: manager.interrupt_kernel()
            else: os.kill(manager.provisioner.pid, number)
        well, out, error = in_kernel(kernel, source, asked(f"wait {place}"), work, send)
        check(f"{name} to a kernel: the same", not well and error == f"JobFailed: RuntimeError: stopped by {name}; a checkpoint is there" and Path(f"{place}.checkpoint").exists(), out + error)
    place = work/"orphan"
    job = subprocess.Popen([python, studio.folder/JOB], env=asked(f"wait {place}"), cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: place.exists() and place.read_text())
    job.kill()
    job.wait()
    wait_for(Path(f"{place}.checkpoint").exists)
    check("a script that is killed: its job doesn't go on alone, and leaves a checkpoint", True)

# 5. The real thing: ftnb itself, and a job as the Studio's dispatcher makes it

def dispatch(studio, project):
    "What the Studio does when its button is pressed: a job with the template's script and runtime, and a run of it."
    job = studio.server.add_job(project.experiment_id, studio.script, runtime_identifier=studio.job["runtime_identifier"], cpu=2, memory=8, arguments=project.job_arguments)
    env = studio.env | {"JOB_ARGUMENTS": job["arguments"]}  # the database is where the Studio has it, below the working folder
    return (studio.folder/job["script"]).read_text(encoding="utf-8"), env

def real_job(work, old, python, kernel):
    folder = work/"project"
    project = make_demo_project(folder, save_tiny(work/"tiny", kind="qwen"), fraction=0.05)
    (folder/"ftnb").mkdir()  # the clone, as the README says
    with Studio(folder, old, ROOT, python) as studio:
        code, said = studio.do("install", "--env", sys.prefix)
        check("install with the real ftnb: a job would run", code == 0 and studio.script == JOB, said)
        source, env = dispatch(studio, project)
        if kernel: well, out, error = in_kernel(kernel, source, env, folder)
        else:
            code, out = run([python, "-c", AS_A_CELL, folder/JOB], env, folder)
            well, error = code == 0, ""
        check(f"the Studio's button: the job runs, in a {'kernel' if kernel else 'process'} of the Studio's Python", well, out[-3000:] + error)
        with closing(sqlite3.connect(project.db)) as con: adapters = con.execute("SELECT name, location, fine_tuning_job_id FROM adapters").fetchall()
        args = parse_job_arguments(project.job_arguments)
        check("its adapter is whole, and registered", adapters == [(args.adapter_name, args.out_dir, args.experimentid)] and (project.out_dir/"adapter_model.safetensors").exists(), adapters)
        versions = json.loads((project.out_dir/"run.json").read_text())["versions"] if (project.out_dir/"run.json").exists() else {}
        check("it was trained with the libraries of ftnb's environment", versions.get("python", "").startswith("3.%d" % sys.version_info[1]), versions)
        broken = env | {"JOB_ARGUMENTS": "--base_modl_id 1"}
        code, said = run([python, "-c", AS_A_CELL, folder/JOB], broken, folder)
        check("a wrong argument fails the job in ftnb's own words", code == 1 and "JobFailed: ftnb.problems.ProblemsError: The job's arguments are wrong:\n- --base_modl_id is no key" in said, said[-500:])
        code, said = studio.do("undo")
        check("undo: the Studio's own script is back, data and adapter stay", code == 0 and studio.script == FORMER and (project.out_dir/"run.json").exists(), said)

# 6. Two nodes: the second is started by Cloudera's module, which only the Studio's Python has, and begins in that Python too

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

def two_nodes(work, old, python):
    folder, module = work/"project", work/"module"
    project = make_demo_project(folder, save_tiny(work/"tiny", kind="qwen"), fraction=0.05)
    module.mkdir()
    (module/"cdsw.py").write_text(WORKERS)
    with Studio(folder, old | {"PYTHONPATH": f"{old['PYTHONPATH']}:{module}"}, ROOT, python) as studio:
        studio.do("install", "--env", sys.prefix)
        args = replace(parse_job_arguments(project.job_arguments), dist_num=2, dist_cpu=1, dist_mem=2, dist_gpu=0)
        env = studio.env | {"JOB_ARGUMENTS": format_job_arguments(args), "CDSW_IP_ADDRESS": "127.0.0.1"}
        code, said = run([python, "-c", AS_A_CELL, folder/JOB], env, folder, timeout=900)
        log = (module/"worker.log").read_text() if (module/"worker.log").exists() else "no worker was started"
        check("a job on two nodes: the second one comes, in the Studio's Python, and hands over too", code == 0 and "node 1 has come" in said, said[-2000:] + log[-2000:])
        check("and its adapter is there", (project.out_dir/"adapter_model.safetensors").exists())

PARTS = ("which Python", "own environment", "killed", "api", "doors", "real job", "two nodes")

def main(words):
    logging.disable_progress_bar()
    chosen = [p for p in PARTS if not words or " ".join(words) in p]
    python, version = studio_python()
    print(f"the Studio's Python: {version}" if version.startswith("3.10.") else f"no Python 3.10 is here: this one, {version}, stands for it", flush=True)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work).resolve()
        old = old_libraries(work/"old")
        kernel = kernel_python(work, python) if {"doors", "real job"} & {*chosen} else None
        if not kernel and {"doors", "real job"} & {*chosen}: print("no ipykernel for that Python can be had: scripts run as the source of a cell, in a process")
        clone, env = fake_clone(work/"light"), work/"light_env"
        if {"killed", "api", "doors"} & {*chosen}:
            for command in ([sys.executable, "-m", "venv", env], [env/"bin"/"pip", "install", "-q", "--disable-pip-version-check", clone]): subprocess.run([*map(str, command)], check=True)
            for name in ("build", "ftnb.egg-info"): shutil.rmtree(clone/name, ignore_errors=True)
        if "which Python" in chosen: which_python(work/"which", old, python)
        if "own environment" in chosen: own_environment(work/"own", old, python)
        if "killed" in chosen:
            killed(work/"killed", old, python, clone, env)
            killed_while_installing(work/"pip", old, python, clone)
        if "api" in chosen: api(work/"api", old, python, clone, env)
        if "doors" in chosen: doors(work, old, python, clone, env, kernel)
        if "real job" in chosen: real_job(work/"real", old, python, kernel)
        if "two nodes" in chosen: two_nodes(work/"nodes", old, python)
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return int(not all(results))

if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
