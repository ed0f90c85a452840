"What the tests share that run a script as Cloudera ML does: as the source of one cell of a kernel."
import subprocess
from dataclasses import dataclass

from jupyter_client.manager import KernelManager


@dataclass(frozen=True)
class Cell:
    "A cell that has run."
    well: bool  # did it end well?
    out: str  # what it has printed
    error: str  # such as "ValueError: no rows"; "" where it ended well


def run_cell(python, source, env, folder, meanwhile=None):
    "Run one cell in a kernel of this Python. `meanwhile(manager)` is called once it has begun to print."
    manager = KernelManager(kernel_name="python3")
    manager.kernel_spec.argv[:] = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager.start_kernel(env=env, cwd=str(folder), stderr=subprocess.DEVNULL)
    client = manager.client()
    client.start_channels()
    out, error, called = [], [], []

    def show(message):
        content = message["content"]
        if "text" in content:
            out.append(content["text"])
        if "evalue" in content:
            error.append(f"{content['ename']}: {content['evalue']}")
        if out and meanwhile and not called:
            called.append(True)
            meanwhile(manager)

    try:
        client.wait_for_ready(timeout=900)
        reply = client.execute_interactive(source, timeout=1500, output_hook=show)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return Cell(reply["content"]["status"] == "ok", "".join(out), "".join(error))
