"A row is the same row in every format, and no file makes a check endless."
import bz2
import csv
import datetime as dt
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ftnb.demo.project import make_demo_project
from ftnb.jobargs import parse_job_arguments
from ftnb.preflight import check_job
from ftnb.progress import quiet_libraries
from ftnb.prompts import map_dataset_with_prompt_template, read_template
from ftnb.rows import prepare_rows, read_rows
from ftnb.tiny import save_tiny

pytestmark = pytest.mark.slow


# A column: its Arrow type, and what a value is as text, and in JSON

class Raw(str):
    "JSON text as it stands."


def as_json(value):
    "Any of our values as JSON, numbers as they are written."
    if isinstance(value, Raw):
        return value
    if isinstance(value, dict):
        return "{%s}" % ", ".join(f"{json.dumps(k)}: {as_json(v)}" for k, v in value.items())
    if isinstance(value, list):
        return "[%s]" % ", ".join(map(as_json, value))
    return json.dumps(value, ensure_ascii=False)


def compact(value):
    "Nested values as a person would write them: without blanks, and without keys that have no value."
    if isinstance(value, dict):
        return "{%s}" % ",".join(f"{json.dumps(k)}:{compact(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list):
        return "[%s]" % ",".join(map(compact, value))
    return str(value) if isinstance(value, Raw) else json.dumps(value, ensure_ascii=False)


def same(value):
    return value


def short(value):
    "A number of 32 bits, with as many digits as it has."
    return repr(float(str(np.float32(value))))


def texts(values):
    return [str(value) for value in values]


@dataclass(frozen=True)
class Kind:
    "A kind of column."
    arrow: pa.DataType
    text: Callable = same  # value -> what a person would write
    json: Callable = same  # value -> what JSON has


NESTED = pa.struct([("a", pa.int64()), ("b", pa.string()), ("c", pa.list_(pa.string())),
                    ("d", pa.struct([("e", pa.bool_()), ("f", pa.float64())]))])
KINDS = {
    "text": Kind(pa.string()),
    "large": Kind(pa.large_string()),
    "labels": Kind(pa.dictionary(pa.int32(), pa.string())),
    "int": Kind(pa.int64(), str),
    "huge": Kind(pa.decimal128(38, 0), str),
    "unsigned": Kind(pa.uint64(), str),
    "float": Kind(pa.float64(), repr),
    "short": Kind(pa.float32(), short, lambda v: Raw(short(v))),
    "bool": Kind(pa.bool_(), lambda v: "true" if v else "false"),
    "date": Kind(pa.date32(), str, str),
    "time": Kind(pa.timestamp("us"), str, str),
    "zone": Kind(pa.timestamp("ms", "UTC"), str, str),
    "money": Kind(pa.decimal128(12, 2), str, Raw),
    "bytes": Kind(pa.binary(), bytes.decode, bytes.decode),
    "span": Kind(pa.duration("s"), str, str),
    "object": Kind(NESTED, compact),
    "list": Kind(pa.list_(pa.int64()), compact),
    "days": Kind(pa.list_(pa.timestamp("ns")), lambda v: compact(texts(v)), texts),
}
NAMES = {"int": "customer.id", "text": "q:text", "object": "an object"}  # Python's formatting would take them for more


def values():
    "Kind of column -> what may stand in it."
    word = st.sampled_from([
        "", "", " ", "a", "7", "1.50", "true", "None", "NA", "null", "NaN", "{a}", "{", '"', "'", ",", ";", "|", "\t", "\n",
        "\r\n", "é", "🙂", "e\u0301", "2024-02-01", "where is it", "</s>", "<|im_end|>", "[1]", "\u2028", "\\"])
    letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    text = st.lists(st.one_of(word, st.text(letters, max_size=5)), max_size=3).map("".join)
    moment = st.datetimes(dt.datetime(1700, 1, 1), dt.datetime(2200, 1, 1))
    moment = moment.map(lambda o: o.replace(microsecond=o.microsecond // 1000 * 1000))
    real = st.floats(allow_nan=False, allow_infinity=False)
    deepest = st.fixed_dictionaries({}, optional={"e": st.booleans(), "f": real})
    inner = st.fixed_dictionaries({}, optional={
        "a": st.one_of(st.none(), st.integers(-9, 9)), "b": text,
        "c": st.lists(st.one_of(st.none(), text), max_size=2), "d": deepest})
    return {
        "text": text, "large": text, "labels": st.sampled_from(["x", "y z", "7"]),
        "int": st.integers(-2**63, 2**63 - 1), "huge": st.integers(-10**37, 10**37), "unsigned": st.integers(0, 2**64 - 1),
        "float": real, "short": st.floats(width=32, allow_nan=False, allow_infinity=False), "bool": st.booleans(),
        "date": st.dates(dt.date(1, 1, 1)), "time": moment, "zone": moment.map(lambda o: o.replace(tzinfo=dt.timezone.utc)),
        "money": st.decimals(-10**9, 10**9, places=2, allow_nan=False), "bytes": text.map(str.encode),
        "span": st.integers(-10**6, 10**6).map(lambda s: dt.timedelta(seconds=s)), "object": inner,
        "list": st.lists(st.integers(-9, 9), max_size=3), "days": st.lists(moment, max_size=2)}


VALUES = values()


@dataclass(frozen=True)
class Table:
    "Random rows."
    used: tuple  # kinds of its columns but the last, `answer`
    rows: list  # of {name of a column: value}

    @property
    def kinds(self):
        return {NAMES.get(kind, kind): KINDS[kind] for kind in self.used} | {"answer": KINDS["text"]}

    @property
    def arrow(self):
        return pa.table({c: pa.array([r[c] for r in self.rows], kind.arrow) for c, kind in self.kinds.items()})

    def as_text(self):
        return [{c: None if r[c] is None else kind.text(r[c]) for c, kind in self.kinds.items()} for r in self.rows]

    def as_json(self):
        return [{c: None if r[c] is None else kind.json(r[c]) for c, kind in self.kinds.items()} for r in self.rows]

    @property
    def template(self):
        "Every column, then the answer."
        asked = "".join("%s={%s}\n" % (kind, NAMES.get(kind, kind)) for kind in self.used) + "A:"
        record = SimpleNamespace(prompt_template=None, input_template=asked, completion_template="{answer}")
        return read_template(record, list(self.kinds))

    def text_of(self, row):
        "What a person would make of the template and a row of texts."
        asked = "".join("%s=%s\n" % (kind, row[NAMES.get(kind, kind)]) for kind in self.used)
        return f"{asked}A:{row['answer']}"


@st.composite
def tables(draw):
    used = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=5, unique=True))
    row = {NAMES.get(kind, kind): st.one_of(*[VALUES[kind]] * 8, st.none()) for kind in used}
    row["answer"] = st.one_of(VALUES["text"], st.sampled_from("ab"))
    n = draw(st.integers(3, 9))
    return Table(tuple(used), draw(st.lists(st.fixed_dictionaries(row), min_size=n, max_size=n)))


# Its files

def packed(name, data):
    "Bytes, packed as the name says."
    if name.endswith("zip"):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("rows", data)
        return out.getvalue()
    if name.endswith("zst"):
        return pa.compress(data, codec="zstd", asbytes=True)
    by = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    return by.get(name.split(".")[-1], bytes)(data)


TEXT_FILES = (("rows.csv", ",", "utf-8"), ("rows.tsv", "\t", "utf-8-sig"), ("other.csv", ";", "utf-16"),
              ("rows.csv.gz", "|", "utf-8"))
LINES = ("rows.jsonl", "rows.jsonl.bz2", "rows.jsonl.xz", "rows.jsonl.zst", "rows.jsonl.zip")


def text_files(columns, rows):
    "Name -> bytes of a table as CSV; every value is its text, and a missing one an empty field."
    found = {}
    for name, separator, encoding in TEXT_FILES:
        made = io.StringIO(newline="")
        csv.writer(made, delimiter=separator).writerows([list(columns), *([r[c] or "" for c in columns] for r in rows)])
        found[name] = packed(name, made.getvalue().encode(encoding))
    return found


def json_files(columns, rows):
    "Name -> bytes of a table as JSON; a missing value is null, or its key is left out."
    def kept(i, row):
        return {c: row[c] for c in columns if row[c] is not None or not i or (i + len(c)) % 2}
    lines = "\n".join(as_json(kept(i, row)) for i, row in enumerate(rows)).encode() + b"\n"
    listed = ("[" + ",\n".join(as_json(r) for r in rows) + "]").encode()
    return {"rows.json": listed} | {name: packed(name, lines) for name in LINES}


def typed_folders(folder, table):
    "Folders of a table in formats with types."
    for name in ("parquet", "arrow"):
        (folder/name).mkdir()
    pq.write_table(table, folder/"parquet"/"train.parquet")
    with pa.OSFile(str(folder/"arrow"/"train.arrow"), "wb") as f, pa.ipc.new_stream(f, table.schema) as out:
        out.write_table(table)
    Dataset(table).save_to_disk(folder/"saved")
    return [("project", folder/name) for name in ("parquet", "arrow", "saved")]


def records(folder, files):
    "(type of the record, place) of each file, written to a folder."
    for name, data in files.items():
        (folder/name).write_bytes(data)
        yield "project_" + ("csv" if re.search(r"\.[ct]sv", name) else "jsonl" if ".jsonl" in name else "json"), folder/name


SHAPES = (r" *([-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?|[-+]?(inf|nan|NaN|Inf|Infinity)) *",
          " *(true|false|True|False|TRUE|FALSE) *",
          r" *\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d([.,]\d+)?)?( ?(Z|UTC|[-+]\d\d:?(\d\d)?))?)? *")


def as_csv_has_it(columns, rows):
    "Missing values as CSV has them: the empty text, but missing among numbers, dates, true and false."
    def typed(c):
        there = [r[c] for r in rows if r[c]]
        return there and any(all(re.fullmatch(shape, v, re.A) for v in there) for shape in SHAPES)
    return [{c: r[c] or (None if typed(c) else "") for c in columns} for r in rows]


# What a job makes of it

@pytest.fixture(scope="module")
def work(tmp_path_factory):
    quiet_libraries()
    return tmp_path_factory.mktemp("formats").resolve()


@pytest.fixture(scope="module")
def base(work):
    return save_tiny(work/"base", kind="bpe")


@pytest.fixture(scope="module")
def checked(work, base):
    "A job that was checked, and its tokenizer."
    project = make_demo_project(work/"project", base, fraction=0.01875)
    args = parse_job_arguments(project.job_arguments)
    found = check_job(args, {"FINE_TUNING_STUDIO_SQLITE_DB": str(project.db)}, keep=False)
    return found.job, found.base.tokenizer


def outcome(job, tokenizer, kind, place):
    "Text, ledger and tokens of a data set's rows, or the words of the error."
    record = replace(job.records.dataset, type=kind, location=str(place))
    job = replace(job, records=replace(job.records, dataset=record))
    try:
        data, rows = read_rows(record, job.template), prepare_rows(job, tokenizer)
    except ValueError as e:
        return str(e)
    made = map_dataset_with_prompt_template(data.splits, job.template, tokenizer.eos_token)["train"]["prediction"][:]
    return made, rows.ledger.as_dict(), rows.train.dataset[:], rows.test.dataset[:], rows.numbers


def groups(table, folder):
    "Of each group of files that hold the same rows: their records, and the rows as text."
    plain, as_text = table.as_json(), table.as_text()
    (folder/"csv").mkdir()
    yield [*records(folder, json_files(table.kinds, plain)), *typed_folders(folder, table.arrow)], as_text
    empty = as_csv_has_it(table.kinds, as_text)
    same_rows = folder/"csv"/"same.json"
    same_rows.write_text(as_json(empty), encoding="utf-8")
    yield [("project_json", same_rows), *records(folder/"csv", text_files(table.kinds, as_text))], empty


def check_texts(made, table, wanted, eos):
    "A text is what a person would make of the row, to its answer's end."
    good = [row for row in wanted if None not in row.values() and row["answer"].strip()]
    for text, row in zip(made, good, strict=True):
        assert text.startswith(table.text_of(row).rstrip().removesuffix(eos).rstrip())


def test_a_table_gives_the_same_rows_in_every_format(checked, work):
    job, tokenizer = checked
    count = Counter()
    shares = st.sampled_from([(1.0, 0.5), (0.7, 0.6), (1.0, 1.0)])

    @settings(max_examples=45, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(tables(), shares, st.booleans())
    def same_rows(table, shares, only):
        args = replace(job.args, dataset_fraction=shares[0], train_test_split=shares[1])
        this = replace(job, template=table.template, args=args, settings=replace(job.settings, completion_only=only))
        with tempfile.TemporaryDirectory(dir=work) as folder:
            for group, wanted in groups(table, Path(folder)):
                (_, first), *others = [(place.name, outcome(this, tokenizer, kind, place)) for kind, place in group]
                for name, found in others:
                    assert found == first, name
                if isinstance(first, str):
                    count["errors"] += 1
                    continue
                check_texts(first[0], table, wanted, tokenizer.eos_token)
                ledger = first[1]
                count.update({"trained": ledger["trained"], "held out": ledger["held_out"],
                              "dropped": len(ledger["dropped"])})
    same_rows()
    assert count["trained"] and count["held out"] and count["dropped"]


# What must not make a check endless: 60 seconds of processor time each, and 2 GiB of memory, in a process of its own

def wide():
    return ",".join(f"c{i}" for i in range(100_000)) + "\n" + ",".join("1" for _ in range(100_000)) + "\n"


def many_keys():
    return "{%s}\n" % ",".join(f'"k{i}": 1' for i in range(40_000))


def one_key():
    return "{%s}\n" % ",".join('"k": 1' for _ in range(40_000))


def own_keys(n, row='{"k%d": 1}\n'):
    return "".join(row % ((i,) * row.count("%d")) for i in range(n))


def eos_and_blanks():
    long = {"message": "a", "intent": ("</s>" + " " * 30) * 20_000 + "x"}
    return json.dumps(long) + "\n" + '{"message": "b", "intent": "c"}\n' * 30


def blanks():
    return "message,intent\n" + "".join(f"m{i},{' ' * 100_000}x\n" for i in range(20))


def bomb():
    return gzip.compress(b"message,intent\n") + gzip.compress(b"a" * 1_000_000) * 3_000


@dataclass(frozen=True)
class Hostile:
    "A file, and what a check says of it."
    name: str
    file: str
    said: str
    made: Callable | None = None  # gives its text or bytes; None: a FIFO, or a file that is there

    def put(self, folder):
        "Its path."
        path = folder/self.file
        if path.is_absolute() and self.file.startswith("/"):
            return path
        folder.mkdir()
        if self.made is None:
            os.mkfifo(path)
            return path
        data = self.made()
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path


HOSTILE = (
    Hostile("100,000 CSV columns", "rows.csv", "100,000 columns, and 10,000 is the most", wide),
    Hostile("40,000 keys in an object", "rows.jsonl", "40,000 different keys", many_keys),
    Hostile("a key 40,000 times", "rows.jsonl", "occurs more than once", one_key),
    Hostile("2,000 rows with keys of their own", "rows.jsonl", "2,000 read",
            lambda: own_keys(2_000, '{"message": "m%d", "intent": "i", "k%d": 1}\n')),
    Hostile("200,000 rows with keys of their own", "rows.jsonl", "10,000 is the most", lambda: own_keys(200_000)),
    Hostile("a list 900 deep", "rows.jsonl", "rows",
            lambda: '{"message": %s%s, "intent": "a"}\n' % ("[" * 900, "]" * 900) * 12),
    Hostile("EOS and blanks in turn", "rows.jsonl", "over max_length", eos_and_blanks),
    Hostile("blanks", "rows.csv", "over max_length", blanks),
    Hostile("quotes", "rows.csv", "1 field, but the header has 2", lambda: "message,intent\n" + '"' * 2_000_000 + "\n"),
    Hostile("a line of 20 MB that is no JSON", "rows.jsonl", "not JSON", lambda: '{"a": "' + "x\\\\" * 7_000_000 + "\n"),
    Hostile("200,000 bad rows", "rows.csv", "and 199980 more", lambda: "message,intent\n" + "x\n" * 200_000),
    Hostile("a bomb", "rows.csv.gz", "more than", bomb),
    Hostile("a FIFO", "rows.csv", "a pipe (FIFO), not a regular file"),
    Hostile("a device", "/dev/zero", "a device, not a regular file"),
    Hostile("a template of 10 MB", "template.jsonl", "1,000,000 is the most",
            lambda: '{"message": "a", "intent": "b"}\n' * 20),
)
CHILD = """
import os, resource, sqlite3, sys, time
from unittest.mock import patch
from ftnb.jobargs import parse_job_arguments
from ftnb.preflight import check_job
from ftnb.progress import quiet_libraries
quiet_libraries()
resource.setrlimit(resource.RLIMIT_CPU, (600, 600))
arguments, *places = sys.argv[1:]
for place in places:
    with sqlite3.connect(os.environ["FINE_TUNING_STUDIO_SQLITE_DB"]) as con:
        con.execute("update datasets set location = ?, type = ?", (place, "project_jsonl" if "jsonl" in place else "project_csv"))
        template = "{message}" * 1_200_000 if "template" in place else "{message}:"
        con.execute("update prompts set prompt_template = '', input_template = ?, completion_template = '{intent}'", (template,))
    con.close()
    start = time.process_time()
    with patch("ftnb.files.most_bytes", lambda: 2**28): print(check_job(parse_job_arguments(arguments), keep=False))
    print("SPENT", round(time.process_time() - start), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "END OF", place, flush=True)
"""


@dataclass(frozen=True)
class Check:
    report: str
    seconds: int  # of processor time
    peak: int  # MiB, of the process so far


@pytest.fixture(scope="module")
def checks(work, base, chosen):
    "What checks say of the hostile files, all in one process."
    project = make_demo_project(work/"hostile", base, fraction=1.0)
    hostile = chosen("hostile")
    places = [case.put(work/f"hostile-{i}") for i, case in enumerate(hostile)]
    env = os.environ | {"FINE_TUNING_STUDIO_SQLITE_DB": str(project.db)}
    done = subprocess.run([sys.executable, "-c", CHILD, project.job_arguments, *map(str, places)], capture_output=True,
                          text=True, timeout=1200, env=env)
    reports = re.split(r"SPENT (\d+) (\d+) END OF .*\n", done.stdout)
    assert done.returncode == 0 and len(reports) == 3 * len(hostile) + 1, done.stdout[-1000:] + done.stderr[-2000:]
    return {case: Check(reports[3 * i], *map(int, reports[3 * i + 1:3 * i + 3])) for i, case in enumerate(hostile)}


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_no_file_makes_a_check_endless(hostile, checks):
    check = checks[hostile]
    assert hostile.said in check.report, check.report[-3000:]
    assert check.seconds < 60
    assert check.peak < 2048
    assert len(check.report) < 20_000
