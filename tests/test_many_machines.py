"""One tree, many machines: shards of whole subjects, each with a workdir of its own.

The files that the README shows for Slurm, GNU parallel and Kubernetes are taken from there and run.
"""

import csv
import json
import os
import re
import subprocess
import sys
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

import dicomUpload
from tests.dicom import digests, uid, write_series
from tests.support import ROOT, SCRIPT, Ran, UploadTest, missing, need, variation
from tests.test_container import IMAGE, Containers
from tests.xnat_standin import Standin

ONCE = True  # the Python that it runs on makes no difference

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHARDS = 10
# What a shell, a glob or the program itself could take for something else.
SUBJECTS = ("007", "s[1] $(touch hit)", "s1 x", "-n")


def pasted(name: str) -> str:
    """The file that the README shows under this name."""
    for block in re.findall(r"^```\w*\n(.*?)^```$", README, re.DOTALL | re.MULTILINE):
        if f"# {name}: " in block:
            return str(block)
    raise AssertionError(f"README.md shows no file {name}")


def shard_of(subject: str) -> int:
    """The shard that a subject is in."""
    found = [number for number in range(1, SHARDS + 1) if dicomUpload.read_options(
        ["https://x", "a", "-", "B", "/tmp", "--workdir", "/nowhere", "--shard",
         f"{number}/{SHARDS}"]).chooses(subject, "pre")]
    return found[0]


def plant(root: Path, subjects: Tuple[str, ...] = SUBJECTS, files: int = 2) -> None:
    """A session of two series for each subject."""
    for subject in subjects:
        for number in (1, 2):
            write_series(root / subject / "pre" / f"T1_000{number}", study=uid(subject),
                         number=number, files=files, patient="SUBJECT")


def archived(server: Standin) -> Dict[str, List[str]]:
    """What each session of the archive holds."""
    return {label: sorted(file.sha256 for file in session.files)
            for (_, label), session in server.archive.items()}


class ManyRuns(UploadTest):
    """What these tests share."""

    def whole(self, server: Standin) -> None:
        """Every file is in the archive once, and nothing is left in the prearchive."""
        there = sum(archived(server).values(), [])
        self.assertEqual(sorted(there), sorted(digests(self.root).values()))
        self.assertEqual(server.prearchive, [])

    def rows(self, *workdirs: str) -> Set[Tuple[str, ...]]:
        """What the reports in these workdirs say of the series, but for times and addresses."""
        told = set()
        for workdir in workdirs:
            for path in (self.folder / workdir).glob("*.csv"):
                with path.open(encoding="utf-8", newline="") as file:
                    told |= {(row["subject"], row["session"], row["series"], row["status"],
                              row["files"]) for row in csv.DictReader(file)}
        return told

    def in_workdir(self, server: Standin, name: str, *options: str) -> List[str]:
        self.work = self.folder / name
        return self.arguments(server.url, *options)


class Shards(ManyRuns):
    @variation
    def test_two_shards_at_a_time_do_what_one_run_does(self) -> None:
        plant(self.root)
        with self.xnat() as server:
            self.assertEqual(self.run_command(self.in_workdir(server, "one")).status, 0)
            at_once = archived(server)
        with self.xnat() as server:
            for again in (False, True):
                runs = [self.start(self.in_workdir(server, f"w{number}", "--shard", f"{number}/2"))
                        for number in (1, 2)]
                for run in runs:
                    out, err = run.communicate(timeout=60)
                    self.assertEqual(run.returncode, 0, out + err)
                    self.assertIn("All is there.", out)
                self.assertEqual(archived(server), at_once)
                self.assertEqual(server.prearchive, [])
                self.assertEqual(len(server.imports()), 2 * len(SUBJECTS))
                if not again:
                    self.assertEqual(self.rows("w1", "w2"), self.rows("one"))
            # Cut otherwise and from other workdirs: the server is the memory.
            for number in (1, 2, 3):
                ran = self.run_command(self.in_workdir(
                    server, f"other{number}", "--shard", f"{number}/3"))
                self.assertEqual(ran.status, 0, ran.text)
            self.assertEqual(len(server.imports()), 2 * len(SUBJECTS))
            self.whole(server)

    def test_a_session_from_two_workdirs_at_a_time_is_archived_once_or_told(self) -> None:
        plant(self.root, ("007",), files=20)
        wanted = sorted(digests(self.root).values())
        # Not self.xnat(): what these two do together is an abuse.
        with Standin(seconds_per_file=0.01) as server:
            runs = [self.start(self.in_workdir(server, name)) for name in ("w1", "w2")]
            told = [run.communicate(timeout=60) for run in runs]
            # Where they meet decides: the slower one may find all of it archived, and be right.
            self.assertIn(sorted(run.returncode for run in runs), ([0, 0], [0, 1]), told)
            self.assertEqual(archived(server), {"007_pre": wanted})
            for (out, err), run in zip(told, runs):
                self.assertNotIn("Traceback", err)
                self.assertEqual(run.returncode == 0, "All is there." in out, out)
                if run.returncode:
                    self.assertRegex(out, "007_pre.*: ")
            ran = self.run_command(self.in_workdir(server, "w3"))
            self.assertEqual((ran.status, archived(server)), (0, {"007_pre": wanted}), ran.text)

    @variation
    def test_a_session_of_which_another_run_archived_the_half_is_archived_once(self) -> None:
        plant(self.root, ("007",))
        wanted = {"007_pre": sorted(digests(self.root).values())}
        tools, go = self.folder / "bin", self.folder / "go"
        tools.mkdir()
        (tools / "zip").write_text(
            f"#!/bin/sh\ncase $PWD in *T1_0002) until [ -e '{go}' ]; do sleep 0.05; done;; esac\n"
            f"exec {need(self, 'zip')} \"$@\"\n")
        (tools / "zip").chmod(0o755)
        with Standin() as server:
            slow = self.start(self.in_workdir(server, "slow", "--procs", "1"),
                              {"PATH": f"{tools}:{os.environ['PATH']}"})
            self.assertTrue(server.wait_for(
                lambda: any(each.answered for each in server.imports())))
            quick = self.run_command(self.in_workdir(server, "quick"))
            self.assertEqual(quick.status, 0, quick.text)
            go.touch()
            out, err = slow.communicate(timeout=60)
            self.assertIn(slow.returncode, (0, 1), out + err)
            self.assertEqual(slow.returncode == 0, "All is there." in out, out)
            self.assertEqual(archived(server), wanted)
            if slow.returncode:
                self.assertRegex(out, "007_pre.*: ")

    def test_a_tree_that_one_machine_has_sent_is_already_there_for_another(self) -> None:
        plant(self.root, ("007",))
        with self.xnat() as server:
            self.assertEqual(self.run_command(self.in_workdir(server, "one")).status, 0)
            ran = self.run_command(self.in_workdir(server, "two"))
            self.assertEqual(ran.status, 0, ran.text)
            self.assertIn("All is there.", ran.out)
            self.assertEqual(len(server.imports()), 2)
            self.whole(server)


class Pasted(ManyRuns):
    """The README's files, with its settings from the environment."""

    def setUp(self) -> None:
        super().setUp()
        plant(self.root)
        tools = self.folder / "bin"
        tools.mkdir()
        (tools / "python3").symlink_to(sys.executable)
        self.path = f"{tools}:{os.environ['PATH']}"

    def paste(self, name: str) -> str:
        (self.folder / name).write_text(pasted(name))
        return name

    def settings(self, server: Standin, **more: str) -> Dict[str, str]:
        return {"PATH": self.path, "URL": server.url, "USER_NAME": "alice", "PROJECT": "BRAIN",
                "SCRIPT": str(SCRIPT), "ROOTDIR": str(self.root),
                "WORK": str(self.folder / "up load"), **more}

    @variation
    def test_a_slurm_array_sends_everything_once(self) -> None:
        script = self.paste("upload.slurm")
        (self.home / ".netrc").write_text("machine 127.0.0.1 login alice password s3cret\n")
        (self.home / ".netrc").chmod(0o600)
        with self.xnat() as server:
            def task(number: int) -> Ran:
                return self.run_command(["bash", script], self.settings(
                    server, SLURM_ARRAY_TASK_ID=str(number)))

            used = {shard_of(subject) for subject in SUBJECTS}
            empty = min(set(range(1, SHARDS + 1)) - used)
            for numbers in ([*used, empty], [min(used)]):
                with ThreadPoolExecutor(2) as pool:
                    for ran in pool.map(task, numbers):
                        self.assertEqual(ran.status, 0, ran.text)
                        self.assertIn("All is there.", ran.out)
                self.whole(server)
                self.assertEqual(len(server.imports()), 2 * len(SUBJECTS))
            self.assertLessEqual(set(map(str, used)),
                                 {path.name for path in (self.folder / "up load").iterdir()})
            self.root = self.folder / "not-mounted"
            self.assertEqual(task(1).status, 2)
        self.assertFalse((self.folder / "hit").exists())

    def test_the_slurm_array_is_as_long_as_there_are_shards_and_is_ended_in_order(self) -> None:
        script = pasted("upload.slurm")
        self.assertRegex(script, rf"(?m)^#SBATCH --array=1-{SHARDS}(%\d+)?$")
        self.assertIn(f"/{SHARDS}", script)
        # The batch shell becomes the program, so that it gets Slurm's signal.
        self.assertRegex(script, r"(?m)^#SBATCH --signal=B:TERM@\d+$")
        self.assertIn("\nexec python3 ", script)
        lines = script.splitlines()
        last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
        self.assertTrue(all(line.startswith("#") for line in lines[:last]), "Slurm stops reading")

    @variation
    def test_gnu_parallel_sends_everything_once_and_counts_what_failed(self) -> None:
        need(self, "parallel")
        script = self.paste("upload-parallel.sh")
        with self.xnat() as server:
            server.fail("error page", "services/import", status=400, text="no", times=1)
            for status in (1, 0):
                ran = self.run_command(["bash", script], self.settings(server, XNAT_PASS="s3cret"))
                self.assertEqual(ran.status, status, ran.text)
            self.whole(server)
            self.assertEqual(len(server.imports()), 2 * len(SUBJECTS) + 1)
            self.assertEqual(ran.out.count("All is there."), SHARDS)
        self.assertFalse((self.folder / "hit").exists())

    def test_shellcheck_finds_nothing_in_them(self) -> None:
        need(self, "shellcheck")
        for name in ("upload.slurm", "upload-parallel.sh"):
            done = subprocess.run(["shellcheck", self.paste(name)], cwd=self.folder,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            self.assertEqual((done.stdout.decode(), done.returncode), ("", 0))


def parsed(test: unittest.TestCase, text: str) -> Any:
    """YAML, by a Python of this machine that has PyYAML."""
    script = "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout)"
    for python in (sys.executable, "/usr/bin/python3"):
        done = subprocess.run([python, "-c", script], input=text.encode(), stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)
        if done.returncode == 0:
            return json.loads(done.stdout)
        if b"No module named 'yaml'" not in done.stderr:
            test.fail(done.stderr.decode())
    return missing(test, "no Python here has PyYAML")


class AnIndexedJob(Containers):
    """The README's Kubernetes Job: read, and each index run as a kubelet would."""

    def setUp(self) -> None:
        super().setUp()
        self.job = parsed(self, pasted("upload-job.yaml"))
        self.spec = self.job["spec"]
        self.pod = self.spec["template"]["spec"]
        self.container = self.pod["containers"][0]

    def test_it_is_an_indexed_job_with_an_index_for_each_shard(self) -> None:
        values = {each["name"]: each.get("value") for each in self.container["env"]}
        self.assertEqual((self.job["apiVersion"], self.job["kind"]), ("batch/v1", "Job"))
        self.assertEqual(self.spec["completionMode"], "Indexed")
        self.assertEqual(self.spec["completions"], SHARDS)
        self.assertIn(f"/{SHARDS}", self.container["command"][-1])
        # 20 wrong logins lock an account, and every index has one try more than backoffLimit's.
        self.assertLess(self.spec["backoffLimit"] + self.spec["parallelism"], 20)
        self.assertEqual(self.pod["restartPolicy"], "Never")  # as a podFailurePolicy asks
        self.assertIsNone(values["XNAT_PASS"], "a password in the open")
        self.assertEqual(self.container["image"], IMAGE)
        self.assertEqual({each["name"] for each in self.container["volumeMounts"]},
                         {each["name"] for each in self.pod["volumes"]})
        for each in self.container["env"]:
            self.assertIsInstance(each.get("value", ""), str, "Kubernetes refuses numbers here")

    def kubelet(self, server: Standin, index: int) -> List[str]:
        """podman's words for what the Job says of this index."""
        folders = {"dicom": self.root, "work": self.work}
        given = {"URL": server.url, "USER_NAME": "alice", "PROJECT": "BRAIN",
                 "XNAT_PASS": "s3cret\n", "JOB_COMPLETION_INDEX": str(index)}
        rights = self.container["securityContext"]
        words = ["podman", "run", "--rm", "--user",
                 "{runAsUser}:{runAsGroup}".format(**self.pod["securityContext"])]
        words += ["--read-only"] * rights["readOnlyRootFilesystem"]
        words += ["--security-opt=no-new-privileges"] * (not rights["allowPrivilegeEscalation"])
        words += ["--cap-drop=" + each for each in rights["capabilities"]["drop"]]
        for each in self.container["volumeMounts"]:
            words += ["-v", "{}:{}{}".format(folders[each["name"]], each["mountPath"],
                                             ":ro" if each.get("readOnly") else "")]
        for each in self.container["env"]:
            words += ["--env", "{}={}".format(each["name"], given.get(each["name"],
                                                                      each.get("value")))]
        words += ["--env", f"JOB_COMPLETION_INDEX={index}", IMAGE]
        return words + self.container["command"] + self.container.get("args", [])

    @variation
    def test_its_indexes_send_everything_once(self) -> None:
        subjects = ("007", "s[1]")
        plant(self.root, subjects)
        self.work.chmod(0o777)
        indexes = {shard_of(subject) - 1 for subject in subjects}
        empty = min(set(range(SHARDS)) - indexes)
        with self.xnat() as server, ThreadPoolExecutor(2) as pool:
            def run(index: int) -> Ran:
                return self.run_command(self.kubelet(server, index), self.environment())

            for ran in pool.map(run, [*indexes, empty]):
                self.assertEqual(ran.status, 0, ran.text)
                self.assertIn("All is there.", ran.out)
            self.whole(server)
            self.assertEqual(len(server.imports()), 2 * len(subjects))
        self.assertLessEqual(set(map(str, indexes)), {path.name for path in self.work.iterdir()})

    def test_an_index_without_data_fails_the_job_and_is_not_tried_again(self) -> None:
        command = self.container["command"][-1]
        for inside, here in (
                ("/src/dicomUpload.py", str(SCRIPT)), ("exec python ", "exec python3 "),
                (" /dicom", f" {self.folder}/nowhere"), ("/work", str(self.work))):
            self.assertIn(inside, command)
            command = command.replace(inside, here)
        ran = self.run_command([*self.container["command"][:-1], command], {
            "XNAT_PASS": "s3cret", "JOB_COMPLETION_INDEX": "0", "URL": "http://127.0.0.1:9",
            "USER_NAME": "alice", "PROJECT": "BRAIN"})
        rule = self.spec["podFailurePolicy"]["rules"][0]
        self.assertEqual((rule["action"], rule["onExitCodes"]),
                         ("FailJob", {"operator": "In", "values": [ran.status]}))


if __name__ == "__main__":
    unittest.main()
