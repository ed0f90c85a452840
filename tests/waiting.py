"What the tests share that wait for something."
import time


def wait_for(test, seconds=900, pause=0.02):
    "Ask again and again until there is an answer, and return it."
    limit = time.monotonic() + seconds
    while not (found := test()):
        if time.monotonic() > limit:
            raise TimeoutError(f"waited {seconds} s in vain")
        time.sleep(pause)
    return found
