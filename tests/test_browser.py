"""A newcomer's first hour in JupyterLab, in headless Chromium.

The first tutorial from top to bottom; then the form: a wrong field, a run that is watched, stopped, resumed and left alone,
base against adapter, and the run found again by another kernel. What they show is read by axe-core, in a light and a dark theme,
as a screen reader would. `--pictures nbs/images` also writes the README's pictures.
"""
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import time
import uuid
from contextlib import closing, contextmanager
from pathlib import Path

import lab
import nbformat
import psutil
import pytest
from axe_playwright_python.sync_playwright import Axe
from lab import MARK, PICTURE_OF_RUN, RESTART, Notebook, chromium, end_all, find_chromium, held, jobs, jupyter_lab, silent_hub, until
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pictures import animation, is_a_picture, part, png
from playwright.sync_api import TimeoutError


pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.skipif(find_chromium() is None, reason="no Chromium")]

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = "1_first_run.ipynb"
EPOCHS = 14  # of the form's run
STEPS = 18 * EPOCHS
MOVES, MOVES_OF_PICTURES = 3, 9  # changes of a run's picture that are waited for
FORM = [new_markdown_cell("# A form"), new_code_cell("""\
import pandas as pd
from ftnb.all import *

quiet_libraries()
messages = pd.read_csv(demo_data(), nrows=1080)
four = ["gift_card", "invoice_request", "newsletter_stop", "reset_password"]
messages[messages.intent.isin(four)].to_csv("messages.csv", index=False)
base = save_tiny("base", kind="qwen", initializer_range=0.2, seed=1)
project = make_demo_project(".", base, "messages.csv", training=DEMO_TRAINING | {"eval_strategy": "epoch"})"""),
        new_code_cell("form = Form(project.db)\nform")]


@pytest.fixture(scope="module")
def keep(request):
    "Look at a picture of the README or the pages, and keep it where pictures are asked for."
    folder = request.config.getoption("--pictures")
    if folder:
        lab.WAIT = 3600  # the README's picture is of its own model

    def write(name, data):
        is_a_picture(data)
        if folder:
            Path(folder, name).write_bytes(data)
    write.asked = bool(folder)
    return write


def test_every_picture_is_taken_here():
    "Those that the README and the pages show are those that lie there, and those that these tests keep."
    pages = [ROOT/"README.md", *(ROOT/"nbs").rglob("*.ipynb"), *(ROOT/"docs").rglob("*.md")]
    shown = {name for page in pages for name in re.findall(r"images/([\w.]+)\)", page.read_text(encoding="utf-8"))}
    taken = re.findall(r'keep\("([\w.]+)"', Path(__file__).read_text(encoding="utf-8"))
    assert shown == set(taken) == {picture.name for picture in (ROOT/"nbs"/"images").iterdir()}
    assert len(taken) == len(shown)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    "A notebook in a browser; at the end no process is left, and the browser has reported no error."
    work, errors = tmp_path_factory.mktemp("browser").resolve(), []
    try:
        with jupyter_lab(work) as address, chromium() as context:
            yield Notebook(context, address, work/"nb", errors)
    finally:
        left = end_all()
    assert not left
    gone = "widget model not found"  # said of a notebook whose kernel was ended, whenever it is opened again; only a developer looks there
    assert not [error for error in errors if gone not in error]


@pytest.fixture
def notebook(opened, request, tmp_path):
    "A picture of the page is kept where a test fails."
    failed = request.session.testsfailed
    yield opened
    if request.session.testsfailed > failed and opened.page:
        opened.page.screenshot(path=tmp_path/"page.png")
        print(f"the page as it was: {tmp_path/'page.png'}")


def test_the_first_tutorial(notebook, keep):
    shutil.copy(ROOT/"nbs"/"tutorials"/TUTORIAL, notebook.folder/TUTORIAL)
    notebook.open(TUTORIAL)
    notebook.run_all()
    seen = set()

    def over():
        if picture := notebook.picture():
            seen.add(picture)
        s = notebook.state()
        return s and (s["errors"] or all(s["counts"]) and s["kernel"] == "idle") and s
    assert not notebook.until("the tutorial has run", over)["errors"]
    notebook.until("the picture says that the run is finished", lambda: notebook.step()[0] == "finished")
    assert len(seen) > 1  # it moves while its kernel trains; how often, is the machine's affair
    shown = notebook.output("preview(rows.train")
    assert "tokens carry loss" in shown.inner_text()
    keep("preview.png", png(part(notebook, shown, shown, above=0)))
    everybody_can_read_it(notebook)
    compared = notebook.output("run.compare()").inner_text()
    assert all(word in compared for word in ("perplexity", "base", "tuned"))
    the_readme_runs(notebook, keep)
    outputs_without_errors(notebook)
    left_alone(notebook, "finished")


TICKETS = """\
import ftnb.all
teams = dict(track_parcel="delivery", late_delivery="delivery", return_item="returns", exchange_size="returns",
             double_charge="billing", invoice_request="billing", reset_password="accounts", close_account="accounts")
tickets = pd.read_csv(demo_data()).rename(columns=dict(message="ticket"))
tickets["team"] = tickets.intent.map(teams)
tickets.groupby("team").head(40)[["ticket", "team"]].to_csv("tickets.csv", index=False)"""


def the_readme_runs(notebook, keep):
    "Its lines as they stand there; on a tiny base, unless its picture is asked for."
    notebook.run(TICKETS if keep.asked else TICKETS + "\nftnb.all.demo_base_model = lambda: base")
    code, = re.findall(r"^```python\n(.*?)^```", (ROOT/"README.md").read_text(encoding="utf-8"), re.M | re.S)
    notebook.run(code)
    notebook.finished()
    said = notebook.output("my parcel is late").inner_text()
    assert all(word in said for word in ("perplexity", "held-out rows", "{'base': ", "'tuned': ")), said
    notebook.run("display(plot_run(run.report.parent), run)")
    notebook.finished()
    parts = notebook.root.locator(".jp-CodeCell", has_text="display(plot_run").locator(".jp-OutputArea-output")
    curves, table = parts.first.locator("img"), parts.last.locator("table")
    texts = table.locator("tr").all_inner_texts()
    assert ["held-out loss" in texts[1], "right answers" in texts[2], len(texts)] == [True, True, 6], texts
    before, after = map(float, re.findall(r"[\d.]+", texts[1]))
    assert after < before / 2
    keep("run.png", png(part(notebook, curves, table, above=2)))


def outputs_without_errors(notebook):
    "The outputs of the saved notebook: none is an error, nothing was written to stderr."
    outputs = [o for c in notebook.saved().cells for o in c.get("outputs", ())]
    bad = [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not bad
    return outputs


THEMES = ("JupyterLab Dark", "JupyterLab Light")
SHOWN = {"include": [[".jp-NotebookPanel:not(.lm-mod-hidden) .jp-OutputArea-output"]],
         "exclude": [["table.dataframe th:empty"]]}  # pandas leaves the header above a DataFrame's index empty


def everybody_can_read_it(notebook):
    "axe-core finds nothing in what we show, and nothing has a scroll bar that it doesn't need, in either theme."
    for theme in THEMES:
        notebook.theme(theme)
        found = Axe().run(notebook.page, context=SHOWN)
        wrong = [f"{v['id']}: {v['help']}: {[n['html'][:200] for n in v['nodes'][:3]]}" for v in found.response["violations"]]
        assert not wrong, (theme, wrong)
        assert not notebook.scrolling(), theme


SEEN = """() => [...document.querySelectorAll('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-OutputArea-child')]
    .filter(o => o.offsetParent !== null)
    .map(o => ({text: o.innerText, still: !!o.querySelector('.ftnb-still'), picture: !!o.querySelector('.ftnb-still img')}))"""


def left_alone(notebook, words):
    "Save, end the kernel, load the page again: a still stands where the widgets were, and no error."
    assert not any(o["still"] for o in notebook.page.evaluate(SEEN))  # while the widgets live
    notebook.saved()
    notebook.end_kernel()
    notebook.open(notebook.name)
    notebook.until("JupyterLab has given up on the widgets", lambda: "model not found" in notebook.root.inner_html())
    seen = notebook.page.evaluate(SEEN)
    stills = [o for o in seen if o["still"]]
    assert any(words in o["text"] for o in stills), stills
    assert any(o["picture"] for o in stills)
    assert not any("Error displaying widget" in o["text"] for o in seen)


def test_the_form(notebook, keep):
    "From an empty form to an adapter; the steps are below, in their order."
    shots = []
    open_form(notebook)
    nothing_is_red(notebook)
    panes_are_as_the_fields(notebook)
    a_wrong_field_is_marked(notebook, keep)
    what_is_not_there_is_marked(notebook)
    every_control_is_reached(notebook)
    fill_form(notebook)
    train_and_stop(notebook, MOVES_OF_PICTURES if keep.asked else MOVES, shots)
    resume_and_close_the_tab(notebook, shots)
    adapters = adapter_rows(notebook)
    assert [name for name, place in adapters if Path(place, "adapter_model.safetensors").exists()] == ["shop-intents"]
    keep("run_live.gif", animation(shots[:-1:2] + shots[-1:]))
    everybody_can_read_it(notebook)
    base_against_adapter(notebook)
    the_lines_run(notebook)
    left_alone(notebook, "run this cell again")
    found_again(notebook)


def open_new(notebook, name, cells):
    "Write a notebook, and open it."
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), notebook.folder/name)
    notebook.open(name)


def open_form(notebook):
    open_new(notebook, "form.ipynb", FORM)
    notebook.run_all()
    notebook.finished()
    notebook.until("the form has checked its job", lambda: notebook.widgets_say("the job can run|to put right"))


def nothing_is_red(notebook):
    "Defaults fit the machine; the columns of the data set are listed; the completion alone is learnt."
    assert notebook.root.get_by_role("alert").count() == 0
    notebook.until("the job can run as it stands", lambda: notebook.widgets_say("the job can run"))
    assert "columns: {message}, {intent}" in notebook.row("Data set").inner_text()
    assert notebook.row("Learn the completion only").locator("input").is_checked()
    notebook.until("a time is told", lambda: notebook.widgets_say(r"time\s+about"))


PANES = ("Add a base model", "Add a data set", "Write a prompt", "This run as text")


def open_or_close_panes(notebook):
    for name in PANES:
        notebook.press(name)


def panes_are_as_the_fields(notebook):
    "Folded-up parts begin where the fields do, are as legible, and need no scroll bar; a prompt is shown in rows."
    open_or_close_panes(notebook)
    text = notebook.root.get_by_label("Text", exact=True)
    text.fill("Message: {massage}")
    notebook.root.get_by_role("alert").get_by_text("did you mean 'message'?").wait_for()
    text.fill("Message: {message}\nIntent:")
    notebook.root.get_by_label("Completion", exact=True).fill(" {intent}")
    notebook.until("the preview is there", lambda: notebook.widgets_say("^Message: "))
    left = notebook.row("Rank").locator("input").bounding_box()["x"]
    for label in ("Model", "Data", "Text", "Completion", "Load"):
        field = notebook.root.get_by_label(label, exact=True)
        assert abs(field.bounding_box()["x"] - left) < 2, label
    everybody_can_read_it(notebook)
    for label in ("Text", "Completion"):
        notebook.root.get_by_label(label, exact=True).fill("")
    open_or_close_panes(notebook)


def a_wrong_field_is_marked(notebook, keep):
    "A remark stands beside its field while it is wrong, and the run can't be started."
    rank, dropout = notebook.row("Rank").get_by_role("alert"), notebook.row("Dropout").get_by_role("status")
    assert rank.count() == 0 and notebook.can("Train here")
    notebook.fill(Rank=-1, Dropout=0.5)
    rank.wait_for()
    dropout.wait_for()
    assert "r is -1" in rank.inner_text()
    field = notebook.row("Rank").locator("input")
    notebook.until("the field says that it is wrong", lambda: field.get_attribute("aria-invalid") == "true")
    assert field.get_attribute("aria-describedby") == rank.get_attribute("id")
    everybody_can_read_it(notebook)
    notebook.until("the button is off", lambda: not notebook.can("Train here"))
    assert not notebook.can("Resume")
    notebook.until("the panel tells of it", lambda: notebook.widgets_say("^Put right what is marked"))
    top = notebook.root.locator(".widget-hbox:has(> .widget-vbox)").first
    top.evaluate("e => e.scrollIntoView()")  # the panes that were open have moved the page
    keep("form_error.png", png(part(notebook, top, notebook.row("Quantisation"), above=2)))
    notebook.fill(Rank=8, Dropout=0)
    rank.wait_for(state="detached")
    dropout.wait_for(state="detached")
    notebook.until("the field is right", lambda: field.get_attribute("aria-invalid") is None)
    notebook.until("the button is on", lambda: notebook.can("Train here"))


def what_is_not_there_is_marked(notebook):
    "A set to hold out, and an adapter to go on from, are looked for as the job will; what is wrong stands beside the field."
    for label in ("More data sets", "Validation set", "Go on from"):
        remark, field = notebook.row(label).get_by_role("alert"), notebook.row(label).locator("input, textarea")
        notebook.fill(**{label.replace(" ", "_"): "nowhere.csv"})
        remark.wait_for()
        assert "nowhere.csv" in remark.inner_text()
        notebook.until("the field says that it is wrong", lambda: field.get_attribute("aria-invalid") == "true")
        assert field.get_attribute("aria-describedby") == remark.get_attribute("id")
        notebook.fill(**{label.replace(" ", "_"): ""})
        remark.wait_for(state="detached")
    notebook.until("the job can run again", lambda: notebook.widgets_say("the job can run"))


FIELDS = ["Run", "Base model", "Add a base model", "Data set", "Add a data set", "Prompt", "Write a prompt", "Share of rows to keep",
          "More data sets", "Validation set", "Leave out duplicates", "Go on from", "Rank", "Learn the completion only",
          "Write it as a chat", "Weight of prompts", "Epochs", "Seconds at most", "Schedule", "Group rows that begin alike",
          "Longest row, in tokens", "Evaluation", "Rows to ask each time", "Stop early after", "Adapter's name", "Check", "Train here",
          "This run as text"]


def every_control_is_reached(notebook):
    "By the Tab key alone, in the order in which one goes."
    notebook.root.get_by_label("Run", exact=True).focus()
    reached = ["Run", *notebook.tabbed(80)]
    places = [reached.index(name) for name in FIELDS]
    assert places == sorted(places), reached


def fill_form(notebook):
    "The rest of the fields."
    for number in (0, 1):
        notebook.row("Begin with", number).locator("select").select_option(index=1)  # the project's own settings
    notebook.until("their values are in the fields",
                   lambda: notebook.number("Rank") == 16 and notebook.number("Learning rate") == 1e-3)
    notebook.fill(Learning_rate=5e-3, Share_to_train_on=0.8, Epochs=EPOCHS, Batch=8, Accumulation=1,
                  **{"Adapter's_name": "shop-intents"})
    notebook.row("Register it in the Studio").locator("input[type=checkbox]").check()
    notebook.until("the job is checked again", lambda: notebook.widgets_say(rf"steps\s+{STEPS:,} of 8 rows"))
    notebook.until("the run can be started", lambda: notebook.can("Train here"))
    assert notebook.widgets_say("the job can run")
    notebook.until("its time is told", lambda: notebook.widgets_say(r"time\s+about"))


def shot_of_run(notebook):
    "The picture of the run, and what stands above it."
    parts = notebook.root.locator(f".widget-vbox:has(> .widget-html {PICTURE_OF_RUN.split()[-1]})").last.locator("> *")
    return part(notebook, parts.first, parts.nth(1), margin=0, above=0)


def run_folder(notebook):
    return max(notebook.folder.glob("runs/*"), key=os.path.getmtime)


def last_step(notebook):
    "Of the whole lines of metrics.jsonl."
    lines = (run_folder(notebook)/"metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    return json.loads(lines[-1])["step"]


def watch(notebook, job, moves, shots):
    "Look on until step and picture have changed so many times; the job waits where it is far ahead of what is shown."
    steps, seen = set(), set()

    def moved():
        if last_step(notebook) > notebook.step()[1] + 20:
            job.suspend()
        else:
            job.resume()
        (state, step), new = notebook.step(), notebook.picture()
        if state != "running" or not new:
            return False
        if new not in seen:
            shots.append(shot_of_run(notebook))
        steps.add(step)
        seen.add(new)
        return len(steps) > moves and len(seen) > moves
    try:
        notebook.until("the curve moves", moved)
    finally:
        job.resume()


def train_and_stop(notebook, moves, shots):
    "Start a run, watch it, use the notebook meanwhile, stop it."
    notebook.press("Train here")
    notebook.until("the run has begun", lambda: jobs() and (run_folder(notebook)/"metrics.jsonl").exists())
    job, = jobs()
    with held(job):
        notebook.until("the picture says so", lambda: notebook.step()[0] == "running")
    watch(notebook, job, moves, shots)
    with held(job):
        everybody_can_read_it(notebook)
        notebook.run("6 * 7")
        notebook.finished()
        assert notebook.output("6 * 7").inner_text() == "42"
        notebook.press("Stop")
        notebook.until("what will happen is said", lambda: notebook.widgets_say("will stop after this step"))
    notebook.until("the form says that the run has stopped",
                   lambda: notebook.widgets_say(r"stopped at step [\d,]+ of [\d,]+; a checkpoint is saved; Resume goes on"))
    log = notebook.root.get_by_role("log").inner_text()
    assert "stopped by the file stop at step" in log and "Traceback" not in log
    assert "Traceback" not in (run_folder(notebook)/"output.log").read_text()
    said = notebook.until("the picture says so, too", lambda: (state := notebook.step()[0]) in ("stopped", "finished") and state)
    assert said == "stopped"  # before its end
    assert not jobs()
    notebook.until("Resume is on", lambda: notebook.can("Resume"))


def resume_and_close_the_tab(notebook, shots):
    "Go on, close the tab, come back, and see the run end."
    before = last_step(notebook)
    notebook.press("Resume")
    notebook.until("the run goes on", lambda: last_step(notebook) > before)
    job, = jobs()
    with held(job):
        folder = run_folder(notebook)
        assert f"going on from {folder/f'checkpoint-{before}'}" in (folder/"output.log").read_text()
        notebook.saved()
        notebook.close()
    until("the run goes on without its tab", lambda: not jobs() or last_step(notebook) > before + 40)
    open_with_widgets(notebook, "form.ipynb")
    notebook.until("the form, opened again, says that the run is done", lambda: notebook.widgets_say(r"^trained$"))
    notebook.until("the picture says so, too", lambda: notebook.step() == ("finished", STEPS))
    notebook.until("Stop is off", lambda: not notebook.can("Stop"))
    assert not jobs() and not notebook.can("Resume")
    shots.append(shot_of_run(notebook))


def open_with_widgets(notebook, name):
    "ipywidgets gives the kernel four seconds to tell its widgets; on a busy machine that is too few, and the page is loaded again."
    def opened():
        notebook.open(name)
        try:
            notebook.button("Train here").wait_for(timeout=30_000)
        except TimeoutError:
            return False
        return True
    until("the form's widgets are on the page again", opened)


def adapter_rows(notebook):
    with closing(sqlite3.connect(notebook.folder/".app"/"state.db")) as con:
        return con.execute("SELECT name, location FROM adapters").fetchall()


def base_against_adapter(notebook):
    "In a new cell: the adapter has learnt."
    notebook.run("form.compare()")
    notebook.finished()
    texts = [o.get("data", {}).get("text/plain", "") for o in outputs_without_errors(notebook)]
    compared = "\n".join(text for text in texts if "perplexity" in text)
    loss = {m[1]: float(m[2]) for m in re.finditer(r"^(base|shop-intents) +([\d.]+)", compared, re.M)}
    assert loss["shop-intents"] < loss["base"] / 2, compared


def the_lines_run(notebook):
    "Below the picture stand lines that use the adapter; pasted into a cell, the first of them answer."
    lines = notebook.root.locator(".widget-html-content pre", has_text="from peft import").first.inner_text()
    notebook.run(lines.replace('"..."', '"where is my card"'))
    notebook.finished()
    outputs_without_errors(notebook)
    assert notebook.output("where is my card").inner_text().strip()


AGAIN = [new_code_cell("from ftnb.all import *\nfound = runs('.')\nfound"),
         new_code_cell("check = check_job(parse_job_arguments(found[0].repeat().job_arguments))\ncheck"),
         new_code_cell("""\
run = tune("base", "messages.csv", prompt="{message}", completion=" {intent}", max_steps=2)
run"""),
         new_code_cell("run.compare(n=4)"),
         new_code_cell("box = chat('base', {'mine': found[0].record.given['out_dir']}, check.job.template, 8)\nprint(box.ask('Where is my card?'))"),
         new_code_cell("compare_runs('runs')"),
         new_code_cell("try: compare_runs('no_such_folder')\nexcept ValueError as e: print(e)"),
         new_code_cell("again = Form()\nagain")]


def found_again(notebook):
    "In another kernel, without a word of red: the run is in the list, and loads; it is checked, compared, and another is tuned."
    open_new(notebook, "again.ipynb", AGAIN)
    notebook.run_all()
    notebook.finished()
    outputs_without_errors(notebook)
    assert notebook.output("compare_runs('runs')").locator("img").count() == 1
    assert "no_such_folder is not there" in notebook.output("no_such_folder").inner_text()
    choose_run(notebook, f"shop-intents: trained, {STEPS} steps")
    notebook.until("its picture is shown", lambda: notebook.step() == ("finished", STEPS))
    assert notebook.number("Learning rate") == 5e-3


def choose_run(notebook, label):
    "In the list at the form's top."
    chosen = notebook.root.get_by_label("Run", exact=True)

    def listed():
        texts = [text.replace("\xa0", " ") for text in chosen.locator("option").all_inner_texts()]
        return [i for i, text in enumerate(texts) if text.startswith(label)]
    chosen.select_option(index=notebook.until(f"the list has {label}", listed)[0])


# A file of conversations

CHATS = """\
import json, random
from ftnb.all import *
base, tokenizer = save_tiny("base", "qwen", "llama", initializer_range=0.3), tiny_tokenizer("qwen")
tokenizer.chat_template = \'\'\'{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}\'\'\'
tokenizer.save_pretrained(base)
answers = {"Where is my order?": "track", "I want my money back.": "refund", "Is the chair in stock?": "stock"}
def turns(asked): return [{"role": "user", "content": asked}, {"role": "assistant", "content": answers[asked]}]
rng = random.Random(0)
with open("chats.jsonl", "w") as file:
    for _ in range(40): print(json.dumps({"messages": sum(map(turns, rng.sample(list(answers), 2)), [])}), file=file)"""


def test_conversations_in_the_form(notebook):
    "A newcomer has a model and a file of chats, and no project: they are added, looked at and trained on, and the adapter answers."
    open_new(notebook, "chats.ipynb", [new_code_cell(CHATS), new_code_cell("form = Form('talk/.app/state.db')\nform")])
    notebook.run_all()
    notebook.finished()
    notebook.theme("JupyterLab Dark")
    add_model_and_chats(notebook)
    add_prompt = notebook.root.get_by_role("button", name=ADD).nth(2)
    text = notebook.root.get_by_label("Text", exact=True)
    notebook.until("the prompt is written", lambda: text.input_value() == "{messages}")
    notebook.until("the preview is there", lambda: notebook.widgets_say("^user: "))
    learnt = notebook.root.locator(".widget-html-content b").all_inner_texts()
    assert learnt and all(turn.startswith("assistant: ") for turn in learnt), learnt
    add_prompt.click()
    notebook.until("the job can run", lambda: notebook.widgets_say("the job can run"))
    assert notebook.row("Learn the assistant's turns").locator("input").is_checked()
    notebook.fill(Epochs=20, Learning_rate=1e-2, **{"Adapter's_name": "chats"})
    notebook.until("the job is checked again", lambda: notebook.widgets_say(r"steps\s+180 of 4 rows"))
    notebook.until("the run can be started", lambda: notebook.can("Train here"))
    notebook.press("Train here")
    notebook.until("the form says that the run is done", lambda: notebook.widgets_say(r"^trained$"))
    notebook.run("form.chat(max_new_tokens=8).ask('Where is my order?')['chats']")
    notebook.finished()
    assert notebook.output("form.chat").inner_text().strip() == "'track'"
    everybody_can_read_it(notebook)
    outputs_without_errors(notebook)


ADD = re.compile(r"^\W*Add$")


def add_model_and_chats(notebook):
    "Without a database it is said what to press; then both are asked for at once, and chosen."
    add = notebook.root.get_by_role("button", name=ADD)
    notebook.root.get_by_label("Model", exact=True).fill("base")
    notebook.root.get_by_label("Data", exact=True).fill("chats.jsonl")
    add.nth(0).click()
    notebook.root.get_by_role("alert").get_by_text("first press Create this database").wait_for()
    notebook.press("Create this database")
    notebook.button("Create this database").wait_for(state="hidden")
    for number in (0, 1):
        add.nth(number).click()
    chosen = "select => select.selectedOptions[0].text"
    for label, name in {"Base model": "base", "Data set": "chats.jsonl"}.items():
        notebook.until(f"{name} is chosen", lambda: notebook.row(label).locator("select").evaluate(chosen) == name)
    notebook.until("its column is listed", lambda: "columns: {messages}" in notebook.row("Data set").inner_text())


# Runs that another kernel has begun

PROJECT = """\
from ftnb.all import *
project = make_demo_project("{name}", save_tiny("{name}/base", kind="qwen"))"""


def leave_run(project, state, message=""):
    "The files of a run as a job leaves them; returns its folder."
    folder = project/"runs"/state
    folder.mkdir(parents=True)
    with closing(sqlite3.connect(project/".app"/"state.db")) as con:
        ids = [con.execute(f"SELECT id FROM {table}").fetchone()[0] for table in ("models", "datasets", "prompts")]
    told = dict(zip(("base_model_id", "dataset_id", "prompt_id"), ids)) | {
        "experimentid": str(uuid.uuid4()), "adapter_name": f"was-{state}", "out_dir": project/"adapters"/state, "train_out_dir": folder}
    arguments = " ".join(f"--{key} {value}" for key, value in told.items())
    (folder/"job.json").write_text(json.dumps({"arguments": arguments, "started": time.time()}))
    lines = [{"step": step, "time": time.time(), "loss": 2.0 / step, "max_steps": 9} for step in (1, 2, 3)] + [
        {"step": 3, "time": time.time(), "max_steps": 9, "state": state, "message": message}]
    (folder/"metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, arguments


@contextmanager
def seems_to_train(folder, arguments):
    "Within this, a process stands for the job of a run."
    with subprocess.Popen(["sleep", "100000"], env={**os.environ, **MARK}) as process:
        try:
            told = {"pid": process.pid, "created": psutil.Process(process.pid).create_time(), "host": socket.gethostname(), "arguments": arguments}
            (folder/"process.json").write_text(json.dumps(told))
            later = time.time() + 1000  # than the process was born, whatever clock that is told by
            os.utime(folder/"metrics.jsonl", (later, later))
            yield
        finally:
            process.kill()


def test_runs_that_this_kernel_has_not_begun(notebook):
    "Running, stopped and failed ones are in the list and in `runs`, and are opened."
    open_new(notebook, "others.ipynb", [new_code_cell(PROJECT.format(name="others"))])
    notebook.run_all()
    notebook.finished()
    project = notebook.folder/"others"
    running = leave_run(project, "running")
    leave_run(project, "stopped", "stopped by the file stop")
    leave_run(project, "failed", "the loss is nan")
    with seems_to_train(*running):
        notebook.run("sorted((run.name, str(run.status)) for run in runs('others'))")
        notebook.finished()
        found = notebook.output("sorted((run.name").inner_text()
        for words in ("failed at step 3 of 9: the loss is nan", "running, step 3 of 9", "stopped at step 3 of 9; no checkpoint is saved; Resume begins again"):
            assert words in found, found
        notebook.run("form = Form(project.db)\nform")
        notebook.finished()
        for state, can_stop, can_resume in (("stopped", False, True), ("running", True, False), ("failed", False, True)):
            choose_run(notebook, f"was-{state}: {state}")
            notebook.until("its picture is shown", lambda: notebook.step() == (state, 3))
            notebook.until("Stop is as it should be", lambda: notebook.can("Stop") == can_stop)
            notebook.until("Resume is as it should be", lambda: notebook.can("Resume") == can_resume)
            assert notebook.row("Adapter's name").locator("input").input_value() == f"was-{state}"


# The kernel itself

TRAIN = """\
run = tune("others/base", data, prompt="Q: {q}", completion=" {a}", folder="mine", name="mine", num_train_epochs=4000,
           watch=True)"""


def test_the_kernel_is_interrupted_and_restarted(notebook):
    "A run that trains in the notebook stops in words, with a checkpoint; another kernel finds it, and goes on with it."
    rows = "data = [dict(q=f'{word} {i}', a=word) for i in range(4) for word in ('red', 'blue')]"
    first = new_code_cell(f"from ftnb.all import *\nsave_tiny('others/base', kind='qwen')\n{rows}")
    open_new(notebook, "mine.ipynb", [first, new_code_cell(TRAIN)])
    notebook.run_all()
    notebook.until("the picture says that it trains", lambda: notebook.step()[0] == "running" and notebook.step()[1] > 0)
    notebook.command("notebook:interrupt-kernel")
    state = notebook.wait("the cell has ended", lambda s: s["errors"] and s["kernel"] == "idle")
    said, = (o for c in notebook.saved().cells for o in c.get("outputs", ()) if o.output_type == "error")
    assert re.fullmatch(r"RunStopped: stopped by SIGINT at step \d+ of \d+; a checkpoint is in \S+; the same call goes on", *state["errors"])
    assert said.traceback == [said.evalue]  # a sentence alone
    notebook.until("the picture says so, too", lambda: notebook.step()[0] == "stopped")
    everybody_can_read_it(notebook)
    restarted_form(notebook)


def restarted_form(notebook):
    "In a kernel that was restarted: the form finds the run, by its list and by its folder; wrong folders are said, and nothing is lost."
    notebook.page.evaluate(RESTART)
    form = "from ftnb.all import *\nform = Form('mine/.app/state.db')\nform"
    open_new(notebook, "restarted.ipynb", [new_code_cell(form)])
    notebook.run_all()
    notebook.finished()
    folder, = (notebook.folder/"mine"/"runs").iterdir()
    for way in (lambda: choose_run(notebook, "mine: stopped at step"), lambda: load_run(notebook, folder)):
        choose_run(notebook, "a new run")
        notebook.until("no picture is shown", lambda: notebook.step()[1] < 0)
        notebook.until("another run like it can be started", lambda: notebook.can("Train here") and notebook.widgets_say("the job can run"))
        assert notebook.root.get_by_role("alert").count() == 0
        way()
        notebook.until("its picture is shown", lambda: notebook.step()[0] == "stopped")
        notebook.until("Resume is on", lambda: notebook.can("Resume"))
        assert notebook.number("Epochs") == 4000
    notebook.run(f"form.load({str(folder)!r});")
    notebook.finished()
    notebook.press("Resume")
    notebook.until("the run goes on", lambda: notebook.step()[0] == "running")
    notebook.press("Finish now")
    notebook.until("the form says that the run is done", lambda: notebook.widgets_say(r"^trained$"))
    assert not jobs()
    outputs_without_errors(notebook)


def load_run(notebook, folder):
    "By the pane that takes a run as text."
    notebook.press("This run as text")
    box = notebook.root.get_by_role("textbox", name="Load", exact=True)
    button = notebook.page.get_by_role("button", name=re.compile(r"^\W*Load$"))
    for text, said in (("nowhere", "alert"), (str(folder), "status")):
        box.fill(text)
        notebook.press("Load")
        notebook.root.locator(".widget-hbox", has=button).last.get_by_role(said).wait_for()
    notebook.press("This run as text")


# A hub that doesn't answer

def test_a_hub_that_does_not_answer(notebook):
    "What isn't there is said beside its field; what takes too long can be given up, and the form is quick meanwhile."
    with silent_hub() as hub:
        never = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address, "HF_HUB_ETAG_TIMEOUT": "100000", "HF_HUB_DOWNLOAD_TIMEOUT": "100000"}
        cell = f"import os\nos.environ |= {never}\n{PROJECT.format(name='far')}\nform = Form(project.db)\nform"
        open_new(notebook, "far.ipynb", [new_code_cell(cell)])
        notebook.run_all()
        notebook.finished()
        notebook.until("the form has checked its job", lambda: notebook.widgets_say("the job can run"))
        base = notebook.row("Base model")
        notebook.run("form.add('base_model_id', 'somebody/something');")
        base.get_by_role("alert").wait_for()
        assert "somebody/something isn't on this machine, and the hub" in base.inner_text()
        # as if it had said that it is there: from here on it is only slow
        notebook.run("import ftnb.hub\nftnb.hub.hub_answers = lambda: True")
        notebook.finished()
        notebook.press("Check")
        notebook.until("the hub is asked for the model", lambda: any("somebody/something" in path for path in hub.asked))
        notebook.until("Give up is on", lambda: notebook.can("Give up"))
        marked = notebook.row("Rank").get_by_role("alert")
        for rank, seen in ((-1, "attached"), (16, "detached")):
            notebook.fill(Rank=rank)
            marked.wait_for(state=seen)
        give_up(notebook, "^Given up. Check looks again")
        base.locator("select").select_option(label="base")
        notebook.run("form.add('dataset_id', 'somebody/rows');")
        notebook.until("the hub is asked for the data", lambda: any("somebody/rows" in path for path in hub.asked))
        give_up(notebook, "^Given up. Check looks again")
        notebook.press("Write a prompt")
        notebook.root.get_by_label("Text", exact=True).fill("Question: {question}")
        notebook.until("rows are read for the preview", lambda: notebook.widgets_say("^reading the first rows"))
        give_up(notebook, "^the first rows were given up")
    outputs_without_errors(notebook)


def give_up(notebook, words):
    "By the button; the form says so, and the button is off again."
    notebook.until("Give up is on", lambda: notebook.can("Give up"))
    notebook.press("Give up")
    notebook.until("it is given up", lambda: notebook.widgets_say(words))
    notebook.until("Give up is off", lambda: not notebook.can("Give up"))
