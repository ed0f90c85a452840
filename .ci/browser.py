"""A newcomer's first hour in JupyterLab, in headless Chromium: `python .ci/browser.py`.

The first tutorial from top to bottom; then the form: a wrong field, a run that is watched, stopped, resumed and left alone,
base against adapter. `--pictures nbs/images` also writes the README's pictures. Chromium must be there (Debian: `apt-get
install chromium`); all files go into a temporary folder, and every process is looked for at the end.
"""
import argparse, base64, json, os, re, shutil, socket, sqlite3, subprocess, sys, tempfile, time, traceback, urllib.request, uuid
from contextlib import closing, contextmanager
from io import BytesIO
from pathlib import Path

import nbformat, psutil
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image
from playwright.sync_api import Error, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = "1_first_run.ipynb"
START = time.monotonic()
END, WAIT = START + 570, 240  # seconds: of the whole test, and at most for one thing
EPOCHS = 20  # of the form's run, 18 steps each
MARK = {"FTNB_BROWSER_TEST": uuid.uuid4().hex}  # in the environment of every process that comes of this test
results = []

FORM = [new_markdown_cell("# A form"), new_code_cell("""\
import pandas as pd
from ftnb.all import *

quiet_libraries()
messages = pd.read_csv(demo_data())
four = ["gift_card", "invoice_request", "newsletter_stop", "reset_password"]
messages[messages.intent.isin(four)].to_csv("messages.csv", index=False)
base = save_tiny("base", kind="qwen", initializer_range=0.2, seed=1)
project = make_demo_project(".", base, "messages.csv", training=DEMO_TRAINING | {"eval_strategy": "epoch"})"""),
        new_code_cell("form = Form(project.db)\nform")]


def check(what, right, note=""):
    results.append(bool(right))
    print(f"{'ok' if right else 'FAILED'}: {what}" + f" ({note})" * bool(note) + f", {time.monotonic() - START:.0f} s", flush=True)

def patience(): return max(1.0, min(WAIT, END - time.monotonic()))

def until(what, test, pause=lambda: time.sleep(0.2)):
    "Wait for a condition, and return what it gave."
    end = time.monotonic() + patience()
    while not (found := test()):
        if time.monotonic() > end: raise TimeoutError(f"waited in vain for this: {what}")
        pause()
    return found


# Processes

def ours():
    "Every process with the mark in its environment, but for this one."
    found = []
    for process in psutil.process_iter():
        try: marked = process.pid != os.getpid() and MARK.items() <= process.environ().items() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error: continue
        if marked: found.append(process)
    return found

def end_all():
    "Give what is left a while, then end it; returns what had to be ended."
    end = time.monotonic() + 60
    while (left := ours()) and time.monotonic() < end: time.sleep(0.5)
    names = []
    for process in left:
        try: names.append(" ".join(process.cmdline())[:120]); process.kill()
        except psutil.Error: pass
    return names

@contextmanager
def jupyter_lab(work):
    "JupyterLab on a folder, without the settings of whoever runs this; gives the address and the token of its pages."
    home, token = work/"jupyter", uuid.uuid4().hex
    settings = home/"settings"/"@jupyterlab"/"apputils-extension"
    for made in (settings, work/"nb", work/"tmp"): made.mkdir(parents=True)
    (settings/"notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    own = {f"JUPYTER_{k}": str(home/k.lower()) for k in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")} | {"IPYTHONDIR": str(home/"ipython")}
    env = {**os.environ, **MARK, **own, "TMPDIR": str(work/"tmp"), "JUPYTERLAB_SETTINGS_DIR": str(home/"settings"),
           "JUPYTERLAB_WORKSPACES_DIR": str(home/"workspaces"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip", "127.0.0.1", "--port", str(port), "--allow-root",
               "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={work/'nb'}", "--LabApp.expose_app_in_browser=True"]
    with open(work/"lab.log", "wb") as log: lab = subprocess.Popen(command, env=env, cwd=work/"nb", stdout=log, stderr=subprocess.STDOUT)
    def answers():
        if lab.poll() is not None: raise RuntimeError("JupyterLab ended: " + (work/"lab.log").read_text()[-2000:])
        try: return urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}", timeout=5).status == 200
        except OSError: return False
    try:
        until("JupyterLab answers", answers)
        yield f"http://127.0.0.1:{port}/lab/tree/", f"?token={token}"
    finally:
        lab.terminate()
        try: lab.wait(60)
        except subprocess.TimeoutExpired: lab.kill(); lab.wait()

def find_chromium():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None: sys.exit("no Chromium here: on Debian, apt-get install chromium\n0 passed, 1 failed")
    return found

@contextmanager
def chromium():
    "A browser, and the errors that its pages report."
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox", "--disable-dev-shm-usage"], env={**os.environ, **MARK})
        try: yield browser.new_context(viewport={"width": 1180, "height": 1700}, device_scale_factor=1.5)
        finally: browser.close()


# A page of JupyterLab

STATE = """() => {
    const panel = window.jupyterapp?.shell?.currentWidget, kernel = panel?.sessionContext?.session?.kernel
    if (!kernel || !panel.context?.isReady || !panel.sessionContext.isReady) return null
    const cells = panel.content.widgets.filter(c => c.model.type === 'code'), outputs = cells.flatMap(c => c.model.outputs.toJSON())
    return {path: panel.context.path, kernel: kernel.status, counts: cells.map(c => c.model.executionCount),
            errors: outputs.filter(o => o.output_type === 'error').map(o => `${o.ename}: ${o.evalue}`)}
}"""
COMMAND = "([name, args]) => { window.jupyterapp.commands.execute(name, args) }"  # its promise isn't waited for
NEW_CELL = """async source => {
    const notebook = window.jupyterapp.shell.currentWidget.content
    notebook.activeCellIndex = notebook.widgets.length - 1
    await window.jupyterapp.commands.execute('notebook:insert-cell-below')
    notebook.activeCell.model.sharedModel.setSource(source)
    window.jupyterapp.commands.execute('notebook:run-cell')
}"""
PICTURE = """async image => {
    if (!image.complete || !image.naturalWidth) return null
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer())
    return btoa(Array.from(bytes, b => String.fromCharCode(b)).join(''))
}"""

class Notebook:
    "A notebook that is open in JupyterLab."
    def __init__(self, context, address, folder, errors):
        self.context, self.address, self.folder, self.errors, self.page = context, address, folder, errors, None

    def open(self, name):
        "In a new tab; the one before is closed."
        if self.page: self.page.close()
        self.page, self.name = self.context.new_page(), name
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.set_default_timeout(1000 * patience())
        self.page.goto(name.join(self.address))
        self.wait("the notebook is open", lambda s: s["path"] == name and s["kernel"] == "idle")
        self.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
        self.root = self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")

    def pause(self): self.page.wait_for_timeout(200)
    def until(self, what, test): return until(what, test, self.pause)
    def command(self, name, **args): self.page.evaluate(COMMAND, [name, args])
    def state(self): return self.page.evaluate(STATE)
    def wait(self, what, test): return self.until(what, lambda: (s := self.state()) and test(s) and s)

    def run_all(self):
        "A run-all can be lost just after a kernel has started: nothing was begun, and the kernel is idle."
        for _ in range(10):
            self.command("notebook:run-all-cells")
            for _ in range(75):
                s = self.state()
                if s and (s["kernel"] == "busy" or any(s["counts"])): return
                self.pause()
        raise TimeoutError("the cells aren't run")

    def run(self, source):
        "In a new cell, below all others."
        self.page.evaluate(NEW_CELL, source)

    def finished(self):
        "Wait for the cells; a traceback among their outputs ends the test."
        s = self.wait("all cells have run", lambda s: s["errors"] or all(s["counts"]) and s["kernel"] == "idle")
        if s["errors"]: raise RuntimeError("; ".join(s["errors"]))

    def saved(self):
        "The notebook as it is in its file."
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        return nbformat.read(self.folder/self.name, 4)

    def output(self, source):
        "What the cell with this source shows."
        return self.root.locator(".jp-CodeCell", has_text=source).locator(".jp-OutputArea-output").last

    def widgets_say(self, pattern):
        "What matches in the text of the widgets, or None."
        return next((m for text in self.root.locator(".widget-html-content").all_inner_texts() if (m := re.search(pattern, text))), None)

    def step(self):
        "Where the picture of a run says that it is."
        found = self.widgets_say(r"^(\w+) .*· step ([\d,]+) of")
        return (found[1], int(found[2].replace(",", ""))) if found else ("", -1)

    def picture(self):
        "The bytes of the picture of a run."
        try: return base64.b64decode(self.root.locator("img.widget-image").last.evaluate(PICTURE, timeout=5000) or b"")
        except Error: return b""  # it was being replaced

    def row(self, label, number=-1):
        "The row of a field in the form; of several with one label, the last."
        return self.root.locator(".widget-hbox:not(:has(.widget-hbox))", has=self.page.get_by_label(label, exact=True)).nth(number)

    def fill(self, **fields):
        for label, value in fields.items(): self.row(label.replace("_", " ")).locator("input[type=text]").fill(str(value))

    def button(self, name): return self.root.get_by_role("button", name=re.compile(rf"^\W*{name}$"))  # before its name stands its icon
    def press(self, name): self.button(name).click()
    def can(self, name): return self.button(name).is_enabled()


# Pictures

def few_colours(image, n):
    "Also the rare ones are kept; white stays white."
    few = image.quantize(n, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.putpalette([255 if v > 252 else v for v in few.getpalette()])
    return few

def png(shot):
    "A screenshot with few colours."
    out = BytesIO()
    few_colours(Image.open(BytesIO(shot)).convert("RGB"), 128).save(out, "PNG", optimize=True)
    return out.getvalue()

def animation(shots, width=760):
    "Screenshots as one GIF; the last one stays longer."
    frames = [Image.open(BytesIO(s)).convert("RGB") for s in shots]
    high = max(f.height for f in frames)
    def paper(f):
        page = Image.new("RGB", (frames[0].width, high), "white")
        page.paste(f)
        return few_colours(page.resize((width, high * width // page.width), Image.Resampling.LANCZOS), 32)
    first, *rest = map(paper, frames)
    out = BytesIO()
    first.save(out, "GIF", save_all=True, append_images=rest, duration=[700] * len(rest) + [3000], loop=0, optimize=True)
    return out.getvalue()

def part(notebook, first, last, margin=8, above=8):
    "A screenshot from the top of one thing to the bottom of another."
    for end in (last, first): end.scroll_into_view_if_needed()
    a, b = first.bounding_box(), last.bounding_box()
    clip = dict(x=a["x"] - margin, y=a["y"] - above, width=a["width"] + 2 * margin, height=b["y"] + b["height"] - a["y"] + 2 * above)
    return notebook.page.screenshot(clip=clip)


# What a newcomer does

def tutorial(notebook, pictures):
    "Open the tutorial, and run it from top to bottom."
    shutil.copy(ROOT/"nbs"/"tutorials"/TUTORIAL, notebook.folder/TUTORIAL)
    notebook.open(TUTORIAL)
    notebook.run_all()
    seen = set()
    def over():
        if bytes_ := notebook.picture(): seen.add(bytes_)
        s = notebook.state()
        return s and (s["errors"] or all(s["counts"]) and s["kernel"] == "idle") and s
    errors = notebook.until("the tutorial has run", over)["errors"]
    check("the tutorial runs from top to bottom", not errors, "; ".join(errors))
    notebook.until("the picture says that the run is finished", lambda: notebook.step()[0] == "finished")
    check("its picture moves while its kernel trains", len(seen) > 2, f"{len(seen)} pictures")
    shown = notebook.output("preview(rows.train").inner_text()
    check("the tokens that carry loss are shown", "tokens carry loss" in shown)
    pictures["preview.png"] = png(part(notebook, *2 * [notebook.output("preview(rows.train")], above=0))
    said = notebook.output("compare(base").inner_text()
    check("base and adapter are compared", all(o in said for o in ("perplexity", "base", "adapter")))
    bad_outputs(notebook)
    left_alone(notebook, "finished")

def bad_outputs(notebook):
    "Errors, and what was written to stderr, in the saved notebook."
    outputs = [o for c in notebook.saved().cells for o in c.get("outputs", ())]
    bad = [str(o.get("evalue") or o.get("text"))[:200] for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    check(f"{notebook.name}: no output is an error", not bad, "; ".join(bad))
    return outputs

def open_form(notebook):
    nbformat.write(new_notebook(cells=FORM, metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))), notebook.folder/"form.ipynb")
    notebook.open("form.ipynb")
    notebook.run_all()
    notebook.finished()
    notebook.until("the form has checked its job", lambda: notebook.widgets_say("the job can run|to put right"))
    notebook.row("Quantisation").locator("select").select_option(label="none")
    for label in ("Base model", "Data set", "Prompt"): notebook.row(label).locator("select").select_option(index=1)
    check("the form says what the run comes to", notebook.until("a time is told", lambda: notebook.widgets_say(r"time\s+about")))

def form_top(notebook): return part(notebook, notebook.root.locator(".widget-hbox:has(> .widget-vbox)").first, notebook.row("Quantisation"))

def wrong_field(notebook, pictures):
    "A remark stands beside its field while it is wrong."
    remark = notebook.row("Rank").get_by_role("alert")
    check("nothing is marked at first", remark.count() == 0 and notebook.can("Train here"))
    notebook.fill(Rank=-1, Dropout=0.5)
    remark.wait_for()
    notebook.row("Dropout").get_by_role("alert").wait_for()
    check("a wrong rank is marked beside its field", "r is -1" in remark.inner_text(), remark.inner_text())
    notebook.until("the button is off", lambda: not notebook.can("Train here"))
    check("with it, the run can't be started", not notebook.can("Resume"))
    notebook.until("the panel tells of it", lambda: notebook.widgets_say("^Put right what is marked"))
    pictures["form_error.png"] = png(form_top(notebook))
    notebook.fill(Rank=8, Dropout=0)
    remark.wait_for(state="detached")
    notebook.row("Dropout").get_by_role("alert").wait_for(state="detached")
    check("the remarks go when the fields are mended", notebook.until("the button is on", lambda: notebook.can("Train here")))

def fill_form(notebook, epochs):
    "The rest of the fields."
    for number in (0, 1): notebook.row("Begin with", number).locator("select").select_option(index=1)  # the project's own settings
    value = lambda label: float(notebook.row(label).locator("input").input_value())
    notebook.until("their values are in the fields", lambda: (value("Rank"), value("Learning rate")) == (16, 1e-3))
    notebook.fill(Learning_rate=5e-3, Share_to_train_on=0.8, Epochs=epochs, Batch=8, Accumulation=1, **{"Adapter's_name": "shop-intents"})
    notebook.row("Register it in the Studio").locator("input[type=checkbox]").check()
    notebook.until("the job is checked again", lambda: notebook.widgets_say(rf"steps\s+{18 * epochs:,} of 8 rows"))
    notebook.until("the run can be started", lambda: notebook.can("Train here"))
    check("the filled form can be run", notebook.widgets_say("the job can run"))
    notebook.until("its time is told", lambda: notebook.widgets_say(r"time\s+about"))

def monitor_shot(notebook):
    "The picture of the run, and what stands above it."
    parts = notebook.root.locator(".widget-vbox:has(> img.widget-image)").last.locator("> *")
    return part(notebook, parts.first, parts.nth(1), margin=0, above=0)

def jobs(): return [p for p in ours() if any(o.endswith("finetune.py") for o in p.cmdline())]

@contextmanager
def held(job):
    "Within this, a job waits: on a busy machine a tiny run would else be over before the browser has done its part."
    job.suspend()
    try: yield
    finally: job.resume()

def run_folder(notebook): return max(notebook.folder.glob("runs/*"), key=os.path.getmtime)
def last_step(notebook): return json.loads((run_folder(notebook)/"metrics.jsonl").read_text().rpartition("\n")[0].splitlines()[-1])["step"]  # of its whole lines

def watch(notebook, job, moves, shots):
    "Look on until step and picture have changed so many times; the job waits where it is far ahead of what is shown."
    steps, seen = set(), set()
    def moved():
        if last_step(notebook) > notebook.step()[1] + 20: job.suspend()
        else: job.resume()
        (state, step), new = notebook.step(), notebook.picture()
        if state != "running" or not new: return False
        if new not in seen: shots.append(monitor_shot(notebook))
        steps.add(step); seen.add(new)
        return len(steps) > moves and len(seen) > moves
    try: notebook.until("the curve moves", moved)
    finally: job.resume()
    return len(steps), len(seen)

def train(notebook, moves, shots):
    "Start a run, watch it, use the notebook meanwhile, stop it."
    notebook.press("Train here")
    notebook.until("the run has begun", lambda: notebook.step()[0] == "running")
    job, = jobs()
    steps, seen = watch(notebook, job, moves, shots)
    check("the curve moves while the form's job trains", steps > 2 and seen > 2, f"{steps} steps, {seen} pictures seen")
    with held(job):
        notebook.run("6 * 7")
        notebook.finished()
        check("the notebook can be used meanwhile", notebook.output("6 * 7").inner_text() == "42")
        notebook.press("Stop")
        check("Stop says what it does", notebook.until("what will happen is said", lambda: notebook.widgets_say("will stop after this step")))
    notebook.until("the form says that the run has stopped", lambda: notebook.widgets_say("not running any more"))
    state, step = notebook.until("the picture says so, too", lambda: (s := notebook.step())[0] in ("stopped", "finished") and s)
    check("it ends before its end", state == "stopped" and not jobs(), f"step {step:,}")
    check("and can be gone on with", notebook.until("Resume is on", lambda: notebook.can("Resume")))

def resume(notebook, steps, shots):
    "Go on, close the tab, come back, and see the run end."
    before = last_step(notebook)
    notebook.press("Resume")
    notebook.until("the run goes on", lambda: last_step(notebook) > before)
    job, = jobs()
    with held(job):
        log = (run_folder(notebook)/"output.log").read_text()
        check("Resume goes on from the checkpoint", f"going on from {run_folder(notebook)/f'checkpoint-{before}'}" in log, f"step {before:,} of {steps:,}")
        notebook.saved()
        notebook.page.close()
        notebook.page = None
    until("the run goes on without its tab", lambda: not jobs() or last_step(notebook) > before + 40)
    notebook.open("form.ipynb")
    notebook.button("Train here").wait_for()
    notebook.until("the form, opened again, says that the run is done", lambda: notebook.widgets_say(r"^trained$"))
    notebook.until("the picture says so, too", lambda: notebook.step() == ("finished", steps))
    check("a closed tab does it no harm, and it finishes", not jobs() and not notebook.can("Resume") and not notebook.can("Stop"))
    shots.append(monitor_shot(notebook))

def adapter_rows(notebook):
    with closing(sqlite3.connect(notebook.folder/".app"/"state.db")) as con: return con.execute("SELECT name, location FROM adapters").fetchall()

def compared(notebook):
    "Base against adapter, in a new cell."
    notebook.run("form.compare()")
    notebook.finished()
    text = "\n".join(o.data["text/plain"] for o in bad_outputs(notebook) if "perplexity" in o.get("data", {}).get("text/plain", ""))
    loss = {m[1]: float(m[2]) for m in re.finditer(r"^(base|shop-intents) +([\d.]+)", text, re.M)}
    check("the adapter has learnt", loss and loss["shop-intents"] < loss["base"] / 2, str(loss))

SEEN = """() => [...document.querySelectorAll('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-OutputArea-child')]
    .filter(o => o.offsetParent !== null).map(o => ({text: o.innerText, still: !!o.querySelector('.ftnb-still'), picture: !!o.querySelector('.ftnb-still img')}))"""

def left_alone(notebook, words):
    "Save, end the kernel, load the page again: a still stands where the widgets were, and no error."
    check(f"{notebook.name}: no still is seen while the widgets live", not any(o["still"] for o in notebook.page.evaluate(SEEN)))
    notebook.saved()
    notebook.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    notebook.open(notebook.name)
    lost = lambda: "model not found" in notebook.root.inner_html()
    notebook.until("JupyterLab has given up on the widgets", lost)
    seen = notebook.page.evaluate(SEEN)
    stills = [o for o in seen if o["still"]]
    check(f"{notebook.name}: its widgets' last words stay", any(words in o["text"] for o in stills), f"{len(stills)} stills")
    check(f"{notebook.name}: with the picture of the run", any(o["picture"] for o in stills))
    check(f"{notebook.name}: no error is seen in their place", not any("Error displaying widget" in o["text"] for o in seen))
    notebook.errors[:] = [e for e in notebook.errors if "widget model not found" not in e]  # said where only a developer looks

def form(notebook, pictures, moves):
    shots = []
    open_form(notebook)
    wrong_field(notebook, pictures)
    fill_form(notebook, EPOCHS)
    train(notebook, moves, shots)
    resume(notebook, 18 * EPOCHS, shots)
    check("the adapter is registered", [n for n, place in adapter_rows(notebook) if Path(place, "adapter_model.safetensors").exists()] == ["shop-intents"])
    pictures["run_live.gif"] = animation(shots[:-1:2] + shots[-1:])
    compared(notebook)
    left_alone(notebook, "run this cell again")

def drive(work, pictures, errors, moves):
    "Everything in one browser; a picture of the page is kept where it goes wrong."
    with jupyter_lab(work) as address, chromium() as context:
        notebook = Notebook(context, address, work/"nb", errors)
        try: tutorial(notebook, pictures); form(notebook, pictures, moves)
        except Exception:
            if notebook.page:
                kept = Path(tempfile.mkdtemp(prefix="ftnb_browser_"))/"page.png"
                notebook.page.screenshot(path=kept)
                print(f"the page as it was: {kept}")
            raise

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, help="folder for the README's pictures")
    given, pictures, errors = parser.parse_args(), {}, []
    find_chromium()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        work = Path(work).resolve()
        try: drive(work, pictures, errors, moves=9 if given.pictures else 3)
        except Exception: check("all of it can be done", False, traceback.format_exc())
        finally: left = end_all()
        check("no process is left", not left, "; ".join(left))
    check("the browser reports no error", not errors, "; ".join(dict.fromkeys(errors))[:2000])
    for name, data in pictures.items() if given.pictures else ():
        (given.pictures/name).write_bytes(data)
        print(f"{given.pictures/name}: {len(data):,} bytes")
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return int(not all(results))

if __name__ == "__main__": sys.exit(main())
