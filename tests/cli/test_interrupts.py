"""Ctrl-C at any moment: it interrupts, once, and leaves no lock behind."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

COMMON = """
import functools, logging, operator, os, queue, random, signal, sys, threading, time, weakref
from concurrent.futures import Future, wait
from contextlib import nullcontext
from proteus_pipeline.cli.interrupts import interruptions

def interrupt(number=signal.SIGINT):
    os.kill(os.getpid(), number)

def then(*functions):
    # Call them, once, and return what is true of it. All of that is C: whoever calls it is the frame that a handler sees.
    return functools.partial(max, map(operator.call, functions), key=bool, default=True)

stop = functools.partial(os.kill, os.getpid(), signal.SIGINT)

def is_free(lock):
    there = []
    def ask():
        if lock.acquire(timeout=2):
            there.append(1)
            lock.release()
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return bool(there)
"""


def run(program: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", COMMON + program, *args], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The main thread and another one take turns, and each interruption comes at a moment of chance: by Python's own handler, three
# of four left a Condition's lock taken.
TAKE_TURNS = """
kind, number, handlers = sys.argv[1], int(sys.argv[2]), interruptions() if sys.argv[3] == "ours" else nullcontext()

def of_a_condition(lock):
    condition = threading.Condition(lock)
    def take():
        with condition:
            pass
    return take, take, lambda: is_free(condition)

def of_futures():
    futures = [Future() for _ in range(8)]
    for future in futures:
        future.set_result(1)
    return functools.partial(wait, futures), lambda: futures[3].done(), lambda: all(map(is_free, [f._condition for f in futures]))

def of_an_event():
    event = threading.Event()
    return functools.partial(event.wait, 1e-5), event.is_set, lambda: is_free(event._cond)

def of_a_queue():
    items = queue.Queue()
    def both():
        items.put(1)
        items.get()
    return both, both, lambda: is_free(items.mutex)

mine, theirs, free = {
    "RLock": lambda: of_a_condition(threading.RLock()), "Lock": lambda: of_a_condition(threading.Lock()),
    "futures": of_futures, "event": of_an_event, "queue": of_a_queue,
}[kind]()
left = interrupted = 0
with handlers:
    for _ in range(60):
        going = True
        def turn():
            while going:
                theirs()
        other = threading.Thread(target=turn, daemon=True)
        other.start()
        def later():
            time.sleep(random.uniform(1e-4, 2e-3))
            interrupt(number)
        stopper = threading.Thread(target=later, daemon=True)  # kept: what is raised while it goes would be lost
        try:
            stopper.start()
            while True:
                mine()
        except KeyboardInterrupt:
            interrupted += 1
        going = False
        if not free():
            left += 1
            break
        other.join()
print(interrupted, left)
"""


@pytest.mark.parametrize("kind", ["RLock", "Lock", "futures", "event", "queue"])
def test_each_interrupts_and_none_leaves_a_lock(kind: str):
    number = signal.SIGTERM if kind == "RLock" else signal.SIGINT
    assert run(TAKE_TURNS, kind, str(int(number)), "ours") == "60 0"


@pytest.mark.parametrize("kind", ["RLock", "futures"])
def test_pythons_own_handler_leaves_one(kind: str):
    # Or the test above could not fail.
    assert run(TAKE_TURNS, kind, str(int(signal.SIGINT)), "Python's").endswith(" 1")


BETWEEN = {
    "a lock is let go and waited for": """
condition = threading.Condition()
condition._release_save = then(condition._release_save, stop)
def use():
    with condition:
        condition.wait(0.5)
lock = condition
""",
    "some futures' locks are taken": """
futures = [Future(), Future()]
first = min(futures, key=id)
taken = first._condition.acquire
first._condition.acquire = then(taken, stop)
def use():
    wait(futures, timeout=0.5)
lock = first._condition._lock
""",
    "a handler's lock is taken": """
class Slow(logging.Handler):
    def emit(self, record):
        time.sleep(0.5)
handler = Slow()
logging._handlerList.clear()  # or it would be closed at the end
lock = handler.lock
class Lock:
    acquire, release = staticmethod(then(lock.acquire, stop)), staticmethod(lock.release)
handler.lock = Lock
def use():
    handler.handle(logging.makeLogRecord({}))
""",
    "logging's own lock is taken": """
lock = logging._lock
class Lock:
    acquire, release = staticmethod(then(lock.acquire, stop)), staticmethod(lock.release)
def use():
    logging._lock = Lock
    logging.getLogger("any")
    logging._lock = lock
    time.sleep(0.5)
""",
    "an object goes": """
lock = threading.Lock()
class Thing:
    pass
def gone():
    lock.acquire()
    stop()
    lock.release()
def use():
    thing = Thing()
    weakref.finalize(thing, gone)
    del thing
    time.sleep(0.5)
""",
    "two signals come": """
condition = threading.Condition()
class Lock:
    __enter__, __exit__ = staticmethod(then(condition._lock.__enter__, stop)), staticmethod(condition._lock.__exit__)
    _is_owned = staticmethod(then(stop, condition._lock._is_owned))
lock, condition._lock = condition._lock, Lock
def use():
    with condition:
        time.sleep(0.5)
""",
}


@pytest.mark.parametrize("moment", BETWEEN)
def test_between_two_steps_where(moment: str):
    program = """
with interruptions():
    try:
        use()
    except KeyboardInterrupt:
        try:
            time.sleep(0.1)
            print("interrupted once")
        except KeyboardInterrupt:
            print("interrupted again")
print("free" if is_free(lock) else "taken")
"""
    assert run(BETWEEN[moment] + program) == "interrupted once\nfree"


def test_who_waits_for_ever_is_interrupted_all_the_same():
    program = """
condition = threading.Condition(threading.Lock())
condition.acquire()  # nobody lets go
with interruptions():
    try:
        threading.Timer(0.2, interrupt).start()
        with condition:
            pass
    except KeyboardInterrupt:
        print("interrupted")
"""
    assert run(program) == "interrupted"


def test_sigterm_is_told_from_ctrl_c_also_where_it_has_to_wait():
    program = """
with interruptions():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        send = functools.partial(signal.raise_signal, number)
        try:
            send()
        except KeyboardInterrupt as error:
            print(type(error).__name__)
        condition = threading.Condition()
        condition._release_save = then(condition._release_save, send)
        try:
            with condition:
                condition.wait(0.5)
        except KeyboardInterrupt as error:
            print(type(error).__name__)
"""
    names = ["KeyboardInterrupt", "Terminated", "KeyboardInterrupt"]
    assert run(program).split() == [name for name in names for _ in range(2)]


def test_what_was_set_stays():
    program = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
with interruptions():
    interrupt()
    signal.setitimer(signal.ITIMER_REAL, 0.01)  # an alarm that is nobody's
    time.sleep(0.05)
print(*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)))
"""
    said = f"{signal.Handlers.SIG_IGN} {signal.Handlers.SIG_DFL} {signal.Handlers.SIG_DFL}"
    assert run(program) == said


def test_another_thread_runs_a_command_too():
    program = """
def use():
    with interruptions():
        print(signal.getsignal(signal.SIGTERM))
thread = threading.Thread(target=use)
thread.start()
thread.join()
"""
    assert run(program) == str(signal.Handlers.SIG_DFL)


def test_a_command_has_it():
    program = """
from proteus_pipeline.cli import main
def seen(args):
    print(type(signal.getsignal(signal.SIGINT)).__name__, type(signal.getsignal(signal.SIGTERM)).__name__)
    return 0
main._code = seen
main.main(["doctor"])
"""
    assert run(program) == "_Interrupt _Interrupt"
