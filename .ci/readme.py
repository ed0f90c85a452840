"README.md from nbs/index.ipynb: `python .ci/readme.py` writes it, `python .ci/readme.py --check` only compares."
import posixpath, re, sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


def with_paths(text):
    "Links and images that are relative to the notebook, written as the README sees them."
    def moved(m): return m[1] + posixpath.normpath(f"nbs/{m[2]}")
    relative = r"(?!\w+:|[/#])([^\s)\"']+)"  # no https:, no /absolute, no #heading
    text = re.sub(rf"(\]\(){relative}", moved, text)
    return re.sub(rf"(<(?:img|a)\b[^>]*?\b(?:src|href)=[\"']){relative}", moved, text)

def fenced(text, language=""): return f"```{language}\n{text.strip(chr(10))}\n```"

def shown(output):
    "What an output shows in plain Markdown, or None."
    data = output.get("data", {})
    if "text/markdown" in data: return with_paths(data["text/markdown"])
    text = output.get("text", data.get("text/plain"))
    return fenced(text) if text and "image/png" not in data else None

def parts(nb):
    "The README's blocks, in order; nbdev's own lines never show."
    for cell in nb.cells:
        flags = set(re.findall(r"^#\|\s*([\w-]+)", cell.source, re.M))
        source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
        if flags & {"hide", "default_exp"} or not source: continue
        if cell.cell_type == "markdown": yield with_paths(source)
        if cell.cell_type != "code": continue
        if "hide_input" not in flags: yield fenced(source, "python")
        if "hide_output" not in flags: yield from filter(None, map(shown, cell.outputs))

def main():
    text = "\n\n".join(parts(nbformat.read(ROOT/"nbs"/"index.ipynb", 4))) + "\n"
    readme = ROOT/"README.md"
    if "--check" not in sys.argv[1:]: readme.write_text(text, encoding="utf-8")
    elif readme.read_text(encoding="utf-8") != text: sys.exit("README.md isn't nbs/index.ipynb: run python .ci/readme.py")

if __name__ == "__main__": main()
