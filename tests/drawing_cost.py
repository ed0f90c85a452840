"""What the live picture of a run costs it: `python tests/drawing_cost.py [--rounds 3] [--steps 120] [--width 256]`.

The same training, in turn without `monitor` and with it: in the process that trains, as `tune(..., watch=True)` shows it,
and from another process, as the form does. Prints seconds a step, and how much longer a step took; a minute or two on a
quiet machine.
"""
import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from datasets import Dataset

from ftnb.adapters import apply_lora
from ftnb.all import demo_data, map_dataset_with_prompt_template, monitor, quiet_libraries, save_tiny
from ftnb.models import choose_precision, load_base_model, load_tokenizer
from ftnb.settings import settle_training
from ftnb.tokenizer import configure_tokenizer_padding
from ftnb.tokens import tokenize_rows
from ftnb.trainer import train_adapter

WATCH = """
import sys
from ftnb.all import monitor
monitor(sys.argv[1]).show()
print("watching", flush=True)
sys.stdin.read()
"""
WAYS = ("without", "in this process", "from another")


@contextlib.contextmanager
def watched(way, folder):
    "A picture that is drawn anew every two seconds, or none."
    if way == "in this process":
        picture = monitor(folder)
        picture.show()
        yield
        picture.close()
    elif way == "from another":
        with subprocess.Popen([sys.executable, "-c", WATCH, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            process.stdout.readline()  # it has drawn its first picture, which has imported what it needs
            yield
            process.stdin.close()
    else:
        yield


def tokenized(base):
    "The demo's rows, as they are trained."
    tokenizer = configure_tokenizer_padding(load_tokenizer(str(base)))
    rows = Dataset.from_pandas(pd.read_csv(demo_data()))
    texts = map_dataset_with_prompt_template(rows, "Message: {message}\nIntent: {intent}", tokenizer.eos_token)
    return tokenizer, tokenize_rows(texts, tokenizer).dataset


def seconds_a_step(way, base, rows, folder, steps):
    "Train, and give the seconds of a step, from the tenth to the last."
    tokenizer, dataset = rows
    precision = choose_precision({}, {}, "cpu")
    asked = {"max_steps": steps, "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no"}
    folder.mkdir()
    model = apply_lora(load_base_model(str(base), precision), {"r": 8})
    with contextlib.redirect_stdout(io.StringIO()), watched(way, folder):
        train_adapter(model, tokenizer, dataset, dataset.select([]), settle_training(asked, precision, folder), bar=False)
    lines = map(json.loads, (folder/"metrics.jsonl").read_text().splitlines())
    times = [line["time"] for line in lines if "loss" in line][10:]
    return (times[-1] - times[0]) / (len(times) - 1)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rounds", 3), ("steps", 120), ("width", 256)):
        options.add_argument(f"--{name}", type=int, default=value)
    asked = options.parse_args()
    quiet_libraries()
    found = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as work:
        base = save_tiny(Path(work)/"base", kind="qwen", hidden_size=asked.width, intermediate_size=2 * asked.width)
        rows = tokenized(base)
        seconds_a_step("without", base, rows, Path(work)/"first", 20)  # what is slow once
        for number in range(asked.rounds):
            for way in WAYS:
                found[way].append(seconds_a_step(way, base, rows, Path(work)/f"{number} {way}", asked.steps))
                print(f"round {number + 1}: {way:16} {found[way][-1]:.4f} s a step", flush=True)
    for way in WAYS:
        more = [a / b - 1 for a, b in zip(found[way], found["without"])]
        print(f"{way:16} median {statistics.median(found[way]):.4f} s a step, {statistics.median(more):+.1%} against without")


if __name__ == "__main__":
    main()
