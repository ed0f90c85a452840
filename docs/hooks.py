"What mkdocs asks while it builds the site: pages from the notebooks, and an API page a module from its docments."
import ast, json, re, shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, PAGES = ROOT/"nbs", ROOT/"_proc"


# A notebook as its reader sees it

def directives(source): return set(re.findall(r"^#\|\s*([\w-]+)", source, re.M))

def linked(text):
    "Links to notebooks, as links to their pages."
    return re.sub(r"(\]\([^)\s:]+)\.ipynb(?=[)#])", r"\1.html", text)

def shown(cell):
    "A cell without nbdev's own lines; None where it is hidden."
    source = "".join(cell["source"])
    flags = directives(source)
    if flags & {"hide", "default_exp"} or not source.strip(): return None
    source = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
    if cell["cell_type"] == "markdown": source = linked(source)
    tags = sorted(flags & {"hide_input", "hide_output"})
    return {**cell, "source": source, "metadata": {**cell["metadata"], **({"tags": tags} if tags else {})}}

def put_notebook(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["cells"] = [cell for cell in map(shown, notebook["cells"]) if cell]
    place = PAGES/path.relative_to(NBS)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(notebook), encoding="utf-8")
    return place

def title(path):
    "The heading of a page."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb": text = "".join(json.loads(text)["cells"][0]["source"])
    return re.search(r"^# (.+)", text, re.M)[1].replace("`", "")


# A module's names, from its source

def is_patch(node): return any(getattr(d, "id", getattr(getattr(d, "func", None), "id", "")) == "patch" for d in node.decorator_list)

def name_of(node):
    "`f`, or `Class.f` for a method that is added to a class."
    return f"{node.args.args[0].annotation.id}.{node.name}" if is_patch(node) else node.name

def signature(node, lines):
    "A function up to its docstring, as it is written, comments and all."
    return "\n".join(line for line in lines[node.lineno - 1:node.body[0].lineno - 1]).rstrip()

def fields(node, lines):
    "What a class says before its first method, less its docstring."
    body = node.body[1:] if ast.get_docstring(node) else node.body
    plain = [n for n in body if isinstance(n, (ast.Assign, ast.AnnAssign))]
    return [line for n in plain for line in lines[n.lineno - 1:n.end_lineno]]

def described(node, lines, level=3, name=None):
    "A name's heading, its docstring and how it is called."
    yield f"{'#' * level} {name or name_of(node)}\n\n{ast.get_docstring(node) or ''}\n"
    if not isinstance(node, ast.ClassDef):
        yield f"```python\n{signature(node, lines)}\n```\n"
        return
    if inside := fields(node, lines): yield "\n".join(["```python", f"class {node.name}:", *inside, "```\n"])
    for method in node.body:
        if not isinstance(method, ast.FunctionDef): continue
        if method.name == "__init__": yield f"```python\n{signature(method, lines)}\n```\n"
        elif not method.name.startswith("_"): yield from described(method, lines, level + 1, f"{node.name}.{method.name}")

def api_page(path):
    "A module's public functions and classes; None where it has none."
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    public = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    if not public: return None
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    source = re.search(r"File to edit: \.\./(?:\.\./)*nbs/(\S+)\.ipynb", text)
    more = f"\n\nHow it works, and its tests: [{source[1]}](../{source[1]}.ipynb)." if source else ""
    parts = [part for node in public for part in described(node, lines)]
    place = PAGES/"api"/f"{module}.md"
    place.write_text(f"# {module}\n\n{ast.get_docstring(tree) or ''}{more}\n\n" + "\n".join(parts), encoding="utf-8")
    return place


def names_page(path):
    "What a star brings, by the module where each name is described; the pages of the modules are there already."
    tree, found = ast.parse(path.read_text(encoding="utf-8")), {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom): found.setdefault(f"ftnb.{node.module}", []).extend(alias.name for alias in node.names)
    def linked_module(module): return f"[{module}]({module}.md)" if (PAGES/"api"/f"{module}.md").exists() else module
    lines = [f"- {linked_module(module)}: " + ", ".join(f"`{name}`" for name in names) for module, names in found.items()]
    place = PAGES/"api"/"ftnb.all.md"
    place.write_text(f"# ftnb.all\n\n{ast.get_docstring(tree)}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return place


# The table of contents

GROUPS = {".": "The job", "ui": "What you see", "cluster": "On a cluster", "demo": "To try it on"}  # folder of nbs/ and of ftnb/ -> heading

def number(path):
    "Where a room stands."
    return int(re.match(r"\d+", path.name)[0])

def listed(pages): return [{title(p): str(p.relative_to(PAGES))} for p in pages]

def room_pages(notebooks):
    "Rooms under the headings of their folders, in the order of their numbers; the list of all names comes last."
    sections, last = [], []
    for folder, heading in GROUPS.items():
        rooms = [p for p in notebooks if re.match(r"\d", p.name) and p.parent == PAGES/folder]
        rooms.sort(key=number)
        last += [p for p in rooms if number(p) == 99]
        sections.append({heading: listed(p for p in rooms if number(p) < 99)})
    return sections + listed(last)

def api_pages():
    "A page a module, under the same headings."
    sections = []
    for folder, heading in GROUPS.items():
        modules = sorted((ROOT/"ftnb"/folder).glob("[a-z]*.py"))
        sections.append({heading: listed(page for path in modules if (page := api_page(path)))})
    return [*listed([names_page(ROOT/"ftnb"/"all.py")]), *sections]


# mkdocs

def on_config(config):
    "Make the pages, and the table of contents: tutorials, guides by task, rooms, API."
    shutil.rmtree(PAGES, ignore_errors=True)
    notebooks = [put_notebook(p) for p in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    shutil.copytree(NBS/"images", PAGES/"images")
    shutil.copy(Path(__file__).parent/"extra.css", PAGES)
    guides = [Path(shutil.copy(p, PAGES)) for p in sorted((Path(__file__).parent/"guides").glob("*.md"))]  # its links are the site's
    tutorials = sorted((p for p in notebooks if p.parent.name == "tutorials"), key=number)
    measured = [p for p in notebooks if p.parent.name == "benchmarks"]
    (PAGES/"api").mkdir()
    config.docs_dir = str(PAGES)
    config.nav = [{"Home": "index.ipynb"}, {"Tutorials": listed(tutorials)}, {"Guides": listed(guides)},
                  {"Rooms": room_pages(notebooks)}, {"Measured": listed(measured)}, {"API": api_pages()}]
    return config
