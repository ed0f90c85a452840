"JupyterLab in headless Chromium, for the tests that look at a page as a person does."
import base64
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import nbformat
import psutil
from playwright.sync_api import Error, sync_playwright

WAIT = 600  # seconds, at most for one thing
MARK = {"FTNB_BROWSER_TEST": uuid.uuid4().hex}  # in the environment of every process that comes of these tests


def until(what, test, pause=lambda: time.sleep(0.2)):
    "Wait for a condition, and return what it gave."
    end = time.monotonic() + WAIT
    while not (found := test()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited in vain for this: {what}")
        pause()
    return found


# Processes

def is_ours(process):
    "Has it the mark in its environment, and isn't it this one?"
    if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
        return False
    return MARK.items() <= process.environ().items()


def our_processes():
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if is_ours(process):
                found.append(process)
    return found


def jobs():
    found = []
    for process in our_processes():
        with suppress(psutil.Error):
            if any(word.endswith("finetune.py") for word in process.cmdline()):
                found.append(process)
    return found


def end_all():
    "Give what is left a while, then end it; returns what had to be ended."
    end = time.monotonic() + 300
    while (left := our_processes()) and time.monotonic() < end:
        time.sleep(0.5)
    names = []
    for process in left:
        with suppress(psutil.Error):
            names.append(" ".join(process.cmdline())[:120])
            process.kill()
    return names


@contextmanager
def held(job):
    "Within this, a job waits: on a busy machine a tiny run would else be over before the browser has done its part."
    job.suspend()
    try:
        yield
    finally:
        job.resume()


# The server and the browser

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def jupyter_lab(work):
    "JupyterLab on a folder, without the settings of whoever runs this; gives the address and the token of its pages."
    home, token, port = work/"jupyter", uuid.uuid4().hex, free_port()
    settings = home/"settings"/"@jupyterlab"/"apputils-extension"
    for made in (settings, work/"nb", work/"tmp"):
        made.mkdir(parents=True)
    quiet = '{"fetchNews": "false", "checkForUpdates": false}'
    (settings/"notification.jupyterlab-settings").write_text(quiet)
    own = {f"JUPYTER_{name}": str(home/name.lower()) for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")}
    env = {**os.environ, **MARK, **own, "IPYTHONDIR": str(home/"ipython"), "TMPDIR": str(work/"tmp"),
           "JUPYTERLAB_SETTINGS_DIR": str(home/"settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home/"workspaces"),
           "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip", "127.0.0.1", "--port", str(port), "--allow-root",
               "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={work/'nb'}",
               "--LabApp.expose_app_in_browser=True"]
    with open(work/"lab.log", "wb") as log:
        lab = subprocess.Popen(command, env=env, cwd=work/"nb", stdout=log, stderr=subprocess.STDOUT)

    def answers():
        if lab.poll() is not None:
            raise RuntimeError("JupyterLab ended: " + (work/"lab.log").read_text()[-2000:])
        with suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}", timeout=60).status == 200
    try:
        until("JupyterLab answers", answers)
        yield f"http://127.0.0.1:{port}/lab/tree/", f"?token={token}"
    finally:
        lab.terminate()
        try:
            lab.wait(300)
        except subprocess.TimeoutExpired:
            lab.kill()
            lab.wait()


def find_chromium():
    "Its path, or None. Debian: `apt-get install chromium`."
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def chromium():
    "A browser's context."
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox", "--disable-dev-shm-usage"],
                                    env={**os.environ, **MARK})
        try:
            yield browser.new_context(viewport={"width": 1180, "height": 1700}, device_scale_factor=1.5)
        finally:
            browser.close()


# The hub

class Unanswering(BaseHTTPRequestHandler):
    "A hub that takes questions and answers none of them."
    def wait(self):
        self.server.asked.append(self.path)
        self.server.over.wait()
        self.close_connection = True
    do_GET = do_HEAD = do_POST = wait

    def log_message(self, *args):
        pass


@contextmanager
def silent_hub():
    "A hub that never answers; its `address`, and what it was `asked`."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Unanswering)
    server.daemon_threads, server.asked, server.over = True, [], threading.Event()
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


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
PICTURE_OF_RUN = ".widget-html-content img.ftnb-picture"  # the live one, not that of a still
THEME = """async name => {
    await window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})
}"""
SCROLLING = """() => [...document.querySelectorAll('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-OutputArea-output *')].filter(e => {
    const look = getComputedStyle(e), scrolls = way => way === 'auto' || way === 'scroll'
    if (e.closest('[role=log]') || ['TEXTAREA', 'SELECT', 'INPUT'].includes(e.tagName) || !e.clientHeight) return false
    return scrolls(look.overflowX) && e.scrollWidth > e.clientWidth + 1 || scrolls(look.overflowY) && e.scrollHeight > e.clientHeight + 1
}).map(e => `${e.tagName}.${e.className}: ${e.innerText.slice(0, 60)}`)"""
FOCUSED = """() => {
    const e = document.activeElement, label = e.labels?.[0]?.innerText || e.getAttribute('aria-label') || e.innerText || e.title
    return e === document.body ? null : label.trim()
}"""
RESTART = "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()"
SHUT_DOWN = "() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()"


class Notebook:
    "A notebook that is open in JupyterLab."
    def __init__(self, context, address, folder, errors):
        self.context, self.address, self.folder, self.errors, self.page = context, address, folder, errors, None

    def open(self, name):
        "In a new tab; the one before is closed."
        self.close()
        self.page, self.name = self.context.new_page(), name
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.set_default_timeout(1000 * WAIT)
        self.page.goto(name.join(self.address))
        self.wait("the notebook is open", lambda s: s["path"] == name and s["kernel"] == "idle")
        self.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
        self.root = self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")

    def close(self):
        if self.page:
            self.page.close()
        self.page = None

    def pause(self):
        self.page.wait_for_timeout(200)

    def until(self, what, test):
        return until(what, test, self.pause)

    def command(self, name, **args):
        self.page.evaluate(COMMAND, [name, args])

    def state(self):
        return self.page.evaluate(STATE)

    def wait(self, what, test):
        return self.until(what, lambda: (s := self.state()) and test(s) and s)

    def run_all(self):
        "A run-all can be lost just after a kernel has started: nothing was begun, and the kernel is idle."
        for _ in range(10):
            self.command("notebook:run-all-cells")
            for _ in range(300):
                s = self.state()
                if s and (s["kernel"] == "busy" or any(s["counts"])):
                    return
                self.pause()
        raise TimeoutError("the cells aren't run")

    def run(self, source):
        "In a new cell, below all others."
        self.page.evaluate(NEW_CELL, source)

    def finished(self):
        "Wait for the cells; a traceback among their outputs ends the test."
        s = self.wait("all cells have run", lambda s: s["errors"] or all(s["counts"]) and s["kernel"] == "idle")
        assert not s["errors"]

    def saved(self):
        "The notebook as it is in its file."
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        return nbformat.read(self.folder/self.name, 4)

    def end_kernel(self):
        self.page.evaluate(SHUT_DOWN)

    def output(self, source):
        "What the cell with this source shows."
        return self.root.locator(".jp-CodeCell", has_text=source).locator(".jp-OutputArea-output").last

    def widgets_say(self, pattern):
        "What matches in the text of the widgets, or None."
        texts = self.root.locator(".widget-html-content").all_inner_texts()
        return next((m for text in texts if (m := re.search(pattern, text))), None)

    def step(self):
        "Where the picture of a run says that it is."
        found = self.widgets_say(r"^(\w+) .*· step ([\d,]+) of")
        return (found[1], int(found[2].replace(",", ""))) if found else ("", -1)

    def picture(self):
        "The bytes of the picture of a run."
        try:
            return base64.b64decode(self.root.locator(PICTURE_OF_RUN).last.evaluate(PICTURE, timeout=5000) or b"")
        except Error:  # it was being replaced
            return b""

    def row(self, label, number=-1):
        "The row of a field in the form; of several with one label, the last."
        field = self.page.get_by_label(label, exact=True)
        return self.root.locator(".ftnb-field", has=field).nth(number)

    def fill(self, **fields):
        for label, value in fields.items():
            self.row(label.replace("_", " ")).locator("input[type=text], textarea").fill(str(value))

    def number(self, label):
        "That stands in a field."
        return float(self.row(label).locator("input").input_value())

    def button(self, name):
        return self.root.get_by_role("button", name=re.compile(rf"^\W*{name}$"))  # before its name stands its icon

    def theme(self, name):
        "JupyterLab Light or JupyterLab Dark."
        self.page.evaluate(THEME, name)
        self.until(f"the theme is {name}", lambda: self.page.evaluate("() => document.body.dataset.jpThemeName") == name)

    def scrolling(self):
        "What has a scroll bar."
        return self.page.evaluate(SCROLLING)

    def tabbed(self, most=200):
        "What the Tab key comes to, from where the focus is, until it comes round or leaves."
        seen = []
        for _ in range(most):
            self.page.keyboard.press("Tab")
            seen.append(self.page.evaluate(FOCUSED))
        return seen

    def press(self, name):
        self.button(name).click()

    def can(self, name):
        return self.button(name).is_enabled()
