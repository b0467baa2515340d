"""A line that is slow, breaks for a while, or breaks for good, in the middle of an upload.

The kernel is the judge: the uploader and the stand-in each have a network of their own
(`ip netns`), with a virtual Ethernet line between them, shaped by `tc tbf`. That needs root on
Linux, and rights that a container may lack.

    python3 -m tests.test_judge_line

prints what `--procs 4` reaches on 100 Mbit/s in relation to `--procs 1`. No test depends on that.
"""

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Iterator, List

from tests.dicom import uid, write_series
from tests.support import SCRIPT, need, slow, variation
from tests.support import load_tests as load_tests  # these mostly wait: all at a time
from tests.running import RunningTest, until
from tests.xnat_standin import Standin

ONCE = True  # the Python that it runs on makes no difference

NUMBERS = itertools.count(1)
HERE, THERE = "192.0.2.1", "192.0.2.2"  # both only in the networks made here
CLONE_NEWNET = 0x40000000


def run(*words: str) -> str:
    """Run a command that must work; its output."""
    return subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE).stdout.decode()


class Line:
    """Two networks and the line between them; whatever it made is gone after close()."""

    def __init__(self, megabits: float = 0) -> None:
        name = "dicomUpload-%d-%d" % (os.getpid(), next(NUMBERS))
        self.here, self.there = name + "-here", name + "-there"
        try:
            for network in self.here, self.there:
                run("ip", "netns", "add", network)
            run("ip", "-n", self.here, "link", "add", "line", "type", "veth", "peer", "name",
                "line", "netns", self.there)
            for network, address in ((self.here, HERE), (self.there, THERE)):
                run("ip", "-n", network, "addr", "add", address + "/24", "dev", "line")
                run("ip", "-n", network, "link", "set", "line", "up")
                if megabits:
                    run("tc", "-n", network, "qdisc", "add", "dev", "line", "root", "tbf", "rate",
                        "%dkbit" % (megabits * 1000), "burst", "64kb", "latency", "100ms")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for network in self.here, self.there:
            subprocess.run(["ip", "netns", "del", network], stderr=subprocess.DEVNULL)

    def listener(self) -> socket.socket:
        """A socket that listens at the far end. A socket stays in the network that its thread
        was in when it was made."""
        made: List[Any] = []

        def make() -> None:
            try:
                with open("/run/netns/" + self.there) as network:
                    if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                made.append(socket.create_server((THERE, 0), backlog=64))
            except OSError as error:
                made.append(error)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if isinstance(made[0], OSError):
            raise made[0]
        return made[0]

    def put(self, state: str, network: str = "") -> None:
        """The far end (or the other) "up" or "down". What is sent to a far end that is down is
        lost without a word; with the near end down there is no way to anywhere."""
        run("ip", "-n", network or self.there, "link", "set", "line", state)

    def arrived(self) -> int:
        """Bytes that came over the line."""
        [line] = json.loads(run("ip", "-n", self.there, "-s", "-j", "link", "show", "line"))
        return int(line["stats64"]["rx"]["bytes"])

    def from_here(self, command: List[str]) -> List[str]:
        """The command, run at the near end."""
        return ["ip", "netns", "exec", self.here, *command]


class LineTest(RunningTest):

    def setUp(self) -> None:
        super().setUp()
        for tool in "ip", "tc":
            need(self, tool)
        if os.geteuid() != 0:
            self.skipTest("networks are root's to make")

    @contextlib.contextmanager
    def line(self, megabits: float) -> Iterator[Line]:
        try:
            line = Line(megabits)
            self.addCleanup(line.close)
            listener = line.listener()
        except (OSError, subprocess.CalledProcessError) as error:
            self.skipTest("no networks of one's own here: %s" % error)
        self.server = Standin(listener=listener)
        with self.server:
            yield line
        self.assertEqual(self.server.abuses, [])

    def run_over(self, line: Line, *options: str) -> Any:
        """An upload from the near end."""
        return self.start(line.from_here(self.arguments(self.server.url, *options)))

    def series(self) -> None:
        """Four series in two sessions, 4 MB in all."""
        for path in "007/pre/A_0001", "007/pre/B_0002", "008/pre/A_0001", "008/pre/B_0002":
            self.big_series(path, 1, files=2)

    @slow
    def test_a_line_that_is_down_for_three_seconds_loses_and_doubles_nothing(self) -> None:
        self.series()
        with self.line(20) as line:
            process = self.run_over(line)
            self.assertTrue(until(lambda: line.arrived() > 1500000), "it has not begun")
            line.put("down")
            time.sleep(3)  # the outage itself
            line.put("up")
            ran = self.ended(process, 40)
            self.assertEqual(ran.status, 0, ran.text)
            self.assert_whole(self.server)
            self.tidy(ran)

    @slow
    @variation
    def test_a_line_that_is_down_for_good_is_told_and_the_next_run_completes(self) -> None:
        self.series()
        with self.line(20) as line:
            process = self.run_over(line, "--timeout", "1", "--retries", "1", "--procs", "1")
            self.assertTrue(until(lambda: len(self.server.imports()) > 1), "it has not begun")
            line.put("down", line.here)
            ran = self.ended(process, 40)
            self.assertEqual(ran.status, 3, ran.text)
            self.assertRegex(ran.err, "dicomUpload: http://192.0.2.2.*: .* .curl exit .*: .+")
            self.assertIn("\nNot finished: 007_pre, 008_pre\n", ran.out)
            self.assertRegex(ran.out, "Not whole in the prearchive.*007_pre")
            self.assertEqual(self.statuses(), "sent, not sent, not sent, not sent")
            self.tidy(ran)
            line.put("up", line.here)
            ran = self.ended(self.run_over(line), 40)
            self.assertEqual(ran.status, 0, ran.text)
            self.assertEqual(len([each for each in self.server.imports() if each.status]), 4)
            self.assert_whole(self.server)

    def test_the_timeout_that_was_given_holds_for_connecting_too(self) -> None:
        self.series()
        with self.line(20) as line:
            line.put("down")
            process = self.run_over(line, "--timeout", "1", "--retries", "0")
            self.assertTrue(until(lambda: process.poll() is not None, 12), "it still waits")
            self.assertEqual(self.ended(process).status, 3)


def seconds(server: Standin, line: Line, folder: Path, root: Path, procs: int) -> float:
    """How long an upload of `root` takes over the line."""
    server.forget()
    command = [sys.executable, str(SCRIPT), server.url, "alice", "s3cret", "BRAIN", str(root),
               "--workdir", str(folder / ("work-%d" % procs)), "--again", "--procs", str(procs)]
    began = time.monotonic()
    subprocess.run(line.from_here(command), check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def ratio(seconds_per_file: float, megabits: float = 100) -> float:
    """How many times faster --procs 4 is than --procs 1; says the times."""
    folder = Path(tempfile.mkdtemp(prefix="dicomUpload-line-"))
    line = Line(megabits)
    try:
        for number in range(8):
            write_series(folder / "root" / str(number // 2) / "pre" / ("T1_%04d" % number),
                         study=uid("line", number // 2), number=number + 1, files=40, rows=256,
                         columns=256, patient=str(number // 2))
        with Standin(listener=line.listener(), seconds_per_file=seconds_per_file) as server:
            one, four = (seconds(server, line, folder, folder / "root", procs) for procs in (1, 4))
        print("%3.0f Mbit/s, %2.0f ms a file: --procs 1 %5.1f s, --procs 4 %5.1f s, ratio %.2f"
              % (megabits, 1000 * seconds_per_file, one, four, one / four))
        return one / four
    finally:
        line.close()
        shutil.rmtree(str(folder))


if __name__ == "__main__":
    for each in 0.0, 0.05:
        ratio(each)
