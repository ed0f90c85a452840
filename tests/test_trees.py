"At least 200 random trees over 15 architectures: the same losses, gradients and answers as rows run one by one."
import json
from pathlib import Path

import pytest

from ftnb.ranks import run_locally

pytestmark = pytest.mark.slow

TREES = 14  # of each architecture, and as many trees of prompts
LIMITS = (1e-12, 1e-6)  # of losses, and of gradients, relative


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "What each of two processes has found: architecture -> its numbers."
    folder = tmp_path_factory.mktemp("trees")
    done = run_locally(2, Path(__file__).parent/"trees.py", folder, TREES)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder/f"{rank}.json").read_text()) for rank in range(2)]


def test_enough(found, tell):
    for of_rank in found:
        assert len(of_rank) == 15
        assert sum(each["trees"] for each in of_rank.values()) >= 200
    tell("random trees", f"{sum(each['trees'] for each in found[0].values())} of rows over {len(found[0])} architectures",
         f"{sum(each['prompts'] for each in found[0].values())} of prompts")


@pytest.mark.parametrize("what", ["one process", "side by side", "two processes", "evaluation"])
def test_exact(found, what, tell):
    "Loss and gradients, in passes, kept or not, with checkpointing or not; the held-out loss."
    worst = [0.0, 0.0]
    for of_rank in found:
        for kind, each in of_rank.items():
            for number, limit in zip(each["worst"][what], LIMITS):
                assert number <= limit, (kind, each["worst"])
            worst = [max(pair) for pair in zip(worst, each["worst"][what])]
    tell("largest differences", what, f"loss {worst[0]:.0e}" + (f", gradients {worst[1]:.0e}" if worst[1] else ""))


def test_answers(found):
    "Prompts that form a tree are answered as one by one."
    for of_rank in found:
        for kind, each in of_rank.items():
            assert each["answered"] == each["prompts"] == TREES, kind
