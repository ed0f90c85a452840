"What the tests share. `pytest tests` runs them all; `pytest tests -k words` some, `-m 'not slow'` the quick ones."
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # no threads of the libraries' own before a fork
for name in ("JOB_ARGUMENTS", "FINE_TUNING_STUDIO_SQLITE_DB", "PYTHONHASHSEED"):
    os.environ.pop(name, None)
sys.path.insert(0, str(Path(__file__).parent))  # for what the tests share


def pytest_addoption(parser):
    parser.addoption("--pictures", help="folder for the README's pictures, which test_browser.py takes")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    "The folder of a tiny base model."
    from ftnb.tiny import save_tiny
    return save_tiny(tmp_path_factory.mktemp("base").resolve()/"tiny", kind="qwen")


@pytest.fixture(scope="module")
def chosen(request):
    "What a parameter is in the tests of a module that will run: what they need can be made at once."
    def values(name):
        items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
        return [*dict.fromkeys(item.callspec.params[name] for item in items if name in item.callspec.params)]
    return values


TABLE = []  # of three texts: what, of what, a figure


@pytest.fixture(scope="session")
def tell():
    "Put a line into the table at the end."
    return lambda *cells: TABLE.append(tuple(map(str, cells)))


def pytest_terminal_summary(terminalreporter):
    if not TABLE:
        return
    terminalreporter.section("figures")
    widths = [max(len(row[i]) for row in TABLE) for i in range(3)]
    for row in TABLE:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths)))
