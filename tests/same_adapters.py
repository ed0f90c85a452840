"""The same jobs by two checkouts: `python tests/same_adapters.py BEFORE AFTER [WORDS ...]`.

Each tiny job is run as a Studio runs it, from a database and files that are made here, by each checkout's own
`ftnb/finetune.py`. What it leaves must be the same, byte for byte. What it prints is shown where it differs, without
times. WORDS choose jobs: each stands for those that have it in their name (`killed`, "4 bits"), several for any of
these; without one all jobs run. With `--keep FOLDER` what a commit gave is kept there, and not computed again unless `--update` is given.
"""
import argparse
import csv
import difflib
import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

SCHEMA = {
    "models": "id type framework name description huggingface_model_name location cml_registered_model_id "
              "mlflow_experiment_id mlflow_run_id",
    "datasets": "id type name description huggingface_name location features",
    "prompts": "id type name description dataset_id prompt_template input_template completion_template",
    "configs": "id type description config model_family is_default",
    "adapters": "id type name description huggingface_name model_id location fine_tuning_job_id prompt_id "
                "cml_registered_model_id mlflow_experiment_id mlflow_run_id",
    "fine_tuning_jobs": "id base_model_id dataset_id prompt_id num_workers cml_job_id adapter_id num_cpu num_gpu "
                        "num_memory num_epochs learning_rate out_dir training_arguments_config_id "
                        "model_bnb_config_id adapter_bnb_config_id lora_config_id training_arguments_config "
                        "model_bnb_config adapter_bnb_config lora_config dataset_fraction train_test_split user_script "
                        "user_config_id framework_type axolotl_config_id gpu_label_id adapter_name",
}
TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
            "learning_rate": 5e-3, "lr_scheduler_type": "cosine", "warmup_ratio": 0.05, "logging_steps": 1,
            "optim": "adamw_torch", "completion_only_loss": True, "report_to": "none"}
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
LEFT = ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
ROWS = 30


@dataclass(frozen=True)
class Job:
    "A tiny job: how it differs from the plainest one."
    name: str
    data: str = "csv"  # a key of `DATA`
    base: tuple = ("qwen", "llama")  # kind of tokenizer, architecture
    training: dict = field(default_factory=dict)
    lora: dict = field(default_factory=dict)
    bnb: dict = field(default_factory=lambda: {"load_in_4bit": False})
    arguments: dict = field(default_factory=dict)  # more of them
    templates: tuple = ("Message: {message}\nIntent:", " {intent}")
    killed: bool = False  # after its second step, and run again
    refused: bool = False  # it must end in an error

JOBS = (
    Job("a CSV file"),
    Job("the whole text of a JSON Lines file", "jsonl", training={"completion_only_loss": False}),
    Job("a JSON file", "json", ("llama", "llama"), arguments={"dataset_fraction": 0.7, "train_test_split": 0.8}),
    Job("a folder of Parquet files with a split of its own", "parquet", training={"eval_strategy": "steps", "eval_steps": 2}),
    Job("PiSSA", lora={"init_lora_weights": "pissa"}),
    Job("OLoRA with rsLoRA", lora={"init_lora_weights": "olora", "use_rslora": True}),
    Job("DoRA", base=("bpe", "gpt2"), lora={"use_dora": True, "target_modules": ["c_attn"]}),
    Job("4 bits", training={"max_steps": 3},
        bnb={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    Job("4 bits, layers computed again", training={"max_steps": 3, "gradient_checkpointing": True},
        bnb={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    Job("padded batches", training={"shared_prefix": False, "per_device_train_batch_size": 5}),
    Job("padded batches of whole texts", base=("bpe", "gpt2"), lora={"target_modules": ["c_attn", "c_fc"]},
        training={"shared_prefix": False, "completion_only_loss": False, "gradient_accumulation_steps": 2}),
    Job("small passes", training={"tokens_per_pass": 60, "per_device_train_batch_size": 8}),
    Job("several epochs with weight decay and dropout", lora={"lora_dropout": 0.2, "bias": "lora_only"},
        training={"num_train_epochs": 3, "weight_decay": 0.1, "lr_scheduler_type": "linear", "eval_strategy": "epoch",
                  "gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "max_grad_norm": 0.3}),
    Job("the best checkpoint", training={"num_train_epochs": 3, "eval_strategy": "epoch", "save_strategy": "epoch",
                                         "load_best_model_at_end": True, "learning_rate": 0.05}),
    Job("rows over max_length", training={"max_length": 39}),
    Job("checkpointing, a cap on the gradient and Adafactor",
        training={"gradient_checkpointing": True, "optim": "adafactor", "max_grad_norm": 0.1}),
    Job("an output layer of its own", base=("llama3", "llama"), lora={"modules_to_save": ["lm_head"]}),
    Job("the Studio's own settings",
        training={"optim": "paged_adamw_32bit", "fp16": True, "lr_scheduler_type": "constant", "max_grad_norm": 0.3,
                  "warmup_ratio": 0.03, "learning_rate": 2e-4, "disable_tqdm": True, "ddp_find_unused_parameters": False,
                  "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        lora={"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none", "task_type": "CAUSAL_LM",
              "target_modules": None}),
    Job("killed, and gone on with", killed=True,
        training={"num_train_epochs": 10, "save_steps": 2, "save_total_limit": 100, "eval_strategy": "epoch"},
        lora={"lora_dropout": 0.1}),
    Job("a weighted prompt, killed, and gone on with", killed=True, lora={"lora_dropout": 0.1},
        training={"prompt_loss_weight": 0.1, "num_train_epochs": 6, "save_steps": 2, "save_total_limit": 100}),
    Job("several data sets, killed, and gone on with", "several", killed=True,
        training={"num_train_epochs": 6, "save_steps": 2, "save_total_limit": 100, "eval_strategy": "epoch",
                  "validation": "checked.csv", "test": "last.csv", "more_data": {"older.csv": 1.5}, "data_weight": 0.5,
                  "drop_duplicates": True, "drop_overlap": True}),
    Job("registered", arguments={"auto_add_adapter": "true", "adapter_name": "intents"}, training={"max_steps": 2}),
    Job("refused: wrong settings", refused=True, training={"learning_rat": 1, "weight_decay": "much"}, lora={"r": -1}),
    Job("refused: wrong arguments", refused=True, arguments={"base_modl_id": 1, "train_test_split": 2}),
    Job("a file with bad rows", "bad", training={"max_steps": 2}),
    Job("refused: a template that names no column", refused=True, templates=("Message: {mesage}\nIntent:", " {intent}")),
)


# A project: its rows, and its database

INTENTS = ("refund", "track_parcel", "cancel_order", "change_address")
THINGS = ("my parcel", "the lamp", "order 7", "an invoice", "the blue chair")


def rows():
    "Messages and their intents."
    for i in range(ROWS):
        yield {"message": f"please help me with {THINGS[i % 5]}, number {i * 37 % 101}", "intent": INTENTS[i * 7 % 4]}


def write_csv(folder, lines=()):
    with open(folder/"rows.csv", "w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, ["message", "intent"])
        out.writeheader()
        out.writerows(rows())
        f.writelines(lines)
    return "project_csv", folder/"rows.csv"


def write_bad_csv(folder):
    return write_csv(folder, ["one field\n", "three,of,them\n"])


def write_several(folder):
    "A file, and others beside it that share some of its rows."
    for name, some in {"older": range(12, 30), "checked": range(3), "last": range(2, 6)}.items():
        lines = [f"{i} {THINGS[i % 5]},{INTENTS[i % 4]}\n" for i in some]
        (folder/f"{name}.csv").write_text("message,intent\n" + "".join(lines))
    return write_csv(folder, [f"{INTENTS[0]} twice,{INTENTS[0]}\n"] * 2 + [f"2 {THINGS[2]},{INTENTS[2]}\n"])


def write_jsonl(folder):
    text = "".join(json.dumps(row) + "\n" for row in rows())
    (folder/"rows.jsonl").write_text(text, encoding="utf-8")
    return "project_jsonl", folder/"rows.jsonl"


def write_json(folder):
    (folder/"rows.json").write_text(json.dumps(list(rows())), encoding="utf-8")
    return "project_json", folder/"rows.json"


def write_parquet(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq
    table = pa.Table.from_pylist(list(rows()))
    (folder/"data").mkdir()
    pq.write_table(table.slice(0, 22), folder/"data"/"train.parquet")
    pq.write_table(table.slice(22), folder/"data"/"test.parquet")
    return "project", folder/"data"


DATA = {"csv": write_csv, "jsonl": write_jsonl, "json": write_json, "parquet": write_parquet, "bad": write_bad_csv,
        "several": write_several}


def write_database(path, records):
    "A Studio database with these records: table -> {column: value}."
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as con, con:
        for table, columns in SCHEMA.items():
            con.execute(f"CREATE TABLE {table} ({', '.join(columns.split())}, PRIMARY KEY (id))")
        for table, record in records.items():
            marks = ", ".join("?" * len(record))
            con.execute(f"INSERT INTO {table} ({', '.join(record)}) VALUES ({marks})", list(record.values()))


def make_project(job, folder, base):
    "The folder of a job; returns its environment."
    folder.mkdir(parents=True)
    kind, place = DATA[job.data](folder)
    given, answer = job.templates
    key = str(uuid.uuid5(uuid.NAMESPACE_OID, job.name))
    write_database(folder/".app"/"state.db", {
        "models": {"id": "m", "type": "project", "name": "tiny", "location": str(base)},
        "datasets": {"id": "d", "type": kind, "name": "rows", "location": str(place), "features": '["message", "intent"]'},
        "prompts": {"id": "p", "type": "in_place", "name": "intents", "dataset_id": "d", "prompt_template": given + answer,
                    "input_template": given, "completion_template": answer},
        "fine_tuning_jobs": {"id": key, "base_model_id": "m", "dataset_id": "d", "prompt_id": "p", "adapter_name": "intents"}})
    settings = {"training_arguments_config": TRAINING | job.training, "lora_config": LORA | job.lora, "bnb_config": job.bnb}
    arguments = {"base_model_id": "m", "dataset_id": "d", "prompt_id": "p", "experimentid": key, "out_dir": folder/"adapter",
                 "train_out_dir": folder/"train", **{k: json.dumps(v, separators=(",", ":")) for k, v in settings.items()}}
    words = [f"--{k} {v}" for k, v in (arguments | job.arguments).items()]
    return {"JOB_ARGUMENTS": " ".join(words), "FINE_TUNING_STUDIO_SQLITE_DB": str(folder/".app"/"state.db")}


# A run

def python_in(checkout, argv, folder, env=None, **more):
    "Start a Python that finds this checkout's ftnb."
    left_out = ("PYTHONPATH", "JOB_ARGUMENTS", "FINE_TUNING_STUDIO_SQLITE_DB")
    full = {k: v for k, v in os.environ.items() if k not in left_out}
    full |= {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
    return subprocess.Popen([sys.executable, *map(str, argv)], env=full, cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)


def kill_after_two_steps(process, checkpoints):
    "SIGKILL once the checkpoint of step 2 is there; later ones are taken away, so that the next run always begins there."
    while process.poll() is None and not (checkpoints/"checkpoint-2").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0]
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the job ended before it could be killed, with {process.returncode}:\n{said[-3000:]}")
    for later in checkpoints.glob("checkpoint-*"):
        if later.name != "checkpoint-2":
            shutil.rmtree(later)


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Left:
    "What a job has left."
    status: int
    files: dict  # name -> hash, of those that must be the same byte for byte
    metrics: list  # lines of metrics.jsonl, without times
    printed: str


def unexpected(job, status):
    "Does a job end in another way than it should?"
    return (status != 0) != job.refused


def run_job(job, checkout, folder, base):
    shutil.rmtree(folder, ignore_errors=True)
    env = make_project(job, folder, base)
    script = checkout/"ftnb"/"finetune.py"
    if job.killed:
        kill_after_two_steps(python_in(checkout, [script], folder, env), folder/"train")
    process = python_in(checkout, [script], folder, env)
    said = process.communicate()[0]
    if unexpected(job, process.returncode):
        print(f"{job.name}, by {checkout}: it ends with {process.returncode}:\n{said[-3000:]}")
    files = {name: sha(folder/"adapter"/name) for name in LEFT if (folder/"adapter"/name).exists()}
    if (folder/"train"/"ledger.json").exists():
        files["ledger.json"] = sha(folder/"train"/"ledger.json")
    metrics = folder/"train"/"metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return Left(process.returncode, files, [timeless(json.loads(line)) for line in lines], said)


def timeless(values):
    return {k: v for k, v in values.items() if not re.search("time|second|memory", k)}


UNITS = "s|ms|seconds?|min|minutes?|h|[KMG]i?B|[kMG]?FLOP|rows/s|tokens/s|left"


def masked(printed):
    "What a job has printed, without what differs from one time to the next, and without where in the code it was."
    printed = re.sub(r'^ +File ".*\n( {4}.*\n)*', "", printed, flags=re.M)
    printed = re.sub(rf"\d[\d,.:]*( to \d[\d,.:]*)? ?({UNITS})\b", "N unit", printed)
    printed = re.sub(r"about \d+:\d+|process \d+", "N", printed)
    printed = re.sub(r"^step \d+/\d+ .*\n", "", printed, flags=re.M)  # as often as time passes; metrics.jsonl has them all
    printed = printed.replace("ftnb.problems.ProblemsError: ", "ValueError: ")  # which it is, and was called
    return [line.rstrip() for line in printed.splitlines() if line.strip()]


# Two checkouts

def commit_of(checkout):
    "The commit of a checkout; with a mark of what isn't committed."
    git = ["git", "-C", checkout]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], text=True, capture_output=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "HEAD", "--", "ftnb"], capture_output=True).stdout
    return commit + (f"-{hashlib.sha256(changed).hexdigest()[:8]}" if changed else "")


def make_bases(jobs, checkout, folder):
    "Tiny bases, all by one checkout."
    made = {job.base: folder/"-".join(job.base) for job in jobs}
    new = {base: path for base, path in made.items() if not path.exists()}
    lines = [f"save_tiny({str(path)!r}, kind={kind!r}, arch={arch!r})" for (kind, arch), path in new.items()]
    process = python_in(checkout, ["-c", "\n".join(["from ftnb.tiny import save_tiny", *lines])], folder)
    said = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(said)
    return made


def left_by(job, checkout, work, bases, kept, update):
    "What a job leaves, as kept or as it is now."
    name = "".join(c if c.isalnum() else "_" for c in job.name)
    note = kept/commit_of(checkout)/f"{name}.json"
    settings = repr(job)
    if note.exists() and not update and json.loads(note.read_text())["job"] == settings:
        return Left(**json.loads(note.read_text())["left"])
    left = run_job(job, checkout, work/"run", bases[job.base])
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"job": settings, "left": vars(left)}, indent=1))
    return left


def differences(job, before, after):
    "(what differs that must not, what is printed in other words)."
    ends_well = not unexpected(job, before.status) and after.status == before.status
    found = [] if ends_well else [f"it ends with {after.status}, and before with {before.status}"]
    for name in sorted(before.files | after.files):
        if before.files.get(name) != after.files.get(name):
            now, then = (left.files.get(name, "missing")[:12] for left in (after, before))
            found.append(f"{name}: {now}, and before {then}")
    if before.metrics != after.metrics:
        pairs = zip(before.metrics, after.metrics, strict=False)
        first = next(((a, b) for a, b in pairs if a != b), (len(before.metrics), len(after.metrics)))
        found.append(f"metrics.jsonl: {first[1]}, and before {first[0]}")
    words = difflib.unified_diff(masked(before.printed), masked(after.printed), "before", "after", n=0, lineterm="")
    return found, list(words)


def unknown_words(words):
    "Those that are in no job's name."
    return [word for word in words if not any(word in job.name for job in JOBS)]


def chosen_jobs(words):
    "The jobs that have any of these words in their name; all of them where there is no word."
    if not words:
        return JOBS
    return [job for job in JOBS if any(word in job.name for word in words)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("words", nargs="*", help="parts of a job's name; several mean any of these jobs; default: all")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--update", action="store_true")
    given = parser.parse_args()
    if unknown := unknown_words(given.words):
        parser.error(f"no job has {', '.join(map(repr, unknown))} in its name; there are {'; '.join(j.name for j in JOBS)}")
    for checkout in (given.before, given.after):
        if not (checkout/"ftnb"/"finetune.py").is_file():
            parser.error(f"{checkout} is no checkout: it has no ftnb/finetune.py (git worktree add makes one of a commit)")
    jobs = chosen_jobs(given.words)
    different = worded = 0
    with tempfile.TemporaryDirectory(prefix="same-adapters-") as work:
        work = given.keep.resolve() if given.keep else Path(work).resolve()
        (work/"bases").mkdir(parents=True, exist_ok=True)
        before, after = given.before.resolve(), given.after.resolve()
        bases = make_bases(jobs, before, work/"bases")
        for job in jobs:
            lefts = [left_by(job, checkout, work, bases, work/"kept", given.update) for checkout in (before, after)]
            found, words = differences(job, *lefts)
            different += bool(found)
            worded += bool(words)
            print("\n  ".join([f"{'DIFFERENT' if found else 'the same'}: {job.name}", *found]), flush=True)
            if words:
                print("    it is said in other words:", *words, sep="\n    ", flush=True)
    print(f"{len(jobs) - different} passed, {different} failed; {worded} say it in other words")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
