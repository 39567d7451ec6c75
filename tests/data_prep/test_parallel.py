"""Work over processes: in order whoever works, and none of them outlives its command.

Each of these turns the suite red (tried): results in the order in which they are ready; processes that outlive a killed
command, or that Ctrl-C cuts; no end by SIGTERM; Ctrl-C that meets an import, here or in a process.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest

from data_prep.common import parallel
from data_prep.common.errors import UsageError
from tests.helpers.runs import MODULES


@pytest.mark.parametrize(
    ("items", "num_proc", "here"), [(7, None, True), (30, 1, True), (30, 2, False), (30, None, False)]
)
def test_results_are_in_order_whoever_works(items, num_proc, here):
    """The first ones take longest; few items are worked on here."""
    work = [f"(__import__('time').sleep({0.2 * (n < 2)}), {n}, __import__('os').getpid())[1:]" for n in range(items)]
    with mock.patch("data_prep.common.parallel.count_cores", lambda: 2):
        results = [*parallel.parallel_map(eval, work, num_proc)]
    assert [number for number, _ in results] == [*range(items)]
    assert {process == os.getpid() for _, process in results} == {here}


def test_a_process_that_dies_is_one_sentence():
    with pytest.raises(UsageError, match="a process died, most likely out of memory: pass a smaller --num_proc"):
        [*parallel.parallel_map(eval, ["__import__('os')._exit(1)"] * 20, 2)]


def test_work_ahead_is_bounded():
    """Memory does not grow with the input: no more than twice the processes are ahead of what was taken."""
    drawn = []

    def items():
        for number in range(40):
            drawn.append(number)
            yield str(number)

    results = parallel.parallel_map(eval, items(), 2)
    for taken in range(1, 41):
        next(results)
        assert len(drawn) <= max(parallel.FEW, taken + 4)


def test_no_process_is_left_when_all_results_are_there():
    """Those that end together with Python print a fault of theirs."""
    assert [*parallel.parallel_map(eval, map(str, range(20)), 2)] == [*range(20)]
    assert not multiprocessing.active_children()


def test_results_that_nobody_takes_are_not_waited_for(tmp_path):
    """The processes work until the file is there, which is after the end of the generator."""
    wait = f"while not __import__('os').path.exists({str(tmp_path / 'go')!r}): __import__('time').sleep(0.05)"
    results = parallel.parallel_map(eval, ["0", *[f"exec({wait!r})"] * 20], 2)
    assert next(results) == 0
    end = threading.Thread(target=results.close, daemon=True)
    end.start()
    end.join(60)
    waits = end.is_alive()
    (tmp_path / "go").touch()
    assert not waits
    until(lambda: not multiprocessing.active_children())


# -- Ctrl-C before the work begins ------------------------------------------------------------------------------------
INTERRUPTED = "interrupted: nothing was written\n"


@pytest.mark.parametrize("command", ["check", "mix", "preview", "generate"])
def test_an_interrupt_during_the_imports_is_one_sentence(command, tmp_path):
    """It comes when Python says that the package is there, and before it says so of the command's own imports."""
    script = [sys.executable, "-X", "importtime", "-m", f"data_prep.{command}", "none"]
    with subprocess.Popen(script, cwd=tmp_path, env=MODULES, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.endswith("| data_prep\n"):
                process.send_signal(signal.SIGINT)
                break
        said = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.returncode == 130 and said == [INTERRUPTED]


def test_programs_that_import_the_package_keep_their_interrupts(tmp_path):
    """Also where the package of `python -m` imports it; and a command that is to ignore Ctrl-C does."""
    asks = "import signal\nimport data_prep\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text(asks)
    (tmp_path / "other" / "__main__.py").touch()
    (tmp_path / "script.py").write_text(asks)
    for program in (["-c", asks], ["-m", "other"], ["script.py"]):
        done = subprocess.run([sys.executable, *program], cwd=tmp_path, env=MODULES, capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("True\n", "")
    ignores = f"trap '' INT; exec {sys.executable} -X importtime -m data_prep.check none"
    with subprocess.Popen(
        ["sh", "-c", ignores], cwd=tmp_path, env=MODULES, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:
            if line.endswith("| data_prep\n"):
                process.send_signal(signal.SIGINT)
                break
        assert "none: no such file" in process.stderr.read()
    assert process.returncode == 2


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc: processes of a session cannot be told")
def test_an_interrupt_while_the_processes_start_is_one_sentence(tmp_path):
    """Each of them imports, too; it comes when one of them has reached numpy, and others of its imports lie ahead."""
    command = [sys.executable, "-m", "data_prep.normalize", "messages", "-", "--out", "set", "--num_proc", "2"]
    row = {"messages": [{"role": "user", "content": "a" * 900}, {"role": "assistant", "content": "b"}]}
    rows = json.dumps(row).encode().join([b"\n"] * 5000)
    with open(tmp_path / "said", "wb") as said:
        script = subprocess.Popen(
            command, cwd=tmp_path, env=MODULES, stdin=subprocess.PIPE, stderr=said, start_new_session=True
        )
        writer = threading.Thread(target=write_rows, args=(script.stdin, rows))
        writer.start()
        until(lambda: any(imports(pid, "numpy") for pid in session(script.pid) if pid != str(script.pid)))
        os.killpg(script.pid, signal.SIGINT)
        assert script.wait(60) == 130
        writer.join()
        with suppress(BrokenPipeError):
            script.stdin.close()
    until(lambda: not session(script.pid))
    assert (tmp_path / "said").read_text() == INTERRUPTED and not [*tmp_path.glob(".set*")]


def write_rows(stdin, rows):
    """Write them as far as they are read."""
    with suppress(BrokenPipeError):
        stdin.write(rows)
        stdin.flush()


def imports(pid, library):
    """Whether a process has begun to import a library."""
    with suppress(OSError):
        return library in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc: processes of a session cannot be told")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_a_script_that_is_stopped_leaves_no_process_behind(name, code, tmp_path):
    """Nor a half pool, where it can still remove one."""
    command = [sys.executable, "-m", "data_prep.normalize", "messages", "-", "--out", "set", "--num_proc", "2"]
    row = {"messages": [{"role": "user", "content": "a" * 900}, {"role": "assistant", "content": "b"}]}
    with open(tmp_path / "said", "wb") as said:
        script = subprocess.Popen(
            command, cwd=tmp_path, env=MODULES, stdin=subprocess.PIPE, stderr=said, start_new_session=True
        )
        script.stdin.write(json.dumps(row).encode().join([b"\n"] * 5000))  # and no end: it waits for more
        script.stdin.flush()
        until(lambda: len(session(script.pid)) > 3)  # with what starts the others, and what counts semaphores
        time.sleep(1)
        (os.kill if name == "SIGKILL" else os.killpg)(script.pid, getattr(signal, name))
        assert script.wait(60) == code
        script.stdin.close()
    until(lambda: not session(script.pid))
    if name != "SIGKILL":
        assert not [*tmp_path.glob(".set*")]
    if name == "SIGINT":
        assert (tmp_path / "said").read_text() == INTERRUPTED


def test_processes_start_where_the_path_for_temporary_files_is_long(tmp_path):
    """A socket's path has 107 characters at most."""
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    row = {"messages": [{"role": "user", "content": "a" * 900}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 3000))
    script = [sys.executable, "-m", "data_prep.normalize", "messages", "rows.jsonl", "--out", "set"]
    env = MODULES | {"TMPDIR": str(folder)}
    done = subprocess.run([*script, "--num_proc", "2"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "3,000 rows kept" in done.stdout, done.stderr


def session(pid):
    """The processes that a process started, it and theirs too."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, leader = path.read_text().rpartition(") ")[2].split()[:4]
            found += [path.parent.name] * (int(leader) == pid and state != "Z")
    return found


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)
