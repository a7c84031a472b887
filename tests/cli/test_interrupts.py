"""Ctrl-C at any moment: it interrupts, and leaves no lock behind."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# The main thread and another one take turns at a condition, and each interruption comes at a moment of chance: by Python's
# own handler, three of four left the lock taken.
TAKE_TURNS = """
import os, random, signal, sys, threading, time
from proteus_pipeline.cli.interrupts import take_interrupts
kind, number = sys.argv[1], int(sys.argv[2])
condition = threading.Condition() if kind == "RLock" else threading.Condition(threading.Lock())
if sys.argv[3] == "ours":
    take_interrupts()

def free():
    there = []
    def ask():
        if condition.acquire(timeout=5):
            there.append(1)
            condition.release()
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return bool(there)

def interrupt():
    time.sleep(random.uniform(1e-4, 2e-3))
    os.kill(os.getpid(), number)

left = interrupted = 0
for _ in range(100):
    going = True
    def turn():
        while going:
            with condition:
                pass
    other = threading.Thread(target=turn, daemon=True)
    other.start()
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        while True:
            with condition:
                pass
    except KeyboardInterrupt:
        interrupted += 1
    going = False
    if not free():
        left += 1
        break
    other.join()
print(interrupted, left)
"""


def take_turns(kind: str, number: signal.Signals, handler: str) -> tuple[int, int]:
    done = subprocess.run(
        [sys.executable, "-c", TAKE_TURNS, kind, str(int(number)), handler],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    interrupted, left = map(int, done.stdout.split())
    return interrupted, left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["RLock", "Lock"])
def test_each_interrupts_and_none_leaves_a_lock(kind: str, number: signal.Signals):
    assert take_turns(kind, number, "ours") == (100, 0)


def test_pythons_own_handler_leaves_one():
    # Or the test above could not fail.
    assert take_turns("RLock", signal.SIGINT, "Python's")[1] == 1


def test_who_waits_for_ever_is_interrupted_all_the_same():
    program = """
import os, signal, threading
from proteus_pipeline.cli.interrupts import take_interrupts
take_interrupts()
condition = threading.Condition(threading.Lock())
condition.acquire()  # nobody lets go
threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    with condition:
        pass
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "interrupted\n"


def test_an_ignored_ctrl_c_stays_ignored():
    program = """
import os, signal
from proteus_pipeline.cli.interrupts import take_interrupts
signal.signal(signal.SIGINT, signal.SIG_IGN)
take_interrupts()
os.kill(os.getpid(), signal.SIGINT)
print("here")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "here\n"
