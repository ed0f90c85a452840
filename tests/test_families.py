"""Conversations by each family's chat template: the text and ids of the tokenizer's own `apply_chat_template`, and loss on the assistant's tokens alone.

Most templates are TRL's copies of what the models publish; those of SmolLM2, Mistral and Phi-4 are written here from theirs.
"""
import json
from dataclasses import dataclass, field
from importlib.resources import files

import pytest
from datasets import Dataset

from ftnb.chat_rows import tokenize_conversations
from ftnb.chat_templates import Loss, open_chat_template
from ftnb.conversations import settle_template
from ftnb.special_tokens import PlainTokenizer
from ftnb.tiny import tiny_tokenizer

# https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (tokenizer_config.json)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

# https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.2 (tokenizer_config.json)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}")

# https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.3 (tokenizer_config.json)
MISTRAL_TOOLS = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- tool | tojson }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ", " }}
        {%- if not message.tool_call_id is defined or message.tool_call_id|length != 9 %}
            {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
        {%- endif %}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}"""

# https://huggingface.co/microsoft/phi-4 (tokenizer_config.json)
PHI4 = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}"
    "{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}"
    "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}")


@dataclass(frozen=True)
class Family:
    "A chat template, and the tokenizer that it is for."
    kind: str  # of a tiny tokenizer
    tokens: tuple  # special ones beside the tokenizer's own
    template: str = field(default="", repr=False)  # default: TRL's file of the family's name
    refuses: tuple = ()  # conversations that its template doesn't take, or not whole: their rows are left out, with the reason


HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|eom_id|>")
CHATML = ("<|im_start|>", "<|im_end|>")
PHI = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")
FAMILIES = {
    "llama3": Family("llama3", HEADERS, refuses=("tools",)),
    "llama3_1": Family("llama3", HEADERS),
    "llama3_2": Family("llama3", HEADERS),
    "qwen2_5": Family("qwen", ()),
    "qwen3": Family("qwen", ()),
    "qwen3_instruct_2507": Family("qwen", ()),
    "mistral": Family("llama", ("[INST]", "[/INST]"), MISTRAL, ("a system", "twice in a row", "tools")),
    "mistral_tools": Family("llama", ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
                            MISTRAL_TOOLS, ("a system", "twice in a row")),
    "gemma3": Family("llama", TURNS, refuses=("twice in a row", "tools")),
    "phi3": Family("llama", PHI, refuses=("tools",)),
    "phi3_5": Family("llama", PHI, refuses=("tools",)),
    "phi4": Family("qwen", ("<|im_sep|>",), PHI4, ("tools",)),
    "smollm2": Family("bpe", CHATML, SMOLLM2, ("tools",)),
    "gptoss": Family("bpe", HARMONY),
}


def asks(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "track0007", "type": "function", "function": {"name": "track", "arguments": {"id": 7}}}]}
TOOLS = [{"type": "function", "function": {"name": "track", "description": "Find a parcel.", "parameters": {
    "type": "object", "properties": {"id": {"type": "integer", "description": "its number"}}, "required": ["id"]}}}]
TALKS = {
    "one turn": [asks("Where is it?"), says("On its way.")],
    "many turns": [asks("Where is it?"), says("On its way."), asks("Since when?"), says("Monday."), asks("Thanks!"), says("Bye.")],
    "a system": [{"role": "system", "content": "Be brief."}, asks("Where is it?"), says("On its way."), asks("Since when?"), says("Monday.")],
    "twice in a row": [asks("Where is it?"), says("Let me look."), says("On its way."), asks("Since when?"), says("Monday.")],
    "odd texts": [asks(" On its\n\nway. "), says("🙂 é {{x}} {% if %}"), asks("**Fine**\n\n- 1\n- 22"), says("\tA\u00a0tab, \"quotes\" and \\n")],
    "tools": [asks("Where is 7?"), CALL, {"role": "tool", "name": "track", "tool_call_id": "track0007", "content": "\"here\""}, says("It is here.")],
}
LOSSES = {"all": Loss(), "the last turn": Loss(completion=True), "the assistant": Loss(assistant=True),
          "the assistant's last turn": Loss(True, True)}


def tokenizer_of(name):
    family, shipped = FAMILIES[name], files("trl")/"chat_templates"/f"{name}.jinja"
    tokenizer = tiny_tokenizer(family.kind)
    tokenizer.add_special_tokens({"additional_special_tokens": [*family.tokens]})
    tokenizer.chat_template = family.template or shipped.read_text(encoding="utf-8")
    return tokenizer


def talk_of(name, kind):
    talk = [dict(turn) for turn in TALKS[kind]]
    if name == "gptoss" and kind == "tools":
        talk[1].pop("content")  # its template takes a call or a text
    return talk, TOOLS if kind == "tools" else None


def rows_of(tokenizer, talk, tools, loss):
    "One conversation as a job trains it."
    columns = {"messages": [json.dumps(talk)]}
    if tools:
        columns["tools"] = [json.dumps(tools)]
    data = Dataset.from_dict(columns)
    return tokenize_conversations(data, tokenizer, settle_template("{messages}", data), loss, max_length=4000)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def grown_mask(tokenizer, talk, tools, ids):
    "Token by token, by rendering the conversation as it grows: a turn's tokens are those behind what is asked."
    mask = [False] * len(ids)
    for k, turn in enumerate(talk):
        if turn["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(talk[:k], tools=tools, add_generation_prompt=True, tokenize=False)
        start = ids_of(tokenizer, asked)
        assert ids[:len(start)] == start
        end = len(ids)
        if k + 1 < len(talk):
            text = tokenizer.apply_chat_template(talk[:k + 1], tools=tools, tokenize=False)
            so_far = ids_of(tokenizer, text)
            while so_far != ids[:len(so_far)]:  # an end of the text that stands only at the very end
                assert so_far.pop() == tokenizer.eos_token_id
            end = len(so_far)
        mask[len(start):end] = [True] * (end - len(start))
    return mask


def right_mask(tokenizer, talk, tools, ids, marked):
    "Which tokens are the assistant's: by the library's own mask where a template has marks, else by the growing conversation."
    if not marked:
        return grown_mask(tokenizer, talk, tools, ids)
    found = tokenizer.apply_chat_template(talk, tools=tools, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True)
    assert found["input_ids"] == ids
    return without_call(tokenizer, ids, [bool(token) for token in found["assistant_masks"]])


def without_call(tokenizer, ids, mask):
    "The words that call the assistant are given to the model, also where a template's marks take them in."
    told, asked = (tokenizer.apply_chat_template([asks("x")], add_generation_prompt=asking, tokenize=False) for asking in (False, True))
    call = ids_of(tokenizer, asked.removeprefix(told))
    starts = [k for k, on in enumerate(mask) if on and not mask[k - 1] and ids[k:k + len(call)] == call]
    return [on and not any(k <= at < k + len(call) for k in starts) for at, on in enumerate(mask)]


def last_turn(mask):
    "Of a mask of the assistant's turns that of the last one."
    end = len(mask) - mask[::-1].index(True)
    start = end - (mask[:end][::-1] + [False]).index(False)
    return [start <= k < end for k in range(len(mask))]


@pytest.mark.parametrize("kind", TALKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_text_and_ids_are_the_tokenizers_own(name, kind):
    tokenizer, (talk, tools) = tokenizer_of(name), talk_of(name, kind)
    rows = rows_of(tokenizer, talk, tools, Loss())
    if kind in FAMILIES[name].refuses:
        assert rows.dropped[0].reason.startswith("the chat template "), rows.dropped
        return
    assert not rows.dropped and not rows.joined
    assert open_chat_template(tokenizer).render(tuple(talk), tuple(tools or ())) == tokenizer.apply_chat_template(talk, tools=tools, tokenize=False)
    assert rows.dataset[0]["input_ids"] == tokenizer.apply_chat_template(talk, tools=tools, return_dict=False)
    assert rows.dataset[0]["labels"] == rows.dataset[0]["input_ids"]


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "all"])
@pytest.mark.parametrize("kind", TALKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_is_on_the_assistants_tokens(name, kind, loss):
    if kind in FAMILIES[name].refuses:
        pytest.skip("its rows are left out")
    tokenizer, (talk, tools) = tokenizer_of(name), talk_of(name, kind)
    rows = rows_of(tokenizer, talk, tools, LOSSES[loss])
    assert not rows.dropped and not rows.joined
    row = rows.dataset[0]
    ids, labels = row["input_ids"], row["labels"]
    carries = [label != -100 for label in labels]
    assert [label for label in labels if label != -100] == [id for id, on in zip(ids, carries) if on]
    asked = ids_of(tokenizer, tokenizer.apply_chat_template(talk[:-1], tools=tools, add_generation_prompt=True, tokenize=False))
    behind = [k >= len(asked) for k in range(len(ids))]
    if loss == "the last turn":
        assert ids[:len(asked)] == asked and carries == behind
        return
    mask = right_mask(tokenizer, talk, tools, ids, open_chat_template(tokenizer).marked)
    if loss == "the assistant's last turn":  # from where it is asked, or, where a template marks it, with the words that open it
        assert carries in (last_turn(mask), [on and late for on, late in zip(mask, behind)])
    else:
        assert carries == mask
    said = tokenizer.decode([id for id, on in zip(ids, carries) if on])
    for turn in talk:
        text = turn.get("content", "").strip() or "track"
        is_learnt = turn["role"] == "assistant" and (turn is talk[-1] or loss == "the assistant")
        assert (text in said) == is_learnt, said


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_that_somebody_types_are_text(name):
    "They end no turn: as many special tokens as without them, and the ids give the text back."
    tokenizer = tokenizer_of(name)
    plain = PlainTokenizer(tokenizer)
    typed = " ".join(plain.special)
    talk, clean = ([asks(f"What is {text}?"), says(f"It is {text}."), asks("And?"), says("No more.")] for text in (typed, "x"))
    for loss in LOSSES.values():
        rows, right = (rows_of(tokenizer, some, None, loss) for some in (talk, clean))
        assert not rows.dropped
        special, as_clean = ([id for id in some.dataset[0]["input_ids"] if id in plain.ids] for some in (rows, right))
        assert special == as_clean
