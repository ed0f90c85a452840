"Nothing obeys the data, and nothing shows the token: `python .ci/safety.py [PART ...]`."
import csv, inspect, io, json, os, re, sqlite3, subprocess, sys, tempfile, threading, time, traceback, unicodedata, warnings
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import ftnb
from ftnb.jobargs import format_job_arguments, parse_job_arguments

SCRIPT = Path(ftnb.__file__).parent/"finetune.py"
results = []


def check(what, right):
    results.append(bool(right))
    print(f"{'ok' if right else 'FAILED'}: {what}", flush=True)

# Fields of the libraries' settings: each that could reach a file, the network, code or another folder is refused or known here

SUSPICIOUS = re.compile(r"path|dir(_|$)|file|folder|url|uri|repo|hub|token(?!s)|code|kwargs|core|config|host|space|bucket_id|revision|module|script"
                        r"|plugin|backend|checkpoint|deepspeed|fsdp|mapping|context(?!_)|project|run_name|init|load(?!er|ing)|debug|args|log_level")
HARMLESS = {  # field -> what it comes to
    # SFTConfig
    "activation_checkpointing": "a switch", "activation_checkpointing_kwargs": "options of torch's checkpoint", "gradient_checkpointing": "a switch",
    "gradient_checkpointing_kwargs": "options of torch's checkpoint", "ddp_backend": "a name that torch knows", "debug": "a name that transformers knows",
    "torch_compile_backend": "a backend that torch has registered", "dataloader_multiprocessing_context": "fork, spawn or forkserver",
    "dataset_kwargs": "ignored", "eos_token": "ignored", "pad_token": "ignored", "enable_jit_checkpoint": "a switch; checkpoints go to train_out_dir",
    "liger_kernel_config": "switches of an installed library", "load_best_model_at_end": "from the run's own checkpoints",
    "log_level": "a name", "log_level_replica": "a name", "lr_scheduler_kwargs": "numbers", "optim_args": "numbers", "optim_target_modules": "names of modules of the model",
    "project": "a label in the tracker", "run_name": "a label in the tracker", "report_to": "trackers by name, each known to transformers",
    "restore_callback_states_from_checkpoint": "of the run's own checkpoints",
    # LoraConfig
    "target_modules": "names of modules of the model", "exclude_modules": "names of modules of the model", "modules_to_save": "names of modules of the model",
    "init_lora_weights": "a name that PEFT knows", "trainable_token_indices": "numbers", "loftq_config": "numbers of bits",
    "velora_config": "numbers", "monteclora_config": "numbers", "kasa_config": "numbers", "runtime_config": "a switch",
    # BitsAndBytesConfig
    "load_in_8bit": "a switch", "load_in_4bit": "a switch", "llm_int8_enable_fp32_cpu_offload": "a switch", "llm_int8_skip_modules": "names of modules of the model"}

def fields():
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig
    from ftnb.adapters import lora_problems
    from ftnb.quantisation import bnb_problems
    from ftnb.settings import training_problems
    own = {SFTConfig: training_problems, LoraConfig: lora_problems, BitsAndBytesConfig: bnb_problems}
    seen = set()
    for library, problems_of in own.items():
        names = [o for o in inspect.signature(library.__init__).parameters if o not in ("self", "kwargs")]
        refused = {n for n in names if any("reaches outside" in str(p) for p in problems_of({n: "x"}))}
        odd = {n for n in names if SUSPICIOUS.search(n)}
        seen |= odd
        check(f"{library.__name__}: {len(names)} fields, {len(refused)} refused; of names that might reach outside all are refused or known: {sorted(odd - refused - HARMLESS.keys()) or 'yes'}", odd <= refused | HARMLESS.keys())
        check(f"{library.__name__}: none is both", not refused & HARMLESS.keys())
        check(f"{library.__name__}: trust_remote_code and an invented key are refused", all(problems_of({k: True}) for k in ("trust_remote_code", "invented")))
    check(f"no field is listed that the libraries don't have: {sorted(HARMLESS.keys() - seen) or 'yes'}", HARMLESS.keys() <= seen)

# Rows of a file become prompts and tokens: the text is what a person would expect, or the row is named with a reason

def expected(pieces, row, eos):
    "What a person would write: each slot is its value, and one EOS is at the end."
    text = "".join(row[o] if slot else o for slot, o in pieces)
    while text.rstrip().endswith(eos): text = text.rstrip()[:-len(eos)]
    return text + eos

def tokenizers():
    "One of each family, and one that can't write its EOS as plain text."
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from ftnb.tiny import TINY_KINDS, TINY_SENTENCES, tiny_tokenizer
    from ftnb.tokenizer import configure_tokenizer_padding
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.train_from_iterator(TINY_SENTENCES, trainers.UnigramTrainer(vocab_size=200, show_progress=False, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"))
    kinds = {k: tiny_tokenizer(k) for k in TINY_KINDS} | {"unigram": PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")}
    return {k: configure_tokenizer_padding(tok) for k, tok in kinds.items()}

def write_rows(folder, kind, rows):
    "The rows as a data file of the Studio; returns its record."
    path = Path(folder)/f"rows.{kind}"
    if kind == "csv":
        out = csv.writer(made := io.StringIO(newline=""), quoting=csv.QUOTE_ALL)
        out.writerows([["a", "b"], *([r["a"] or "", r["b"] or ""] for r in rows)])
        path.write_bytes(made.getvalue().encode("utf-8", "surrogatepass"))
    elif kind == "json": path.write_text(json.dumps(rows), encoding="utf-8")
    else: path.write_bytes("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode("utf-8", "surrogatepass"))
    return SimpleNamespace(type=f"project_{kind}", location=str(path), name="rows")

def read_rows(record, rows):
    "The file's rows; None where it is refused with an error that names a row, as it must be for what UTF-8 or CSV can't hold."
    from ftnb.corpus import load_dataset_into_memory
    bad = [i for i, r in enumerate(rows, 1) if any(re.search("[\ud800-\udfff]" + ("|\0" if record.type.endswith("csv") else ""), v or "") for v in r.values())]
    try: found = load_dataset_into_memory(record)["train"]
    except ValueError as e:
        assert bad and f"(row {bad[0]})" in str(e), (str(e), bad)
        return None
    assert not bad, bad
    if record.type.endswith("csv"): rows = as_csv_has_it(rows)
    assert [dict(r) for r in found] == rows
    return found

def as_csv_has_it(rows):
    "Rows with their empty fields: the empty text in a column of texts, a missing value among numbers, dates, true and false."
    kinds = [r" *([-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?|[-+]?(inf|nan|NaN|Inf|Infinity)) *", " *(true|false|True|False|TRUE|FALSE) *"]
    def texts(c): return [r[c] for r in rows if r[c]]
    typed = {c for c in "ab" if texts(c) and any(all(re.fullmatch(kind, v, re.A) for v in texts(c)) for kind in kinds)}
    return [{c: v or (None if c in typed else "") for c, v in r.items()} for r in rows]

def check_tokens(kind, tok, pieces, row, before, text, ids, labels, only):
    "Ids and labels of a row, against its text alone."
    special = {i: t.content for i, t in tok.added_tokens_decoder.items() if t.special}
    head = tok("")["input_ids"]
    assert ids[:len(head)] == head and ids[-1] == tok.eos_token_id
    body, plain = ids[len(head):-1], text[:-len(tok.eos_token)]
    named = re.compile("|".join(map(re.escape, sorted(special.values(), key=len, reverse=True))))
    own, at = [], 0  # the special tokens that the template itself holds
    for slot, o in pieces:
        if not slot: own += [m[0] for m in named.finditer(o) if at + m.end() <= len(plain) and m[0] != tok.unk_token]
        at += len(row[o] if slot else o)
    if head and not pieces[0][0] and pieces[0][1].startswith(bos := special[head[-1]]):  # it is there once
        own, plain, before = own[1:], plain.removeprefix(bos), before.removeprefix(bos)
    assert [special[i] for i in body if i in special and i != tok.unk_token_id] == own
    first = next(k for k, o in enumerate(labels) if o != -100)
    assert labels == [-100]*first + ids[first:] and (only or not first)
    if kind not in ("bpe", "llama3", "qwen"): return
    nfc = lambda t: unicodedata.normalize("NFC", t) if kind == "qwen" else t
    assert nfc(tok.decode(body, clean_up_tokenization_spaces=False)) == nfc(plain)
    if kind == "qwen" or not only: return
    sizes = [len(special[i].encode()) if i in special else len(tok.convert_ids_to_tokens(i)) for i in body]  # one sign a byte
    ends = [sum(sizes[:k + 1]) for k in range(len(sizes))]
    assert first == len(head) + sum(e <= len(before.encode()) for e in ends), (first, before)

def text(examples=1500):
    import datasets
    from collections import Counter
    from hypothesis import HealthCheck, Phase, given, note, settings, strategies as st
    from ftnb.prompts import map_dataset_with_prompt_template, missing_values, unusable_rows
    from ftnb.tokens import tokenize_rows
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")
    kinds, count = tokenizers(), Counter()
    special = sorted({t.content for tok in kinds.values() for t in tok.added_tokens_decoder.values() if t.special})
    words = [*special, *(s[:k] for s in special for k in (2, len(s)//2)), *(s[k:] for s in special for k in (2, len(s)//2)),
             "{", "}", "{{", "}}", "{a}", "{b}", "{0}", "{}", "{a.b}", "{a!r}", "%s", "$a", '"', "'", "\\", "\\n", "\n", "\r\n", "\r", "\t", "\x00", "\x1b[31m", "\x7f", "\x85", "\u2028",
             "🙂", "👩‍👩‍👧", "e\u0301", "\u200d", "\ufeff", "\ufffd", "\U0010fffd", "\ue000", " ", "  ", ",", "where is it", "None", "null", "NaN", "00701", "1.50", "x"*5000]
    word = st.one_of(st.sampled_from(words), st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
    value = st.one_of(st.none(), st.lists(word, max_size=5).map("".join), st.lists(st.one_of(word, st.just("\ud800")), max_size=3).map("".join))
    piece = st.one_of(st.lists(word, max_size=3).map(lambda o: (False, "".join(o).replace("\0", ""))), st.sampled_from("ab").map(lambda c: (True, c)))
    written = lambda pieces: "".join("{%s}" % o if slot else o.replace("{", "{{").replace("}", "}}") for slot, o in pieces)

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sorted(kinds)), st.sampled_from(["csv", "json", "jsonl"]), st.lists(piece, min_size=1, max_size=6), st.integers(0, 6),
           st.lists(st.fixed_dictionaries(dict(a=value, b=value)), min_size=1, max_size=6), st.booleans())
    def rows_become_tokens(kind, file, pieces, cut, rows, only):
        tok, cut = kinds[kind], min(cut, len(pieces) - 1)
        given, added = pieces[:cut], pieces[cut:]
        if not written(given + added).strip() or not written(added): return
        joined = []  # literals side by side are one
        for slot, o in pieces:
            if joined and not slot and not joined[-1][0]: o = joined.pop()[1] + o
            joined.append((slot, o))
        with tempfile.TemporaryDirectory() as folder: ds = read_rows(write_rows(folder, file, rows), rows)
        if ds is None: return count.update(["refused files"])
        prompt = SimpleNamespace(prompt_template=None, input_template=written(given), completion_template=written(added))
        used, found, rows = {o for slot, o in pieces if slot}, ds[:], [dict(r) for r in ds]
        whole = [i for i in range(len(ds)) if all(found[c][i] is not None for c in used)]
        assert sorted(missing_values(ds, prompt)) == [i for i in range(len(ds)) if i not in whole]
        blank = lambda row: any(slot for slot, _ in added) and not "".join(row[o] if slot else o for slot, o in added).strip()
        good = [i for i in whole if not blank(rows[i])]
        assert sorted(unusable_rows(ds, prompt)) == [i for i in range(len(ds)) if i not in good]
        if not good: return count.update(["nothing left"])
        done = map_dataset_with_prompt_template(ds, prompt, tok.eos_token)
        want = [expected(pieces, rows[i], tok.eos_token) for i in good]
        assert done["prediction"][:] == want
        out = tokenize_rows(done, tok, prompt, only, max_length=3000)
        assert sorted([*out.kept, *out.dropped]) == list(range(len(good))) and all(out.dropped.values())
        assert all("max_length" in why.reason or kind == "unigram" for why in out.dropped.values()), out.dropped
        for i, ids, labels in zip(out.kept, out.dataset["input_ids"], out.dataset["labels"]):
            note((want[i], tok.convert_ids_to_tokens(ids)))
            check_tokens(kind, tok, joined, rows[good[i]], "".join(rows[good[i]][o] if slot else o for slot, o in given), want[i], ids, labels, only)
        count.update({"rows trained": len(out.kept), "rows named": len(out.dropped), "rows without a value": len(rows) - len(good)})
    try: rows_become_tokens()
    except Exception: traceback.print_exc()
    else: return check(f"rows of a file become prompts and tokens ({examples} examples: {dict(count)})", all(count[o] for o in ("rows trained", "rows named", "rows without a value", "refused files")))
    check("rows of a file become prompts and tokens", False)

# The token: it reaches the hub, and no file, no output and no command line

CANARY, HUB = "hf_CANARYcanary0123456789abcdef", "HUGGINGFACE_ACCESS_TOKEN"

class Gate(BaseHTTPRequestHandler):
    "A hub on this machine that gives nobody anything, and notes the tokens it was shown."
    seen = []
    def refuse(self):
        self.seen.append(self.headers.get("Authorization", ""))
        self.send_response(403)
        for name, value in {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted: ask its authors", "Content-Length": "0"}.items(): self.send_header(name, value)
        self.end_headers()
    do_GET = do_HEAD = do_POST = refuse
    def log_message(self, *args): pass

@contextmanager
def watched_command_lines(seen):
    "Collect the command lines of all processes that hold the token."
    stop = threading.Event()
    def look():
        while not stop.wait(0.02):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try: line = path.read_bytes()
                except OSError: continue
                if CANARY.encode() in line: seen.add(line)
    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try: yield
    finally: stop.set(); watcher.join()

def holding(folder):
    "Files below a folder, links not followed, that hold the token; and how many were looked at."
    files = [p for p in Path(folder).rglob("*") if p.is_file() and not p.is_symlink()]
    return [str(p.relative_to(folder)) for p in files if CANARY.encode() in p.read_bytes() or CANARY in str(p)], len(files)

def run_job(what, folder, project, arguments, well, said="", env=None):
    "Run a job that knows the token; then look for it everywhere."
    places = {k: str(folder/k.lower()) for k in ("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME")}
    for place in places.values(): os.makedirs(place, exist_ok=True)
    lines, start = set(), time.time()
    full = {**os.environ, **places, "JOB_ARGUMENTS": arguments, "FINE_TUNING_STUDIO_SQLITE_DB": str(project.db), **(env or {})}
    with watched_command_lines(lines):
        done = subprocess.run([sys.executable, str(SCRIPT)], env=full, cwd=project.folder, capture_output=True, text=True)
    out = done.stdout + done.stderr
    if (done.returncode == 0) != well or said not in out: print(out.replace(CANARY, "<TOKEN>")[-3000:])
    check(f"{what}: it ends {'well' if well else 'in the error that was meant'} ({time.time() - start:.0f} s)", (done.returncode == 0) == well and said in out)
    found, number = holding(folder)
    check(f"{what}: the token is in no output, in no command line, in none of {number} files{f', but in {found}' * bool(found)}", CANARY not in out and not lines and not found and number > 5)

def token():
    from dataclasses import replace
    from ftnb.demo.project import make_demo_project
    from ftnb.tiny import save_tiny
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    gate = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        project = make_demo_project(folder/"project", save_tiny(folder/"tiny", kind="qwen"), fraction=0.03)
        args = parse_job_arguments(project.job_arguments, {})
        with closing(sqlite3.connect(project.db)) as con, con: con.execute("INSERT INTO models (id, type, name, huggingface_model_name) VALUES ('gated', 'huggingface', 'gated', 'someone/gated')")
        by_key = lambda **kw: f"{format_job_arguments(replace(args, **kw))} --hf_token {CANARY}"
        run_job("a job that ends well", folder, project, project.job_arguments, True, "registered", {HUB: CANARY, "HF_TOKEN": CANARY})
        run_job("a gated model", folder, project, by_key(base_model_id="gated"), False, "someone/gated", gate)
        check("the hub was shown the token", f"Bearer {CANARY}" in Gate.seen)
        run_job("wrong records", folder, project, by_key(base_model_id="none", lora_config='{"r":-1}'), False, "there is no such row")
        run_job("wrong arguments", folder, project, by_key() + f" --hf_tokn {CANARY} --out_dir ../x", False, "--hf_tokn is no key")
        run_job("training that diverges", folder, project, by_key(adapter_name="diverges", train_out_dir=f"{args.train_out_dir}-2", training_arguments_config='{"learning_rate":1e20,"weight_decay":1e30,"max_steps":20}'), False, "FloatingPointError")
        check("nobody was logged in", not [p for p in folder.rglob("*token*") if p.name in ("token", "stored_tokens")])
    server.shutdown()

# The database: names, and what isn't the job's, whoever writes at the same moment

REGISTER = """
import sys
from ftnb.registry import register_adapter
from ftnb.studio import open_studio
engine = open_studio(sys.argv[1]); job = sys.argv[2]
print(flush=True); sys.stdin.readline()
try: print(register_adapter(engine, name=sys.argv[3], model_id="m", prompt_id="p", location="out/" + job, experimentid=job, wait=float(sys.argv[4])))
except ValueError as e: print("refused:", str(e).splitlines()[0])
"""

def at_once(db, jobs, wait=120):
    "What processes say that register (job, name) at the same moment."
    started = [subprocess.Popen([sys.executable, "-c", REGISTER, str(db), job, name, str(wait)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for job, name in jobs]
    for p in started: p.stdout.readline()
    for p in started: p.stdin.write("\n"); p.stdin.flush()
    return [p.communicate()[0].splitlines()[-1] for p in started]

def database():
    from ftnb.studio import create_studio
    with tempfile.TemporaryDirectory() as folder:
        db = Path(folder)/"state.db"
        create_studio(db)
        with closing(sqlite3.connect(db)) as con, con: con.execute("ALTER TABLE adapters ADD COLUMN owner TEXT DEFAULT 'nobody'")
        schema = lambda: sqlite3.connect(db).execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        rows = lambda: sqlite3.connect(db).execute("SELECT id, name, fine_tuning_job_id, owner FROM adapters ORDER BY name").fetchall()
        before = schema()
        said = at_once(db, [(f"job{i}", "same-name") for i in range(8)])
        check("eight jobs with one name at once: one has it, seven are told", len(rows()) == 1 and sum("is taken by" in o for o in said) == 7)
        said = at_once(db, [(f"own{i}", f"name-{i}") for i in range(8)] )
        check("eight jobs at once: eight rows", len(set(said)) == 8 and len(rows()) == 9)
        said = at_once(db, [("own0", "name-0")]*8)
        check("one job, eight times at once: its one row", len(set(said)) == 1 and len(rows()) == 9)
        with closing(sqlite3.connect(db, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            said = at_once(db, [("late", "late")], wait=1)
            other.execute("ROLLBACK")
        check("locked for good: told so, nothing written", "database is locked" in said[0] and len(rows()) == 9)
        check("schema, unknown columns, journal and folder are as they were", schema() == before and all(r[3] == "nobody" for r in rows())
              and db.read_bytes()[18:20] == b"\1\1" and os.listdir(folder) == ["state.db"])

PARTS = {"fields": fields, "text": text, "token": token, "database": database}

def main(chosen=()):
    for name in chosen or PARTS: PARTS[name]()
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return int(not all(results))

if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
