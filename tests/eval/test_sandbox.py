"""eval/sandbox.py under attack: each program here does what the sandbox must stop, and the test looks from outside.

What holds memory beside the limits is tried in HOLDERS: each program takes what it gets, up to a bound of its own that
this machine can bear, and prints how much that was.

Breaks tried, each seen red: NEWNET left out, read_only() and os.chroot() doing nothing (as nobody), env of the caller,
RLIMIT_NPROC left out, RLIMIT_AS at 4 GB, the verdict without its key, the verdict of forked children counted, an exit
code of 0 counted as passed, output kept whole, no /tmp of its own, one without a bound, one over a Python that lies
in /tmp, and of bubblewrap's options no /tmp, a /tmp behind the folders, no --chdir, folders bound to be written; no
system call filter, one without each of its rules, no limit of open files, no nr_inodes, bubblewrap's files not counted,
its root left writable, a /dev/shm of its own, the verdict of a program that lets SIGXCPU pass taken, exit code 255.
"""

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest

from eval import sandbox
from tests.helpers.runs import REPO

WAYS = ("bubblewrap", "namespaces")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux")


@pytest.fixture(params=WAYS)
def run(request):
    """run(program) in one way of isolation, where this machine has it."""
    probe = sandbox.run_by(request.param, "pass", 5, 512)
    if not probe.ok:
        pytest.skip(f"{request.param} does not work on this machine: {probe.reason} {probe.output[-100:]}")
    return lambda source, seconds=5, megabytes=256: sandbox.run_by(request.param, source, seconds, megabytes)


def processes():
    """How many processes of any sandbox there are on this machine."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            count += b"verdict, seconds, memory, processes, size" in path.read_bytes()
        except OSError:
            continue
    return count


def test_a_program_passes_that_runs_to_its_end(run):
    assert run("def add(a, b):\n    return a + b\n\nassert add(2, 3) == 5\nprint('told')") == (True, "passed", "told\n")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 == 2", "failed: AssertionError"),
        ("def f(:", "failed: SyntaxError"),
        ("def f(): return f()\nf()", "failed: RecursionError"),
        ("import nothing_of_this_name", "failed: ModuleNotFoundError"),
        ("input()", "failed: EOFError"),
        # leaving before the tests behind it have run
        ("import sys; sys.exit(0)\nassert False", "failed: SystemExit"),
        ("raise SystemExit", "failed: SystemExit"),
        ("import os; os._exit(0)\nassert False", "exited early"),
        ("import os; os.kill(os.getpid(), 9)", "killed: SIGKILL"),
        ("import os; os.killpg(0, 9)", "killed: SIGKILL"),  # ends the program, not who called it
        ("import ctypes; ctypes.string_at(0)", "killed: SIGSEGV"),
        # telling that it passed
        ("import os; print('passed'); os._exit(0)", "exited early"),
        (
            "import os\nfor n in range(1, 64):\n try: os.write(n, b'passed')\n except OSError: 0\nos._exit(0)",
            "exited early",
        ),
        ("import os, time\nif os.fork():\n time.sleep(.3); raise ValueError", "failed: ValueError"),
        ("x = 'a' * (1 << 30)", "out of memory"),
        ("x = []\nwhile True: x.append(bytes(1 << 20))", "out of memory"),
    ],
)
def test_a_program_fails_for_its_reason(run, source, reason):
    assert run(source)[:2] == (False, reason)


def test_a_loop_and_a_wait_end_in_time(run):
    started = time.monotonic()
    assert run("while True: pass", 1)[:2] == (False, "timeout")
    assert run("import time\nwhile True:\n try: time.sleep(60)\n except BaseException: pass", 1).reason == "timeout"
    assert time.monotonic() - started < 30  # by default the loop would never end


def test_the_network_is_not_there(run):
    """A server of the host: neither TCP nor UDP reaches it, nor an abstract UNIX socket, which has no file."""
    name = f"\0sandbox test {os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(name)
            unix.listen()
            source = f"""
import socket
for family, kind, place in (
    (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", {tcp.getsockname()[1]})),
    (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", {udp.getsockname()[1]})),
    (socket.AF_UNIX, socket.SOCK_STREAM, {name!r}),
):
    try:
        one = socket.socket(family, kind)
        one.connect(place)
        one.send(b"secret")
    except OSError:
        pass  # bubblewrap's network has a loopback of its own, which takes a datagram and loses it
"""
            result = run(source)
            assert result.ok, result
            for server in (tcp, udp, unix):
                server.setblocking(False)
            for receive in (tcp.accept, lambda: udp.recv(9), unix.accept):
                with pytest.raises(BlockingIOError):
                    receive()


def test_nothing_is_written_but_to_its_own_tmp(run, tmp_path):
    places = [Path.home(), REPO, REPO / "eval", Path("/usr"), Path("/etc"), Path("/"), Path("/dev/shm"), tmp_path]
    places += [Path(sys.prefix), Path(sys.base_prefix), Path("/tmp"), Path("/var/tmp")]
    name = f"sandbox-{os.getpid()}"
    source = f"""
import os
written = []
for place in {[str(place) for place in places]}:
    try:
        with open(os.path.join(place, {name!r}), "w") as file:
            file.write("x")
        written.append(place)
    except OSError:
        pass
assert "/tmp" in written
"""
    assert run(source).ok
    found = [place / name for place in places if (place / name).exists()]
    [path.unlink() for path in found]
    assert not found
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    for act in ("open({0!r}, 'w')", "__import__('os').remove({0!r})", "__import__('shutil').rmtree({1!r})"):
        assert not run(act.format(str(kept), str(tmp_path))).ok
    assert kept.read_text() == "as it was"


def test_what_it_writes_is_bounded(run):
    write = f"open(f'/tmp/written-{{name}}', 'wb').write(bytes({sandbox.FILE_BYTES - 1}))"
    several = f"for name in 'abc': {write}"
    assert run(several.replace("abc", "a")).ok
    assert run(several).reason == "failed: OSError"  # all files together
    assert run("open('/tmp/a', 'w').write('x' * (64 << 20))").reason == "failed: OSError"
    printed = run("print('x' * 10_000_000)")
    assert printed.ok and len(printed.output) == sandbox.OUTPUT
    flood = run("while True: print('flood' * 1000)", 1)
    assert flood.reason == "timeout" and len(flood.output) == sandbox.OUTPUT


# -- what holds memory beside the limits ------------------------------------------------------------------------------
LIBC = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.shmdt.argtypes = [ctypes.c_void_p]
libc.syscall.restype = ctypes.c_long
held = 0
"""
MEMFD = """
try:
    for number in range(20):
        file = {open}
        for _ in range(30):
            held += os.write(file, bytes(1 << 20)) / (1 << 20)
except OSError:
    pass
print(round(held))
"""
FILES = """
try:
    for number in range(10):
        with open(f"{folder}/held{{number}}", "wb") as file:
            for _ in range(30):
                held += file.write(bytes(1 << 20)) / (1 << 20)
except OSError:
    pass
print(round(held))
"""
SOCKETS = """
import socket
try:
    server = socket.socket({family})
    server.bind({place})
    server.listen(4096)
    for _ in range(400):
        client = socket.socket({family})
        client.setblocking(False)
        try:
            client.connect(server.getsockname())
        except BlockingIOError:
            pass
        try:
            while True:
                held += client.send(bytes(1 << 16)) / (1 << 20)
        except BlockingIOError:
            client.close()
except OSError:
    pass
print(round(held))
"""
COUNT = """
try:
    for number in range(20000):
        {make}
        held += 1
except OSError:
    pass
print(held)
"""
MEGABYTES_OF_TMP = sandbox.TMP_BYTES >> 20
HOLDERS = {  # the program, and how much it may hold, megabytes or a count
    "memfd_create": (MEMFD.format(open="os.memfd_create(str(number))"), 0),
    "memfd_create by its number": (MEMFD.format(open="libc.syscall(MEMFD_CREATE, b'x', 0)"), 0),
    "memfd_create by x32": (MEMFD.format(open="libc.syscall(0x40000000 | 319, b'x', 0)"), 0),
    "memfd_secret": (
        """
for _ in range(20):
    file = libc.syscall(447, 0)
    if file < 0 or libc.ftruncate(file, ctypes.c_long(30 << 20)):
        break
    held += 30
print(held)
""",
        0,
    ),
    "shared memory of System V": (
        """
for _ in range(20):
    segment = libc.shmget(0, 30 << 20, 0o1600)
    if segment < 0:
        break
    place = libc.shmat(segment, None, 0)
    ctypes.memset(ctypes.c_void_p(place), 1, 30 << 20)
    libc.shmdt(place)
    held += 30
print(held)
""",
        0,
    ),
    "messages of System V": (
        """
message = ctypes.create_string_buffer(8 + 8000)
message[0] = b"\\1"
for _ in range(3000):
    queue = libc.msgget(0, 0o1600)
    if queue < 0:
        break
    while libc.msgsnd(queue, message, 8000, 0o4000) == 0:
        held += 8000 / (1 << 20)
print(round(held))
""",
        0,
    ),
    "semaphores of System V": (
        """
for _ in range(20):
    if libc.semget(0, 32000, 0o1600) < 0:
        break
    held += 32000 * 64 / (1 << 20)
print(round(held))
""",
        0,
    ),
    "messages of POSIX": (
        """
while held < 100 and libc.mq_open(f"/held{held}".encode(), 0o102, 0o600, None) >= 0:
    held += 1
print(held)
""",
        0,
    ),
    "files of /dev/shm": (FILES.format(folder="/dev/shm"), MEGABYTES_OF_TMP),
    "files of /dev": (FILES.format(folder="/dev"), 0),
    "files of the root": (FILES.format(folder=""), 0),
    "unread connections": (SOCKETS.format(family="socket.AF_UNIX", place="'\\0held'"), 0),
    "unread connections of a loopback": (SOCKETS.format(family="socket.AF_INET", place="('127.0.0.1', 0)"), 0),
    "unread datagrams of a loopback": (
        """
import socket
kept = []
try:
    for _ in range(20):
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        kept.append(server)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 20)
        server.bind(("127.0.0.1", 0))
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for _ in range(300):
            held += client.sendto(bytes(1 << 15), server.getsockname()) / (1 << 20)
except OSError:
    pass
print(round(held))
""",
        0,
    ),
    "wide buffers of sockets": (
        """
import socket
kept = [socket.socketpair() for _ in range(20)]
for first, second in kept:
    first.setblocking(False)
    try:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 20)
    except OSError:
        pass
    try:
        while held < 600:
            held += first.send(bytes(1 << 16)) / (1 << 20)
    except BlockingIOError:
        pass
print(round(held))
""",
        10,
    ),
    "huge pages in pipes": (
        """
import mmap
class Piece(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("size", ctypes.c_size_t)]
kept = []
for _ in range(16):
    kept.append(os.pipe())
    for _ in range(16):
        pages = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
        pages[:] = bytes(4 << 20)
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        piece = Piece((start + (2 << 20) - 1) & ~((2 << 20) - 1), 4096)
        if libc.vmsplice(kept[-1][1], ctypes.byref(piece), ctypes.c_ulong(1), 0) > 0:
            held += 2
        del pages
print(held)
""",
        0,
    ),
    "events that nobody reads": (
        """
while held < 100 and libc.inotify_init1(0) >= 0:
    held += 1
print(held)
""",
        0,
    ),
    "rings of io_uring": (
        """
while held < 50 and libc.syscall(425, 64, ctypes.create_string_buffer(120)) >= 0:
    held += 1
print(held)
""",
        0,
    ),
    "a file system of its own": (
        """
if libc.unshare(0x10020000) == 0 and libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, b"size=1g") == 0:
    held = 1024
print(held)
""",
        0,
    ),
    "a new user namespace by clone": (
        """
child = libc.syscall(CLONE, 0x10000000 | 17, 0, 0, 0, 0)
if child == 0:
    os._exit(0)
print(int(child > 0))
""",
        0,
    ),
    "files that are open": (COUNT.format(make="file = os.open('/dev/null', 0)"), sandbox.OPEN_FILES),
}
NUMBERS = {"x86_64": {"MEMFD_CREATE": 319, "CLONE": 56}, "aarch64": {"MEMFD_CREATE": 279, "CLONE": 220}}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_that_no_limit_counts_is_not_held(run, holder):
    source, bound = HOLDERS[holder]
    numbers = NUMBERS[platform.machine()]
    definitions = "".join(f"{name} = {number}\n" for name, number in numbers.items())
    result = run(definitions + LIBC + source)
    assert result.ok, result
    assert int(result.output) <= bound, result


@pytest.mark.parametrize(
    "make",
    [
        "os.mkdir(f'/tmp/{number}')",
        "open(f'/tmp/{number}', 'w').close()",
        "os.symlink('x' * 100, f'/tmp/{number}')",
        "os.link('/tmp/first', f'/tmp/{number}')",
        "os.mkdir('/tmp' + '/x' * (number % 1000 + 1)) if number < 1000 else os.mkdir(f'/tmp/{number}')",
    ],
)
def test_files_and_folders_without_number_are_bounded(run, request, make):
    """namespaces' /tmp takes no more of them; of bubblewrap's they are counted from outside."""
    source = LIBC + "open('/tmp/first', 'w').close()\n" + COUNT.format(make=make)
    result = run(source + "import time\ntime.sleep(1)")
    if "namespaces" in request.node.name:
        assert result.ok and int(result.output) <= sandbox.TMP_FILES, result
    else:
        assert result.reason == "killed: too many files", result
    assert run(source.replace("20000", "2000")).output == "2000\n"


def test_what_an_honest_program_uses_is_there(run):
    """Pools, locks and queues of processes, threads, an event loop, a child, a folder, shared memory."""
    source = """
import asyncio, multiprocessing, subprocess, sys, tempfile, threading
from multiprocessing import shared_memory

with multiprocessing.Pool(2) as pool:
    assert pool.map(abs, [-1, 2, -3]) == [1, 2, 3]
queue = multiprocessing.Queue()
queue.put(4)
with multiprocessing.Lock():
    assert queue.get() == 4
block = shared_memory.SharedMemory(create=True, size=1 << 20)
block.buf[0] = 7
block.close()
block.unlink()

async def wait():
    await asyncio.sleep(0.01)
    return 5

assert asyncio.run(wait()) == 5
thread = threading.Thread(target=print, args=(6,))
thread.start()
thread.join()
assert subprocess.run([sys.executable, "-c", "print(7)"], capture_output=True).stdout == b"7\\n"
with tempfile.TemporaryDirectory() as folder, open(f"{folder}/file", "w") as file:
    file.write("8")
"""
    assert run(source) == (True, "passed", "6\n")


def test_no_key_is_left_for_the_next_program(run):
    """The keyring of its user would outlive it."""
    source = """
import ctypes, platform
numbers = {"x86_64": (248, 250), "aarch64": (217, 219)}[platform.machine()]
libc = ctypes.CDLL(None, use_errno=True)
for keyring in (-4, -5, -3, -1):
    assert libc.syscall(numbers[0], b"user", b"sandbox", b"secret", 6, ctypes.c_int(keyring)) == -1, keyring
    assert libc.syscall(numbers[1], 0, ctypes.c_int(keyring), 1) == -1, keyring
"""
    assert run(source).ok


@pytest.mark.parametrize(
    "source",
    [
        "signal.signal(signal.SIGXCPU, signal.SIG_IGN)",
        "signal.signal(signal.SIGXCPU, stop)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGXCPU])",
    ],
)
def test_the_limit_of_cpu_time_is_a_timeout_whatever_is_made_of_its_signal(run, source, monkeypatch):
    """Also where the program runs to its end, with more seconds than it has; there without a limit of wall time."""
    start = f"import signal, time\ndef stop(*_): raise ValueError\n{source}\n"
    assert run(start + "while True: pass", 1)[:2] == (False, "timeout")
    monkeypatch.setattr(sandbox, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=time.sleep))
    assert run(start + "while time.process_time() < 1.5: pass", 1)[:2] == (False, "timeout")


@pytest.mark.parametrize("code", [1, 2, 126, 127, 128, 200, 255])
def test_an_exit_code_that_is_no_signal_is_an_early_exit(run, code):
    assert run(f"import os; os._exit({code})")[:2] == (False, "exited early")


def test_a_process_of_the_sandbox_is_not_read_or_traced(run):
    source = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
for process in {1, os.getppid()} - {0}:
    assert libc.ptrace(16, process, 0, 0) == -1
    pidfd = os.pidfd_open(process)
    for number in range(20):
        assert libc.syscall(438, pidfd, number, 0) == -1
    word = ctypes.create_string_buffer(8)
    place = (ctypes.c_void_p * 2)(ctypes.addressof(word), 8)
    assert libc.process_vm_readv(process, place, 1, place, 1, 0) == -1
"""
    assert run(source).ok


def test_the_numbers_of_the_filter_are_those_of_the_headers():
    """Linux's own lists of system calls: that of x86_64, and the generic one, which is aarch64's."""
    headers = {
        "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
        "aarch64": "/usr/include/asm-generic/unistd.h",
    }
    for machine, header in headers.items():
        if not os.path.isfile(header):
            pytest.skip(f"no {header}")
        text = Path(header).read_text()
        numbers = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
        table = sandbox.ARCHITECTURES[machine]
        single = {"clone": table.clone, "socket": table.socket, "setsockopt": table.setsockopt}
        for name, number in (table.denied | table.absent | single).items():
            if name in numbers or machine == "x86_64":
                assert numbers[name] == number, (machine, name)
    assert sandbox.ARCHITECTURES["x86_64"].denied.keys() - sandbox.ARCHITECTURES["aarch64"].denied.keys() == {
        "inotify_init"
    }


def test_secrets_stay_outside(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret of the environment")
    secret = tmp_path / "token"
    secret.write_text("secret of a file")
    python = [Path(one).parts[2] for one in sandbox.visible() if one.startswith("/tmp/")]  # this Python may lie there
    source = f"""
import os
print(sorted(os.environ), sorted({{*os.listdir(os.getcwd())}} - {{*{python}}}), os.path.exists({str(secret)!r}))
print(os.path.exists("/etc/passwd"))
print(os.path.exists({str(REPO / "README.md")!r}), os.path.exists("/proc/1/environ"))
"""
    result = run(source)
    assert result.ok and "HF_TOKEN" not in result.output, result
    assert result.output.endswith("[] False\nFalse\nFalse False\n"), result


def test_a_fork_bomb_stays_small_and_ends(run, request):
    """The bomb is bounded here as well: 200 forks at the most, whose children sleep for a minute at the most."""
    if os.geteuid() == 0 and "bubblewrap" in request.node.name:
        pytest.skip("no limit of processes binds root, who is never run by bubblewrap (way())")
    before = processes()
    source = """
import os, time
made = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        made += 1
    except OSError:
        break
print(made)
"""
    result = run(source)
    assert result.ok and 0 < int(result.output) < sandbox.PROCESSES
    deadline = time.monotonic() + 5
    while processes() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes() <= before


def test_its_rights_are_gone():
    if sandbox.way() != "namespaces":
        pytest.skip("bubblewrap's own affair, or no sandbox here")
    source = """
import ctypes, os
libc = ctypes.CDLL(None)
assert libc.unshare(0x10000000) and libc.mount(b"x", b"/tmp", b"tmpfs", 0, None) and libc.chroot(b"/tmp")
for act in (lambda: os.mknod("/tmp/disk", 0o60600, 0x801), lambda: os.nice(-5), lambda: os.sethostname("x")):
    try:
        act()
        print("done")
    except (OSError, AttributeError):
        pass
try:
    os.kill(1, 9)  # what waits for it outside the program's rights, or ignores it
except OSError:
    pass
"""
    result = sandbox.run(source)
    assert result.ok and not result.output, result


@pytest.mark.parametrize("way", WAYS)
def test_a_plain_user_has_the_sandbox_too(way):
    """As root, once more as nobody, by the system's Python, since the one of the tests may stand in root's home."""
    if os.geteuid():
        pytest.skip("the other tests are it")
    python = "/usr/bin/python3"
    if not os.path.exists(python):
        pytest.skip("no /usr/bin/python3 that nobody may run")
    place = Path("/tmp") / f"sandbox-{os.getpid()}"
    place.mkdir()
    programs = ["pass", 'open("/usr/x", "w")', "import os; os._exit(0)", "import os; os.memfd_create('x')"]
    programs += ["import os, time\nfor n in range(9000): os.mkdir(f'/tmp/{n}')\ntime.sleep(1)"]
    try:
        shutil.copy(REPO / "eval" / "sandbox.py", place)
        place.chmod(0o755)
        source = f"import sandbox\nfor program in {programs!r}:\n"
        source += f"    print(sandbox.run_by({way!r}, program, {sandbox.SECONDS}, 256).reason)"
        done = subprocess.run(
            [python, "-c", source], cwd=place, user=65534, group=65534, extra_groups=[], capture_output=True, text=True
        )
    finally:
        shutil.rmtree(place)
    if "passed" not in done.stdout:
        pytest.skip(f"{way} does not work on this machine: plain users get none")
    expected = ["passed", "failed: OSError", "exited early", "failed: PermissionError"]
    expected.append("failed: OSError" if way == "namespaces" else "killed: too many files")
    assert done.stdout.splitlines() == expected, done


def test_a_python_that_lies_in_tmp(run, request):
    """Its folder is in the /tmp of the program, and nothing else of the /tmp outside."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        venv.create(Path(folder, "venv"), symlinks=True)
        Path(folder, "secret").touch()
        program = f"import os; assert os.listdir({folder!r}) == ['venv'] and os.listdir('/tmp') == [{folder[5:]!r}]"
        way = request.node.callspec.params["run"]
        source = f"from eval import sandbox; print(sandbox.run_by({way!r}, {program!r}, 5, 256))"
        command = [Path(folder, "venv", "bin", "python"), "-c", source]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.stdout.startswith("Result(ok=True"), done


def test_what_bubblewrap_is_asked_for(monkeypatch):
    """By its manual, where no machine has it: options take effect in their order, so that a /tmp of its own comes
    before a Python that lies in /tmp; nothing is writable beside it, and of /dev there are four devices."""
    monkeypatch.setattr(sandbox, "visible", lambda: ["/usr", "/tmp/venv"])
    command = sandbox.command_of("bubblewrap", ["python3", "-c", "pass"], 9)[1:]
    assert command[-7:] == ["--chdir", "/tmp", "--info-fd", "9", "python3", "-c", "pass"]
    assert {"--unshare-all", "--die-with-parent", "--new-session"} <= {*command}
    assert command.count("--ro-bind") == 2
    assert not {"--bind", "--dev", "--share-net", "--proc"} & {*command}
    kinds = ("--tmpfs", "--ro-bind", "--remount-ro", "--dev-bind")
    places = [command[n + 1] for n, word in enumerate(command) if word in kinds]
    assert places == ["/tmp", *sandbox.DEVICES, "/usr", "/tmp/venv", "/"]
    assert command[command.index("--symlink") :][:3] == ["--symlink", "/tmp", "/dev/shm"]
    size = command.index("--size")
    assert command[size : size + 4] == ["--size", str(sandbox.TMP_BYTES), "--tmpfs", "/tmp"]


def test_there_is_a_way_where_the_kernel_gives_namespaces():
    """Else every test above would be skipped by a broken sandbox."""
    try:
        flags = ["--net", "--pid", "--fork", "--mount", *([] if os.geteuid() == 0 else ["--user"])]
        given = subprocess.run(["unshare", *flags, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        pytest.skip("no unshare to ask")
    assert sandbox.way() or not given


def test_no_sandbox_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sandbox, "way", lambda: None)
    with pytest.raises(RuntimeError, match="--unsafe_sandbox"):
        sandbox.run("pass")
    (tmp_path / "answer.py").write_text("print(6 * 7)")
    assert sandbox.main([str(tmp_path / "answer.py")]) == 2
    assert "no sandbox here" in capsys.readouterr().err
    assert sandbox.main([str(tmp_path / "answer.py"), "--unsafe_sandbox"]) == 0
    assert capsys.readouterr().out == "42\n"
    assert sandbox.run("while True: pass", 1, unsafe=True).reason == "timeout"  # the limits stand
    assert sandbox.run("x = 'a' * (1 << 30)", unsafe=True).reason == "out of memory"
    assert sandbox.main([str(tmp_path / "gone.py")]) == 2
    (tmp_path / "answer.py").write_text("assert False")
    assert sandbox.main([str(tmp_path / "answer.py"), "--unsafe_sandbox"]) == 1
