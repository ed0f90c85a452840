"What a job leaves is loaded with the libraries that the Studio pins: `python .ci/studio.py`."
# They are installed from the package index into a folder of their own; FTNB_STUDIO_LIBS names one to keep.
import contextlib, io, json, os, sqlite3, subprocess, sys, tempfile, time, traceback
from contextlib import closing
from pathlib import Path

PINNED = ("peft==0.12.0", "transformers==4.44.0", "tokenizers==0.19.1", "huggingface_hub==0.24.6", "accelerate==0.33.0")
TEXTS = ("Message: where is my parcel?\nIntent:", "Message: I want my money back!\nIntent: refund",
         "The keypad of my phone is broken.", "  two spaces, caf\u00e9, \U0001F600 12345\n\n")
HERE = Path(__file__).resolve()
results = []

LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
QWEN = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
GPT2 = {"model_max_length": 1024}  # as on the hub: no class, no special token
ALL, SOME = {"target_modules": "all-linear"}, {"target_modules": ["c_attn", "c_fc"]}

# name: (tokenizer, architecture, LoRA settings,
#        the transformers that wrote the base's tokenizer files, or what their tokenizer_config.json says)
CASES = {
    "llama": ("llama", "llama", {"r": 4, "lora_alpha": 8}, 4),
    "llama, by transformers 5": ("llama", "llama", {"r": 4} | ALL, 5),
    "llama's own class": ("llama", "llama", {"r": 4}, LLAMA),
    "a BOS switched off": ("llama", "llama", {"r": 4}, LLAMA | {"add_bos_token": False}),
    "llama 3": ("llama3", "llama", {"r": 4, "use_rslora": True, "layers_to_transform": [1], "layers_pattern": "layers"}, 4),
    "qwen 2": ("qwen", "qwen2", {"r": 8, "use_dora": True}, 4),
    "qwen 2, by transformers 5": ("qwen", "qwen2", {"r": 4, "target_modules": ".*mlp.*_proj", "bias": "lora_only"}, 5),
    "qwen 2's own class": ("qwen", "qwen2", {"r": 4}, QWEN),
    "gpt2": ("bpe", "gpt2", {"r": 4, "lora_alpha": 16}, GPT2),
    "gpt2, by transformers 5": ("bpe", "gpt2", {"r": 4, "inference_mode": True} | SOME, 5),
    "pissa": ("qwen", "qwen2", {"r": 4, "init_lora_weights": "pissa"} | ALL, 4),
    "pissa by fast SVD": ("bpe", "gpt2", {"r": 4, "init_lora_weights": "pissa_niter_4"} | SOME, 4),
    "olora": ("llama", "llama", {"r": 4, "init_lora_weights": "olora", "use_rslora": True}, 4),
    "layers left out": ("llama", "llama", {"r": 4, "exclude_modules": ".*layers.0.mlp.*"} | ALL, 4),
    "patterns": ("llama", "llama", {"r": 4, "rank_pattern": {"^model.layers.0.*_proj": 2},
                                    "alpha_pattern": {"q_proj": 32, "down_proj": 2}} | ALL, 4),
    "output layer": ("llama3", "llama", {"r": 4, "modules_to_save": ["lm_head"]}, 4),
}

# what is asked: (tokenizer, who wrote the base's tokenizer files, input_template, completion_template); the Studio's own ticketing prompt ends in a space
ASKED = {
    "prompt that ends in a space": ("qwen", 4, "### TICKET: {message}\n### ACTION: ", "{intent}"),
    "prompt that ends in a space, llama": ("llama", 4, "### TICKET: {message}\n### ACTION: ", "{intent}"),
    "prompt that doesn't": ("llama3", 4, "### TICKET: {message}\n### ACTION:", " {intent}"),
}

def check(what, right):
    results.append(bool(right))
    print(f"{'ok' if right else 'FAILED'}: {what}", flush=True)

def install(folder):
    "The Studio's libraries; torch and the rest are those of this interpreter."
    if not (folder/"transformers").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), *PINNED], check=True)
    return folder

def as_version_4(base, written):
    "Write a tiny base's settings as transformers 4 did, which both versions read: so do the models on the hub."
    from ftnb.tokenizer_files import portable_merges
    config = json.loads((base/"config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters", None) or {}
    if "rope_theta" in rope: config["rope_theta"] = rope["rope_theta"]
    (base/"config.json").write_text(json.dumps(config, indent=2))
    if written == 5: return
    settings = json.loads((base/"tokenizer_config.json").read_text())
    settings = {k: v for k, v in settings.items() if k not in ("backend", "is_local")}
    settings = written if isinstance(written, dict) else settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (base/"tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    content = portable_merges(json.loads((base/"tokenizer.json").read_text()))
    (base/"tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))

def job(work, name):
    "Run a small job; returns (base, folder of its adapter)."
    from ftnb.demo.project import DEMO_TRAINING, make_demo_project
    from ftnb.finetune import finetune
    from ftnb.jobargs import parse_job_arguments
    from ftnb.tiny import save_tiny
    kind, arch, lora, written = CASES[name]
    place = work/"".join(c if c.isalnum() else "_" for c in name)
    base = save_tiny(place/"base", kind=kind, arch=arch, initializer_range=0.1)
    as_version_4(base, written)
    training = DEMO_TRAINING | {"learning_rate": 1e-2}
    project = make_demo_project(place/"project", base, fraction=0.03, lora=lora, training=training)
    with closing(sqlite3.connect(project.db)) as con, con:
        con.execute("UPDATE models SET location = '../base'")  # as the Studio names a folder of the project
    os.chdir(project.folder)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            finetune(parse_job_arguments(project.job_arguments), {"FINE_TUNING_STUDIO_SQLITE_DB": str(project.db)})
    except Exception:
        print(said.getvalue()[-3000:])
        traceback.print_exc()
    finally: os.chdir(work)
    return base, project.out_dir

def tickets(file, rows=80):
    "Messages that come again and again: half of them always with the same intent, so that a tiny model can learn them, half with one of two."
    import csv, random
    rng, names = random.Random(0), ("refund", "track_parcel", "cancel_order", "change_address")
    messages = [f"{word} {thing}" for word in ("where is", "I want") for thing in ("my parcel", "the lamp", "order 7", "help")]
    with open(file, "w", newline="", encoding="utf-8") as f:
        lines = csv.writer(f)
        lines.writerow(["message", "intent"])
        for i in range(rows): lines.writerow([messages[i % 8], names[i % 4] if i % 8 < 4 else rng.choice(names[:2])])
    return file

def asked_job(work, name):
    "Run a job whose adapter answers some rows right and some wrong; returns (base, folder of its adapter, prompts and right answers, what the report says)."
    from ftnb.demo.project import DEMO_TRAINING, held_out_prompts, make_demo_project
    from ftnb.finetune import finetune
    from ftnb.jobargs import parse_job_arguments
    from ftnb.tiny import save_tiny
    kind, written, given, added = ASKED[name]
    place = work/"".join(c if c.isalnum() else "_" for c in name)
    base = save_tiny(place/"base", kind=kind, arch="llama", initializer_range=0.1)
    as_version_4(base, written)
    training = DEMO_TRAINING | {"num_train_epochs": 16, "learning_rate": 1e-2}
    project = make_demo_project(place/"project", base, tickets(place/"tickets.csv"), split=0.7, training=training)
    with closing(sqlite3.connect(project.db)) as con, con:
        con.execute("UPDATE prompts SET prompt_template = ?, input_template = ?, completion_template = ?", (given + added, given, added))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        run = finetune(parse_job_arguments(project.job_arguments), {"FINE_TUNING_STUDIO_SQLITE_DB": str(project.db)})
    check(f"{name}: preflight says whether a token would join prompt and completion", ("they are trained as they will be asked" in said.getvalue()) == given.endswith(" "))
    return base, project.out_dir, [list(row[1:]) for row in held_out_prompts(project, 32)], run["comparison"]["models"]

def answers(base, adapter, asked):
    "As the Studio evaluates: the filled-in prompt is a text, the tokenizer makes tokens of it, and the model goes on from there."
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    def answer(prompt):
        row = tokenizer(prompt, return_tensors="pt")
        row.pop("token_type_ids", None)
        with torch.no_grad(): made = model.generate(**row, max_new_tokens=64, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        return tokenizer.decode(made[0, row["input_ids"].shape[1]:], skip_special_tokens=True)
    right = [answer(prompt).strip().splitlines()[:1] == [want] for prompt, want in asked]
    return sum(right) / len(right)

def loaded(base, adapter, ids=None):
    "What the libraries of this interpreter make of an adapter: ids of texts, logits with it and without."
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    settings = json.loads((Path(adapter)/"adapter_config.json").read_text())
    own = [tokenizer(text)["input_ids"] for text in TEXTS]
    roles = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    said = {"ids": own, "texts": [tokenizer.decode(row) for row in own], "base": settings["base_model_name_or_path"],
            "special": [getattr(tokenizer, role) for role in roles]}
    def logits(): return [model(input_ids=torch.tensor([row])).logits[0].float().numpy() for row in ids or said["ids"]]
    with torch.no_grad():
        said["logits"] = logits()
        with model.disable_adapter(): said["alone"] = logits()
    return said

def child(libs, places, out):
    "In a process of its own: load all adapters with the Studio's libraries, and ask some of them."
    sys.path.insert(0, str(libs))
    import pickle, warnings
    warnings.simplefilter("ignore")
    import peft, transformers
    transformers.logging.set_verbosity_error()
    found = {"versions": (peft.__version__, transformers.__version__)}
    for name, base, adapter, *asked in json.loads(Path(places).read_text()):
        try: found[name] = answers(base, adapter, asked[0]) if asked else loaded(base, adapter)
        except Exception: found[name] = traceback.format_exc()
    Path(out).write_bytes(pickle.dumps(found))

def compare(name, ours, theirs):
    if not isinstance(theirs, dict):
        print(theirs)
        return check(f"{name}: the Studio's libraries load the adapter", False)
    off = max(abs(a - b).max() for a, b in zip(ours["logits"], theirs["logits"]) if a.shape == b.shape)
    moved = max(abs(a - b).max() for a, b in zip(theirs["logits"], theirs["alone"]))
    limit = 1e-4 * max(abs(a).max() for a in ours["logits"])
    check(f"{name}: the same logits (they differ by {off:.1e}; the adapter moves them by {moved:.1e})",
          off <= limit < moved / 10)
    check(f"{name}: the same tokens", ours["ids"] == theirs["ids"] and ours["texts"] == theirs["texts"])
    check(f"{name}: the same special tokens {theirs['special']}",
          ours["special"] == theirs["special"] and theirs["special"][2] is not None)
    check(f"{name}: its base is named by an absolute path", os.path.isabs(theirs["base"]))

def compare_answers(name, rows, report, theirs):
    ours = report["adapter"]["score"]
    if not isinstance(theirs, float): print(theirs)
    check(f"{name}: {rows} held-out rows, {ours:.1%} right in the job's report, {report['base']['score']:.1%} without the adapter", 0 < ours < 1)
    check(f"{name}: asked with the Studio's libraries as much is right ({theirs if isinstance(theirs, str) else format(theirs, '.1%')})", theirs == ours)

def main():
    import pickle
    from transformers import logging
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        work, start = Path(work).resolve(), time.time()
        libs = install(Path(os.environ.get("FTNB_STUDIO_LIBS") or work/"libs"))
        jobs = {name: job(work, name) for name in CASES}
        trained = {name: places for name, places in jobs.items() if (places[1]/"adapter_model.safetensors").exists()}
        for name in CASES: check(f"{name}: the job runs", name in trained)
        asked = {name: asked_job(work, name) for name in ASKED}
        print(f"{len(jobs) + len(asked)} jobs: {time.time() - start:.0f} s", flush=True)
        places = [[name, *map(str, places)] for name, places in trained.items()]
        places += [[name, str(base), str(adapter), rows] for name, (base, adapter, rows, _) in asked.items()]
        (work/"places.json").write_text(json.dumps(places))
        command = [sys.executable, str(HERE), "--child", str(libs), str(work/"places.json"), str(work/"found")]
        subprocess.run(command, check=True, cwd=work)
        found = pickle.loads((work/"found").read_bytes())
        check("at work are peft {}, transformers {}".format(*found["versions"]), found["versions"] == ("0.12.0", "4.44.0"))
        for name, (base, adapter) in trained.items():
            theirs = found[name]
            compare(name, loaded(base, adapter, theirs["ids"] if isinstance(theirs, dict) else None), theirs)
        for name, (*_, rows, report) in asked.items(): compare_answers(name, len(rows), report, found[name])
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return int(not all(results))

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]: child(*sys.argv[2:])
    else: sys.exit(main())
