"A row is the same row in every format, and no file makes a check endless: `python .ci/formats.py`, or parts of it by name."
import bz2, csv, datetime as dt, gzip, io, json, lzma, os, re, subprocess, sys, tempfile, traceback, warnings, zipfile
from collections import Counter
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

results = []

def check(what, right):
    results.append(bool(right))
    print(f"{'ok' if right else 'FAILED'}: {what}", flush=True)

# A table: for each kind of column its Arrow type, what a person would write for a value, and what JSON has for it

class Raw(str): "JSON text as it stands."

def as_json(value):
    "Any of our values as JSON, numbers as they are written."
    if isinstance(value, Raw): return value
    if isinstance(value, dict): return "{%s}" % ", ".join(f"{json.dumps(k)}: {as_json(v)}" for k, v in value.items())
    if isinstance(value, list): return "[%s]" % ", ".join(map(as_json, value))
    return json.dumps(value, ensure_ascii=False)

def compact(value):
    "Nested values as a person would write them: without blanks, and without keys that have no value."
    if isinstance(value, dict): return "{%s}" % ",".join(f"{json.dumps(k)}:{compact(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list): return "[%s]" % ",".join(map(compact, value))
    return str(value) if isinstance(value, Raw) else json.dumps(value, ensure_ascii=False)

def kinds():
    "Kind of column -> (Arrow type, value -> text, value -> what JSON has)."
    import numpy as np, pyarrow as pa
    nested = pa.struct([("a", pa.int64()), ("b", pa.string()), ("c", pa.list_(pa.string())), ("d", pa.struct([("e", pa.bool_()), ("f", pa.float64())]))])
    number, same, string = lambda v: Raw(v), lambda v: v, str
    short = lambda v: repr(float(str(np.float32(v))))
    return {"text": (pa.string(), same, same), "large": (pa.large_string(), same, same), "labels": (pa.dictionary(pa.int32(), pa.string()), same, same),
            "int": (pa.int64(), string, same), "huge": (pa.decimal128(38, 0), string, same), "unsigned": (pa.uint64(), string, same),
            "float": (pa.float64(), repr, same), "short": (pa.float32(), short, lambda v: Raw(short(v))), "bool": (pa.bool_(), lambda v: "true" if v else "false", same),
            "date": (pa.date32(), string, string), "time": (pa.timestamp("us"), string, string), "zone": (pa.timestamp("ms", "UTC"), string, string),
            "money": (pa.decimal128(12, 2), string, lambda v: Raw(v)), "bytes": (pa.binary(), lambda v: v.decode(), lambda v: v.decode()),
            "span": (pa.duration("s"), string, string), "object": (nested, compact, same), "list": (pa.list_(pa.int64()), compact, same),
            "days": (pa.list_(pa.timestamp("ns")), lambda v: compact([str(o) for o in v]), lambda v: [str(o) for o in v])}

def values():
    "Kind of column -> what may stand in it."
    from hypothesis import strategies as st
    word = st.sampled_from(["", "", " ", "a", "7", "1.50", "true", "None", "NA", "null", "NaN", "{a}", "{", '"', "'", ",", ";", "|", "\t", "\n", "\r\n", "é", "🙂", "e\u0301",
                            "2024-02-01", "where is it", "</s>", "<|im_end|>", "[1]", "\u2028", "\\"])
    letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    text = st.lists(st.one_of(word, st.text(letters, max_size=5)), max_size=3).map("".join)
    moment = st.datetimes(dt.datetime(1700, 1, 1), dt.datetime(2200, 1, 1)).map(lambda o: o.replace(microsecond=o.microsecond // 1000 * 1000))
    real = st.floats(allow_nan=False, allow_infinity=False)
    inner = st.fixed_dictionaries({}, optional=dict(a=st.one_of(st.none(), st.integers(-9, 9)), b=text, c=st.lists(st.one_of(st.none(), text), max_size=2),
                                                    d=st.fixed_dictionaries({}, optional=dict(e=st.booleans(), f=real))))
    return {"text": text, "large": text, "labels": st.sampled_from(["x", "y z", "7"]), "int": st.integers(-2**63, 2**63 - 1), "huge": st.integers(-10**37, 10**37),
            "unsigned": st.integers(0, 2**64 - 1), "float": real, "short": st.floats(width=32, allow_nan=False, allow_infinity=False), "bool": st.booleans(),
            "date": st.dates(dt.date(1, 1, 1)), "time": moment, "zone": moment.map(lambda o: o.replace(tzinfo=dt.timezone.utc)),
            "money": st.decimals(-10**9, 10**9, places=2, allow_nan=False), "bytes": text.map(str.encode), "span": st.integers(-10**6, 10**6).map(lambda s: dt.timedelta(seconds=s)),
            "object": inner, "list": st.lists(st.integers(-9, 9), max_size=3), "days": st.lists(moment, max_size=2)}

# Its files

def packed(name, data):
    "Bytes, packed as the name says."
    import pyarrow as pa
    if name.endswith("zip"):
        with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as z: z.writestr("rows", data)
        return out.getvalue()
    by = dict(gz=gzip.compress, bz2=bz2.compress, xz=lzma.compress, zst=lambda o: pa.compress(o, codec="zstd", asbytes=True))
    return by.get(name.split(".")[-1], bytes)(data)

def text_files(columns, rows):
    "Name -> bytes of a table as CSV; every value is its text, and a missing one an empty field."
    found = {}
    for name, separator, encoding in (("rows.csv", ",", "utf-8"), ("rows.tsv", "\t", "utf-8-sig"), ("other.csv", ";", "utf-16"), ("rows.csv.gz", "|", "utf-8")):
        out = csv.writer(made := io.StringIO(newline=""), delimiter=separator)
        out.writerows([list(columns), *([r[c] or "" for c in columns] for r in rows)])
        found[name] = packed(name, made.getvalue().encode(encoding))
    return found

def json_files(columns, rows):
    "Name -> bytes of a table as JSON; a missing value is null, or its key is left out."
    lines = [as_json({c: r[c] for c in columns if r[c] is not None or not i or (i + len(c)) % 2}) for i, r in enumerate(rows)]
    whole = "\n".join(lines).encode() + b"\n"
    listed = ("[" + ",\n".join(as_json(r) for r in rows) + "]").encode()
    return {"rows.json": listed} | {name: packed(name, whole) for name in ("rows.jsonl", "rows.jsonl.bz2", "rows.jsonl.xz", "rows.jsonl.zst", "rows.jsonl.zip")}

def typed_folders(folder, table):
    "Folders of a table in formats with types."
    import pyarrow as pa, pyarrow.parquet as pq
    from datasets import Dataset
    for name in ("parquet", "arrow"): (folder/name).mkdir()
    pq.write_table(table, folder/"parquet"/"train.parquet")
    with pa.OSFile(str(folder/"arrow"/"train.arrow"), "wb") as f, pa.ipc.new_stream(f, table.schema) as out: out.write_table(table)
    Dataset(table).save_to_disk(folder/"saved")
    return [("project", folder/name) for name in ("parquet", "arrow", "saved")]

def records(folder, files):
    "(type of the record, place) of each file, written to a folder."
    for name, data in files.items():
        (folder/name).write_bytes(data)
        yield "project_" + ("csv" if re.search(r"\.[ct]sv", name) else "jsonl" if ".jsonl" in name else "json"), folder/name

# What a job makes of it

def a_job(folder):
    "A job on a tiny model, and its tokenizer."
    from ftnb.demo.project import make_demo_project
    from ftnb.jobargs import parse_job_arguments
    from ftnb.preflight import check_job, quiet_libraries
    from ftnb.tiny import save_tiny
    quiet_libraries()
    project = make_demo_project(folder/"project", save_tiny(folder/"base", kind="bpe"), fraction=0.05)
    found = check_job(parse_job_arguments(project.job_arguments), {"FINE_TUNING_STUDIO_SQLITE_DB": str(project.db)}, keep=False)
    return found.job, found.known["tokenizer"]

def outcome(job, tokenizer, kind, place):
    "Text, ledger and tokens of a data set's rows, or the words of the error."
    from ftnb.prompts import map_dataset_with_prompt_template
    from ftnb.rows import prepare_rows, read_rows
    record = replace(job.records.dataset, type=kind, location=str(place))
    job = replace(job, records=replace(job.records, dataset=record))
    try: data, rows = read_rows(record, job.template), prepare_rows(job, tokenizer)
    except ValueError as e: return str(e)
    texts = map_dataset_with_prompt_template(data.splits, job.template, tokenizer.eos_token)["train"]["prediction"][:]
    return texts, dict(rows.ledger), rows.train.dataset[:], rows.test.dataset[:], rows.numbers

def as_csv_has_it(columns, rows):
    "Rows of texts with their missing values as CSV has them: the empty text, but missing among numbers, dates, true and false."
    shapes = [r" *([-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?|[-+]?(inf|nan|NaN|Inf|Infinity)) *", " *(true|false|True|False|TRUE|FALSE) *",
              r" *\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d([.,]\d+)?)?( ?(Z|UTC|[-+]\d\d:?(\d\d)?))?)? *"]
    def typed(c):
        there = [r[c] for r in rows if r[c]]
        return there and any(all(re.fullmatch(shape, v, re.A) for v in there) for shape in shapes)
    return [{c: r[c] or (None if typed(c) else "") for c in columns} for r in rows]

def tables(examples=45):
    import pyarrow as pa
    from hypothesis import HealthCheck, Phase, given, settings, strategies as st
    from ftnb.prompts import read_template
    count, kind_of, value_of = Counter(), kinds(), values()
    names = {"int": "customer.id", "text": "q:text", "object": "an object"}  # names that Python's formatting would take for more
    column = lambda kind: names.get(kind, kind)
    with tempfile.TemporaryDirectory() as work:
        job, tokenizer = a_job(Path(work))

        @settings(max_examples=examples, derandomize=True, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(st.data(), st.lists(st.sampled_from(sorted(kind_of)), min_size=1, max_size=5, unique=True), st.integers(3, 9),
               st.sampled_from([(1.0, 0.5), (0.7, 0.6), (1.0, 1.0)]), st.booleans())
        def same_rows(data, used, n, shares, only):
            row = st.fixed_dictionaries({kind: st.one_of(*[value_of[kind]] * 8, st.none()) for kind in used} | {"answer": st.one_of(value_of["text"], st.sampled_from("ab"))})
            rows = data.draw(st.lists(row, min_size=n, max_size=n))
            of = {column(kind): kind_of[kind] for kind in used} | {"answer": kind_of["text"]}
            key = {column(kind): kind for kind in used} | {"answer": "answer"}
            rows = [{c: r[key[c]] for c in of} for r in rows]
            given = "".join("%s={%s}\n" % (kind, column(kind)) for kind in used) + "A:"
            template = read_template(SimpleNamespace(prompt_template=None, input_template=given, completion_template="{answer}"), list(of))
            args = replace(job.args, dataset_fraction=shares[0], train_test_split=shares[1])
            this = replace(job, template=template, args=args, settings=replace(job.settings, completion_only=only))
            table = pa.table({c: pa.array([r[c] for r in rows], of[c][0]) for c in of})
            texts = [{c: None if r[c] is None else of[c][1](r[c]) for c in of} for r in rows]
            plain = [{c: None if r[c] is None else of[c][2](r[c]) for c in of} for r in rows]
            with tempfile.TemporaryDirectory(dir=work) as folder:
                folder = Path(folder)
                groups = [[*records(folder, json_files(of, plain)), *typed_folders(folder, table)]]
                (folder/"csv").mkdir()
                (folder/"csv"/"same.json").write_text(as_json(as_csv_has_it(of, texts)), encoding="utf-8")
                groups.append([("project_json", folder/"csv"/"same.json"), *records(folder/"csv", text_files(of, texts))])
                for group, wanted in zip(groups, (texts, as_csv_has_it(of, texts))):
                    first, *others = [(place.name, outcome(this, tokenizer, *record)) for record in group for place in [record[1]]]
                    for name, found in others: assert found == first[1], (name, found, first)
                    if isinstance(first[1], str): count.update(["errors"]); continue
                    good = [r for r in wanted if None not in r.values() and r["answer"].strip()]
                    whole = ["".join("%s=%s\n" % (kind, r[column(kind)]) for kind in used) + "A:" + r["answer"] for r in good]
                    for text, want in zip(first[1][0], whole, strict=True): assert text.startswith(want.rstrip().removesuffix(tokenizer.eos_token).rstrip()), (text, want)
                    count.update({"rows trained": first[1][1]["trained"], "rows held out": first[1][1]["held_out"], "rows dropped": len(first[1][1]["dropped"]), "files": len(group)})
        try: same_rows()
        except Exception: traceback.print_exc()
        else: return check(f"the same text, ledger and tokens from every format ({examples} tables: {dict(count)})", all(count[o] for o in ("rows trained", "rows held out", "rows dropped")))
    check("the same text, ledger and tokens from every format", False)

# What must not make a check endless, in a process of its own: 60 seconds of processor time each, and 2 GiB of memory

HOSTILE = {
    "100,000 CSV columns": ("rows.csv", lambda: ",".join(f"c{i}" for i in range(100_000)) + "\n" + ",".join("1" for _ in range(100_000)) + "\n", "100,000 columns, and 10,000 is the most"),
    "40,000 keys in an object": ("rows.jsonl", lambda: "{%s}\n" % ",".join(f'"k{i}": 1' for i in range(40_000)), "40,000 different keys"),
    "a key 40,000 times": ("rows.jsonl", lambda: "{%s}\n" % ",".join('"k": 1' for _ in range(40_000)), "occurs more than once"),
    "2,000 rows with keys of their own": ("rows.jsonl", lambda: "".join('{"message": "m%d", "intent": "i", "k%d": 1}\n' % (i, i) for i in range(2_000)), "2,000 read"),
    "200,000 rows with keys of their own": ("rows.jsonl", lambda: "".join('{"k%d": 1}\n' % i for i in range(200_000)), "10,000 is the most"),
    "a list 900 deep": ("rows.jsonl", lambda: '{"message": %s%s, "intent": "a"}\n' % ("[" * 900, "]" * 900) * 12, "rows"),
    "EOS and blanks in turn": ("rows.jsonl", lambda: json.dumps(dict(message="a", intent=("</s>" + " " * 30) * 20_000 + "x")) * 1 + "\n" + '{"message": "b", "intent": "c"}\n' * 30, "over max_length"),
    "blanks": ("rows.csv", lambda: "message,intent\n" + "".join(f"m{i},{' ' * 100_000}x\n" for i in range(20)), "over max_length"),
    "quotes": ("rows.csv", lambda: "message,intent\n" + '"' * 2_000_000 + "\n", "1 field, but the header has 2"),
    "a line of 20 MB that is no JSON": ("rows.jsonl", lambda: '{"a": "' + "x\\\\" * 7_000_000 + '\n', "not JSON"),
    "200,000 bad rows": ("rows.csv", lambda: "message,intent\n" + "x\n" * 200_000, "and 199980 more"),
    "a bomb": ("rows.csv.gz", lambda: gzip.compress(b"message,intent\n") + gzip.compress(b"a" * 1_000_000) * 3_000, "more than"),
    "a FIFO": ("rows.csv", None, "a pipe (FIFO), not a regular file"),
    "/dev/zero": ("/dev/zero", None, "a device, not a regular file"),
    "a template of 10 MB": ("template.jsonl", lambda: '{"message": "a", "intent": "b"}\n' * 20, "1,000,000 is the most"),
}

CHILD = """
import os, resource, sqlite3, sys, time
from unittest.mock import patch
from ftnb.jobargs import parse_job_arguments
from ftnb.preflight import check_job, quiet_libraries
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

def hostile():
    from ftnb.demo.project import make_demo_project
    from ftnb.tiny import save_tiny
    with tempfile.TemporaryDirectory() as work:
        project = make_demo_project(Path(work)/"project", save_tiny(Path(work)/"base", kind="bpe"), fraction=1.0)
        places = []
        for i, (name, make, _) in enumerate(HOSTILE.values()):
            path = Path(name) if name.startswith("/") else Path(work)/f"{i}"/name
            places.append(str(path))
            if name.startswith("/"): continue
            path.parent.mkdir()
            if make: path.write_bytes(data if isinstance(data := make(), bytes) else data.encode())
            else: os.mkfifo(path)
        done = subprocess.run([sys.executable, "-c", CHILD, project.job_arguments, *places], capture_output=True, text=True, timeout=1200,
                              env=os.environ | {"FINE_TUNING_STUDIO_SQLITE_DB": str(project.db)})
        reports = re.split(r"SPENT (\d+) (\d+) END OF .*\n", done.stdout)
        if done.returncode: print(done.stderr[-2000:])
        for i, (what, (_, _, said)) in enumerate(HOSTILE.items()):
            report, seconds, peak = (reports[3 * i:3 * i + 3] + ["", 0, 0])[:3] if 3 * i + 2 < len(reports) else ("", 0, 0)
            right = said in report and int(seconds) < 60 and int(peak) < 2048 and len(report) < 20_000
            if not right: print(report[-3000:])
            check(f"{what}: {said!r} ({seconds} s, {peak} MiB so far)", right)

PARTS = {"tables": tables, "hostile": hostile}

def main(chosen=()):
    warnings.simplefilter("ignore")
    for name in chosen or PARTS: PARTS[name]()
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return int(not all(results))

if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
