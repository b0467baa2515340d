"""The image built from the Dockerfile and run: by the call of the README, by runuploadDocker.sh.

`.ci/image` builds it with podman, from a base that debootstrap makes, and says there how; podman
starts containers for a user who has a Docker daemon (see `docker`) and for one who has podman.
Podman's own settings hold what a sandbox needs, so that no call here gets a word more than a
user's has, and the stand-in on loopback is the server. A start takes most of a second: so one
start answers several questions.
"""

import functools
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
import unittest
from pathlib import Path
from typing import Any, Callable, Dict, List

import dicomUpload
from tests.dicom import digests, readme_tree, uid, write_series
from tests.support import (EXCLUSIONS, ROOT, Ran, UploadTest, missing, need,
                           sealed_environment, variation)
from tests.xnat_standin import Standin

ONCE = True  # the Python that it runs on makes no difference

BUILDING = threading.Lock()  # the image, which one test builds for all
IMAGE = "aacazxnat/dicomupload:0.1"
CALLER = 4242  # somebody whom the system does not know, and who may nothing
IMPORT = "POST /data/services/import"
ODD = "a b'c\"d:e,f$(g)"  # a folder may well be named so
# The call of the original's README, word for word.
SEED = ("docker run -it --rm -v $WORKDIR:/work -v $ROOTDIR:/dicom -v $PWD:/input "
        "aacazxnat/dicomupload:0.1 python /src/dicomUpload.py $URL $USER $PASS $PROJECT /dicom "
        "--config /input/$CONFIG  --workdir /work")
# Docker for those who may not be root: a client of a service, as the real one is.
CLIENT = """#!/bin/sh
[ "$1" != --version ] || exec echo "Docker version 20.10.5"
exec podman --remote --url unix://{socket} "$@"
"""


@functools.lru_cache(maxsize=None)
def built() -> Any:
    """The variables that make podman find the image, built if it is not there; or what failed."""
    done = subprocess.run([str(ROOT / ".ci" / "image")], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True)
    if done.returncode:
        return done.stderr
    return dict(word.split("=", 1) for word in shlex.split(done.stdout) if word != "export")


def until(true: Callable[[], Any], seconds: float = 20) -> Any:
    """Wait for it; what it gave in the end."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


class Containers(UploadTest):
    """A scratch folder that others may enter, podman's settings, and an end of all containers."""

    def setUp(self) -> None:
        super().setUp()
        for tool in ("podman", "runc", "catatonit", "debootstrap"):
            need(self, tool)
        if os.geteuid() != 0:
            missing(self, "only root can make the base and start containers here")
        with BUILDING:
            self.variables = built()
        self.assertIsInstance(self.variables, dict, self.variables)
        self.folder.chmod(0o755)
        self.bin = self.folder / "bin"
        self.bin.mkdir()
        self.work.mkdir()
        self.addCleanup(self.end_containers)

    def environment(self, **more: str) -> Dict[str, str]:
        path = f"{self.bin}:{os.environ['PATH']}"
        return sealed_environment(self.home, **{**self.variables, "PATH": path, **more})

    def podman(self, *words: str) -> str:
        return subprocess.check_output(["podman", *words], env=self.environment(),
                                       stderr=subprocess.DEVNULL, universal_newlines=True)

    def containers(self) -> List[Dict[str, Any]]:
        """What `inspect` shows of the containers that have folders of this test."""
        names = self.podman("ps", "-aq").split()
        shown: List[Dict[str, Any]] = []
        for name in names:  # one of another suite may be gone by now
            try:
                shown += json.loads(self.podman("inspect", name))
            except subprocess.CalledProcessError:
                pass
        return [each for each in shown if str(self.folder) in json.dumps(each["Mounts"])]

    def end_containers(self) -> None:
        for each in self.containers():
            self.podman("rm", "-f", "-t", "0", each["Id"])

    def program(self, server: Standin) -> Path:
        """The folder in /proc of the dicomUpload.py that runs against `server`."""
        for place in Path("/proc").glob("[0-9]*"):
            try:
                words = (place / "cmdline").read_text(errors="replace").split("\0")
            except OSError:
                continue
            if words[0] == "python" and server.url in words:
                return place
        self.fail("dicomUpload.py does not run")

    def held(self, server: Standin) -> None:
        """From now on imports stay unanswered."""
        server.fail("stall before", IMPORT, seconds=120, times=None)

    def begun(self, server: Standin) -> None:
        self.assertTrue(server.wait_for(lambda: server.imports(), 20), "nothing was sent")

    def whole(self, server: Standin) -> None:
        """Every file under ROOTDIR is there once, and nothing else."""
        there = sum((server.stored(label) for label in server.labels()), [])
        self.assertEqual(sorted(there), sorted(digests(self.root).values()))
        self.assertEqual(server.prearchive, [])

    def owners(self) -> set:
        """The owners of all that lies in the workdir."""
        return {(path.stat().st_uid, path.stat().st_gid) for path in self.work.rglob("*")}


class TheSeedsCall(Containers):
    """By root's podman that is named docker, on a terminal."""

    def setUp(self) -> None:
        super().setUp()
        (self.bin / "docker").symlink_to(need(self, "podman"))
        shutil.copy(str(EXCLUSIONS), str(self.folder))
        self.work.chmod(0o755)
        os.chown(str(self.work), CALLER, CALLER)  # whose log, report and ledger it will be
        readme_tree(self.root, files=2)
        self.before = digests(self.root)

    def call(self, server: Standin) -> "subprocess.Popen[bytes]":
        """Start it; what it shows goes to self.shown."""
        ours, theirs = pty.openpty()
        self.addCleanup(os.close, ours)
        self.shown = b""
        process = subprocess.Popen(
            ["bash", "-c", SEED], stdin=theirs, stdout=theirs, stderr=theirs, cwd=self.folder,
            start_new_session=True, env=self.environment(
                WORKDIR=str(self.work), ROOTDIR=str(self.root), URL=server.url, USER="alice",
                PASS="s3cret", PROJECT="BRAIN", CONFIG=EXCLUSIONS.name))
        os.close(theirs)
        reader = threading.Thread(target=self.read, args=(ours,), daemon=True)
        reader.start()
        self.addCleanup(reader.join, 10)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def read(self, terminal: int) -> None:
        while True:
            try:
                self.shown += os.read(terminal, 65536)
            except OSError:  # Linux's word for the end of a terminal
                return

    def test_the_readme_has_it_word_for_word(self) -> None:
        self.assertIn("\n" + SEED + "\n", (ROOT / "README.md").read_text(encoding="utf-8"))

    def test_all_arrives_and_docker_stop_ends_it_at_once(self) -> None:
        with self.xnat() as server:
            self.held(server)
            process = self.call(server)
            self.begun(server)
            name = self.containers()[0]["Id"]
            self.podman("stop", "-t", "50", name)  # then it would be killed: 137
            self.assertEqual(process.wait(50), 143, self.shown)
            self.assertIn(b"stopped by SIGTERM", self.shown)
        with self.xnat() as server:
            process = self.call(server)
            self.assertEqual(process.wait(50), 0, self.shown)
            self.assert_all_is_there()
            self.assertEqual(server.labels(), ["007_post", "007_pre", "008_post", "008_pre"])
            sent = [digest for path, digest in self.before.items()
                    if not re.search("JJWANGS|AAHEAD", path)]
            there = sum((server.stored(label) for label in server.labels()), [])
            self.assertEqual(sorted(there), sorted(sent))
            self.assertEqual(self.owners(), {(CALLER, CALLER)})
            posts = len(server.imports())
            self.work = self.folder / "work2"  # another machine's: the server is the memory
            self.work.mkdir(0o755)
            os.chown(str(self.work), CALLER, CALLER)
            process = self.call(server)
            self.assertEqual(process.wait(50), 0, self.shown)
            self.assert_all_is_there()
            self.assertEqual((len(server.imports()), server.prearchive), (posts, []))
            self.assertEqual(self.owners(), {(CALLER, CALLER)})
        self.assertEqual(digests(self.root), self.before)

    def assert_all_is_there(self) -> None:
        self.assertTrue(until(lambda: b"All is there.\r\n" in re.sub(
            b"\033\\[[0-9;]*m", b"", self.shown)), self.shown)


class TheWrapper(Containers):
    """runuploadDocker.sh, from a folder of its own, with what `docker` or `podman` is here."""

    def setUp(self) -> None:
        super().setUp()
        self.root = self.folder / ODD / "dicomdir"
        self.work.rmdir()
        self.work = self.folder / ODD / "work"
        self.work.mkdir(parents=True)
        for name in ("runuploadDocker.sh", "Dockerfile", ".dockerignore", "dicomUpload.py"):
            shutil.copy(str(ROOT / name), str(self.folder))
        for session in ("pre", "post"):
            for number in (1, 2):
                write_series(self.root / "007" / session / f"T1_000{number}", number=number,
                             study=uid("007", session), patient="007")
        self.before = digests(self.root)

    def start_wrapper(self, server: Standin, *words: str, caller: int = 0, password: str = "s3cret",
                      **settings: str) -> "subprocess.Popen[str]":
        def become_the_caller() -> None:
            if caller:
                os.setgroups([])
                os.setgid(caller)
                os.setuid(caller)

        environment = self.environment(
            URL=server.url, USER_NAME="alice", PROJECT="BRAIN", XNAT_PASS=password,
            ROOTDIR=str(self.root), WORKDIR=str(self.work), **settings)
        if caller:  # root's settings are none of theirs
            for name in self.variables:
                del environment[name]
        process = self.start([str(self.folder / "runuploadDocker.sh"), *words], environment,
                             env=environment, preexec_fn=become_the_caller)
        self.addCleanup(self.end_containers)  # before `start` waits for what they print
        return process

    def run_wrapper(self, server: Standin, *words: str, **more: Any) -> Ran:
        process = self.start_wrapper(server, *words, **more)
        out, err = process.communicate(timeout=60)
        self.assertNotIn("Traceback", out + err)
        return Ran(process.returncode, out, err)

    def docker(self) -> None:
        """A Docker for everybody: a service that runs as root, and a client that needs not."""
        socket = self.folder / "docker.sock"
        service = subprocess.Popen(["podman", "system", "service", "-t", "0", f"unix://{socket}"],
                                   env=self.environment(), stderr=subprocess.DEVNULL)
        self.addCleanup(service.wait)
        self.addCleanup(service.terminate)
        self.assertTrue(until(socket.exists), "podman system service has not come up")
        socket.chmod(0o666)
        (self.bin / "docker").write_text(CLIENT.format(socket=socket))
        (self.bin / "docker").chmod(0o755)

    @variation
    def test_a_user_of_docker_sends_mends_and_reruns(self) -> None:
        self.docker()
        self.home.chmod(0o777)
        os.chown(str(self.work), CALLER, CALLER)
        bad = self.root / "007" / "pre" / "T1_0002" / "IM0003.dcm"
        bad.chmod(0)
        mine: Dict[str, Any] = {"caller": CALLER}
        with self.xnat() as server:
            ran = self.run_wrapper(server, password="wrong", **mine)
            self.assertEqual(ran.status, 3, ran.text)
            self.assertEqual(server.imports(), [])
            ran = self.run_wrapper(server, **mine)
            self.assertEqual(ran.status, 1, ran.text)
            self.assertIn("IM0003.dcm", ran.text)
            self.assertEqual(len(server.imports()), 3)
            bad.chmod(0o644)
            ran = self.run_wrapper(server, **mine)
            self.assertEqual(ran.status, 0, ran.text)
            self.assertEqual(len(server.imports()), 4)
            self.whole(server)
            ran = self.run_wrapper(server, **mine)
            self.assertEqual(ran.status, 0, ran.text)
            self.assertIn("All is there.", ran.out)
            self.assertEqual(self.owners(), {(CALLER, CALLER)})
            self.work = self.folder / "work2"  # another machine's
            self.work.mkdir()
            os.chown(str(self.work), CALLER, CALLER)
            ran = self.run_wrapper(server, **mine)
            self.assertEqual(ran.status, 0, ran.text)
            self.assertEqual(len(server.imports()), 4)
            self.assertEqual(self.owners(), {(CALLER, CALLER)})
        self.assertEqual(digests(self.root), self.before)

    @variation
    def test_a_user_of_podman_has_it_sealed_and_a_signal_ends_it(self) -> None:
        password = "s3 c\"r'e$t\\"
        with self.xnat() as server:
            server.accounts.users["alice"].password = password
            self.held(server)
            process = self.start_wrapper(server, password=password, ENGINE="podman")
            self.begun(server)
            self.assert_sealed(server, password)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=50)
            self.assertEqual(process.returncode, 143, out + err)
            self.assertIn("stopped by SIGTERM", err)
            self.assertRegex(out, r"2 sessions: .*2 not finished")
            self.assertEqual(until(lambda: not self.containers()), True)
            server.faults.clear()
            ran = self.run_wrapper(server, password=password, ENGINE="podman")
            self.assertEqual(ran.status, 0, ran.text)
            self.whole(server)
        self.assertEqual(digests(self.root), self.before)
        self.assertEqual(self.zips(), [])

    def assert_sealed(self, server: Standin, password: str) -> None:
        """What a look from outside shows while it runs, and what can be done from inside."""
        container = self.containers()[0]
        place = self.program(server)
        status = dict(re.findall(r"^(\w+):\s*(.*)$", (place / "status").read_text(), re.MULTILINE))
        for rights in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            self.assertEqual(int(status[rights], 16), 0, rights)
        self.assertEqual(status["NoNewPrivs"], "1")
        mounts = {words[4]: words[5].split(",")[0] for words in map(
            str.split, (place / "mountinfo").read_text().splitlines())}
        self.assertEqual({name: mounts[name] for name in ("/", "/dicom", "/work")},
                         {"/": "ro", "/dicom": "ro", "/work": "rw"})
        written = subprocess.run(
            ["podman", "exec", "--user", "0", "--privileged", container["Id"], "sh", "-c",
             "touch /dicom/x || touch /dicom/007/pre/T1_0001/IM0001.dcm || touch /src/x"],
            env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(written.stdout.count(b"Read-only file system"), 3, written.stdout)
        self.assertNotIn(password, json.dumps(container, ensure_ascii=False))
        self.assertNotIn(json.dumps(password), json.dumps(container))
        self.assertTrue(container["HostConfig"]["ReadonlyRootfs"])
        for each in Path("/proc").glob("[0-9]*"):
            try:
                self.assertNotIn(password.encode(), (each / "cmdline").read_bytes())
            except OSError:
                pass

    @variation
    def test_an_image_that_is_not_there_is_built_by_the_command_that_it_tells(self) -> None:
        name = "localhost/dicomupload-test:%d" % os.getpid()
        with self.xnat() as server:
            ran = self.run_wrapper(server, ENGINE="podman", IMAGE=name)
            self.assertEqual(ran.status, 3, ran.text)
            command = re.search(r"run  (podman build .*)", ran.err)
            self.assertTrue(command, ran.err)
            self.addCleanup(lambda: self.podman("rmi", "-f", name))
            subprocess.run(["bash", "-c", command[1] if command else ""], env=self.environment(),
                           check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            ran = self.run_wrapper(server, "--dry-run", ENGINE="podman", IMAGE=name)
            self.assertEqual(ran.status, 1, ran.text)  # something is missing on the server
            self.assertIn("2 sessions", ran.text)


class TheImage(Containers):
    def test_it_has_what_is_needed_and_runs_as_anybody_without_any_right(self) -> None:
        script = """id -u; touch /work/x && echo no; touch /src/x && echo no
            for each in python python3 zip curl; do command -v $each; done
            test -s /etc/ssl/certs/ca-certificates.crt && echo certificates
            ls -A /src /dicom /input /work; python --version; curl --version; zip -v
            python /src/dicomUpload.py --version"""
        shown = self.podman("run", "--rm", "--user", "54321:54321", "--read-only", "--cap-drop",
                            "ALL", "--security-opt", "no-new-privileges", IMAGE, "sh", "-c", script)
        self.assertEqual(shown.split("Python 3")[0].split(), [
            "54321", "/usr/bin/python", "/usr/bin/python3", "/usr/bin/zip", "/usr/bin/curl",
            "certificates", "/dicom:", "/input:", "/src:", "as-owner", "dicomUpload.py",
            "/work:"])
        for words in (r"Python 3\.(8|9|\d\d)\.", r"curl [78]\.", r"Zip 3\.0", r"dicomUpload \d"):
            self.assertRegex(shown, words)

    @variation
    def test_by_itself_it_is_nobody_and_says_that_nothing_will_stay(self) -> None:
        done = subprocess.run(
            ["podman", "run", "--rm", IMAGE, "sh", "-c", "id -u; grep ^CapEff /proc/self/status; "
             "touch x; python /src/dicomUpload.py --version"], env=self.environment(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
        self.assertEqual(done.stdout.splitlines(), [
            "10001", "CapEff:\t" + "0" * 16, f"dicomUpload {dicomUpload.VERSION}"], done.stderr)
        self.assertRegex(done.stderr, r"(?m)^/work: is no mount\b")

    def test_it_stops_on_term_has_the_programs_version_and_is_small(self) -> None:
        image = json.loads(self.podman("image", "inspect", IMAGE))[0]
        base = json.loads(self.podman("image", "inspect", "docker.io/library/ubuntu:24.04"))[0]
        self.assertEqual(image["Labels"]["org.opencontainers.image.version"], dicomUpload.VERSION)
        self.assertEqual(image["Config"].get("StopSignal", "SIGTERM"), "SIGTERM")
        self.assertEqual(image["Config"]["Entrypoint"], ["/src/as-owner"])
        self.assertLess(image["Size"] - base["Size"], 70e6)

    def test_nothing_but_the_program_goes_into_the_build(self) -> None:
        place = self.folder / "build"
        (place / "007" / "pre").mkdir(parents=True)
        for name in ("patient.dcm", "007/pre/IM1", ".env", "work.zip", "dicomUpload.py"):
            (place / name).write_text("data")
        shutil.copy(str(ROOT / ".dockerignore"), str(place))
        name = "localhost/dicomupload-context:%d" % os.getpid()
        self.addCleanup(lambda: self.podman("rmi", "-f", name))
        (place / "Dockerfile").write_text("FROM scratch\nCOPY . /all/\n")
        self.podman("build", "-q", "-t", name, str(place))
        mounted = Path(self.podman("image", "mount", name).strip())
        self.addCleanup(lambda: self.podman("image", "unmount", name))
        self.assertEqual(list(digests(mounted)), ["all/dicomUpload.py"])


if __name__ == "__main__":
    unittest.main()
