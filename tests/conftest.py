"What the tests share. `pytest tests` runs them all; `pytest tests -k words` some, `-m 'not slow'` the quick ones."
import os, sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # no threads of the libraries' own when a process is forked
for name in ("JOB_ARGUMENTS", "FINE_TUNING_STUDIO_SQLITE_DB", "PYTHONHASHSEED"): os.environ.pop(name, None)
sys.path.insert(0, str(Path(__file__).parent))  # for forks.py

import pytest

@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    "The folder of a tiny base model."
    from ftnb.tiny import save_tiny
    return save_tiny(tmp_path_factory.mktemp("base")/"tiny", kind="qwen")
