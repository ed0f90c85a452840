"""Random trees of rows over many architectures, by two processes: trees.py FOLDER TREES

In float64, without dropout, against rows run one by one: in one process (in passes, with what they share kept or not, with
checkpointing or not), by two processes, in an evaluation by two processes; and prompts that form a tree, answered. Writes
what it finds to FOLDER/RANK.json.
"""
import contextlib
import json
import os
import random
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
import torch
import transformers
from peft import LoraConfig, get_peft_model

from ftnb.decoding import answer_prompts
from ftnb.metrics import RunState
from ftnb.packing import causal_model, packed_loss, packing_attention
from ftnb.passes import _InPasses, flat_losses, run_step
from ftnb.prefix import tree_passes
from ftnb.ranks import leave, share_of

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()

SIZES = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
             max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED, WIDE = dict(num_key_value_heads=2), dict(num_key_value_heads=2, head_dim=8)
MIXED = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
ARCHITECTURES = {
    "llama": GROUPED, "qwen2": GROUPED, "qwen3": WIDE, "mistral": GROUPED | dict(sliding_window=7), "phi": {},
    "gemma2": WIDE | dict(sliding_window=6, final_logit_softcapping=5.0, attn_logit_softcapping=4.0),
    "gemma3_text": WIDE | MIXED, "gpt2": dict(n_embd=32, n_layer=2, n_head=4), "gpt_neox": {},
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32), "cohere": GROUPED | dict(logit_scale=0.3),
    "granite": GROUPED | dict(logits_scaling=3.0), "olmo2": {}, "starcoder2": GROUPED | dict(sliding_window=5),
    "gpt_oss": WIDE | MIXED | dict(num_local_experts=4, num_experts_per_tok=2)}
TARGETS = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"]}


def random_model(kind):
    "In float64, without dropout, with LoRA that does something."
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES | ARCHITECTURES[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    if kind == "gpt_oss":
        model.set_experts_implementation("eager")  # the others have no float64
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else torch.nn.init.normal_(p, 1.0, 0.1)
    lora = LoraConfig(r=4, target_modules=TARGETS.get(kind, ["q_proj", "v_proj"]), fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).double()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.train()


def random_rows(g, level):
    "Rows below a random beginning."
    def draw(n):
        return [g.randrange(3, 97) for _ in range(n)]
    if not level:
        return [draw(g.randint(1, 6))]
    head = draw(g.choice([0, 1, 3, 9]))
    return [head + row for _ in range(g.randint(1, 3)) for row in random_rows(g, level - 1)]


def random_tree(g):
    "Rows of one to four levels, some of them twice, in any order, with labels anywhere; at least one label counts."
    rows = random_rows(g, g.randint(1, 4))
    rows += g.sample(rows, min(len(rows), g.randint(0, 2)))
    rows.append([5, 6, 7])
    g.shuffle(rows)
    features = [{"input_ids": row, "labels": [t if g.random() < 0.7 else -100 for t in row]} for row in rows]
    for f in features:
        if f["input_ids"] == [5, 6, 7]:
            f["labels"] = [5, 6, 7]
    return features


def padded(features):
    "Such rows as a trainer gets them."
    def block(name, fill):
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(f[name]) for f in features], True, fill)
    lengths = torch.tensor([len(f["input_ids"]) for f in features])
    ids = block("input_ids", 0)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return dict(input_ids=ids, attention_mask=mask, labels=block("labels", -100))


def exact_softmax(x, dim=None, dtype=None, **kwargs):
    "Some models compute it in float32, even for float64."
    return x.softmax(dim)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def one_by_one(model, features):
    "(loss, gradient) of rows that are run one by one."
    model.zero_grad()
    total, items = 0.0, 0
    for f in features:
        logits = model(input_ids=torch.tensor([f["input_ids"]]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(f["labels"][1:], dtype=torch.long)
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        items += int((labels != -100).sum())
    loss = total / items
    loss.backward()
    return loss.item(), gradient(model)


def in_passes(model, features, budget, keep, least, at_once=1):
    "(loss, gradient) of a tree in passes, in one process."
    model.zero_grad()
    items = sum(label != -100 for f in features for label in f["labels"][1:])
    def loss_of(batch):
        return packed_loss(model, batch, items)
    def in_turn(passes):
        losses = [loss_of(batch) for batch in passes]
        for loss in losses:
            loss.backward()
        return losses
    with patch("ftnb.prefix.SIDE_BY_SIDE", 4):
        passes = tree_passes(features, budget, keep, least, at_once)
    losses = flat_losses(model, passes, loss_of, at_once, in_turn)
    return sum(loss.item() for loss in losses), gradient(model)


class Trainer(_InPasses):
    "What passes ask of a trainer."
    is_fsdp_enabled, prompt_weight, compute_loss_context_manager = False, 0.0, contextlib.nullcontext
    args = SimpleNamespace(neftune_noise_alpha=None)

    def __init__(self, accelerator, budget):
        self.accelerator, self.run = accelerator, RunState(budget=budget)
        self.share = partial(share_of, rank=accelerator.process_index, processes=accelerator.num_processes)


def by_all(trainer, model, features):
    "(loss, gradient, held-out loss) of a tree that two processes share."
    model.zero_grad()
    batch, two = padded(features), trainer.accelerator.num_processes
    items = (batch["labels"][:, 1:] != -100).sum()
    loss, _ = run_step(trainer, model, batch, items)
    loss = trainer.accelerator.reduce(loss).item() / two
    trainer.held_out = 0.0
    trainer.prediction_step(model, batch, True)
    total, tokens = trainer.held_out.tolist()
    return loss, gradient(model), total / tokens


def off(mine, right):
    "(how far losses are apart, how far gradients are, relative)"
    return abs(mine[0] - right[0]), ((mine[1] - right[1]).norm() / right[1].norm().clamp(min=1e-12)).item()


def try_tree(g, model, wrapped, accelerator):
    "What -> how far a random tree is from rows run one by one."
    features, budget, least = random_tree(g), g.choice([12, 30, 60, 999]), g.choice([1, 1, 4])
    checkpointing, keep = g.random() < 0.25, g.random() < 0.6
    with patch("torch.nn.functional.softmax", exact_softmax):
        right = one_by_one(model, features)
    if checkpointing:
        causal_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with packing_attention(wrapped):
        alone = in_passes(model, features, budget, keep and not checkpointing, least)
        abreast = alone if checkpointing else in_passes(model, features, budget, keep, least, at_once=3)
        *both, held_out = by_all(Trainer(accelerator, budget), wrapped, features)
    if checkpointing:
        causal_model(model).gradient_checkpointing_disable()
    return {"one process": off(alone, right), "side by side": off(abreast, right), "two processes": off(both, right),
            "evaluation": (abs(held_out - right[0]), 0.0)}


def try_prompts(g, model):
    "Whether prompts that form a tree get the answers of prompts asked one by one."
    prompts = [row + [g.randrange(3, 97)] for row in random_rows(g, g.randint(1, 3))]
    model.eval()
    right = [list(prompt) for prompt in prompts]
    with torch.no_grad():
        with packing_attention(model):
            mine = answer_prompts(model, prompts, 4, g.choice([2, 5, 16]))
        for row in right:
            for _ in range(4):
                row.append(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax().item())
    model.train()
    return mine == [row[-4:] for row in right]


def main(folder, trees):
    from accelerate import Accelerator
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    found = {}
    for kind in ARCHITECTURES:
        model = random_model(kind)
        wrapped, g = accelerator.prepare_model(model), random.Random(kind)
        tried = [try_tree(g, model, wrapped, accelerator) for _ in range(trees)]
        worst = {what: [max(each) for each in zip(*(t[what] for t in tried))] for what in tried[0]}
        answered = [try_prompts(g, model) for _ in range(trees)]
        found[kind] = SimpleNamespace(trees=len(tried), worst=worst, prompts=len(answered), answered=sum(answered)).__dict__
    (Path(folder)/f"{accelerator.process_index}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
