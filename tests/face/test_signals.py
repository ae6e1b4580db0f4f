"""Signals that arrive while pages are brought in: none loses a byte, and none is lost."""

from __future__ import annotations

from conftest import RunChild

STORM = """
import os, signal, socket, sys, tempfile, threading, time
import numpy as np
import userfault
from userfault.testing import FaultyStore, delay

BLOCK, LENGTH = 4096, 1_000_003
caught = 0

def note(number, frame):
    global caught
    caught += 1

signal.signal(signal.SIGALRM, note)
signal.signal(signal.SIGUSR1, note)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
main = threading.main_thread().ident
stop = threading.Event()

def pester():
    while not stop.wait(0.001):
        signal.pthread_kill(main, signal.SIGUSR1)

pesterer = threading.Thread(target=pester)
pesterer.start()
memory = userfault.MemoryStore(LENGTH)
store = FaultyStore(memory, [delay("read", 0.001, count=300), delay("write", 0.001, count=300)])
expected = np.zeros(LENGTH, np.uint8)
end = time.monotonic() + float(sys.argv[1])
turn = 0
with userfault.open(store, "r+", block=BLOCK, memory_limit=16 * BLOCK) as region:
    array = region.ndarray(np.uint8)
    while time.monotonic() < end or turn < 3:
        turn += 1
        value = turn % 251 + 1
        array[::1000] = expected[::1000] = value
        region.pwrite(bytes([value]) * 50_000, 7 * turn)
        expected[7 * turn : 7 * turn + 50_000] = value
        with tempfile.TemporaryFile() as file:
            file.write(bytes([value]) * 30_000)
            file.seek(0)
            assert region.readinto(file, 300_000 + turn, 30_000) == 30_000
        expected[300_000 + turn : 330_000 + turn] = value
        ours, theirs = socket.socketpair()
        with ours, theirs, memoryview(region) as view:
            ours.sendall(view[500_000:540_000])
            assert theirs.recv(40_000, socket.MSG_WAITALL) == expected[500_000:540_000].tobytes()
        region.flush()
        assert memory.getvalue() == expected.tobytes()
        region.prefetch([(0, LENGTH)], wait=True)
        with region.pin(100_000, 8 * BLOCK):
            assert region.pread(LENGTH, 0) == expected.tobytes()
        region.evict()
    assert np.array_equal(array, expected)
    del array
stop.set()
pesterer.join()
signal.setitimer(signal.ITIMER_REAL, 0)
assert caught > 20, caught
print("nothing lost")
"""


def test_a_storm_of_signals_loses_nothing_and_interrupts_no_call(run_child: RunChild) -> None:
    assert run_child(STORM, "2", timeout=90).stdout == "nothing lost\n"


INTERRUPT = """
import os, signal, subprocess, time
import userfault
from userfault.testing import FaultyStore, delay

# A run in the background may have been started with the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
store = FaultyStore(userfault.MemoryStore(100_000), [delay("read", 1.0, count=1)])
region = userfault.open(store, block="4KiB")
# Another process sends it: no thread of this one runs while the touch holds the interpreter lock.
killer = subprocess.Popen(["/bin/sh", "-c", f"sleep 0.2; kill -INT {os.getpid()}"])
begin = time.monotonic()
try:
    memoryview(region)[50_000]
    # Python looks at signals between two calls: the touch is over by then, and was right.
    for _ in range(100):
        time.sleep(0.05)
except KeyboardInterrupt:
    print(time.monotonic() - begin < 4)
"""


def test_an_interrupt_waits_for_the_page_and_no_longer(run_child: RunChild) -> None:
    assert run_child(INTERRUPT, timeout=60).stdout == "True\n"


KILLED = """
import os, subprocess
import userfault
from userfault.testing import FaultyStore, hang

store = FaultyStore(userfault.MemoryStore(100_000), [hang("read")])
region = userfault.open(store, block="4KiB")
killer = subprocess.Popen(["/bin/sh", "-c", f"sleep 0.3; kill -TERM {os.getpid()}"])
memoryview(region)[50_000]
"""


def test_a_process_whose_page_does_not_come_can_be_ended_by_a_signal(run_child: RunChild) -> None:
    """The default action of SIGTERM needs no interpreter, and no page."""
    done = run_child(KILLED, timeout=30, check=False)
    assert done.status == -15
    assert done.seconds < 25
