"The job script on a tiny model, by each of its doors."
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from cells import run_cell
from peft import PeftModel
from transformers import AutoModelForCausalLM, logging

import ftnb
from ftnb.demo.project import make_demo_project
from ftnb.jobargs import format_job_arguments, parse_job_arguments

pytestmark = pytest.mark.slow

SCRIPT = Path(ftnb.__file__).parent/"finetune.py"
COMMANDS = {"path": [sys.executable, str(SCRIPT)], "module": [sys.executable, "-m", "ftnb.finetune"],
            "console script": [str(Path(sys.executable).parent/"ftnb_finetune")]}
FILES = ("adapter_model.safetensors", "adapter_config.json")


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.disable_progress_bar()


@pytest.fixture
def project(tmp_path, tiny_base):
    made = make_demo_project(tmp_path/"project", tiny_base, fraction=0.01875)
    (made.folder/"ftnb").mkdir()  # in the folder of a CML project lies a clone
    return made


def run_job(door, project, arguments):
    "Run a job through one of its doors."
    env = {**os.environ, "JOB_ARGUMENTS": arguments, "FINE_TUNING_STUDIO_SQLITE_DB": str(project.db)}
    if door == "kernel":
        done = run_cell(sys.executable, SCRIPT.read_text(encoding="utf-8"), env, project.folder)
        assert done.well, done.out + done.error
    else:
        done = subprocess.run(COMMANDS[door], env=env, cwd=project.folder, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout


def rows(project, table, **where):
    with closing(sqlite3.connect(project.db)) as con:
        con.row_factory = sqlite3.Row
        test = " AND ".join(f"{name} = ?" for name in where) or "1"
        return [dict(row) for row in con.execute(f"SELECT * FROM {table} WHERE {test}", [*where.values()])]


def check_adapter(out_dir, base):
    "PEFT loads the adapter, and training has moved it from where it started."
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out_dir)
    assert any(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_the_same_job_twice_leaves_the_same_bytes(project, tiny_base):
    "By its path, and as a module; no adapter is registered, since none was asked for."
    args, adapters = replace(parse_job_arguments(project.job_arguments), auto_add_adapter=False), []
    for door in ("path", "module"):
        run_job(door, project, format_job_arguments(args))
        check_adapter(project.out_dir, tiny_base)
        assert not rows(project, "adapters")
        adapters.append({name: (project.out_dir/name).read_bytes() for name in FILES})
        for made in (project.out_dir, project.train_out_dir):
            shutil.rmtree(made)
    first, second = adapters
    for name in FILES:
        assert first[name] == second[name], name
        assert first[name]


@pytest.mark.parametrize("door", ["console script", "kernel"])
def test_a_job_registers_its_adapter(door, project, tiny_base):
    "By the right row, with the job's own row pointing to it."
    run_job(door, project, project.job_arguments)
    check_adapter(project.out_dir, tiny_base)
    args = parse_job_arguments(project.job_arguments)
    found, = rows(project, "adapters")
    right = dict(type="project", name=args.adapter_name, model_id=args.base_model_id, location=args.out_dir,
                 fine_tuning_job_id=args.experimentid, prompt_id=args.prompt_id)
    assert found == found | right
    job, = rows(project, "fine_tuning_jobs", id=args.experimentid)
    assert job["adapter_id"] == found["id"]


def test_a_wrong_argument_fails_a_kernels_cell_in_words(tmp_path):
    env = {**os.environ, "JOB_ARGUMENTS": "--base_modl_id 1"}
    done = run_cell(sys.executable, SCRIPT.read_text(encoding="utf-8"), env, tmp_path)
    assert not done.well
    assert "--base_modl_id is no key" in done.error
