"The job script on a tiny model, by each of its doors: `python .ci/job.py`."
import os, shutil, sqlite3, subprocess, sys, tempfile, time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from jupyter_client.manager import KernelManager
from peft import PeftModel
from transformers import AutoModelForCausalLM, logging

import ftnb
from ftnb.demo.project import make_demo_project
from ftnb.jobargs import format_job_arguments, parse_job_arguments
from ftnb.tiny import save_tiny

SCRIPT = Path(ftnb.__file__).parent/"finetune.py"
COMMANDS = {"path": [sys.executable, str(SCRIPT)], "module": [sys.executable, "-m", "ftnb.finetune"],
            "console script": [str(Path(sys.executable).parent/"ftnb_finetune")]}
FILES = ("adapter_model.safetensors", "adapter_config.json")
results = []


def check(what, right):
    results.append(bool(right))
    print(f"{'ok' if right else 'FAILED'}: {what}", flush=True)

def in_kernel(env, folder):
    "Run the script as Cloudera ML does, as the source of one cell; returns (did it end well?, what it printed)."
    manager, printed = KernelManager(kernel_name="python3"), []
    manager.kernel_spec.argv[:] = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager.start_kernel(env=env, cwd=str(folder))
    client = manager.client()
    client.start_channels()
    def show(message): printed.extend(message["content"].get("traceback") or [message["content"].get("text", "")])
    try:
        client.wait_for_ready(timeout=60)
        reply = client.execute_interactive(SCRIPT.read_text(encoding="utf-8"), timeout=200, output_hook=show)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return reply["content"]["status"] == "ok", "".join(printed)

def run(door, project, arguments):
    "Run a job through one of its doors; its output is shown where it fails. The folder is one in which a clone `ftnb` lies."
    (project.folder/"ftnb").mkdir(exist_ok=True)
    start, env = time.time(), {**os.environ, "JOB_ARGUMENTS": arguments, "FINE_TUNING_STUDIO_SQLITE_DB": str(project.db)}
    if door == "kernel": ended_well, printed = in_kernel(env, project.folder)
    else:
        done = subprocess.run(COMMANDS[door], env=env, cwd=project.folder, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        ended_well, printed = done.returncode == 0, done.stdout
    if not ended_well: print(printed)
    check(f"{door}: the job runs ({time.time() - start:.0f} s)", ended_well)

def rows(project, table, **where):
    with closing(sqlite3.connect(project.db)) as con:
        con.row_factory = sqlite3.Row
        test = " AND ".join(f"{name} = ?" for name in where) or "1"
        return [dict(row) for row in con.execute(f"SELECT * FROM {table} WHERE {test}", [*where.values()])]

def is_trained(out_dir, base):
    "Does PEFT load the adapter, and has training moved it from where it started?"
    if not (out_dir/FILES[0]).exists(): return False
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out_dir)
    return any(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)

def registered(project, args):
    "Is exactly one adapter registered, by the right row, with the job's row pointing to it?"
    right = dict(type="project", name=args.adapter_name, model_id=args.base_model_id, location=args.out_dir,
                 fine_tuning_job_id=args.experimentid, prompt_id=args.prompt_id)
    found, jobs = rows(project, "adapters"), rows(project, "fine_tuning_jobs", id=args.experimentid)
    return (len(found) == 1 and right.items() <= found[0].items()
            and [job["adapter_id"] for job in jobs] == [found[0]["id"]])

def same_job_twice(folder, base, doors):
    "Without registering, the same arguments both times."
    project, adapters = make_demo_project(folder, base, fraction=0.05), []
    args = replace(parse_job_arguments(project.job_arguments), auto_add_adapter=False)
    for door in doors:
        run(door, project, format_job_arguments(args))
        check(f"{door}: PEFT loads the adapter, which is trained", is_trained(project.out_dir, base))
        check(f"{door}: no adapter is registered, since none was asked for", not rows(project, "adapters"))
        adapters.append([(project.out_dir/name).read_bytes() if (project.out_dir/name).exists() else None for name in FILES])
        for made in (project.out_dir, project.train_out_dir): shutil.rmtree(made, ignore_errors=True)
    for name, first, second in zip(FILES, *adapters): check(f"{name} is the same both times", first and first == second)

def registering(folder, base, door):
    project = make_demo_project(folder, base, fraction=0.05)
    run(door, project, project.job_arguments)
    check(f"{door}: PEFT loads the adapter, which is trained", is_trained(project.out_dir, base))
    check(f"{door}: the database holds its row", registered(project, parse_job_arguments(project.job_arguments)))

def refusing(folder):
    "A wrong argument fails a kernel's cell at once, in words."
    start = time.time()
    ended_well, printed = in_kernel({**os.environ, "JOB_ARGUMENTS": "--base_modl_id 1"}, folder)
    check(f"kernel: a wrong argument fails the job ({time.time() - start:.0f} s)", not ended_well and "--base_modl_id is no key" in printed)

def main():
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work).resolve()
        base = save_tiny(work/"tiny", kind="qwen")
        same_job_twice(work/"twice", base, ("path", "module"))
        for door in ("console script", "kernel"): registering(work/door.replace(" ", "_"), base, door)
        refusing(work)
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return int(not all(results))

if __name__ == "__main__": sys.exit(main())
