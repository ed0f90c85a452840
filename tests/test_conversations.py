"""Conversations through `tune` and the job: each format gives an adapter and an answer, bad rows are named, and a killed run ends in the same bytes."""
import json, os
from pathlib import Path

import pytest
from ftnb.jobargs import parse_job_arguments
from ftnb.preflight import check_job
from ftnb.tiny import save_tiny, tiny_tokenizer
from ftnb.ui.tuning import tune

CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
ASKED = ["Where is my order?", "I want my money back.", "Is the chair in stock?", "Please change the address."]
ANSWERS = ["track", "refund", "stock", "address"]


def talk(i):
    "Two questions and their answers."
    turns = []
    for k in (i, i + 1):
        turns.append(dict(role="user", content=ASKED[k % 4]))
        turns.append(dict(role="assistant", content=ANSWERS[k % 4]))
    return turns


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A tiny model with a chat template."
    folder = save_tiny(tmp_path_factory.mktemp("base")/"model", "qwen", "llama", initializer_range=0.3)
    tokenizer = tiny_tokenizer("qwen")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def write(file, rows):
    "Rows as a JSONL file."
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def sharegpt(turns):
    names = dict(user="human", assistant="gpt")
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


FORMATS = {
    "messages": lambda turns: dict(messages=turns),
    "conversations": lambda turns: dict(conversations=sharegpt(turns)),
    "lists": lambda turns: dict(prompt=turns[:1], completion=turns[1:2])}
QUICK = dict(bar=False, learning_rate=1e-2, num_train_epochs=8, per_device_train_batch_size=4, r=8)


@pytest.mark.parametrize("kind", FORMATS)
def test_file_to_answer(base, tmp_path, kind):
    data = write(tmp_path/"chats.jsonl", [FORMATS[kind](talk(i)) for i in range(20)])
    run = tune(base, data, folder=tmp_path/"project", **QUICK)
    assert (run.adapter/"adapter_model.safetensors").is_file()
    assert run.record.comparison["models"]["adapter"]["score"] == 1.0, run.record.comparison
    talked = run.chat(max_new_tokens=8)
    assert talked.ask("Where is my order?")["tuned"] == "track"
    if kind != "lists": assert talked.ask("I want my money back.")["tuned"] == "refund"  # a second turn was trained
    compared = run.compare()
    assert compared.models["tuned"].score == 1.0
    assert compared.models["tuned"].loss < compared.models["base"].loss


def test_what_is_asked_may_count_a_little(base, tmp_path):
    "With a weight of 1 all tokens of a conversation count alike; with less, the loss lies between that and the answers' own."
    data = write(tmp_path/"chats.jsonl", [dict(messages=talk(i)) for i in range(20)])
    def first_loss(**settings):
        run = tune(base, data, folder=tmp_path/"project", **QUICK | dict(max_steps=1) | settings)
        assert run.record.used["training"].get("prompt_loss_weight", 0) == settings.get("prompt_loss_weight", 0)
        lines = map(json.loads, (Path(run.args.train_out_dir)/"metrics.jsonl").read_text().splitlines())
        return next(line["loss"] for line in lines if "loss" in line)
    whole, answers = first_loss(assistant_only_loss=False), first_loss()
    assert first_loss(prompt_loss_weight=1.0) == pytest.approx(whole, rel=1e-4)
    assert min(whole, answers) < first_loss(prompt_loss_weight=0.1) < max(whole, answers)


def test_plain_prompt_as_turns(base, tmp_path):
    data = write(tmp_path/"plain.jsonl", [dict(q=ASKED[i % 4], a=ANSWERS[i % 4]) for i in range(20)])
    asks = dict(prompt="{q}", completion="{a}", folder=tmp_path/"project")
    run = tune(base, data, **asks, chat_template=True, **QUICK)
    assert run.chat(max_new_tokens=8).ask("Where is my order?")["tuned"] == "track"
    assert not any("chat template" in line for line in check_job(run.args, {**os.environ, **run.env}).lines("warning"))
    plain = run.record.asked["training"] | {"chat_template": False}
    report = check_job(parse_job_arguments(_arguments(run.args, plain), {}), {**os.environ, **run.env})
    assert any("chat_template true in the training arguments" in line for line in report.lines("warning"))
    assert not report.problems()


def _arguments(args, training):
    from dataclasses import replace
    from ftnb.jobargs import format_job_arguments
    return format_job_arguments(replace(args, training_arguments_config=json.dumps(training, separators=(",", ":")), out_dir=args.out_dir + "-2", train_out_dir=args.train_out_dir + "-2"))


def test_bad_rows_are_named(base, tmp_path):
    bad = [dict(messages=[dict(role="bot", content="Hi")]), dict(messages=[dict(role="user", content=" "), *talk(0)]), dict(messages="Hi"), dict(messages=None), dict(messages=talk(0)[:1])]
    data = write(tmp_path/"chats.jsonl", [dict(messages=talk(i)) for i in range(40)] + bad)
    run = tune(base, data, folder=tmp_path/"project", train_test_split=1.0, max_steps=1, bar=False)
    dropped = {drop["row"]: drop["reason"] for drop in run.record.rows["dropped"]}
    assert dropped.keys() == {41, 42, 43, 44, 45}, dropped
    assert "has the role 'bot'" in dropped[41] and "turn 1, the user's, is empty" in dropped[42]
    assert "neither JSON" in dropped[43] and "no value for messages" in dropped[44] and "no turn of it is the assistant's" in dropped[45]


def test_needs_conversations(base, tmp_path):
    data = write(tmp_path/"plain.jsonl", [dict(q="a", a="b")] * 10)
    with pytest.raises(ValueError, match="assistant_only_loss needs conversations"):
        tune(base, data, prompt="{q}", completion="{a}", folder=tmp_path/"project", assistant_only_loss=True, bar=False)
    with pytest.raises(ValueError, match="with slots for the columns 'q', 'a'"):
        tune(base, data, folder=tmp_path/"project", bar=False)
    silent = save_tiny(tmp_path/"silent", "qwen", "llama")
    chats = write(tmp_path/"chats.jsonl", [dict(messages=talk(0))] * 10)
    with pytest.raises(ValueError, match="the model has no chat template"):
        tune(silent, chats, folder=tmp_path/"project", bar=False)


def test_row_a_turn_is_a_tree(base, tmp_path):
    "A conversation split into a row a turn: each turn is computed once."
    from datasets import Dataset
    from ftnb.chat_rows import Loss, tokenize_conversations
    from ftnb.conversations import settle_template
    from ftnb.prefix import tree_passes
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(base)
    turns = [turn for i in range(4) for turn in talk(i)]
    split = Dataset.from_dict(dict(messages=[turns[:n] for n in range(2, len(turns) + 1, 2)]))
    rows = tokenize_conversations(split, tokenizer, settle_template("{messages}", split), Loss(completion=True)).dataset
    ids = rows["input_ids"][:]
    for a, b in zip(ids, ids[1:]): assert b[:len(a)] == a
    trained, = tree_passes(list(rows), 10_000)
    assert trained.tokens_given == sum(map(len, ids))
    assert trained.tokens_computed == len(ids[-1]) - 1  # the last token predicts nothing


KILLED_AT_ITS_FIRST_CHECKPOINT = """import os, signal
real = os.rename
def rename(old, new, **more):
    real(old, new, **more)
    if os.path.basename(new) == "checkpoint-3": os.kill(os.getpid(), signal.SIGKILL)
os.rename = rename
"""


def test_killed_and_run_again(base, tmp_path):
    "The same bytes, also where the chat template writes a date and the day is another by then."
    import datetime, shutil, signal, subprocess, sys
    from unittest.mock import patch
    dated = shutil.copytree(base, tmp_path/"dated")
    tokenizer = tiny_tokenizer("qwen")
    tokenizer.chat_template = "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
    tokenizer.save_pretrained(dated)
    data = write(tmp_path/"chats.jsonl", [dict(messages=talk(i)) for i in range(20)])
    how = dict(folder=tmp_path/"project", learning_rate=1e-3, max_steps=12, per_device_train_batch_size=2, save_steps=3, save_strategy="steps")
    day = lambda place: datetime.date(2026, 3, 1)
    with patch("ftnb.rows.first_day", day): run = tune(dated, data, bar=False, **how)
    whole = (run.adapter/"adapter_model.safetensors").read_bytes()
    shutil.rmtree(run.adapter)
    place = Path(run.args.train_out_dir)
    for folder in place.glob("checkpoint-*"): shutil.rmtree(folder)
    code = (f"{KILLED_AT_ITS_FIRST_CHECKPOINT}from ftnb.ui.tuning import tune\n"
            f"tune({str(dated)!r}, {str(data)!r}, folder={str(how.pop('folder'))!r}, bar=False, **{how!r})")
    died = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    assert died.returncode == -signal.SIGKILL
    assert not run.adapter.exists() and [o.name for o in place.glob("checkpoint-*")] == ["checkpoint-3"]
    again = tune(dated, data, folder=tmp_path/"project", bar=False, **how)
    assert (again.adapter/"adapter_model.safetensors").read_bytes() == whole
