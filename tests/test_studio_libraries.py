"""What a job leaves is loaded with the libraries that the Studio pins.

They are installed from the package index into a folder of their own; `FTNB_STUDIO_LIBS` names one to keep.
"""
import csv
import json
import os
import pickle
import random
import sqlite3
import subprocess
import sys
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import pinned
import pytest
from transformers import logging

from ftnb.demo.project import DEMO_TRAINING, held_out_prompts, make_demo_project
from ftnb.finetune import finetune
from ftnb.jobargs import parse_job_arguments
from ftnb.tiny import save_tiny
from ftnb.tokenizer_files import portable_merges

pytestmark = pytest.mark.slow

PINNED = ("peft==0.12.0", "transformers==4.44.0", "tokenizers==0.19.1", "huggingface_hub==0.24.6", "accelerate==0.33.0")
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
QWEN = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
GPT2 = {"model_max_length": 1024}  # as on the hub: no class, no special token
ALL = {"target_modules": "all-linear"}
SOME = {"target_modules": ["c_attn", "c_fc"]}


@dataclass(frozen=True, eq=False)
class Case:
    "A base and the LoRA settings of a job."
    name: str
    kind: str  # of the tokenizer
    arch: str
    lora: dict
    written: object  # the transformers that wrote the base's tokenizer files, or what their tokenizer_config.json says


CASES = (
    Case("llama", "llama", "llama", {"r": 4, "lora_alpha": 8}, 4),
    Case("llama, by transformers 5", "llama", "llama", {"r": 4} | ALL, 5),
    Case("llama's own class", "llama", "llama", {"r": 4}, LLAMA),
    Case("a BOS switched off", "llama", "llama", {"r": 4}, LLAMA | {"add_bos_token": False}),
    Case("llama 3", "llama3", "llama",
         {"r": 4, "use_rslora": True, "layers_to_transform": [1], "layers_pattern": "layers"}, 4),
    Case("qwen 2", "qwen", "qwen2", {"r": 8, "use_dora": True}, 4),
    Case("qwen 2, by transformers 5", "qwen", "qwen2", {"r": 4, "target_modules": ".*mlp.*_proj", "bias": "lora_only"}, 5),
    Case("qwen 2's own class", "qwen", "qwen2", {"r": 4}, QWEN),
    Case("gpt2", "bpe", "gpt2", {"r": 4, "lora_alpha": 16}, GPT2),
    Case("gpt2, by transformers 5", "bpe", "gpt2", {"r": 4, "inference_mode": True} | SOME, 5),
    Case("pissa", "qwen", "qwen2", {"r": 4, "init_lora_weights": "pissa"} | ALL, 4),
    Case("pissa by fast SVD", "bpe", "gpt2", {"r": 4, "init_lora_weights": "pissa_niter_4"} | SOME, 4),
    Case("olora", "llama", "llama", {"r": 4, "init_lora_weights": "olora", "use_rslora": True}, 4),
    Case("layers left out", "llama", "llama", {"r": 4, "exclude_modules": ".*layers.0.mlp.*"} | ALL, 4),
    Case("patterns", "llama", "llama", {"r": 4, "rank_pattern": {"^model.layers.0.*_proj": 2},
                                        "alpha_pattern": {"q_proj": 32, "down_proj": 2}} | ALL, 4),
    Case("output layer", "llama3", "llama", {"r": 4, "modules_to_save": ["lm_head"]}, 4),
)


@dataclass(frozen=True)
class Asked:
    "A prompt whose answers are compared; the Studio's own ticketing prompt ends in a space."
    name: str
    kind: str
    written: int
    given: str  # input_template
    added: str  # completion_template


ASKED = (
    Asked("prompt that ends in a space", "qwen", 4, "### TICKET: {message}\n### ACTION: ", "{intent}"),
    Asked("prompt that ends in a space, llama", "llama", 4, "### TICKET: {message}\n### ACTION: ", "{intent}"),
    Asked("prompt that doesn't", "llama3", 4, "### TICKET: {message}\n### ACTION:", " {intent}"),
)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    "The Studio's; torch and the rest are those of this interpreter."
    folder = Path(os.environ.get("FTNB_STUDIO_LIBS") or tmp_path_factory.mktemp("libraries"))
    if not (folder/"transformers").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), *PINNED], check=True)
    return folder


# Jobs

def write_as_version_4(base, written):
    "A tiny base's settings as transformers 4 did, which both versions read: so do the models on the hub."
    config = json.loads((base/"config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters", None) or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    (base/"config.json").write_text(json.dumps(config, indent=2))
    if written == 5:
        return
    settings = json.loads((base/"tokenizer_config.json").read_text())
    settings = {k: v for k, v in settings.items() if k not in ("backend", "is_local")}
    settings = written if isinstance(written, dict) else settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (base/"tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    content = portable_merges(json.loads((base/"tokenizer.json").read_text()))
    (base/"tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))


@dataclass
class Done:
    "A job that has run."
    base: Path
    adapter: Path
    said: str
    record: dict  # run.json
    asked: list = field(default_factory=list)  # prompts and right answers


def run_job(project, base, **more):
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        record = finetune(parse_job_arguments(project.job_arguments), {"FINE_TUNING_STUDIO_SQLITE_DB": str(project.db)})
    return Done(base, project.out_dir, said.getvalue(), record, **more)


def update(project, statement, values=()):
    with closing(sqlite3.connect(project.db)) as con, con:
        con.execute(statement, values)


def job_of_case(folder, case):
    base = save_tiny(folder/"base", kind=case.kind, arch=case.arch, initializer_range=0.1)
    write_as_version_4(base, case.written)
    training = DEMO_TRAINING | {"learning_rate": 1e-2}
    project = make_demo_project(folder/"project", base, fraction=0.01125, lora=case.lora, training=training)
    update(project, "UPDATE models SET location = '../base'")  # as the Studio names a folder of the project
    was = os.getcwd()
    os.chdir(project.folder)
    try:
        return run_job(project, base)
    finally:
        os.chdir(was)


def write_tickets(file, rows=80):
    "Messages that come again: half of them always with the same intent, so that a tiny model learns them, half with one of two."
    rng, names = random.Random(0), ("refund", "track_parcel", "cancel_order", "change_address")
    things = ("my parcel", "the lamp", "order 7", "help")
    messages = [f"{word} {thing}" for word in ("where is", "I want") for thing in things]
    with open(file, "w", newline="", encoding="utf-8") as f:
        lines = csv.writer(f)
        lines.writerow(["message", "intent"])
        for i in range(rows):
            lines.writerow([messages[i % 8], names[i % 4] if i % 8 < 4 else rng.choice(names[:2])])
    return file


def job_that_is_asked(folder, asked):
    "Its adapter answers some rows right and some wrong."
    base = save_tiny(folder/"base", kind=asked.kind, arch="llama", initializer_range=0.1)
    write_as_version_4(base, asked.written)
    training = DEMO_TRAINING | {"num_train_epochs": 16, "learning_rate": 1e-2}
    project = make_demo_project(folder/"project", base, write_tickets(folder/"tickets.csv"), split=0.7, training=training)
    update(project, "UPDATE prompts SET prompt_template = ?, input_template = ?, completion_template = ?",
           (asked.given + asked.added, asked.given, asked.added))
    return run_job(project, base, asked=[list(row[1:]) for row in held_out_prompts(project, 32)])


# All jobs that are needed are run, and then asked in one process with the Studio's libraries

@dataclass(frozen=True)
class Jobs:
    done: dict  # name -> `Done`
    theirs: dict  # name -> what the Studio's libraries make of it
    versions: tuple  # of peft and transformers, those libraries


@pytest.fixture(scope="module")
def jobs(chosen, libraries, tmp_path_factory):
    logging.disable_progress_bar()
    work, done = tmp_path_factory.mktemp("jobs").resolve(), {}
    for i, case in enumerate(chosen("case")):
        folder = work/str(i)
        folder.mkdir()
        done[case.name] = job_of_case(folder, case) if isinstance(case, Case) else job_that_is_asked(folder, case)
    places = [[name, str(job.base), str(job.adapter), job.asked] for name, job in done.items()]
    (work/"places.json").write_text(json.dumps(places))
    command = [sys.executable, pinned.__file__, str(libraries), str(work/"places.json"), str(work/"found")]
    subprocess.run(command, check=True, cwd=work)
    theirs = pickle.loads((work/"found").read_bytes())
    return Jobs(done, theirs, theirs.pop("versions"))


def test_the_libraries_are_the_studios(jobs):
    assert jobs.versions == ("0.12.0", "4.44.0")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_adapter_is_the_same_model(case, jobs):
    job, theirs = jobs.done[case.name], jobs.theirs[case.name]
    assert isinstance(theirs, dict), theirs
    ours = pinned.loaded(job.base, job.adapter, theirs["ids"])
    off = max(abs(a - b).max() for a, b in zip(ours["logits"], theirs["logits"], strict=True))
    moved = max(abs(a - b).max() for a, b in zip(theirs["logits"], theirs["alone"], strict=True))
    limit = 1e-4 * max(abs(a).max() for a in ours["logits"])
    assert off <= limit < moved / 10
    assert ours["ids"] == theirs["ids"]
    assert ours["texts"] == theirs["texts"]
    assert ours["special"] == theirs["special"]
    assert theirs["special"][pinned.ROLES.index("pad_token_id")] is not None
    assert os.path.isabs(theirs["base"])


@pytest.mark.parametrize("case", ASKED, ids=lambda case: case.name)
def test_as_much_is_right_as_the_report_says(case, jobs):
    job, theirs = jobs.done[case.name], jobs.theirs[case.name]
    said = "they are trained as they will be asked" in job.said  # where a token would join prompt and completion
    assert said == case.given.endswith(" ")
    score = job.record["comparison"]["models"]["adapter"]["score"]
    assert 0 < score < 1
    assert theirs == score
