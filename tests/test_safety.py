"Nothing obeys the data, and nothing shows the token."
import csv
import inspect
import io
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import threading
import unicodedata
import warnings
from collections import Counter
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast
from trl import SFTConfig

import ftnb
from ftnb.corpus import load_dataset_into_memory
from ftnb.demo.project import make_demo_project
from ftnb.jobargs import format_job_arguments, parse_job_arguments
from ftnb.lora_settings import lora_problems
from ftnb.prompts import map_dataset_with_prompt_template, missing_values, unusable_rows
from ftnb.quantisation import bnb_problems
from ftnb.training_fields import training_problems
from ftnb.studio import create_studio
from ftnb.tiny import TINY_KINDS, TINY_SENTENCES, tiny_tokenizer
from ftnb.tokenizer import configure_tokenizer_padding
from ftnb.tokens import tokenize_rows

pytestmark = pytest.mark.slow

SCRIPT = Path(ftnb.__file__).parent/"finetune.py"


# Fields of the libraries' settings: each that could reach a file, the network, code or another folder is refused or known here

SUSPICIOUS = re.compile(
    r"path|dir(_|$)|file|folder|url|uri|repo|hub|token(?!s)|code|kwargs|core|config|host|space|bucket_id|revision|module|script"
    r"|plugin|backend|checkpoint|deepspeed|fsdp|mapping|context(?!_)|project|run_name|init|load(?!er|ing)|debug|args|log_level")
NAMES = "names of modules of the model"
HARMLESS = {  # field -> what it comes to
    SFTConfig: {
        "activation_checkpointing": "a switch", "activation_checkpointing_kwargs": "options of torch's checkpoint",
        "gradient_checkpointing": "a switch", "gradient_checkpointing_kwargs": "options of torch's checkpoint",
        "ddp_backend": "a name that torch knows", "debug": "a name that transformers knows",
        "torch_compile_backend": "a backend that torch has registered",
        "dataloader_multiprocessing_context": "fork, spawn or forkserver", "dataset_kwargs": "ignored",
        "eos_token": "ignored", "pad_token": "ignored", "enable_jit_checkpoint": "a switch; checkpoints go to train_out_dir",
        "liger_kernel_config": "switches of an installed library", "load_best_model_at_end": "from the run's own checkpoints",
        "log_level": "a name", "log_level_replica": "a name", "lr_scheduler_kwargs": "numbers", "optim_args": "numbers",
        "optim_target_modules": NAMES, "project": "a label in the tracker", "run_name": "a label in the tracker",
        "report_to": "trackers by name, each known to transformers",
        "restore_callback_states_from_checkpoint": "of the run's own checkpoints"},
    LoraConfig: {
        "target_modules": NAMES, "exclude_modules": NAMES, "modules_to_save": NAMES,
        "init_lora_weights": "a name that PEFT knows", "trainable_token_indices": "numbers", "loftq_config": "numbers of bits",
        "velora_config": "numbers", "monteclora_config": "numbers", "kasa_config": "numbers", "runtime_config": "a switch"},
    BitsAndBytesConfig: {
        "load_in_8bit": "a switch", "load_in_4bit": "a switch", "llm_int8_enable_fp32_cpu_offload": "a switch",
        "llm_int8_skip_modules": NAMES}}
PROBLEMS = {SFTConfig: training_problems, LoraConfig: lora_problems, BitsAndBytesConfig: bnb_problems}
LIBRARIES = pytest.mark.parametrize("library", PROBLEMS, ids=lambda library: library.__name__)


def fields(library):
    return [name for name in inspect.signature(library.__init__).parameters if name not in ("self", "kwargs")]


def refused(library):
    problems_of = PROBLEMS[library]
    return {name for name in fields(library) if any("reaches outside" in str(p) for p in problems_of({name: "x"}))}


@LIBRARIES
def test_a_field_that_might_reach_outside_is_refused_or_known(library):
    suspicious = {name for name in fields(library) if SUSPICIOUS.search(name)}
    assert suspicious <= refused(library) | HARMLESS[library].keys()


@LIBRARIES
def test_a_field_that_is_listed_here_is_there_and_not_refused(library):
    listed = HARMLESS[library].keys()
    assert not listed & refused(library)
    assert listed <= {name for name in fields(library) if SUSPICIOUS.search(name)}


@LIBRARIES
@pytest.mark.parametrize("field", ["trust_remote_code", "invented"])
def test_what_is_no_field_is_refused(library, field):
    assert PROBLEMS[library]({field: True})


# Rows of a file become prompts and tokens: the text is what a person would expect, or the row is named with a reason

@dataclass(frozen=True)
class Piece:
    "Of a template: a literal, or a slot."
    text: str  # the literal, or the column's name
    slot: bool = False

    def filled(self, row):
        return row[self.text] if self.slot else self.text

    @property
    def written(self):
        "As it stands in a template."
        return "{%s}" % self.text if self.slot else self.text.replace("{", "{{").replace("}", "}}")


def fill(pieces, row):
    return "".join(piece.filled(row) for piece in pieces)


def write(pieces):
    return "".join(piece.written for piece in pieces)


def joined(pieces):
    "Literals that stand side by side are one."
    found = []
    for piece in pieces:
        if found and not piece.slot and not found[-1].slot:
            piece = Piece(found.pop().text + piece.text)
        found.append(piece)
    return found


def expected(pieces, row, eos):
    "What a person would write: each slot is its value, and one EOS is at the end."
    text = fill(pieces, row)
    while text.rstrip().endswith(eos):
        text = text.rstrip()[:-len(eos)]
    return text + eos


def unigram_tokenizer():
    "It can't write its EOS as plain text."
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, show_progress=False, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(TINY_SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


@cache
def tokenizers():
    "One of each family."
    kinds = {kind: tiny_tokenizer(kind) for kind in TINY_KINDS} | {"unigram": unigram_tokenizer()}
    return {kind: configure_tokenizer_padding(tok) for kind, tok in kinds.items()}


def special_tokens():
    added = [token for tok in tokenizers().values() for token in tok.added_tokens_decoder.values()]
    return sorted({token.content for token in added if token.special})


def write_rows(folder, kind, rows):
    "The rows as a data file of the Studio; returns its record."
    path = Path(folder)/f"rows.{kind}"
    if kind == "csv":
        made = io.StringIO(newline="")
        lines = [[row["a"] or "", row["b"] or ""] for row in rows]
        csv.writer(made, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *lines])
        path.write_bytes(made.getvalue().encode("utf-8", "surrogatepass"))
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(lines.encode("utf-8", "surrogatepass"))
    return SimpleNamespace(type=f"project_{kind}", location=str(path), name="rows")


def read_rows(record, rows):
    "The file's rows; None where it is refused with an error that names a row, as it must be for what UTF-8 or CSV can't hold."
    impossible = "[\ud800-\udfff]" + ("|\0" if record.type.endswith("csv") else "")
    bad = [i for i, row in enumerate(rows, 1) if any(re.search(impossible, value or "") for value in row.values())]
    try:
        found = load_dataset_into_memory(record)["train"]
    except ValueError as e:
        assert bad and f"(row {bad[0]})" in str(e), (str(e), bad)
        return None
    assert not bad, bad
    if record.type.endswith("csv"):
        rows = as_csv_has_it(rows)
    assert [dict(row) for row in found] == rows
    return found


NUMBERS = r" *([-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?|[-+]?(inf|nan|NaN|Inf|Infinity)) *"
TRUE_OR_FALSE = " *(true|false|True|False|TRUE|FALSE) *"


def as_csv_has_it(rows):
    "Rows with their empty fields: the empty text in a column of texts, a missing value among numbers, true and false."
    def typed(column):
        values = [row[column] for row in rows if row[column]]
        return values and any(all(re.fullmatch(kind, v, re.A) for v in values) for kind in (NUMBERS, TRUE_OR_FALSE))
    of_values = {column for column in "ab" if typed(column)}
    return [{c: v or (None if c in of_values else "") for c, v in row.items()} for row in rows]


@dataclass
class Trained:
    "A row, as it is trained."
    kind: str  # of the tokenizer
    pieces: list  # of the template
    row: dict
    before: str  # the part of the text that is the prompt
    text: str
    ids: list
    labels: list
    only: bool  # the completion

    @property
    def tok(self):
        return tokenizers()[self.kind]

    @property
    def special(self):
        return {i: token.content for i, token in self.tok.added_tokens_decoder.items() if token.special}

    @property
    def head(self):
        "Ids that the tokenizer puts before every text."
        return self.tok("")["input_ids"]

    @property
    def bos(self):
        "The one that the text itself begins with, and which is there once; else nothing."
        first = self.pieces[0]
        bos = self.special[self.head[-1]] if self.head else ""
        return bos if bos and not first.slot and first.text.startswith(bos) else ""

    def own_tokens(self):
        "Special tokens that the template itself holds."
        named = re.compile("|".join(map(re.escape, sorted(self.special.values(), key=len, reverse=True))))
        length, found, at = len(self.text) - len(self.tok.eos_token), [], 0
        for piece in self.pieces:
            if not piece.slot:
                matches = [m for m in named.finditer(piece.text) if at + m.end() <= length]
                found += [m[0] for m in matches if m[0] != self.tok.unk_token]
            at += len(piece.filled(self.row))
        return found[1:] if self.bos else found

    def check(self):
        "Ids and labels of a row, against its text alone."
        tok, special, head = self.tok, self.special, self.head
        assert self.ids[:len(head)] == head and self.ids[-1] == tok.eos_token_id
        body = self.ids[len(head):-1]
        assert [special[i] for i in body if i in special and i != tok.unk_token_id] == self.own_tokens()
        first = next(k for k, label in enumerate(self.labels) if label != -100)
        assert self.labels == [-100] * first + self.ids[first:]
        assert self.only or not first
        if self.kind in ("bpe", "llama3", "qwen"):  # that lose nothing
            self.check_text(body)
        if self.kind in ("bpe", "llama3") and self.only:
            self.check_boundary(body, first - len(head))

    def check_text(self, body):
        plain = self.text[:-len(self.tok.eos_token)].removeprefix(self.bos)

        def as_kept(text):
            return unicodedata.normalize("NFC", text) if self.kind == "qwen" else text
        assert as_kept(self.tok.decode(body, clean_up_tokenization_spaces=False)) == as_kept(plain)

    def check_boundary(self, body, first):
        "The tokens without loss are those that end within the prompt."
        prompt = len(self.before.removeprefix(self.bos).encode())
        sizes = [len(self.special[i].encode()) if i in self.special else len(self.tok.convert_ids_to_tokens(i))
                 for i in body]  # one sign a byte
        ends = [sum(sizes[:k + 1]) for k in range(len(sizes))]
        assert first == sum(end <= prompt for end in ends), self.before


def words():
    "What templates and values are made of."
    special = special_tokens()
    halves = [part for s in special for k in (2, len(s) // 2) for part in (s[:k], s[k:])]
    return [*special, *halves,
            "{", "}", "{{", "}}", "{a}", "{b}", "{0}", "{}", "{a.b}", "{a!r}", "%s", "$a", '"', "'", "\\", "\\n", "\n", "\r\n", "\r",
            "\t", "\x00", "\x1b[31m", "\x7f", "\x85", "\u2028", "🙂", "👩‍👩‍👧", "e\u0301", "\u200d", "\ufeff", "\ufffd", "\U0010fffd",
            "\ue000", " ", "  ", ",", "where is it", "None", "null", "NaN", "00701", "1.50", "x"*5000]


@st.composite
def files(draw):
    "(kind of tokenizer, kind of file, pieces of the template, how many are the prompt's, rows)"
    word = st.one_of(st.sampled_from(words()), st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
    text = st.lists(word, max_size=5).map("".join)
    broken = st.lists(st.one_of(word, st.just("\ud800")), max_size=3).map("".join)
    value = st.one_of(st.none(), text, broken)
    literal = st.lists(word, max_size=3).map(lambda o: Piece("".join(o).replace("\0", "")))
    piece = st.one_of(literal, st.sampled_from("ab").map(lambda c: Piece(c, slot=True)))
    kind = draw(st.sampled_from(sorted(tokenizers())))
    file = draw(st.sampled_from(["csv", "json", "jsonl"]))
    pieces = draw(st.lists(piece, min_size=1, max_size=6))
    cut = min(draw(st.integers(0, 6)), len(pieces) - 1)
    rows = draw(st.lists(st.fixed_dictionaries({"a": value, "b": value}), min_size=1, max_size=6))
    return kind, file, pieces, cut, rows


def good_rows(ds, pieces, added, prompt):
    "Numbers of the rows that can be trained; what is said of the others is right."
    used, found = {piece.text for piece in pieces if piece.slot}, ds[:]
    whole = [i for i in range(len(ds)) if all(found[c][i] is not None for c in used)]
    assert sorted(missing_values(ds, prompt)) == [i for i in range(len(ds)) if i not in whole]

    def blank(row):
        return any(piece.slot for piece in added) and not fill(added, row).strip()
    good = [i for i in whole if not blank(ds[i])]
    assert sorted(unusable_rows(ds, prompt)) == [i for i in range(len(ds)) if i not in good]
    return good


def test_rows_of_a_file_become_prompts_and_tokens():
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")
    count = Counter()

    @settings(max_examples=1500, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(files(), st.booleans())
    def rows_become_tokens(drawn, only):
        kind, file, pieces, cut, rows = drawn
        tok, prompted, added = tokenizers()[kind], pieces[:cut], pieces[cut:]
        if not write(pieces).strip() or not write(added):
            return
        with tempfile.TemporaryDirectory() as folder:
            ds = read_rows(write_rows(folder, file, rows), rows)
        if ds is None:
            return count.update(["refused files"])
        prompt = SimpleNamespace(prompt_template=None, input_template=write(prompted), completion_template=write(added))
        good = good_rows(ds, pieces, added, prompt)
        if not good:
            return count.update(["nothing left"])
        done = map_dataset_with_prompt_template(ds, prompt, tok.eos_token)
        wanted = [expected(pieces, ds[i], tok.eos_token) for i in good]
        assert done["prediction"][:] == wanted
        out = tokenize_rows(done, tok, prompt, only, max_length=3000)
        assert sorted([*out.kept, *out.dropped]) == list(range(len(good)))
        assert all(drop.reason for drop in out.dropped.values())
        assert all("max_length" in drop.reason or kind == "unigram" for drop in out.dropped.values()), out.dropped
        for i, ids, labels in zip(out.kept, out.dataset["input_ids"], out.dataset["labels"], strict=True):
            note((wanted[i], tok.convert_ids_to_tokens(ids)))
            row = ds[good[i]]
            Trained(kind, joined(pieces), row, fill(prompted, row), wanted[i], ids, labels, only).check()
        count.update({"trained": len(out.kept), "named": len(out.dropped), "without a value": len(ds) - len(good)})
    rows_become_tokens()
    assert count["trained"] and count["named"] and count["without a value"] and count["refused files"]


# The token: it reaches the hub, and no file, no output and no command line

CANARY = "hf_CANARYcanary0123456789abcdef"


class Gate(BaseHTTPRequestHandler):
    "A hub on this machine that gives nobody anything, and notes the tokens it was shown."
    seen = []

    def refuse(self):
        self.seen.append(self.headers.get("Authorization", ""))
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access is restricted: ask its authors")
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_GET = do_HEAD = do_POST = refuse

    def log_message(self, *args):
        pass


@pytest.fixture
def gate():
    "The environment that leads to it."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
           "no_proxy": "127.0.0.1"}
    server.shutdown()


@contextmanager
def watched_command_lines():
    "Collect the command lines of all processes that hold the token."
    stop, seen = threading.Event(), set()

    def look():
        while not stop.wait(0.02):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    line = path.read_bytes()
                except OSError:
                    continue
                if CANARY.encode() in line:
                    seen.add(line)
    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        stop.set()
        watcher.join()


class Keeper:
    "A project whose jobs know the token."
    def __init__(self, folder, base):
        self.folder, self.project = folder, make_demo_project(folder/"project", base, fraction=0.01125)
        self.args = parse_job_arguments(self.project.job_arguments, {})

    def arguments(self, **changes):
        return f"{format_job_arguments(replace(self.args, **changes))} --hf_token {CANARY}"

    def run(self, arguments, env=None):
        "(did it end well?, output); afterwards the token is in no output, in no command line, and in no file."
        places = {k: str(self.folder/k.lower()) for k in ("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME")}
        for place in places.values():
            os.makedirs(place, exist_ok=True)
        full = {**os.environ, **places, "JOB_ARGUMENTS": arguments, "FINE_TUNING_STUDIO_SQLITE_DB": str(self.project.db),
                **(env or {})}
        with watched_command_lines() as lines:
            done = subprocess.run([sys.executable, str(SCRIPT)], env=full, cwd=self.project.folder, capture_output=True,
                                  text=True)
        said = done.stdout + done.stderr
        assert CANARY not in said, said.replace(CANARY, "<TOKEN>")[-3000:]
        assert not lines
        files = [p for p in self.folder.rglob("*") if p.is_file() and not p.is_symlink()]
        self.looked_at = len(files)
        assert files
        assert not [str(p) for p in files if CANARY in str(p) or CANARY.encode() in p.read_bytes()]
        assert not [p for p in self.folder.rglob("*token*") if p.name in ("token", "stored_tokens")]  # nobody was logged in
        return done.returncode == 0, said


@pytest.fixture
def keeper(tmp_path, tiny_base):
    return Keeper(tmp_path.resolve(), tiny_base)


def test_token_of_a_job_that_ends_well(keeper):
    env = {"HUGGINGFACE_ACCESS_TOKEN": CANARY, "HF_TOKEN": CANARY}
    well, said = keeper.run(keeper.project.job_arguments, env)
    assert well and "registered" in said, said[-3000:]
    assert keeper.looked_at > 10  # adapter, run.json, metrics, ledger, report, checkpoint


def test_token_for_a_gated_model(keeper, gate):
    "Only the hub is shown it."
    with closing(sqlite3.connect(keeper.project.db)) as con, con:
        con.execute("INSERT INTO models (id, type, name, huggingface_model_name) "
                    "VALUES ('gated', 'huggingface', 'gated', 'someone/gated')")
    well, said = keeper.run(keeper.arguments(base_model_id="gated"), gate)
    assert not well and "someone/gated" in said, said[-3000:]
    assert f"Bearer {CANARY}" in Gate.seen


def test_token_with_wrong_records(keeper):
    well, said = keeper.run(keeper.arguments(base_model_id="none", lora_config='{"r":-1}'))
    assert not well and "there is no such row" in said, said[-3000:]


def test_token_with_wrong_arguments(keeper):
    well, said = keeper.run(keeper.arguments() + f" --hf_tokn {CANARY} --out_dir ../x")
    assert not well and "--hf_tokn is no key" in said, said[-3000:]


def test_token_when_training_diverges(keeper):
    training = '{"learning_rate":1e20,"weight_decay":1e30,"max_steps":20}'
    well, said = keeper.run(keeper.arguments(adapter_name="diverges", training_arguments_config=training))
    assert not well and "FloatingPointError" in said, said[-3000:]


# The database: names, and what isn't the job's, whoever writes at the same moment

REGISTER = """
import sys
from ftnb.registry import register_adapter
from ftnb.studio import open_studio
db, job, name, wait = sys.argv[1:]
engine = open_studio(db)
print(flush=True)
sys.stdin.readline()
try:
    print(register_adapter(engine, name=name, model_id="m", prompt_id="p", location="out/" + job, experimentid=job, wait=float(wait)))
except ValueError as e:
    print("refused:", str(e).splitlines()[0])
"""


def register_at_once(db, jobs, wait=120):
    "What processes say that register (job, name) at the same moment."
    started = []
    for job, name in jobs:
        command = [sys.executable, "-c", REGISTER, str(db), job, name, str(wait)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for process in started:
        process.stdout.readline()
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate()[0].splitlines()[-1] for process in started]


def ask(db, question):
    with closing(sqlite3.connect(db)) as con:
        return con.execute(question).fetchall()


def schema(db):
    return ask(db, "SELECT name, sql FROM sqlite_master ORDER BY name")


def adapters(db):
    return ask(db, "SELECT id, name, fine_tuning_job_id, owner FROM adapters ORDER BY name")


@pytest.fixture
def db(tmp_path):
    "With a column that ftnb doesn't know. Schema, journal and folder are afterwards as they were."
    path = tmp_path/"state.db"
    create_studio(path)
    with closing(sqlite3.connect(path)) as con, con:
        con.execute("ALTER TABLE adapters ADD COLUMN owner TEXT DEFAULT 'nobody'")
    before = schema(path)
    yield path
    assert schema(path) == before
    assert all(row[3] == "nobody" for row in adapters(path))
    assert path.read_bytes()[18:20] == b"\1\1"
    assert os.listdir(tmp_path) == ["state.db"]


def test_eight_jobs_with_one_name_at_once(db):
    "One has it, seven are told."
    said = register_at_once(db, [(f"job{i}", "same-name") for i in range(8)])
    assert len(adapters(db)) == 1
    assert sum("is taken by" in words for words in said) == 7, said


def test_eight_jobs_at_once(db):
    said = register_at_once(db, [(f"own{i}", f"name-{i}") for i in range(8)])
    assert len(set(said)) == 8 and len(adapters(db)) == 8, said


def test_one_job_eight_times_at_once(db):
    said = register_at_once(db, [("own0", "name-0")] * 8)
    assert len(set(said)) == 1 and len(adapters(db)) == 1, said


def test_a_database_that_is_locked_for_good(db):
    "Said, and nothing is written."
    with closing(sqlite3.connect(db, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        said, = register_at_once(db, [("late", "late")], wait=1)
        other.execute("ROLLBACK")
    assert "database is locked" in said
    assert not adapters(db)
