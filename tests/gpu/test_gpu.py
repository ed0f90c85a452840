"""Trees of rows on a GPU: exact, end to end, with memory running out; their speed is `test_speed.py`. One command, five minutes on one card:

    python tests/gpu/run.py

It runs these tests in parts and writes a report. `pytest tests/gpu` runs them in one process.

The tests of exactness run on a CPU, too; all others need a GPU and are skipped without one.
"""
import random
from statistics import median

import pytest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPE = dict(vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
             max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
KINDS = {
    "llama": dict(num_key_value_heads=2), "qwen2": dict(num_key_value_heads=2),
    "gemma2": dict(num_key_value_heads=2, head_dim=16, sliding_window=12, attn_logit_softcapping=4.0, final_logit_softcapping=5.0),
    "mistral": dict(num_key_value_heads=2, sliding_window=12), "gpt2": dict(n_embd=64, n_layer=2, n_head=4),
    "gpt_oss": dict(num_key_value_heads=2, head_dim=16, sliding_window=12, num_local_experts=4, num_experts_per_tok=2)}
EPS = {"float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-10}


def tiny_model(kind, device):
    "A random model with LoRA that does something, in float32."
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SHAPE | KINDS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    if kind == "gpt_oss":
        model.set_experts_implementation("eager")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.ndim > 1 else torch.nn.init.normal_(p, 1.0, 0.1)
    modules = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=modules, fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model.to(device).eval()


def tree(levels, seed):
    "Rows that share their beginnings on so many levels; of one level, rows that share nothing."
    g = random.Random(seed)

    def below(level):
        head = [g.randrange(3, 320) for _ in range(g.randint(8, 40))]
        return [head + row for _ in range(g.randint(2, 3)) for row in below(level - 1)] if level else [head]
    rows = below(levels - 1) if levels > 1 else [below(0)[0] for _ in range(4)]
    return [{"input_ids": row, "labels": row} for row in rows]


def row_by_row(model, rows):
    "Mean loss of label tokens, a row at a time."
    import torch
    total = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        logits = model(input_ids=ids).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    return total / sum(len(row["labels"]) - 1 for row in rows)


def as_tree(model, rows):
    from ftnb.packing import packed_loss
    from ftnb.prefix import pack_rows
    return packed_loss(model, pack_rows(rows, least=1))


def loss_and_gradient(way, model, rows):
    import torch
    from ftnb.packing import packing_attention
    trained = [p for p in model.parameters() if p.requires_grad]
    if way is as_tree:
        with packing_attention(model):
            loss = way(model, rows)
            grads = torch.autograd.grad(loss, trained)
    else:
        loss = way(model, rows)
        grads = torch.autograd.grad(loss, trained)
    return loss.item(), torch.cat([g.flatten().double() for g in grads])


@pytest.mark.gpu
def test_machine(tell):
    "What the figures are from."
    import torch
    from ftnb.demo.bench import machine_words
    words = machine_words() | {"memory": f"{torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB", "CUDA": torch.version.cuda}
    for name, word in words.items():
        tell("machine", name, word)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", DEVICES)
def test_exact(device, kind, dtype, levels, tell):
    "As near to float32, row by row, as rows run one by one in the same format are; a choice of experts tips over now and then."
    import torch
    off = {row_by_row: [], as_tree: []}
    for seed in range(levels, levels + (5 if kind == "gpt_oss" else 1)):
        model, rows = tiny_model(kind, device), tree(levels, seed=seed)
        right, gradient = loss_and_gradient(row_by_row, model, rows)
        model = model.to(getattr(torch, dtype))
        for way, found in off.items():
            loss, grads = loss_and_gradient(way, model, rows)
            found.append((abs(loss - right) / right, ((grads - gradient).norm() / gradient.norm()).item()))
    mine, theirs = ([median(o) for o in zip(*found)] for found in (off[as_tree], off[row_by_row]))
    for ours, alone in zip(mine, theirs):
        assert ours <= max(2 * alone, 4 * EPS[dtype])
    if levels == 4:
        tell(f"{kind}, {dtype}, {device}", "loss and gradients off", f"{mine[0]:.0e}, {mine[1]:.0e}")


@pytest.mark.parametrize("device", DEVICES)
def test_numerical_check(device):
    "The check before training lets right passes through, in each format."
    import torch
    from ftnb.sharing import shares_exactly
    for kind in KINDS:
        for dtype in EPS:
            check = shares_exactly(tiny_model(kind, device).to(getattr(torch, dtype)), tree(2, 0))
            assert check, (kind, dtype, check.reason)


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_of_the_loss(device):
    "The loss is the same for any number of positions at a time."
    import ftnb.packing as packing
    model, rows, found = tiny_model("llama", device), tree(3, 0), []
    for positions in (7, 64, 4096):
        with pytest.MonkeyPatch.context() as changed:
            changed.setattr(packing, "chunk_positions", lambda *args: positions)
            found.append(loss_and_gradient(as_tree, model, rows))
    for loss, gradient in found[1:]:
        assert abs(loss - found[0][0]) < 1e-5
        assert ((gradient - found[0][1]).norm() / found[0][1].norm()).item() < 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_answers(device):
    "Prompts that are read as a tree, and asked one by one: the same answers."
    import torch
    from ftnb.decoding import answer_prompts
    from ftnb.packing import packing_attention
    for kind in KINDS:
        model = tiny_model(kind, device)
        prompts = [row["input_ids"] for row in tree(3, 1)]
        with torch.no_grad(), packing_attention(model):
            mine = answer_prompts(model, prompts, 6, 5)
        right = [list(prompt) for prompt in prompts]
        with torch.no_grad():
            for row in right:
                for _ in range(6):
                    row.append(model(input_ids=torch.tensor([row], device=device)).logits[0, -1].argmax().item())
        same = sum(a == b[-6:] for a, b in zip(mine, right))
        assert same >= len(prompts) - (device == "cuda"), kind  # a tie may fall otherwise there


@pytest.mark.gpu
def test_nobody_waits():
    "A pass goes to the GPU, forward and backward, without a wait in between."
    import torch
    from ftnb.packing import packed_loss, packing_attention
    from ftnb.prefix import pack_rows
    model, rows = tiny_model("llama", "cuda").to(torch.bfloat16), tree(3, 0)
    with packing_attention(model):
        packed_loss(model, pack_rows(rows, least=1)).backward()  # whatever is made once
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            packed_loss(model, pack_rows(rows, least=1), 99).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_moved():
    "Tensors that go over by pinned memory arrive whole, whatever becomes of the first one."
    import torch
    from ftnb.prefix import moved
    for n in range(50):
        there = moved(torch.full((100_000,), n), "cuda")
        assert there.is_cuda
        assert int(there.min()) == int(there.max()) == n


def trained(folder, base, bnb, asked, rows=256):
    "A run from a base model's folder; its rows share a prompt."
    from ftnb.adapters import apply_lora
    from ftnb.consts import DEFAULT_LORA_CONFIG
    from ftnb.models import choose_precision, load_base_model, load_tokenizer
    from ftnb.settings import settle_training
    from ftnb.tokenizer import configure_tokenizer_padding
    from ftnb.trainer import train_adapter
    from datasets import Dataset
    g = random.Random(0)
    prompt = [g.randrange(9, 200) for _ in range(120)]
    ids = [prompt + [g.randrange(9, 200) for _ in range(g.randint(10, 40))] for _ in range(rows)]
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    precision = choose_precision(asked, bnb)
    model = apply_lora(load_base_model(str(base), precision), DEFAULT_LORA_CONFIG)
    tokenizer = configure_tokenizer_padding(load_tokenizer(str(base)))
    return train_adapter(model, tokenizer, data, data.select(range(9)), settle_training(asked, precision, folder), False)


JOB_SETTINGS = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "num_train_epochs": 2}


def asked_for(what):
    "(training arguments, quantisation) of a job: the Studio's own with steps that are fewer and larger, or bf16."
    from ftnb.consts import DEFAULT_BNB_CONFIG, DEFAULT_TRAINING_ARGUMENTS
    if what == "bf16":
        return JOB_SETTINGS | {"bf16": True}, {}
    return DEFAULT_TRAINING_ARGUMENTS | JOB_SETTINGS | {"report_to": "none"}, DEFAULT_BNB_CONFIG


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["the Studio's default: 4-bit, fp16, paged optimizer", "bf16"])
def test_job(what, tmp_path, tiny_base, tell):
    "A job shares its prefix, and its loss falls."
    asked, bnb = asked_for(what)
    run = trained(tmp_path, tiny_base, bnb, asked)
    before, after = run.metrics["eval_loss_before"], run.metrics["eval_loss"]
    fewer = run.metrics["tokens_given"] / run.metrics["tokens_computed"]
    tell(f"a job: {what}", "held-out loss", f"{before:.3f} to {after:.3f}")
    tell(f"a job: {what}", "rows share" if not run.unshared else "rows don't share", run.unshared or f"{fewer:.1f} times fewer tokens")
    assert run.unshared == ""
    assert after < before


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["the Studio's default: 4-bit, fp16, paged optimizer", "bf16"])
def test_script_of_a_job(what, tmp_path, tiny_base, tell):
    "From a record in the Studio's database to a proven adapter, in a process of its own."
    import json
    from ftnb.demo.project import make_demo_project, run_demo_job
    asked, bnb = asked_for(what)
    project = make_demo_project(tmp_path/"project", tiny_base, training=asked | {"max_steps": 8}, bnb=bnb, fraction=0.075)
    seconds = run_demo_job(project)
    record = json.loads((project.out_dir/"run.json").read_text(encoding="utf-8"))
    used = record["used"]
    tell(f"a job's script: {what}", f"{used['precision']['device']}, {used['precision']['dtype']}", f"{seconds:.0f} s")
    assert used["precision"]["device"].startswith("cuda")
    assert used["training"]["shared_prefix"] is True


@pytest.mark.gpu
def test_memory_runs_out(tmp_path, tiny_base, capsys):
    "Real memory runs out: passes become smaller, and the losses are those of a run with enough."
    import torch
    asked = {"per_device_train_batch_size": 128, "max_steps": 2, "bf16": True, "tokens_per_pass": 100_000}
    usual = trained(tmp_path/"usual", tiny_base, {}, asked)
    whole = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 48 * 2**20) / whole))
        scarce = trained(tmp_path/"scarce", tiny_base, {}, asked)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "memory ran out: passes are of" in capsys.readouterr().out
    assert abs(usual.metrics["train_loss"] - scarce.metrics["train_loss"]) < 1e-2


@pytest.mark.gpu
def test_liger(tell):
    "Liger's kernels give what they replace, in each format, where they are installed; the model is as before."
    pytest.importorskip("liger_kernel")
    import torch
    from ftnb.gpu_layers import kernel_obstacle, liger_problem
    rows = [row["input_ids"] for row in tree(2, 0)[:2]]
    for kind in KINDS:
        for dtype in EPS:
            model = tiny_model(kind, "cuda").to(getattr(torch, dtype)).get_base_model()
            why = liger_problem(kind) or kernel_obstacle(model, rows, torch.finfo(getattr(torch, dtype)).eps)
            tell(f"Liger: {kind}, {dtype}", "used" if not why else "not used", why)
            assert not why or kind not in ("llama", "qwen2", "mistral"), why
