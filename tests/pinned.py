"""What libraries make of an adapter: asked of this Python's own, and of those that the Studio pins.

`python tests/pinned.py LIBRARIES PLACES FOUND` does the latter, in a process of its own.
"""
import json
import pickle
import sys
import traceback
import warnings
from pathlib import Path

TEXTS = ("Message: where is my parcel?\nIntent:", "Message: I want my money back!\nIntent: refund",
         "The keypad of my phone is broken.", "  two spaces, caf\u00e9, \U0001F600 12345\n\n")
ROLES = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def model_and_tokenizer(base, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    return model, AutoTokenizer.from_pretrained(adapter)


def loaded(base, adapter, ids=None):
    "Ids of texts, logits with the adapter and without, special tokens, and the base that it names."
    import torch
    model, tokenizer = model_and_tokenizer(base, adapter)
    settings = json.loads((Path(adapter)/"adapter_config.json").read_text())
    own = [tokenizer(text)["input_ids"] for text in TEXTS]

    def logits():
        return [model(input_ids=torch.tensor([row])).logits[0].float().numpy() for row in ids or own]
    with torch.no_grad():
        found = {"logits": logits()}
        with model.disable_adapter():
            found["alone"] = logits()
    return found | {"ids": own, "texts": [tokenizer.decode(row) for row in own],
                    "base": settings["base_model_name_or_path"], "special": [getattr(tokenizer, role) for role in ROLES]}


def share_right(base, adapter, asked):
    "As the Studio evaluates: the filled-in prompt is a text, the tokenizer makes tokens of it, and the model goes on from there."
    import torch
    model, tokenizer = model_and_tokenizer(base, adapter)
    right = 0
    for prompt, wanted in asked:
        row = tokenizer(prompt, return_tensors="pt")
        row.pop("token_type_ids", None)
        with torch.no_grad():
            made = model.generate(**row, max_new_tokens=64, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answer = tokenizer.decode(made[0, row["input_ids"].shape[1]:], skip_special_tokens=True)
        right += answer.strip().splitlines()[:1] == [wanted]
    return right / len(asked)


def main(libraries, places, found):
    sys.path.insert(0, libraries)
    warnings.simplefilter("ignore")
    import peft
    import transformers
    transformers.logging.set_verbosity_error()
    results = {"versions": (peft.__version__, transformers.__version__)}
    for name, base, adapter, asked in json.loads(Path(places).read_text()):
        try:
            results[name] = share_right(base, adapter, asked) if asked else loaded(base, adapter)
        except Exception:
            results[name] = traceback.format_exc()
    Path(found).write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
