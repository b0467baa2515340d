"""The shell wrappers, run for real, with a stand-in for the program that each of them starts.

The stand-in (RECORDER) writes down what it was given: arguments, environment, standard input,
which of its ends are terminals. So these tests see what python3 or docker would have seen.
"""
import csv
import fcntl
import json
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
import unittest
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from tests.support import cases

ONCE = True  # the Python that it runs on makes no difference

TOP = Path(__file__).resolve().parent.parent
PROGRAM = TOP / "dicomUpload.py"
UPLOAD = TOP / "runupload.sh"
DOCKER = TOP / "runuploadDocker.sh"
IMAGE = "aacazxnat/dicomupload:0.1"
SECRET = "  p\"a's \\s $(x) `y` ü"
ODD = "a b\"c'd`e$(f);g,h:i=j*k[l]\\m\nn\u00fc"  # a folder may well be named so
SETTINGS = {
    "URL": "https://xnat.example.org/a b?c&d",
    "USER_NAME": "alice o'hara \"x\"",
    "PROJECT": "$(touch hit);P*",
}

RECORDER = """#!{python} -I
import json, os, signal, sys

name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
answers = {{"--version": "{version}", "image": "{title}"}}
if name in ("docker", "podman") and words and words[0] in answers:
    print(answers[words[0]])
    sys.exit(0 if answers[words[0]] else 1)
if words[:1] == ["-c"]:  # how old is this Python?
    sys.exit(int(os.environ.get("OLD", 0)))
terminals = [end for end in (0, 1, 2) if os.isatty(end)]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
with open("{log}.new", "w") as file:
    json.dump({{"argv": words, "environment": dict(os.environ), "terminals": terminals,
               "input": "" if 0 in terminals else sys.stdin.read(), "pid": os.getpid()}}, file)
os.rename("{log}.new", "{log}")
while os.environ.get("STAY"):
    signal.pause()
sys.exit(int(os.environ.get("STATUS", 0)))
"""


class Done:
    """How a wrapper ended, and what the stand-in saw: None if it was never started."""

    def __init__(self, status: int, output: str, log: Path) -> None:
        self.status, self.output = status, output
        self.seen: Any = json.loads(log.read_text()) if log.exists() else None


class Wrapped(unittest.TestCase):
    """A scratch folder as HOME and as the current one, and a PATH that begins with stand-ins."""

    def setUp(self) -> None:
        # realpath: macOS's folder for scratch lies behind a link
        self.home = Path(os.path.realpath(tempfile.mkdtemp(prefix="wrappers")))
        self.addCleanup(shutil.rmtree, str(self.home))
        self.log = self.home / "seen.json"
        (self.home / "bin").mkdir()
        self.environment = {
            "PATH": "%s:/usr/local/bin:/usr/bin:/bin" % (self.home / "bin"),
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "TMPDIR": str(self.home),
        }

    def stand_in(self, name: str, title: str = "dicomUpload", version: str = "") -> None:
        path = self.home / "bin" / name
        path.write_text(RECORDER.format(python=sys.executable, log=self.log, title=title,
                                        version=version or name + " version 20.10.5"))
        path.chmod(0o755)

    def settings(self, **more: str) -> Dict[str, str]:
        return {**self.environment, **SETTINGS, **more}

    def start(self, command: Sequence[Any], environment: Dict[str, str],
              **options: Any) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([str(word) for word in command], env=environment, cwd=self.home,
                                **options)

    def run_plain(self, command: Sequence[Any], environment: Dict[str, str]) -> Done:
        """With no terminal anywhere, as cron and CI start things."""
        child = self.start(command, environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, start_new_session=True)
        output, _ = child.communicate(timeout=60)
        return Done(child.returncode, output.decode(), self.log)

    def run_on_terminal(self, command: Sequence[Any], environment: Dict[str, str],
                        answer: str = "", stdout: Optional[int] = None) -> Done:
        """On a terminal, as a person does; answer is typed once something asks for a password."""
        ours, theirs = pty.openpty()

        def own_the_terminal() -> None:
            os.setsid()
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

        child = self.start(command, environment, stdin=theirs, stderr=theirs,
                           stdout=theirs if stdout is None else stdout,
                           preexec_fn=own_the_terminal)
        os.close(theirs)
        shown, end = b"", time.monotonic() + 60
        while time.monotonic() < end:
            if not select.select([ours], [], [], 0.1)[0]:
                # No echo first, then the answer: a prompt is written before echo is turned off.
                if answer and b"assword" in shown and not echoes(ours):
                    os.write(ours, answer.encode() + b"\n")
                    answer = ""
                elif child.poll() is not None:
                    break
                continue
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux's word for the end of a terminal
                break
            if not piece:
                break
            shown += piece
        if time.monotonic() >= end:
            child.kill()
        status = child.wait(timeout=60)
        os.close(ours)
        return Done(status, shown.decode(), self.log)

    def signalled(self, command: Sequence[Any], environment: Dict[str, str], number: int) -> int:
        """The exit status of a wrapper that gets a signal while its program runs."""
        child = self.start(command, {**environment, "STAY": "1"}, stdin=subprocess.DEVNULL,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(child.kill)
        end = time.monotonic() + 60
        while not self.log.exists() and time.monotonic() < end:
            time.sleep(0.02)
        child.send_signal(number)
        return child.wait(timeout=60)  # what it started stays for ever

    def forget(self) -> None:
        if self.log.exists():
            self.log.unlink()

    def assert_refused(self, done: Done, status: int, *words: str) -> None:
        self.assertEqual(done.status, status, done.output)
        self.assertIsNone(done.seen, "it was started all the same")
        for word in words:
            self.assertIn(word, done.output)


def echoes(terminal: int) -> bool:
    return bool(termios.tcgetattr(terminal)[3] & termios.ECHO)


class RunUpload(Wrapped):
    def setUp(self) -> None:
        super().setUp()
        self.stand_in("python3")

    def run_with(self, *words: str, **more: str) -> Done:
        return self.run_plain([UPLOAD, *words], self.settings(**{"ROOTDIR": "tree", **more}))

    def test_every_setting_reaches_the_program_as_it_is(self) -> None:
        done = self.run_with(ROOTDIR="-" + ODD + "\n", CONFIG="-c" + ODD, WORKDIR="-w" + ODD)
        self.assertEqual(done.seen["argv"], [
            str(PROGRAM), f"--workdir={TOP}/-w" + ODD, "--config=-c" + ODD, "--",
            SETTINGS["URL"], SETTINGS["USER_NAME"], "-", SETTINGS["PROJECT"], "-" + ODD + "\n"])
        self.assertFalse((self.home / "hit").exists())

    def test_without_a_config_none_is_named_and_the_workdir_lies_beside_it_and_is_said(
            self) -> None:
        done = self.run_with()
        argv = done.seen["argv"]
        self.assertEqual(argv[1:argv.index("--")], [f"--workdir={TOP}/work"])
        self.assertIn(f"Log and report: {TOP}/work\n", done.output)
        argv = self.run_with(WORKDIR=str(self.home)).seen["argv"]
        self.assertEqual(argv[1:argv.index("--")], [f"--workdir={self.home}"])

    def test_further_arguments_are_handed_on(self) -> None:
        more = ["--only", "00*/pre x", "--dry-run", "", "-n", ODD]
        argv = self.run_with(*more).seen["argv"]
        self.assertEqual(argv[argv.index("--") - len(more):argv.index("--")], more)

    def test_the_exit_status_is_the_programs(self) -> None:
        for status in (0, 1, 2, 3, 130):
            with self.subTest(status=status):
                self.assertEqual(self.run_with(STATUS=str(status)).status, status)

    def test_signals_reach_the_program(self) -> None:
        for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            with self.subTest(signal=number):
                self.forget()
                self.assertEqual(
                    self.signalled([UPLOAD], self.settings(ROOTDIR="tree"), number), status)

    def test_the_password_travels_in_the_environment_and_in_no_argument(self) -> None:
        done = self.run_with(XNAT_PASS=SECRET)
        self.assertEqual(done.seen["environment"]["XNAT_PASS"], SECRET)
        self.assertNotIn(SECRET, " ".join(done.seen["argv"]) + done.output)

    def test_settings_that_are_not_set_are_refused_by_name(self) -> None:
        for name in ("URL", "USER_NAME", "PROJECT", "ROOTDIR"):
            with self.subTest(name=name):
                self.assert_refused(self.run_with(**{name: ""}), 2, name, "not set")

    def test_the_program_is_found_from_anywhere_and_through_links(self) -> None:
        (self.home / "far").mkdir()
        (self.home / "far" / "one").symlink_to(UPLOAD)
        (self.home / "two").symlink_to("far/one")
        for command in (["far/one"], ["./two"], ["bash", os.path.relpath(UPLOAD, self.home)],
                        ["sh", os.path.relpath(UPLOAD, self.home)]):
            with self.subTest(command=command):
                done = self.run_plain(command, self.settings(ROOTDIR="tree"))
                self.assertTrue(os.path.samefile(self.home / done.seen["argv"][0], PROGRAM))

    def test_an_old_python_is_told_in_a_sentence(self) -> None:
        self.assert_refused(self.run_with(OLD="1"), 3, "python3", "too old")

    def test_no_python_is_told_in_a_sentence(self) -> None:
        self.environment["PATH"] = str(self.home)
        done = self.run_plain([shutil.which("bash"), UPLOAD], self.settings(ROOTDIR="tree"))
        self.assert_refused(done, 3, "python3", "install")

    def test_on_a_terminal_the_password_is_asked_for_without_echo(self) -> None:
        """With the real program, and a server that is not there."""
        (self.home / "bin" / "python3").unlink()
        (self.home / "bin" / "python3").symlink_to(sys.executable)
        series = self.home / "tree" / "007" / "pre" / "T1"
        series.mkdir(parents=True)
        (series / "1.dcm").write_bytes(bytes(128) + b"DICM" + bytes(64))
        done = self.run_on_terminal(
            [UPLOAD, "--retries", "0"], self.settings(
                URL="http://127.0.0.1:1", USER_NAME="alice", PROJECT="P", ROOTDIR="tree",
                WORKDIR=str(self.home / "work")), answer="tYped")
        self.assertIn("assword", done.output)
        self.assertNotIn("tYped", done.output)
        self.assertEqual(done.status, 3, done.output)


class RunUploadDocker(Wrapped):
    def setUp(self) -> None:
        super().setUp()
        self.stand_in("docker")
        self.root = self.home / ODD
        self.root.mkdir()

    def settings(self, **more: str) -> Dict[str, str]:
        return super().settings(**{"ROOTDIR": str(self.root), **more})

    def run_with(self, *words: str, **more: str) -> Done:
        return self.run_plain([DOCKER, *words], self.settings(**more))

    def options(self, done: Done) -> List[str]:
        """The words between the engine's run and the image."""
        argv: List[str] = done.seen["argv"]
        self.assertEqual(argv[0], "run")
        return argv[1:argv.index(IMAGE)]

    def call(self, done: Done) -> List[str]:
        """The words after the image: what runs in the container."""
        argv: List[str] = done.seen["argv"]
        return argv[argv.index(IMAGE) + 1:]

    def mounts(self, done: Done) -> Dict[str, Dict[str, str]]:
        """Target -> fields of each --mount, read as the engines do: as one record of CSV."""
        words = self.options(done)
        found = {}
        for position, word in enumerate(words):
            if word == "--mount":
                (record,) = csv.reader([words[position + 1]])
                fields = dict((field + "=").split("=", 1) for field in record)
                fields = {key: value[:-1] for key, value in fields.items()}
                found[fields["target"]] = fields
        return found

    def test_the_call_in_the_container_is_the_one_of_the_readme(self) -> None:
        self.assertEqual(self.call(self.run_with()), [
            "python", "/src/dicomUpload.py", "--workdir", "/work", "--",
            SETTINGS["URL"], SETTINGS["USER_NAME"], "-", SETTINGS["PROJECT"], "/dicom"])
        self.assertFalse((self.home / "hit").exists())

    def test_data_and_config_are_mounted_read_only_whatever_their_names(self) -> None:
        config = self.home / ("c" + ODD)
        config.write_text("{}")
        done = self.run_with(CONFIG=config.name, WORKDIR="w" + ODD)
        mounts = self.mounts(done)
        self.assertEqual(set(mounts), {"/dicom", "/work", "/input/" + config.name})
        self.assertEqual(mounts["/dicom"], {"type": "bind", "source": str(self.root),
                                            "target": "/dicom", "readonly": ""})
        self.assertIn("readonly", mounts["/input/" + config.name])
        self.assertEqual(mounts["/input/" + config.name]["source"], str(config))
        self.assertNotIn("readonly", mounts["/work"])
        self.assertEqual(mounts["/work"]["source"], str(self.home / ("w" + ODD)))
        self.assertTrue((self.home / ("w" + ODD)).is_dir())
        self.assertIn("--config=/input/" + config.name, self.call(done))

    def test_plain_names_are_mounted_without_quotes_that_old_podman_would_not_know(self) -> None:
        (self.home / "tree").mkdir()
        self.assertIn("type=bind,source=%s/tree,target=/dicom,readonly" % self.home,
                      self.options(self.run_with(ROOTDIR="tree")))

    def test_the_container_gets_the_callers_ids_and_no_other_rights(self) -> None:
        options = " ".join(self.options(self.run_with()))
        for words in ("--rm", "--init", "--read-only", "--cap-drop ALL",
                      "--user %d:%d" % (os.getuid(), os.getgid())):
            self.assertIn(words, options)
        for group in os.getgroups():
            self.assertIn("--group-add %d" % group, options)

    def test_rootless_podman_keeps_the_callers_ids(self) -> None:
        self.stand_in("podman", version="podman version 4.3.1")
        (self.home / "bin" / "id").write_text("#!/bin/sh\necho 1234\n")
        (self.home / "bin" / "id").chmod(0o755)
        options = " ".join(self.options(self.run_with(ENGINE="podman")))
        self.assertIn("--user 1234:1234", options)
        self.assertIn("--userns keep-id --group-add keep-groups", options)

    def test_further_arguments_are_handed_on(self) -> None:
        more = ["--only", "00*/pre x", "--dry-run", "", ODD]
        call = self.call(self.run_with(*more))
        self.assertEqual(call[call.index("--") - len(more):call.index("--")], more)

    def test_more_options_for_the_engine_come_before_the_image(self) -> None:
        options = self.options(self.run_with(ENGINE_OPTIONS=" --network=host  --env A*"))
        self.assertEqual(options[-3:], ["--network=host", "--env", "A*"])

    def test_the_exit_status_is_the_containers(self) -> None:
        for status in cases(0, 3, 1, 125, first=2):
            for password in ("", SECRET):
                with self.subTest(status=status, password=password):
                    done = self.run_with(STATUS=str(status), XNAT_PASS=password)
                    self.assertEqual(done.status, status)

    def test_signals_reach_the_engine(self) -> None:
        for number, status in cases((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            for password in cases(SECRET, ""):
                with self.subTest(signal=number, password=password):
                    self.forget()
                    environment = self.settings(XNAT_PASS=password)
                    self.assertEqual(self.signalled([DOCKER], environment, number), status)

    def test_the_password_goes_in_through_standard_input_only(self) -> None:
        done = self.run_with(XNAT_PASS=SECRET)
        self.assertEqual(done.seen["input"], SECRET)
        self.assertIn("-i", self.options(done))
        self.assertNotIn("XNAT_PASS", self.options(done))
        self.assertNotIn(SECRET, " ".join(done.seen["argv"]) + done.output)
        self.assertEqual(list(self.home.glob("tmp*")), [])

    def test_in_the_container_the_password_from_standard_input_is_in_the_environment(self) -> None:
        self.stand_in("python")
        done = self.run_with("--only", ODD, XNAT_PASS=SECRET)
        call = self.call(done)
        inside = subprocess.Popen(call, stdin=subprocess.PIPE, env=self.environment, cwd=self.home)
        inside.communicate(done.seen["input"].encode(), timeout=60)
        seen = json.loads(self.log.read_text())
        self.assertEqual(seen["environment"]["XNAT_PASS"], SECRET)
        self.assertEqual(seen["argv"], call[call.index("/src/dicomUpload.py"):])

    def test_a_netrc_is_mounted_where_the_program_looks_for_it(self) -> None:
        (self.home / ".netrc").write_text("machine xnat.example.org login a password b\n")
        done = self.run_with()
        self.assertEqual(self.mounts(done)["/home/.netrc"]["source"], str(self.home / ".netrc"))
        self.assertIn("readonly", self.mounts(done)["/home/.netrc"])
        self.assertIn("HOME=/home", self.options(done))
        self.assertNotIn("/home/.netrc", self.mounts(self.run_with(XNAT_PASS=SECRET)))

    def test_no_terminal_is_asked_for_where_there_is_none(self) -> None:
        options = self.options(self.run_with())
        self.assertFalse({"-it", "-t", "-i"} & set(options), options)

    def test_on_a_terminal_the_container_gets_it_and_can_ask_there(self) -> None:
        done = self.run_on_terminal([DOCKER], self.settings())
        self.assertIn("-it", self.options(done))
        self.assertEqual(done.seen["terminals"], [0, 1, 2])
        self.assertEqual(self.call(done)[0], "python")

    def test_with_output_into_a_pipe_the_wrapper_asks_without_echo(self) -> None:
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        self.addCleanup(os.close, writing)
        done = self.run_on_terminal([DOCKER], self.settings(), answer=SECRET, stdout=writing)
        self.assertIn("Password of " + SETTINGS["USER_NAME"], done.output)
        self.assertNotIn(SECRET, done.output)
        self.assertEqual(done.seen["input"], SECRET)
        self.assertNotIn("-it", self.options(done))
        self.assertEqual(done.status, 0)

    def test_wrong_settings_are_refused_by_name(self) -> None:
        (self.home / "file").write_text("")
        for name, value, words in (
            ("URL", "", "not set"),
            ("USER_NAME", "", "not set"),
            ("PROJECT", "", "not set"),
            ("ROOTDIR", "", "not set"),
            ("ROOTDIR", "nowhere", "no such folder"),
            ("ROOTDIR", "file", "no such folder"),
            ("CONFIG", "nowhere", "no such file"),
            ("WORKDIR", "file/below", "cannot be made"),
        ):
            with self.subTest(name=name, value=value):
                self.assert_refused(self.run_with(**{name: value}), 2, name, words)

    def test_a_missing_engine_is_told_in_a_sentence(self) -> None:
        done = self.run_with(ENGINE="no-such-engine")
        self.assert_refused(done, 3, "no-such-engine: not found", "ENGINE")

    def test_a_missing_or_foreign_image_is_told_with_the_command_that_builds_it(self) -> None:
        for title in ("", "<no value>"):
            with self.subTest(title=title):
                self.stand_in("docker", title=title)
                done = self.run_with()
                self.assert_refused(done, 3, "docker build -t " + IMAGE)
                words = shlex.split(done.output.strip().splitlines()[-1].split(" run  ")[1])
                self.assertTrue(os.path.samefile(words[-1], TOP))


class Linted(unittest.TestCase):
    def lint(self, *command: str) -> None:
        if not shutil.which(command[0]):
            if os.environ.get("DICOMUPLOAD_TEST_ALL"):
                self.fail(command[0] + " is not installed")
            self.skipTest(command[0] + " is not installed (.ci/run installs it)")
        done = subprocess.run(command, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual((done.returncode, done.stdout.decode()), (0, ""))

    def test_shellcheck_finds_nothing_in_the_scripts(self) -> None:
        self.lint("shellcheck", UPLOAD.name, DOCKER.name, ".ci/run", ".ci/image")

    def test_hadolint_finds_nothing_in_the_dockerfile(self) -> None:
        self.lint("hadolint", "Dockerfile")


# The image itself, built and run, is tested in tests/test_container.py: it needs podman.

if __name__ == "__main__":
    unittest.main()
