"""Run a Python program that nobody has read: what a model wrote, with the tests of a benchmark behind it.

    python -m eval.sandbox answer.py --seconds 5

A program passes if it runs to its last line, as in human-eval's execution.py (OpenAI 2021): no exception, no exit
before the tests behind it, within its limits. It gets a file system of its own in memory: Python and the system's
libraries to read, /tmp to write (/dev/shm is a link to it), gone afterwards; no network, no server, no process but its
own, no environment, no capability, no keyring. Linux on x86_64 or aarch64 only: bubblewrap where it is installed, else
namespaces made here; as root, always the latter, as user nobody, since no limit of processes binds root. Where neither
works, --unsafe_sandbox runs it with the limits of setrlimit alone.

Limits: CPU seconds of each process, wall time of twice that and 2 s, 16 processes, 64 open files and the memory of
each process; 32 MB a file, 64 MB and 4,096 files and folders together in /tmp; OUTPUT characters of what it prints are
kept. What would hold memory beside these is refused by a system call filter: memfd_create, shared memory and queues of
System V and POSIX, listening sockets, inotify, io_uring, vmsplice, new namespaces and mounts.

What it does not bound: the memory of all processes together, 16 times that of one (Linux has a limit for it only in
cgroups, which a container seldom hands on); what the kernel keeps for 64 open files, some 30 MB a process. bubblewrap's
/tmp has no limit of files: they are counted 20 times a second, and the program killed beyond 4,096.

What it cannot do: the program shares its interpreter with its tests, as in human-eval, so one that is written to forge
the verdict (by walking the interpreter's frames) can. Models do not, but rewards of reinforcement learning need more.
"""

import argparse
import contextlib
import ctypes
import errno
import functools
import os
import platform
import re
import secrets
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

SECONDS = 5
MEGABYTES = 512
PROCESSES = 16
OPEN_FILES = 64
FILE_BYTES = 32 << 20
TMP_BYTES = 2 * FILE_BYTES
TMP_FILES = 4096  # and folders
OUTPUT = 2000  # characters
TICK = 0.05  # seconds between two looks at a running program
NOBODY = 65534
LIBRARIES = ("/usr", "/bin", "/lib", "/lib64", "/lib32")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",  # a BLAS thread a core would meet the limits
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}

# What runs inside. The key is new for each program: without it nothing printed or written is taken for the verdict.
RUNNER = """
import ctypes, os, resource, struct, sys
verdict, seconds, memory, processes, size, files = map(int, sys.argv[1:7])
for limit, value in (("AS", memory), ("NPROC", processes), ("FSIZE", size), ("NOFILE", files), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value))
# the second, which kills, lies behind the wall time of all its threads: a program that ignores SIGXCPU runs up to that
resource.setrlimit(resource.RLIMIT_CPU, (seconds, processes * (2 * seconds + 2)))
own = os.getpid()
key, _, source = sys.stdin.buffer.read().decode().partition("\\n")
code = ctypes.create_string_buffer(bytes.fromhex(sys.argv[7]))
if sys.argv[7]:
    libc = ctypes.CDLL(None, use_errno=True)
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(code))
    none = ctypes.c_ulong(0)
    if libc.prctl(38, ctypes.c_ulong(1), none, none, none) or libc.prctl(22, ctypes.c_ulong(2), program, none, none):
        os.write(verdict, (key + "not started: no system call filter").encode())
        os._exit(1)
try:
    exec(compile(source, "program.py", "exec"), {})
    found = "passed"
except MemoryError:
    found = "out of memory"
except BaseException as error:
    found = f"failed: {type(error).__name__}"
    print(f"{type(error).__name__}: {str(error)[:500]}")
if resource.getrlimit(resource.RLIMIT_CPU)[0] > seconds:  # so the kernel notes that it has sent SIGXCPU
    found = "timeout"
if os.getpid() == own:  # of a program that forks, the first process is what counts
    os.write(verdict, (key + found).encode())
try:
    sys.stdout.flush()
finally:
    os._exit(0)
"""


class Result(NamedTuple):
    """Whether a program passed; why not (failed: EXCEPTION, exited early, timeout, out of memory, killed: SIGNAL,
    killed: too many files); what it printed."""

    ok: bool
    reason: str
    output: str


def run(source: str, seconds: int = SECONDS, megabytes: int = MEGABYTES, unsafe: bool = False) -> Result:
    """Return the Result of a program. Raises RuntimeError, one sentence, where there is no sandbox, unless unsafe."""
    found = way()
    if found is None and not unsafe:
        raise RuntimeError(
            "no sandbox here: neither bubblewrap nor namespaces work (Linux on x86_64 or aarch64 without a container's "
            "restrictions has them); install bubblewrap, or pass --unsafe_sandbox where the programs can do no harm"
        )
    return run_by(found, source, seconds, megabytes)


@functools.cache
def way() -> str | None:
    """Return the first way of isolation that runs a program here: bubblewrap, namespaces or None."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        return None
    for name in ("bubblewrap", "namespaces"):
        if name == "bubblewrap" and os.geteuid() == 0:
            continue
        if run_by(name, "pass", SECONDS, MEGABYTES).ok:
            return name
    return None


def visible() -> list[str]:
    """Return the folders that a program may read: the system's libraries, this Python and its packages."""
    folders = [Path(folder) for folder in LIBRARIES if os.path.isdir(folder)]
    folders += [Path(sys.prefix), Path(sys.base_prefix), Path(os.path.realpath(sys.executable)).parent]
    kept = []
    for folder in folders:
        is_inside = any(other in folder.parents for other in folders)
        if not is_inside and str(folder) not in kept:
            kept.append(str(folder))
    return kept


# -- the system call filter -------------------------------------------------------------------------------------------
class Architecture(NamedTuple):
    """Linux's number of an architecture (audit.h), and those of its system calls (unistd.h)."""

    audit: int
    denied: dict[str, int]
    absent: dict[str, int]  # answered as if the kernel did not have them, so that a library takes another
    clone: int
    socket: int
    setsockopt: int


# what is the same on both
NEWER_CALLS = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
    "memfd_secret": 447,
}
ARCHITECTURES = {
    "x86_64": Architecture(
        audit=0xC000003E,
        denied={
            "shmget": 29,
            "listen": 50,
            "semget": 64,
            "msgget": 68,
            "ptrace": 101,
            "pivot_root": 155,
            "chroot": 161,
            "mount": 165,
            "umount2": 166,
            "mq_open": 240,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "inotify_init": 253,
            "unshare": 272,
            "vmsplice": 278,
            "inotify_init1": 294,
            "perf_event_open": 298,
            "fanotify_init": 300,
            "setns": 308,
            "process_vm_readv": 310,
            "process_vm_writev": 311,
            "memfd_create": 319,
            "bpf": 321,
            "userfaultfd": 323,
            **NEWER_CALLS,
        },
        absent={"clone3": 435},
        clone=56,
        socket=41,
        setsockopt=54,
    ),
    "aarch64": Architecture(
        audit=0xC00000B7,
        denied={
            "inotify_init1": 26,
            "umount2": 39,
            "mount": 40,
            "pivot_root": 41,
            "chroot": 51,
            "vmsplice": 75,
            "unshare": 97,
            "ptrace": 117,
            "mq_open": 180,
            "msgget": 186,
            "semget": 190,
            "shmget": 194,
            "listen": 201,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "perf_event_open": 241,
            "fanotify_init": 262,
            "setns": 268,
            "process_vm_readv": 270,
            "process_vm_writev": 271,
            "memfd_create": 279,
            "bpf": 280,
            "userfaultfd": 282,
            **NEWER_CALLS,
        },
        absent={"clone3": 435},
        clone=220,
        socket=198,
        setsockopt=208,
    ),
}
X32 = 0x40000000  # x86_64's other numbers for the same calls
NEW_NAMESPACES = 0x7E020000  # flags of clone
LOAD = 0x20  # operations of classic BPF (filter.h): a word of seccomp_data, the jumps, the answer
IF_EQUAL = 0x15
IF_AT_LEAST = 0x35
IF_ANY_BIT = 0x45
ANSWER = 0x06
NUMBER = 0  # where the words of seccomp_data lie
AUDIT = 4
FIRST_ARGUMENT = 16  # its lower half: both architectures are little-endian
THIRD_ARGUMENT = 32
AF_UNIX = 1
SO_SNDBUF = 7
ALLOW = 0x7FFF0000
KILL = 0x80000000
ERROR = 0x00050000


def make_filter(architecture: Architecture) -> bytes:
    """Return the BPF program that refuses what an architecture's table denies. It sees numbers, not paths."""
    steps = [
        struct.pack("HBBI", LOAD, 0, 0, AUDIT),
        struct.pack("HBBI", IF_EQUAL, 1, 0, architecture.audit),
        struct.pack("HBBI", ANSWER, 0, 0, KILL),
        struct.pack("HBBI", LOAD, 0, 0, NUMBER),
        struct.pack("HBBI", IF_AT_LEAST, 0, 1, X32),
        struct.pack("HBBI", ANSWER, 0, 0, ERROR | errno.ENOSYS),
    ]
    for calls, error in ((architecture.denied, errno.EPERM), (architecture.absent, errno.ENOSYS)):
        for number in calls.values():
            steps.append(struct.pack("HBBI", IF_EQUAL, 0, 1, number))
            steps.append(struct.pack("HBBI", ANSWER, 0, 0, ERROR | error))
    steps += [
        struct.pack("HBBI", IF_EQUAL, 0, 4, architecture.clone),
        struct.pack("HBBI", LOAD, 0, 0, FIRST_ARGUMENT),
        struct.pack("HBBI", IF_ANY_BIT, 0, 1, NEW_NAMESPACES),
        struct.pack("HBBI", ANSWER, 0, 0, ERROR | errno.EPERM),
        struct.pack("HBBI", ANSWER, 0, 0, ALLOW),
        struct.pack("HBBI", IF_EQUAL, 0, 3, architecture.socket),
        struct.pack("HBBI", LOAD, 0, 0, FIRST_ARGUMENT),
        struct.pack("HBBI", IF_EQUAL, 1, 0, AF_UNIX),  # of others the loopback would hold what is sent
        struct.pack("HBBI", ANSWER, 0, 0, ERROR | errno.EAFNOSUPPORT),
        struct.pack("HBBI", IF_EQUAL, 0, 3, architecture.setsockopt),
        struct.pack("HBBI", LOAD, 0, 0, THIRD_ARGUMENT),
        struct.pack("HBBI", IF_EQUAL, 0, 1, SO_SNDBUF),  # the system's own is small
        struct.pack("HBBI", ANSWER, 0, 0, ERROR | errno.EPERM),
        struct.pack("HBBI", ANSWER, 0, 0, ALLOW),
    ]
    return b"".join(steps)


# -- one run ----------------------------------------------------------------------------------------------------------
def command_of(found: str | None, inside: list[str], info: int = -1) -> list[str]:
    """Return the command that runs `inside`, a command, in isolation; info: the file descriptor of bubblewrap's."""
    if found == "bubblewrap":
        command = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent", "--new-session"]
        command += ["--cap-drop", "ALL", "--size", str(TMP_BYTES), "--tmpfs", "/tmp"]
        for device in DEVICES:
            command += ["--dev-bind", device, device]
        command += ["--symlink", "/tmp", "/dev/shm"]
        for folder in visible():
            if os.path.islink(folder):
                command += ["--symlink", os.readlink(folder), folder]
            else:
                command += ["--ro-bind", folder, folder]
        return [*command, "--remount-ro", "/", "--chdir", "/tmp", "--info-fd", str(info), *inside]
    if found == "namespaces":
        return [sys.executable, "-I", __file__, "--inside", *inside]
    return inside


def run_by(found: str | None, source: str, seconds: int, megabytes: int) -> Result:
    """Return the Result of a program by one way of isolation, None: the limits alone."""
    key = secrets.token_hex(16)
    deadline = time.monotonic() + 2 * seconds + 2
    filter_code = b""
    if found is not None:
        filter_code = make_filter(ARCHITECTURES[platform.machine()])
    reading, verdict = os.pipe()
    info_reading, info = os.pipe()
    limits = [verdict, seconds, megabytes << 20, PROCESSES, FILE_BYTES, OPEN_FILES]
    inside = [sys.executable, "-I", "-c", RUNNER, *[str(limit) for limit in limits], filter_code.hex()]
    handed_on = [verdict]
    if found == "bubblewrap":
        handed_on.append(info)
    with tempfile.TemporaryDirectory() as folder, open(reading, "rb") as answer, open(info_reading, "rb") as place:
        try:
            process = subprocess.Popen(
                command_of(found, inside, info),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=handed_on,
                env=ENVIRONMENT,
                cwd=folder,
                start_new_session=True,
            )
        except OSError as error:  # no such command
            return Result(False, f"not started: {error.strerror}", "")
        finally:
            os.close(verdict)
            os.close(info)
        follower = Follower(process, deadline, FileCount(place.fileno()))
        follower.follow(f"{key}\n{source}".encode(errors="replace"))
        os.set_blocking(reading, False)
        said = (answer.read(200) or b"").decode(errors="replace")
    reason = find_reason(said, key, follower)
    return Result(reason == "passed", reason, follower.output.decode(errors="replace")[:OUTPUT])


class FileCount:
    """Counts the files and folders of bubblewrap's /tmp, once it has written to a pipe which process it is."""

    def __init__(self, info: int) -> None:
        os.set_blocking(info, False)
        self.info = info
        self.root = ""

    def count(self) -> int:
        """Return how many there are, 0 where that is not known."""
        try:
            if not self.root:
                found = re.search(rb'"child-pid": (\d+)', os.read(self.info, 4096))
                if found is None:
                    return 0
                self.root = f"/proc/{found[1].decode()}/root"
            if os.stat(f"{self.root}/tmp").st_dev == os.stat("/tmp").st_dev:  # it is not in its own root yet
                return 0
            space = os.statvfs(f"{self.root}/tmp")
        except OSError:
            return 0
        return space.f_files - space.f_ffree


class Follower:
    """Hands a process its text and follows it to its end, which comes at the deadline or beyond TMP_FILES by force.

    output: the first bytes that it prints; code: its exit code, less than 0 for a signal.
    """

    def __init__(self, process: subprocess.Popen, deadline: float, files: FileCount) -> None:
        self.process = process
        self.deadline = deadline
        self.files = files
        self.output = b""
        self.is_late = False
        self.has_too_many_files = False
        self.code = 0

    def follow(self, text: bytes) -> None:
        try:
            with contextlib.suppress(BrokenPipeError), self.process.stdin:
                self.process.stdin.write(text)
            self.read()
            while self.is_running() and not self.must_end():
                time.sleep(TICK / 5)
            self.is_late = self.is_late and self.is_running()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.code = self.process.wait()
            self.process.stdout.close()

    def read(self) -> None:
        """Keep the first bytes that the process prints, until there are no more or it must end."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not self.must_end():
                if not selector.select(TICK):
                    continue
                block = os.read(self.process.stdout.fileno(), 1 << 16)
                if not block:
                    return
                self.output += block[: 4 * OUTPUT - len(self.output)]

    def is_running(self) -> bool:
        return self.process.poll() is None

    def must_end(self) -> bool:
        self.is_late = time.monotonic() >= self.deadline
        self.has_too_many_files = self.files.count() > TMP_FILES
        return self.is_late or self.has_too_many_files


def find_reason(said: str, key: str, follower: Follower) -> str:
    """Return why a program passed or failed; said: what stands in the pipe of its verdict."""
    if said.startswith(key):
        return said[len(key) :]
    ended_by = -follower.code  # as Popen has it, or as what stands between hands it on
    if follower.code >= 0:
        ended_by = follower.code - 128
    if follower.is_late or ended_by == signal.SIGXCPU:
        return "timeout"
    if follower.has_too_many_files:
        return "killed: too many files"
    if ended_by in set(signal.Signals):
        return f"killed: {signal.Signals(ended_by).name}"
    return "exited early"


# -- the way by namespaces: this file again, as the process that becomes the program -----------------------------------
NEWNS = 0x20000
NEWUTS = 0x4000000
NEWIPC = 0x8000000
NEWUSER = 0x10000000
NEWPID = 0x20000000
NEWNET = 0x40000000
MS_NOSUID = 2
MS_NODEV = 4
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MOUNT_SETATTR = 442  # the number of every architecture; Linux 5.12
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
ATTR_RDONLY = 1
ATTR_NOSUID = 2
PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *values: object) -> None:
    """Call a function of libc. Raises OSError where it fails."""
    arguments = []
    for value in values:
        if isinstance(value, str):
            arguments.append(value.encode())
        elif isinstance(value, int):
            arguments.append(ctypes.c_long(value))
        else:
            arguments.append(value)
    if getattr(LIBC, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}{values}: {os.strerror(ctypes.get_errno())}")


def mount(source: str | None, place: str, kind: str | None = None, flags: int = 0, options: str | None = None) -> None:
    call("mount", source, place, kind, flags, options)


def make_read_only(place: str, recursive: bool) -> None:
    attributes = struct.pack("QQQQ", ATTR_RDONLY | ATTR_NOSUID, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, place, AT_RECURSIVE * recursive, attributes, len(attributes))


def become(command: list[str]) -> None:
    """Become a command in namespaces of its own: a new root in memory, nobody's rights, no network."""
    root = os.getcwd()
    is_root = os.geteuid() == 0
    enter_namespaces(is_root)
    first = os.fork()
    if first:  # outside: hand on how the first process of the new namespace ended
        os._exit(exit_code_of(first))
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # with it, the kernel ends all processes of its namespace
    build_root(root)
    os.chroot(root)  # no way back without the capability that exec drops; in it no new user namespace either
    os.chdir("/tmp")
    program = os.fork()
    if program:
        os._exit(exit_code_of(program))
    if is_root:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    os.setsid()  # a signal to its process group stays inside
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.execv(command[0], command)


def enter_namespaces(is_root: bool) -> None:
    """Move to new namespaces; of users too unless root: the kernel lets each user map themselves, once they give up
    setgroups."""
    user = os.geteuid()
    group = os.getegid()
    flags = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    if is_root:
        call("unshare", flags)
        return
    call("unshare", flags | NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def build_root(root: str) -> None:
    """Mount a root in memory at a folder: what is visible and the devices, read-only, and /tmp."""
    folders = visible()
    links = {folder: os.readlink(folder) for folder in LIBRARIES if os.path.islink(folder)}
    os.umask(0o022)
    mount(None, "/", flags=MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    Path(f"{root}/tmp").mkdir()  # first: this Python may lie in /tmp
    options = f"size={TMP_BYTES},nr_inodes={TMP_FILES},mode=1777"
    mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, options)
    for folder in folders:
        if folder not in links:
            target = Path(root + folder)
            target.mkdir(parents=True, exist_ok=True)
            mount(folder, str(target), flags=MS_BIND | MS_REC)
            make_read_only(str(target), recursive=True)
    for device in DEVICES:
        target = Path(root + device)
        target.parent.mkdir(exist_ok=True)
        target.touch()
        mount(device, str(target), flags=MS_BIND | MS_REC)
    os.symlink("/tmp", f"{root}/dev/shm")
    for folder, text in links.items():
        os.symlink(text, root + folder)
    make_read_only(root, recursive=False)


def exit_code_of(process: int) -> int:
    """Wait for a child; return its exit code as shells have it: 128 and the signal where one ended it."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code < 0:
        return 128 - code
    return code


# -- the command ------------------------------------------------------------------------------------------------------
def run_program(args: argparse.Namespace) -> int:
    from data_prep.common.errors import UsageError  # here, as below: the sandbox starts this file alone, by its path

    if not args.program.is_file():
        raise UsageError(f"the program {args.program} does not exist: pass a Python file")
    try:
        source = args.program.read_text(encoding="utf-8")
        result = run(source, args.seconds, args.megabytes, args.unsafe_sandbox)
    except (RuntimeError, UnicodeDecodeError) as error:
        raise UsageError(str(error)) from None
    print(result.output, end="")
    print(result.reason, file=sys.stderr)
    return int(not result.ok)


def main(argv: list[str] | None = None) -> int:
    from eval.common.arguments import positive
    from eval.common.scores import command, parser_of

    parser = parser_of(__doc__)
    parser.add_argument("program", type=Path, help="a Python file")
    parser.add_argument("--seconds", type=positive, default=SECONDS, help="of CPU time")
    parser.add_argument("--megabytes", type=positive, default=MEGABYTES, help="of memory, each process")
    parser.add_argument("--unsafe_sandbox", action="store_true", help="where nothing isolates: the limits alone")
    return command("sandbox.py", run_program, parser.parse_args(argv))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        become(sys.argv[2:])
    sys.exit(main())
