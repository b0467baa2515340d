"""Starts the command in a tenth of the time: one process has imported dicomUpload.py, and each run
is a fork of it.

A run still is a process of its own, with its own arguments, folder, environment, streams and
signals, and main() still is the whole command; only the interpreter's start, the compiling and the
imports are not done anew. What depends on these starts the command as a user does: see `fits`.
"""
import array
import atexit
import contextlib
import gc
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Dict, List, Optional

SCRIPT = Path(__file__).resolve().parent.parent / "dicomUpload.py"
LONGEST = 1 << 17  # bytes that ask for a run
AT_START = re.compile("PYTHON|LANG|LC_|TZ$|LD_|MALLOC")  # what an interpreter reads only then


def fits(arguments: List[str], environment: Dict[str, str], more: Dict[str, Any]) -> bool:
    """Whether a fork shows the same as the command that a user starts, as the first Python of a
    full run does every time."""
    wants = {name for name, value in more.items() if value is not None}
    whole = os.environ.get("DICOMUPLOAD_TEST_ALL") and not os.environ.get("DICOMUPLOAD_TEST_ONCE")
    return (sys.platform == "linux" and not whole
            and arguments[:2] == [sys.executable, str(SCRIPT)]
            and not any(map(AT_START.match, environment))
            and wants <= {"stdin", "stdout", "stderr"})


class Template:
    """The process that has imported the command. It ends with whoever asks it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: Optional["subprocess.Popen[bytes]"] = None

    def ask(self, streams: List[int], **wanted: Any) -> socket.socket:
        """Fork a run; what is returned tells its pid, then its end."""
        line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, self._lock:
            if not self._process:
                self._begin()
            rights = array.array("i", [*streams, theirs.fileno()])
            self._control.sendmsg([json.dumps(wanted).encode()],
                                  [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        return line

    def _begin(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                env={"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"})
        atexit.register(self.close)

    def close(self) -> None:
        if self._process:
            self._control.close()
            self._process.wait()
            self._process = None


TEMPLATE = Template()


class Forked(subprocess.Popen):  # type: ignore[type-arg]
    """A run that is forked off the template, and is otherwise fed, read and ended like any."""

    def _execute_child(self, args: Any, *given: Any) -> None:
        cwd, environment, pipes = given[4], given[5], given[9:15]
        streams = [number if pipe == -1 else pipe
                   for number, pipe in enumerate((pipes[0], pipes[3], pipes[5]))]
        try:
            self._line = TEMPLATE.ask(streams, arguments=args, cwd=cwd, environment=environment)
            self.pid = int(self._line.recv(32))
            self._child_created = True
        finally:
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _wait(self, timeout: Optional[float]) -> Optional[int]:
        if self.returncode is None:
            if not select.select([self._line], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            with self._waitpid_lock:  # type: ignore[attr-defined]
                if self.returncode is None:
                    self.returncode = int(self._line.recv(32))
                    self._line.close()
        return self.returncode

    def _internal_poll(self, *_: Any, **__: Any) -> Optional[int]:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._wait(0)
        return None


# ---- In the template -------------------------------------------------------------------------

def serve(control: socket.socket) -> int:
    """Fork a run whenever one is asked for. In a run: its exit status."""
    sys.path.insert(0, str(SCRIPT.parent))
    import dicomUpload
    gc.freeze()  # so that the runs share its memory
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is meant for the tests, and for a run
    while True:
        asked, rights, _, _ = control.recvmsg(LONGEST, socket.CMSG_SPACE(4 * 4))
        if not asked:
            return 0
        *streams, line = array.array("i", rights[0][2])
        if os.fork() == 0:
            run = os.fork()
            if run == 0:
                control.close()
                os.close(line)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                take_over(streams, **json.loads(asked))
                return dicomUpload.main()
            watch(run, streams, socket.socket(fileno=line))
        for each in (*streams, line):
            os.close(each)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def take_over(streams: List[int], arguments: List[str], cwd: str,
              environment: Dict[str, str]) -> None:
    """Be the process that was asked for."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments[1:]
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def watch(run: int, streams: List[int], line: socket.socket) -> None:
    """Beside a run: tell its pid and its end, as subprocess has it; then end too."""
    for each in streams:
        os.close(each)
    line.send(b"%d" % run)
    status = os.waitpid(run, 0)[1]
    with contextlib.suppress(BrokenPipeError):
        line.send(b"%d" % (-os.WTERMSIG(status) if os.WIFSIGNALED(status)
                           else os.WEXITSTATUS(status)))
    os._exit(0)


if __name__ == "__main__":
    sys.exit(serve(socket.socket(fileno=int(sys.argv[1]))))
