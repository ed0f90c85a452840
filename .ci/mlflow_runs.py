"""One run a job in MLflow, with MLflow itself: `python .ci/mlflow_runs.py [FOLDER]`.

FOLDER holds an installed `mlflow` (`pip install --target FOLDER mlflow`); without one, that of this Python is taken, and where there
is none, nothing is tried. What is in FOLDER comes last on the path, so that it hides no library of ours.
"""
import contextlib, importlib.util, io, json, os, signal, subprocess, sys, tempfile, warnings
from pathlib import Path

if len(sys.argv) > 1:
    os.environ["MLFLOW_FOLDER"] = str(Path(sys.argv[1]).resolve())
    sys.path.append(os.environ["MLFLOW_FOLDER"])

TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 0.01, "eval_strategy": "steps", "eval_steps": 2, "report_to": "mlflow"}
CHILD = """
import os, sys, time
sys.path.append(os.environ.get("MLFLOW_FOLDER", "."))
import ftnb.finetune as finetune
import ftnb.trainer as trainer
if "SLOW" in os.environ:  # time for a signal
    real = trainer.append_metrics
    def slow(*args, **kwargs): real(*args, **kwargs); print("LOGGED", flush=True); time.sleep(1)
    trainer.append_metrics = slow
finetune.run_command([])
"""
failed = 0

def check(what, right):
    global failed
    failed += not right
    print(f"{'ok  ' if right else 'FAIL'} {what}", flush=True)

def runs():
    "Experiment -> status and last metrics of each of its runs."
    import mlflow
    client, found = mlflow.MlflowClient(), {}
    for experiment in client.search_experiments():
        found[experiment.name] = [(r.info.status, set(r.data.metrics)) for r in client.search_runs([experiment.experiment_id])]
    return found

def one_run(name, status, *metrics):
    "Is there one run, ended so, in the experiment of that name, and none in MLflow's own?"
    found = runs()
    mine, default = found.get(name, []), found.get("Default", [])
    return len(mine) == 1 and mine[0][0] == status and set(metrics) <= mine[0][1] and not default

def by_hand(project, number, **more):
    "The arguments of another job on the same project."
    from dataclasses import replace
    from ftnb.all import parse_job_arguments
    args = parse_job_arguments(project.job_arguments)
    beside = Path(args.out_dir).parent
    return replace(args, experimentid=f"00000000-0000-4000-8000-00000000000{number}", out_dir=str(beside/f"adapter-{number}"), auto_add_adapter=False,
                   train_out_dir=str(beside/f"train-{number}"), training_arguments_config=json.dumps(TRAINING | more))

def in_process(args, env):
    from ftnb.all import finetune
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try: finetune(args, env, False)
        except Exception as e: return e

def as_script(args, env, stop=False):
    "The job script in a process of its own; stopped by SIGTERM at its first log."
    from ftnb.all import format_job_arguments
    given = os.environ | env | {"JOB_ARGUMENTS": format_job_arguments(args)} | ({"SLOW": "1"} if stop else {})
    child = subprocess.Popen([sys.executable, "-c", CHILD], env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in child.stdout:
        lines.append(line)
        if stop and lines.count("LOGGED\n") == 2: child.send_signal(signal.SIGTERM); stop = False
    return child.wait(), "".join(lines)

def main():
    from ftnb.all import make_demo_project
    from ftnb.tiny import save_tiny
    import mlflow
    import ftnb.finetune
    warnings.simplefilter("ignore"); ftnb.finetune.preflight.quiet_libraries()
    print(f"mlflow {mlflow.__version__}")
    folder = Path(tempfile.mkdtemp())
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    os.chdir(folder)
    project = make_demo_project(folder/"project", save_tiny(folder/"base", kind="qwen"), fraction=0.02)
    env, first, second, third, fourth, fifth = {"FINE_TUNING_STUDIO_SQLITE_DB": str(project.db)}, *(by_hand(project, n) for n in range(1, 6))
    both = ("loss", "eval_loss")
    check(f"a job from Python: {in_process(first, env)}", one_run(first.experimentid, "FINISHED", *both))
    check("a second one in the same process has an experiment of its own", in_process(second, env) is None and one_run(second.experimentid, "FINISHED", *both))
    check("nothing is open in this process", mlflow.active_run() is None)
    with mlflow.start_run(experiment_id=mlflow.create_experiment("mine")) as mine:
        check("within a person's own run", in_process(third, env) is None and one_run(third.experimentid, "FINISHED", *both))
        check("which stays open, and empty", mlflow.active_run().info.run_id == mine.info.run_id and runs()["mine"] == [("RUNNING", set())])
    code, said = as_script(fourth, env)
    check(f"the job script: exit status {code}", code == 0 and one_run(fourth.experimentid, "FINISHED", *both))
    code, said = as_script(fifth, env, stop=True)
    check(f"stopped by SIGTERM: exit status {code}", code != 0 and one_run(fifth.experimentid, "KILLED", "loss"))
    code, said = as_script(fifth, env)
    check("gone on: a run of its own, ended", code == 0 and sorted(s for s, _ in runs()[fifth.experimentid]) == ["FINISHED", "KILLED"])
    real, sixth = ftnb.finetune._prove, by_hand(project, 6)
    def refuse(*args, **kwargs): raise RuntimeError("the proof fails")
    ftnb.finetune._prove = refuse
    check("a job that fails after training", "proof" in str(in_process(sixth, env)) and one_run(sixth.experimentid, "FAILED", *both))
    ftnb.finetune._prove = real
    seventh = by_hand(project, 7, learning_rate=1e20, weight_decay=1e30, max_steps=20)
    check("a job that fails in training", in_process(seventh, env) is not None and one_run(seventh.experimentid, "FAILED"))
    print(f"{failed} failed")

if __name__ == "__main__":
    if importlib.util.find_spec("mlflow") is None: sys.exit(print("mlflow isn't installed: not tried"))
    main()
    sys.exit(failed > 0)
