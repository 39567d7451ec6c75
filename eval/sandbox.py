"""Run a Python program that nobody has read: what a model wrote, with the tests of a benchmark behind it.

    python -m eval.sandbox answer.py --seconds 5

A program passes if it runs to its last line, as in human-eval's execution.py (OpenAI 2021): no exception, no exit
before the tests behind it, within its limits. It gets a file system of its own in memory: Python and the system's
libraries to read, /tmp to write, gone afterwards; no network, no process but its own, no environment, no capability.
Limits: CPU seconds, wall time of twice that and 2 s, memory of each process, 16 processes, 32 MB a file; OUTPUT
characters of what it prints are kept. Linux only: bubblewrap where it is installed, else namespaces made here; as
root, always the latter, as user nobody, since no limit of processes binds root. Where neither works, --unsafe_sandbox
runs it with the limits alone.

What it cannot do: the program shares its interpreter with its tests, as in human-eval, so one that is written to forge
the verdict (by walking the interpreter's frames) can. Models do not, but rewards of reinforcement learning need more.
"""

import contextlib
import ctypes
import functools
import os
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

SECONDS, MEGABYTES, PROCESSES, FILE_BYTES, OUTPUT = 5, 512, 16, 32 << 20, 2000
NOBODY = 65534
LIBRARIES = ("/usr", "/bin", "/lib", "/lib64", "/lib32")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
ENVIRONMENT |= {"OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}  # a BLAS thread a core would meet the limits

# What runs inside. The key is new for each program: without it nothing printed or written is taken for the verdict.
RUNNER = """
import os, resource, sys
verdict, seconds, memory, processes, size = map(int, sys.argv[1:])
for limit, value in (("AS", memory), ("CPU", seconds), ("NPROC", processes), ("FSIZE", size), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value + (limit == "CPU")))
own = os.getpid()
key, _, source = sys.stdin.buffer.read().decode().partition("\\n")
try:
    exec(compile(source, "program.py", "exec"), {})
    found = "passed"
except MemoryError:
    found = "out of memory"
except BaseException as error:
    found = f"failed: {type(error).__name__}"
    print(f"{type(error).__name__}: {str(error)[:500]}")
if os.getpid() == own:  # of a program that forks, the first process is what counts
    os.write(verdict, (key + found).encode())
try:
    sys.stdout.flush()
finally:
    os._exit(0)
"""


class Result(NamedTuple):
    """Whether a program passed; why not (failed: EXCEPTION, exited early, timeout, out of memory,
    killed: SIGNAL); what it printed."""

    ok: bool
    reason: str
    output: str


def run(source, seconds=SECONDS, megabytes=MEGABYTES, unsafe=False):
    """The Result of a program. Raises RuntimeError, one sentence, where there is no sandbox and unsafe is not set."""
    found = way()
    if found is None and not unsafe:
        raise RuntimeError(
            "no sandbox here: neither bubblewrap nor namespaces work (Linux without a container's restrictions has "
            "them); install bubblewrap, or pass --unsafe_sandbox where the programs can do no harm"
        )
    return run_by(found, source, seconds, megabytes)


@functools.cache
def way():
    """The first way of isolation that runs a program here: bubblewrap, namespaces or None."""
    if sys.platform != "linux":
        return None
    ways = ["bubblewrap", "namespaces"] if os.geteuid() else ["namespaces"]
    return next((one for one in ways if run_by(one, "pass", SECONDS, MEGABYTES).ok), None)


def visible():
    """The folders that a program may read: the system's libraries, this Python and its packages."""
    folders = [Path(sys.prefix), Path(sys.base_prefix), Path(os.path.realpath(sys.executable)).parent]
    folders = [Path(one) for one in LIBRARIES if os.path.isdir(one)] + folders
    return [str(one) for one in dict.fromkeys(folders) if not any(other in one.parents for other in folders)]


def command_of(found, inside):
    """The command that runs `inside` (a command) in isolation."""
    if found == "bubblewrap":
        command = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent", "--new-session"]
        command += ["--size", str(2 * FILE_BYTES), "--tmpfs", "/tmp", "--dev", "/dev"]
        for folder in visible():
            link = os.path.islink(folder)
            command += ["--symlink", os.readlink(folder), folder] if link else ["--ro-bind", folder, folder]
        return [*command, "--chdir", "/tmp", *inside]
    if found == "namespaces":
        return [sys.executable, "-I", __file__, "--inside", *inside]
    return inside


def run_by(found, source, seconds, megabytes):
    """The Result of a program by one way of isolation, None: the limits alone."""
    key, deadline = secrets.token_hex(16), time.monotonic() + 2 * seconds + 2
    reading, verdict = os.pipe()
    limits = map(str, (verdict, seconds, megabytes << 20, PROCESSES, FILE_BYTES))
    command = command_of(found, [sys.executable, "-I", "-c", RUNNER, *limits])
    with tempfile.TemporaryDirectory() as folder, open(reading, "rb") as answer:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[verdict],
                env=ENVIRONMENT,
                cwd=folder,
                start_new_session=True,
            )
        except OSError as error:  # no such command
            return Result(False, f"not started: {error.strerror}", "")
        finally:
            os.close(verdict)
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(f"{key}\n{source}".encode(errors="replace"))
            output, late = printed(process.stdout, deadline)
            if not late:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
            late = process.poll() is None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            process.stdout.close()
        os.set_blocking(reading, False)
        said = (answer.read(200) or b"").decode(errors="replace")
    ended_by = -code if code < 0 else code - 128  # as Popen has it, or as what stands between hands it on
    if said.startswith(key):
        reason = said[len(key) :]
    elif late or ended_by == signal.SIGXCPU:
        reason = "timeout"
    elif ended_by > 0:
        reason = f"killed: {signal.Signals(ended_by).name}"
    else:
        reason = "exited early"
    return Result(reason == "passed", reason, output)


def printed(stream, deadline):
    """(the first OUTPUT characters that a process prints, whether it was still printing at the deadline)."""
    kept = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                if not (block := os.read(stream.fileno(), 1 << 16)):
                    return kept.decode(errors="replace")[:OUTPUT], False
                kept += block[: 4 * OUTPUT - len(kept)]
    return kept.decode(errors="replace")[:OUTPUT], True


# -- the way by namespaces: this file again, as the process that becomes the program -----------------------------------
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 0x1000, 0x4000, 0x40000, 2, 4
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # the number is that of every architecture; Linux 5.12
RDONLY, NOSUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38


def inside(command):
    """Become the command (a list) in namespaces of its own: a new root in memory, nobody's rights, no network."""
    libc, root, user, group = ctypes.CDLL(None, use_errno=True), os.getcwd(), os.geteuid(), os.getegid()

    def call(name, *values):
        values = [value.encode() if isinstance(value, str) else value for value in values]
        values = [ctypes.c_long(value) if isinstance(value, int) else value for value in values]
        if getattr(libc, name)(*values):
            raise OSError(ctypes.get_errno(), f"{name}{values}: {os.strerror(ctypes.get_errno())}")

    def mount(source, place, kind=None, flags=0, options=None):
        call("mount", source, place, kind, flags, options)

    def read_only(place, recursive):
        attributes = struct.pack("QQQQ", RDONLY | NOSUID, 0, 0, 0)
        call("syscall", MOUNT_SETATTR, AT_FDCWD, place, AT_RECURSIVE * recursive, attributes, len(attributes))

    visible_folders, links = visible(), {one: os.readlink(one) for one in LIBRARIES if os.path.islink(one)}
    call("unshare", NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET | (NEWUSER if user else 0))
    if user:  # the kernel lets each user map themselves, once they give up setgroups
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    first = os.fork()
    if first:  # outside: hand on how the first process of the new namespace ended
        os._exit(ended(first))
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # with it, the kernel ends all processes of its namespace

    os.umask(0o022)
    mount(None, "/", flags=MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    Path(f"{root}/tmp").mkdir()  # first: this Python may lie in /tmp
    mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={2 * FILE_BYTES},mode=1777")
    for place in [one for one in visible_folders if one not in links] + list(DEVICES):
        target = Path(root + place)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir(exist_ok=True) if os.path.isdir(place) else target.touch()
        mount(place, str(target), flags=MS_BIND | MS_REC)
        if place not in DEVICES:
            read_only(str(target), True)
    for place, text in links.items():
        os.symlink(text, root + place)
    read_only(root, False)
    os.chroot(root)  # no way back without the capability that exec drops; in it no new user namespace either
    os.chdir("/tmp")

    program = os.fork()
    if program:
        os._exit(ended(program))
    if not user:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    os.setsid()  # a signal to its process group stays inside
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.execv(command[0], command)


def ended(process):
    """The exit code of a child, as shells have it: 128 and the signal where one ended it."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code if code >= 0 else 128 - code


def main(argv=None):
    from data_prep.common.errors import UsageError
    from eval.common.models import positive
    from eval.common.scores import command, parser_of

    parser = parser_of(__doc__)
    parser.add_argument("program", type=Path, help="a Python file")
    parser.add_argument("--seconds", type=positive, default=SECONDS, help="of CPU time")
    parser.add_argument("--megabytes", type=positive, default=MEGABYTES, help="of memory, each process")
    parser.add_argument("--unsafe_sandbox", action="store_true", help="where nothing isolates: the limits alone")

    def once(args):
        if not args.program.is_file():
            raise UsageError(f"the program {args.program} does not exist: pass a Python file")
        try:
            source = args.program.read_text(encoding="utf-8")
            result = run(source, args.seconds, args.megabytes, args.unsafe_sandbox)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UsageError(error) from None
        print(result.output, end="")
        print(result.reason, file=sys.stderr)
        return not result.ok

    return command("sandbox.py", once, parser.parse_args(argv))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2:])
    sys.exit(main())
