"What the tests on a GPU share: they are skipped where there is none."
import pytest
from noting import note_figure, pytest_runtest_logreport  # noqa: F401, pytest looks for it here


def pytest_collection_modifyitems(items):
    import torch
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture(scope="session")
def tell(tell):
    "Put a line into the table at the end, and note it at once."
    def both(*cells):
        note_figure(*cells)
        tell(*cells)
    return both
