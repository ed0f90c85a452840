"What the tests on a GPU share: they are skipped where there is none, and end in a table."
import pytest

TABLE = []  # (what, of what, figure), filled by the tests


def pytest_collection_modifyitems(items):
    import torch
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture
def tell():
    "Put a line into the table."
    return lambda *cells: TABLE.append(tuple(map(str, cells)))


def pytest_terminal_summary(terminalreporter):
    if not TABLE:
        return
    terminalreporter.section("figures")
    widths = [max(len(row[i]) for row in TABLE) for i in range(3)]
    for row in TABLE:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths)))
