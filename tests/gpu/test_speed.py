"""How fast a step is on a GPU, what it takes, and where it waits; against padded batches as TRL runs them.

Everything runs on a CPU, too, on a tiny model and few rows, so that it is ready where there is a GPU. Figures, and limits on them,
are a GPU's alone. Liger's kernels are in both contenders where they are installed, else in none.
"""
import contextlib
import random
import time
import warnings
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LARGE = dict(vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
             num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=True)
TINY = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True)


@pytest.fixture(scope="module", params=DEVICES)
def llama(request):
    "1.24 billion parameters in bf16, random, with LoRA on q and v; on a CPU a tiny one."
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    shape, dtype = (LARGE, torch.bfloat16) if request.param == "cuda" else (TINY, torch.float32)
    with torch.device(request.param):
        model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa")).to(dtype)
    return get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).train()


def on_gpu(model):
    return model.device.type == "cuda"


def rows_of(model, rows, prefix, own):
    "Token ids of rows that share a prefix; few and short ones for a CPU."
    g, words = random.Random(0), model.config.vocab_size
    if not on_gpu(model):
        rows, prefix, own = 4, 20, (3, 5)
    head = [g.randrange(3, words) for _ in range(prefix)]
    return [head + [g.randrange(3, words) for _ in range(g.randint(*own))] for _ in range(rows)]


def padded(rows):
    "Rows side by side, on the CPU."
    import torch
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))


def kernels(model):
    "Liger's, where they are installed; for both contenders."
    from ftnb.gpu_layers import liger_layers, liger_problem
    if on_gpu(model) and not liger_problem("llama"):
        return liger_layers(model.get_base_model())
    return contextlib.nullcontext()


@contextlib.contextmanager
def fused_head(model):
    "Within this, the model has the output layer that TRL's trainer gives it."
    from trl.trainer.utils import add_fused_lm_head
    inner = model.get_base_model()
    usual = inner.__dict__.get("forward")
    add_fused_lm_head(inner, outputs=("log_probs", "entropy", "is_top1"))
    try:
        yield
    finally:
        del inner.forward
        if usual is not None:
            inner.forward = usual


def step_as_tree(model, batch):
    "(tokens computed, positions scored)"
    from ftnb.packing import packed_loss
    from ftnb.passes import packed_passes
    passes = packed_passes(batch, 16_384, on_gpu=on_gpu(model))
    items = sum(p.num_items for p in passes)
    for p in passes:
        packed_loss(model, p, items).backward()
    return sum(p.tokens_computed for p in passes), sum(len(p.positions) for p in passes)


def step_as_trl(model, batch, together):
    "(tokens computed, positions scored) of rows side by side, padded, as TRL's trainer runs them unpacked; so many at a time."
    from ftnb.prefix import moved
    computed = 0
    for at in range(0, len(batch["input_ids"]), together):
        part = {name: moved(tensor[at:at + together], model.device) for name, tensor in batch.items()}
        model(**part, fused_lm_head=True).loss.backward()
        computed += part["input_ids"].numel()
    return computed, computed


def finished(model):
    "Wait for the device."
    import torch
    if on_gpu(model):
        torch.cuda.synchronize()


def measured(model, step, repeats=4):
    "(seconds of a step, bytes at most, what the step gave)"
    import gc
    import torch
    gc.collect()
    if on_gpu(model):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(repeats + 1):
        finished(model)
        start = time.perf_counter()
        given = step()
        model.zero_grad()
        finished(model)
        taken.append(time.perf_counter() - start)
    return median(taken[1:]), torch.cuda.max_memory_allocated() if on_gpu(model) else 0, given


def padded_fits(model, batch, together):
    "Has the GPU memory for a padded pass of so many rows?"
    import torch
    try:
        step_as_trl(model, {name: tensor[:together] for name, tensor in batch.items()}, together)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad()


def measured_as_trl(model, batch):
    """(seconds of a step, bytes that all its rows take in one pass, rows of a pass) of padded batches.

    Where the GPU has no memory for all rows at once, they are run in halves, quarters and so on, which takes no longer;
    what they would take at once is then reckoned from two sizes of a pass, since each row adds the same.
    """
    rows = together = len(batch["input_ids"])
    while together > 1 and not padded_fits(model, batch, together):
        together //= 2
    seconds, memory, _ = measured(model, lambda: step_as_trl(model, batch, together))
    if together < rows:
        half = {name: tensor[:together // 2] for name, tensor in batch.items()}
        _, less, _ = measured(model, lambda: step_as_trl(model, half, together // 2), 1)
        memory += (memory - less) * (rows - together) // (together - together // 2)
    return seconds, memory, together


def test_padded_batches_that_do_not_fit(monkeypatch):
    "They are run in halves until they do, and the memory that all rows would take is reckoned."
    import torch
    most_rows, seen = 16, []

    def step(model, batch, together):
        seen.append(min(together, len(batch["input_ids"])))
        if seen[-1] > most_rows:
            raise torch.OutOfMemoryError("there is no room")

    def measure(model, step, repeats=4):
        step()
        return 0.5, 100 + 10 * seen[-1], None
    monkeypatch.setitem(globals(), "step_as_trl", step)
    monkeypatch.setitem(globals(), "measured", measure)
    model = torch.nn.Linear(1, 1)
    assert measured_as_trl(model, {"input_ids": torch.zeros(64, 3)}) == (0.5, 100 + 10 * 64, 16)
    assert measured_as_trl(model, {"input_ids": torch.zeros(16, 3)}) == (0.5, 100 + 10 * 16, 16)


@pytest.mark.parametrize("rows, prefix, own, times, of_peak", [
    (64, 1000, (60, 200), 10, 0.45), (64, 235, (16, 32), 4.5, 0), (16, 235, (16, 32), 1.5, 0)])
def test_speed(llama, rows, prefix, own, times, of_peak, tell):
    "Against padded batches, in one run."
    from ftnb.demo.bench import matmul_gflops
    from ftnb.packing import packing_attention
    batch = padded(rows_of(llama, rows, prefix, own))
    with kernels(llama):
        with packing_attention(llama):
            ours, memory, (tokens, positions) = measured(llama, lambda: step_as_tree(llama, batch))
        with fused_head(llama):
            theirs, their_memory, together = measured_as_trl(llama, batch)
    if not on_gpu(llama):
        return
    body = sum(p.numel() for name, p in llama.named_parameters() if "lora" not in name and "embed" not in name)
    head = llama.get_output_embeddings().weight.numel()
    share, ratio = 4 * (body * tokens + head * positions) / ours / (matmul_gflops() * 1e9), theirs / ours
    what, padded_rows = f"{rows} x ({prefix} + {own[0]}..{own[1]})", min(rows, together)
    tell(what, f"{rows / ours:.0f} rows/s, {ratio:.1f} times padded batches", f"{share:.0%} of the bf16 product")
    reckoned = f" (reckoned: {padded_rows} rows fit at once)" if padded_rows < rows else ""
    tell(what, f"{memory / 2**30:.1f} GiB", f"padded batches {their_memory / 2**30:.1f} GiB{reckoned}")
    assert ratio >= times
    assert share >= of_peak
    assert rows < 64 or memory <= their_memory / 5


def run_of(model, folder, tiny_base, callback, rows, **more):
    "A run of the job's trainer on this model; gives what the callback is."
    from datasets import Dataset
    from ftnb.models import choose_precision, load_tokenizer
    from ftnb.settings import settle_training
    from ftnb.tokenizer import configure_tokenizer_padding
    from ftnb.trainer import train_adapter
    asked = dict(per_device_train_batch_size=len(rows) // 4, gradient_accumulation_steps=1, save_strategy="no") | more
    asked["bf16"] = on_gpu(model)
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    settings = settle_training(asked, choose_precision(asked, {}), folder)
    tokenizer = configure_tokenizer_padding(load_tokenizer(str(tiny_base)))
    callback.start = time.perf_counter()
    train_adapter(model, tokenizer, data, data.select([]), settings, False, callbacks=(callback,))
    return callback


def test_first_step(llama, tmp_path, tiny_base, tell):
    "It is taken within five seconds of the model being there."
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        first = None

        def on_step_end(self, *args, **kwargs):
            finished(llama)
            self.first = self.first or time.perf_counter() - self.start
    clock = run_of(llama, tmp_path, tiny_base, Clock(), rows_of(llama, 64, 1000, (60, 200)) * 4, max_steps=2)
    assert clock.first
    if on_gpu(llama):
        tell("first step of 1.24 billion", "seconds since the model was there", f"{clock.first:.1f}")
        assert clock.first < 5


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_waits(llama, tmp_path, tiny_base, logging_steps, tell):
    "Laying out, passes and backward wait for nothing; what a step waits for is the look at its numbers."
    import torch
    from transformers import TrainerCallback

    def watch(mode):
        if on_gpu(llama):
            torch.cuda.set_sync_debug_mode(mode)

    class Watch(TrainerCallback):
        steps = 0

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step:  # whatever is made once
                watch("warn")

        def on_step_end(self, args, state, control, **kwargs):
            watch("default")
            self.steps += state.global_step > 1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rows = rows_of(llama, 16, 235, (16, 32)) * 4
        watched = run_of(llama, tmp_path, tiny_base, Watch(), rows, max_steps=4, logging_steps=logging_steps)
    assert watched.steps == 3
    waits = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in said if "synchronizing" in str(w.message))
    if on_gpu(llama):
        tell(f"waits a step, a log every {logging_steps}", f"{waits.total() / 3:.1f}", ", ".join(waits))
    ours = {"passes.py", "packing.py", "prefix.py", "attention.py", "trainer.py", "shards.py"}
    assert not [place for place in waits if place.split(":")[0] in ours], waits


@contextlib.contextmanager
def laid_out(batch):
    "Within this, a pass that is on the device is neither moved nor divided again."
    import ftnb.packing as packing
    chunk = packing._Chunk(slice(0, len(batch.positions)), slice(0, len(batch.pair)))
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(type(batch), "to", lambda self, device, **kwargs: self)
        changed.setattr(packing, "_loss_chunks", lambda *args: [chunk])
        changed.setattr(packing, "_free_for_loss", lambda device: 2**40)
        yield


def as_graph(model, step):
    "A pass as a CUDA graph: a function that runs it again."
    import torch
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
            model.zero_grad()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextlib.contextmanager
def compiled_layers(model):
    "Within this, each layer is compiled, its attention left as it is; within `packing_attention`."
    import torch
    from ftnb.packing import ATTENTION, shared_prefix_attention
    from transformers import AttentionInterface
    layers = model.get_base_model().model.layers
    AttentionInterface.register(ATTENTION, torch.compiler.disable(shared_prefix_attention))
    for layer in layers:
        layer.compile(backend="inductor" if on_gpu(model) else "eager")
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        AttentionInterface.register(ATTENTION, shared_prefix_attention)


def test_launches(llama, tell):
    "Would CUDA graphs or compiled layers pay for a small step? This measures it; nothing is asserted."
    import torch
    from ftnb.packing import packed_loss, packing_attention
    from ftnb.prefix import pack_rows
    rows = rows_of(llama, 16, 235, (16, 32))
    batch = pack_rows([{"input_ids": row, "labels": row} for row in rows]).to(llama.device)
    items = torch.tensor(batch.num_items, device=llama.device)

    def step():
        packed_loss(llama, batch, items).backward()
    found = {}
    with kernels(llama), packing_attention(llama), laid_out(batch):
        found["eager"], *_ = measured(llama, step)
        try:
            with compiled_layers(llama):
                found["compiled layers"], *_ = measured(llama, step)
        except Exception as e:
            found["compiled layers"] = f"{type(e).__name__}: {str(e)[:80]}"
        if on_gpu(llama):
            try:
                found["CUDA graph"], *_ = measured(llama, as_graph(llama, step))
            except Exception as e:
                found["CUDA graph"] = f"{type(e).__name__}: {str(e)[:80]}"
    llama.zero_grad()
    if not on_gpu(llama):
        assert isinstance(found["compiled layers"], float), found
        return
    for name, seconds in found.items():
        tell("a pass of 16 x (235 + 16..32)", name, f"{seconds * 1000:.1f} ms" if isinstance(seconds, float) else seconds)
