"House rules that a machine can check, in notebooks and in the modules they export: `python .ci/checks.py`."
import ast, configparser, json, re, subprocess, sys
from importlib.metadata import metadata
from pathlib import Path

import nbformat
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES, MAX_EXPORTS, MAX_BYTES = 25, 2, 100_000
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "pandas", "matplotlib", "sqlalchemy", "fastcore.test",
         "IPython", "ipywidgets"}
NBDEV = {"export", "exporti", "exports", "default_exp", "hide", "hide_input", "hide_output", "hide_line",
         "filter_stream", "eval", "echo", "output", "code-fold", "warning", "fig-cap", "column"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
FOLDERS = (".", "ui", "cluster", "demo")  # of nbs/: a room imports from lower numbers of its folder, and from folders before

SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT/"settings.ini", encoding="utf-8")
FLAGS = set(SETTINGS["DEFAULT"]["tst_flags"].split())

# What stands in a cell
def directives(cell):
    "`#| name: value` lines of a cell, as a dictionary."
    found = re.findall(r"^[ \t]*#[ \t]*\|[ \t]*([\w-]+):?[ \t]*(.*?)[ \t]*$", cell.source, re.M)
    return dict(found) if cell.cell_type == "code" else {}

def exported(cell): return bool({"export", "exporti", "exports"} & directives(cell).keys())

def leaf(cell):
    "Is this cell left out of the ordinary test run?"
    return bool(FLAGS & directives(cell).keys()) or directives(cell).get("eval", "").lower() == "false"

def parsed(cell):
    "The syntax tree of a code cell, magics and shell lines left out."
    source = re.sub(r"(^[ \t]*|= *)[%!]\w.*$", r"\1None", cell.source, flags=re.M)
    if cell.source.lstrip().startswith("%%"): source = ""
    return compile(source, "cell", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

def shallow(node):
    "Nodes that run when the source does: what `ast.walk` gives, less the bodies of functions."
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (*FUNCTIONS, ast.Lambda)): yield from shallow(child)

def bound(nodes):
    "Names that these nodes give a value to."
    for n in nodes:
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store): yield n.id
        elif isinstance(n, DEFINITIONS): yield n.name
        elif isinstance(n, ast.arg): yield n.arg
        elif isinstance(n, ast.alias): yield (n.asname or n.name).split(".")[0]

def imports(nodes, package="ftnb"):
    "Dotted names imported by a module of `package`, one of ours always written `ftnb.x`."
    for n in nodes:
        if isinstance(n, ast.Import): yield from (a.name for a in n.names)
        elif isinstance(n, ast.ImportFrom):
            above = ".".join(package.split(".")[:len(package.split(".")) - n.level + 1]) if n.level else ""
            base = ".".join(filter(None, [above, n.module]))
            yield from (f"{base}.{a.name}" for a in n.names)

def package_of(name): return f"ftnb.{name}".rpartition(".")[0]

# Rules for the modules: (name, tree, {module: its notebook's number}, {top-level names of libraries used})

def from_lower_numbers(name, tree, numbers, libraries):
    own = numbers.get(name, (0, 0))
    for dotted in imports(ast.walk(tree), package_of(name)):
        parts = dotted.split(".")[1:] if dotted.startswith("ftnb.") else []
        room = next((r for r in (".".join(parts[:2]), parts[0] if parts else "") if r in numbers), None)
        if room and numbers[room] >= own: yield f"imports ftnb.{room}, whose notebook doesn't come before its own"

def has_a_notebook(name, tree, numbers, libraries):
    if name not in numbers: yield "no notebook exports it (`#| default_exp`)"

def hides_no_library(name, tree, numbers, libraries):
    if name in libraries: yield "has the name of a library, which it hides when a script of ftnb is run by its path"

def imports_late(name, tree, numbers, libraries):
    for dotted in imports(shallow(tree)):
        heavy = [h for h in HEAVY if f"{dotted}.".startswith(f"{h}.")]
        if heavy: yield f"imports {dotted} at top level: import it inside the function that uses it"

# Rules for the notebooks: each yields (number of the cell, message)

def opens_with_title(nb):
    first = nb.cells[0] if nb.cells else None
    if not first or first.cell_type != "markdown" or not re.match(r"# \S.*\n+> \S", first.source):
        yield 0, "the first cell isn't `# Title` and `> summary`"

def one_definition(nb):
    for i, cell in enumerate(nb.cells):
        if not exported(cell): continue
        body = parsed(cell).body
        defined = sum(isinstance(n, DEFINITIONS) for n in body)
        constants = any(isinstance(n, (ast.Assign, ast.AnnAssign, ast.AugAssign)) for n in body)
        if defined + constants > 1: yield i, f"exports {defined} definitions{', constants' * constants}: one a cell"

def short_cells(nb):
    for i, cell in enumerate(nb.cells):
        lines = sum(bool(o.strip()) and not o.lstrip().startswith("#|") for o in cell.source.splitlines())
        if exported(cell) and lines > MAX_LINES: yield i, f"exports {lines} lines: {MAX_LINES} at most"

def few_definitions_in_a_row(nb):
    row = 0
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "code" or "default_exp" in directives(cell): continue
        defines = any(isinstance(n, DEFINITIONS) for n in parsed(cell).body)  # constants and imports don't count
        row = row + defines if exported(cell) else 0
        if defines and row > MAX_EXPORTS: yield i, f"exports definition {row} in a row: a demo or a test goes first"

def public(body):
    "Public functions and classes, and the public methods of those classes."
    for n in body:
        if not isinstance(n, DEFINITIONS) or n.name.startswith("_"): continue
        yield n
        if isinstance(n, ast.ClassDef): yield from public(n.body)

def parameters(function):
    a = function.args
    found = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
    return found[1:] if found and found[0].arg in ("self", "cls") else found

def documented(nb):
    for i, cell in enumerate(nb.cells):
        lines = cell.source.splitlines()
        for n in public(parsed(cell).body) if exported(cell) else ():
            if not ast.get_docstring(n): yield i, f"{n.name} has no docstring"
            for a in [] if isinstance(n, ast.ClassDef) else parameters(n):
                alone = sum(b.lineno == a.lineno for b in parameters(n)) == 1
                if not alone or "#" not in lines[a.end_lineno - 1]:
                    yield i, f"{n.name}: parameter {a.arg} has no line and comment of its own"

def known_directives(nb):
    for i, cell in enumerate(nb.cells):
        for name in directives(cell).keys() - NBDEV - FLAGS:
            yield i, f"`#| {name}` is neither nbdev's nor in tst_flags of settings.ini, so it does nothing"

def nothing_needs_a_leaf(nb):
    have, leaves = set(), set()
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "code": continue
        tree = parsed(cell)
        here = set(bound(shallow(tree)))
        if leaf(cell): leaves |= here - have; continue
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        for name in sorted(used & leaves - set(bound(ast.walk(tree)))):
            yield i, f"uses {name}, which only a flagged or unevaluated cell before it defines"
        have, leaves = have | here, leaves - here

def texts(output):
    "What an output shows as text, embedded pictures left out."
    for kind, data in output.get("data", {}).items():
        if kind.startswith("text/") or kind.endswith("svg+xml"): yield re.sub(r"base64,[\w+/=\s]+", "", "".join(data))
    yield "".join(output.get("text", ""))

def clean_outputs(nb):
    unwanted = {"a path of this machine": r"(?<![\w.~])/(tmp|root|work|home)/\S*",
                "a progress bar": r"[\d?]\s?(it/s|s/it)\b|\r(?!\n)"}
    for i, output in ((i, o) for i, cell in enumerate(nb.cells) for o in cell.get("outputs", [])):
        if output.output_type == "error": yield i, f"its output is an error: {output.get('ename')}"
        if output.get("name") == "stderr": yield i, f"it writes to stderr: {output.text.strip()[:60]!r}"
        for text in texts(output):
            for what, pattern in unwanted.items():
                found = re.search(pattern, text)
                if found: yield i, f"its output holds {what}: {found[0][:60]!r}"

MODULE_RULES = (from_lower_numbers, has_a_notebook, hides_no_library, imports_late)
NOTEBOOK_RULES = (opens_with_title, one_definition, short_cells, few_definitions_in_a_row, documented, known_directives,
                  nothing_needs_a_leaf, clean_outputs)

# Going round the house

def room_numbers():
    "Module -> where the notebook that exports it stands: the rooms of the job, then each of FOLDERS; `all` comes last."
    numbers = {}
    for path in sorted((ROOT/"nbs").rglob("[0-9]*.ipynb")):
        rooms = [directives(cell).get("default_exp") for cell in nbformat.read(path, 4).cells]
        folder, number = str(path.parent.relative_to(ROOT/"nbs")), re.match(r"(\d+)_", path.name)[1]
        place = (FOLDERS.index(folder) if folder in FOLDERS and number != "99" else len(FOLDERS), int(number))
        numbers.update({room: place for room in rooms if room})
    return numbers

def check_numbers():
    "No two rooms of a folder have the same number."
    for folder in FOLDERS:
        names = [p.name for p in sorted((ROOT/"nbs"/folder).glob("[0-9]*.ipynb"))]
        used = [name.split("_")[0] for name in names]
        yield [f"nbs/{folder}: {name} has the number of another" for name, n in zip(names, used) if used.count(n) > 1]

def check_modules():
    paths = [p for p in sorted((ROOT/"ftnb").rglob("*.py")) if not p.name.startswith("_")]
    trees = {".".join(p.relative_to(ROOT/"ftnb").with_suffix("").parts): ast.parse(p.read_text(encoding="utf-8")) for p in paths}
    used = {dotted.split(".")[0] for name, tree in trees.items() for dotted in imports(ast.walk(tree), package_of(name))}
    required = {re.match(r"[\w-]+", r)[0].replace("-", "_") for r in SETTINGS["DEFAULT"]["requirements"].split()}
    libraries, numbers = (sys.stdlib_module_names | used | required | {"tokenize", "types"}) - {"ftnb"}, room_numbers()
    for name, tree in trees.items():
        for rule in MODULE_RULES: yield [f"ftnb/{name.replace('.', '/')}.py: {m}" for m in rule(name, tree, numbers, libraries)]

def quoted_annotations(tree):
    "(line, first column, last column) of each annotation that is a text, such as `path: \"str | Path\"`: its names needn't be known."
    for n in ast.walk(tree):
        for kind in ("annotation", "returns"):
            found = getattr(n, kind, None)
            for o in ast.walk(found) if found else ():
                if isinstance(o, ast.Constant) and isinstance(o.value, str): yield o.lineno, o.col_offset, o.end_col_offset

def check_names():
    "Names that a module uses and doesn't know, as ruff finds them. In a notebook any name might come of its `import *`."
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "json", "ftnb"]
    found = json.loads(subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, check=False).stdout)
    for path in sorted({Path(o["filename"]) for o in found}):
        quoted = [*quoted_annotations(ast.parse(path.read_text(encoding="utf-8")))]
        places = [(o["message"], o["location"]["row"], o["location"]["column"]) for o in found if Path(o["filename"]) == path]
        yield [f"{path.relative_to(ROOT)}:{row}: {message}" for message, row, column in places
               if not any(row == line and first < column <= last for line, first, last in quoted)]

def check_notebooks():
    for path in sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts):
        nb, where, size = nbformat.read(path, 4), path.relative_to(ROOT), path.stat().st_size
        yield [f"{where}: {size:,} bytes: under {MAX_BYTES:,}"] if size >= MAX_BYTES else []
        for rule in NOTEBOOK_RULES: yield [f"{where} cell {i}: {m}" for i, m in rule(nb)]

# Which Pythons: README, metadata and the workflow say the same, and every requirement runs there

def requirements_of(python):
    "Requirements whose installed version doesn't run on a Python."
    for requirement in SETTINGS["DEFAULT"]["requirements"].split():
        name = re.match(r"[\w-]+", requirement)[0]
        needs = metadata(name)["Requires-Python"] or ""
        if not SpecifierSet(needs).contains(f"{python}.9"): yield f"settings.ini: min_python is {python}, but {name} needs {needs}"

def check_pythons():
    least = SETTINGS["DEFAULT"]["min_python"]
    readme, workflow = ((ROOT/name).read_text(encoding="utf-8") for name in ("README.md", ".github/workflows/ci.yml"))
    project = (ROOT/".project-metadata.yaml").read_text(encoding="utf-8")
    said = {"README.md": re.findall(r"with Python (3\.\d+) or newer", readme), ".project-metadata.yaml": re.findall(r"kernel: Python (3\.\d+)", project),
            ".ci/run": re.findall(r"^least=(3\.\d+)", (ROOT/".ci/run").read_text(encoding="utf-8"), re.M)}
    yield [f"{where}: says Python {', '.join(found) or 'nothing'}, settings.ini {least}" for where, found in said.items() if found != [least]]
    runs = re.findall(r'python: "(3\.\d+)"', workflow)
    yield [] if runs[:1] == [least] and len(runs) > 2 else [f"ci.yml: runs {runs}: {least} first, and those after it"]
    yield [*requirements_of(least)]

def check_tests():
    "Every file of tests is run."
    run = (ROOT/".ci"/"run").read_text(encoding="utf-8")
    names = [p.stem.removeprefix("test_") for p in sorted((ROOT/"tests").glob("test_*.py"))]
    yield [f"tests/test_{name}.py: .ci/run doesn't run it" for name in names
           if not re.search(rf"^\d+ {name} |tests/test_{name}\.py", run, re.M)]

def main():
    results = [*check_modules(), *check_names(), *check_numbers(), *check_notebooks(), *check_pythons(), *check_tests()]
    for line in sum(results, []): print(line)
    failed = sum(map(bool, results))
    print(f"{len(results) - failed} passed, {failed} failed")
    return int(failed > 0 or not results)

if __name__ == "__main__": sys.exit(main())
