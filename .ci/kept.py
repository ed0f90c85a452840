"From the last optimizer step on nothing that only describes a run can lose it: `python .ci/kept.py [WORDS OF A CASE ...]`."
import json, os, subprocess, sys, tempfile, time, traceback
BEGAN = time.monotonic()
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import ftnb.demo.project, ftnb.finetune, ftnb.jobargs, ftnb.preflight, ftnb.tiny
sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"tests"))
from forks import time_used

TRAINING = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 1, "eval_strategy": "epoch",
            "optim": "adamw_torch", "save_steps": 1, "report_to": "none"}
LORA = {"r": 2, "target_modules": ["q_proj"]}
ROWS = 12

@dataclass(frozen=True)
class Case:
    "A function that fails, and what the log says."
    name: str
    function: str  # dotted name
    said: str  # in the log or the error
    steps: int = 0  # optimizer steps after which it begins to fail
    ends: str = ""  # how the error begins that the job ends with; "" where it ends well
    published: bool = True  # is the adapter in its place?
    training: tuple = ()  # (key, value) that differ

CASES = [
    Case("versions", "ftnb.runrecord.library_versions", "versions of run.json: failed"),
    Case("a library without metadata", "importlib.metadata.version", "loaded back", steps=2),
    Case("what was used", "ftnb.runrecord._used", "used of run.json: failed"),
    Case("hashes of the records", "ftnb.studio.record_hash", "records of run.json: failed", steps=2),
    Case("the report", "ftnb.report.write_report", "report.html: failed"),
    Case("the report's picture", "ftnb.plots.plot_run", "report.html: failed"),
    Case("base against adapter", "ftnb.evaluate.describe_scores", "base against adapter: failed"),
    Case("making the scorer", "ftnb.evaluate.make_scorer", "base against adapter: failed"),
    Case("the estimated time", "ftnb.estimate.estimate_time", "the estimated time: failed"),
    Case("a line of metrics.jsonl", "ftnb.trainer.append_metrics", "metrics.jsonl: failed", steps=2),
    Case("the last evaluation", "transformers.Trainer.evaluate", "the last evaluation: failed", steps=2),
    Case("the last checkpoint", "ftnb.checkpoints._write_share", "the checkpoint of the last step, 2: failed", steps=2),
    Case("the last checkpoint's flush", "ftnb.manifest.flush", "the checkpoint of the last step, 2: failed", steps=2),
    Case("the best checkpoint", "ftnb.checkpoints.whole_checkpoint", "loading the best checkpoint", training=(("load_best_model_at_end", True), ("save_strategy", "epoch"))),
    Case("the tokenizer beside the adapter", "ftnb.adapters.save_tokenizer", "the tokenizer beside the adapter: failed"),
    Case("logits to prove by", "ftnb.adapters.probe_logits", "not proven"),
    Case("the base can't be loaded again", "ftnb.models.load_base_model", "the adapter's proof: failed", steps=2),
    Case("registering", "ftnb.registry.register_adapter", "This registers it", ends="RuntimeError: on purpose"),
    Case("a wrong proof", "ftnb.adapters.NotProven", "what was trained is kept in", ends="RuntimeError: on purpose", published=False),
    Case("publishing", "ftnb.adapters.publish_folder", "what was trained is kept in", ends="RuntimeError: on purpose", published=False),
]

class OnPurpose(Exception): pass

def resolve(function):
    import pkgutil
    place, name = function.rsplit(".", 1)
    return pkgutil.resolve_name(place), name

def failing(case, counted):
    "Let a function fail once so many steps are taken."
    owner, name = resolve(case.function)
    real = getattr(owner, name)
    if case.name == "a wrong proof":
        def wrong(*args, **kwargs): raise real("on purpose")
        return patch.object(ftnb.adapters, "prove_adapter", wrong)
    def fails(*args, **kwargs):
        if counted["steps"] >= case.steps: raise OnPurpose("on purpose")
        return real(*args, **kwargs)
    return patch.object(owner, name, fails)

def counting(counted):
    "Count optimizer steps."
    import ftnb.checkpoints
    real = ftnb.checkpoints.check_finite
    def counts(trainer, norm):
        real(trainer, norm)
        counted["steps"] = trainer.state.global_step + 1
    return patch.object(ftnb.checkpoints, "check_finite", counts)

def project_in(folder, base, **training):
    data = folder/"messages.csv"
    if not data.exists():
        lines = ftnb.demo.project.demo_data().read_text(encoding="utf-8").splitlines(keepends=True)
        data.write_text("".join(lines[:ROWS + 1]), encoding="utf-8")
    return ftnb.demo.project.make_demo_project(folder/"project", base, data, training=TRAINING | training, lora=LORA, split=10/ROWS)

def problems_of(project, log, said, ended, ends, published):
    "What is wrong with what a job has left."
    out, found = project.out_dir, []
    weights, record = "adapter_model.safetensors", "run.json"
    if said not in log: found.append(f"{said!r} isn't said")
    if not ended.startswith(ends) or bool(ended) != bool(ends): found.append(f"it ends with {ended!r} instead of {ends!r}")
    if published and not all((out/o).is_file() for o in (weights, record)): found.append(f"{out} holds {os.listdir(out) if out.exists() else 'nothing'}")
    kept = Path(f"{out}.not-published")
    if not published and (out.exists() or not (kept/weights).is_file()): found.append(f"beside its place: {os.listdir(out.parent)}")
    if published and not found: json.loads((out/record).read_text())["adapter_sha256"]
    left = [o.name for o in out.parent.glob(".*")]
    if left: found.append(f"left beside its place: {left}")
    return [*found, log] if found else []

def fails_once(case, folder, base):
    project = project_in(folder, base, **dict(case.training))
    args, counted, ended = ftnb.jobargs.parse_job_arguments(project.job_arguments), {"steps": 0}, ""
    with ExitStack() as stack, redirect_stdout(StringIO()) as log:
        stack.enter_context(counting(counted))
        stack.enter_context(failing(case, counted))
        try: ftnb.finetune.finetune(args)
        except Exception as e: ended, last = f"{type(e).__name__}: {e}", traceback.format_exc()
        else: last = ""
    return problems_of(project, f"{log.getvalue()}\n{last}", case.said, ended, case.ends, case.published)

HIDES_FTNB = """import importlib.metadata as metadata
real = metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name == "ftnb": raise metadata.PackageNotFoundError(name)
    return real(cls, name)
metadata.Distribution.from_name = classmethod(from_name)
"""

def not_installed(folder, base):
    "The package's folder is copied, and its script run by its path by a Python that has all libraries, and no ftnb among them."
    import shutil
    project = project_in(folder, base)
    shutil.copytree(Path(ftnb.finetune.__file__).parent, folder/"copied"/"ftnb")
    (folder/"sitecustomize.py").write_text(HIDES_FTNB)
    env = os.environ | {"PYTHONPATH": str(folder), "JOB_ARGUMENTS": project.job_arguments, "FINE_TUNING_STUDIO_SQLITE_DB": str(project.db)}
    done = subprocess.run([sys.executable, folder/"copied"/"ftnb"/"finetune.py"], env=env, cwd=folder, capture_output=True, text=True)
    ended = "" if done.returncode == 0 else str(done.returncode)
    if found := problems_of(project, done.stdout + done.stderr, "registered:", ended, "", True): return found
    versions = json.loads((project.out_dir/"run.json").read_text())["versions"]
    return [] if versions["ftnb"] == ftnb.__version__ and "?" not in versions.values() else [f"versions: {versions}"]

def main(words):
    ftnb.preflight.quiet_libraries()
    cases = [("not installed, run by its path", not_installed), *((f"fails: {case.name}", partial(fails_once, case)) for case in CASES)]
    cases, passed = [(name, case) for name, case in cases if not words or " ".join(words) in name], 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        base = ftnb.tiny.save_tiny(folder/"tiny", kind="qwen")
        for number, (name, case) in enumerate(cases):
            (place := folder/str(number)).mkdir()
            os.environ["FINE_TUNING_STUDIO_SQLITE_DB"] = str(place/"project"/".app"/"state.db")
            try: found = case(place, base)
            except Exception: found = [traceback.format_exc()]
            passed += not found
            print("\n  ".join([f"{'FAILED' if found else 'ok'}: {name}", *found]), flush=True)
    print(time_used(BEGAN))
    print(f"{passed} passed, {len(cases) - passed} failed")
    return int(passed < len(cases))

if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
