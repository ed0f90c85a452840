"What the tests on a GPU share: they are skipped where there is none."
import pytest


def pytest_collection_modifyitems(items):
    import torch
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))
