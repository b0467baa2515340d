"""The server is the memory: what a run sends, and what it leaves alone, by what XNAT holds.

Most of this is told to a run whose workdir is empty: another folder, another machine, or after
another tool. The ledger only spares work, and knows what the server cannot tell.
"""

import json
import os
import re
import shlex
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Tuple

from tests.dicom import digests, dicom_file, uid, write_series
from tests.faults import COMMIT, IMPORT, once
from tests.support import Ran, UploadTest, cases, drop_root_rights, variation
from tests.support import load_tests as load_tests  # side by side
from tests.xnat_standin import Row, Standin, other_uid

ONE, TWO = "pre/T1_0001", "pre/T2_0002"
Entries = List[Tuple[str, List[str]]]


class Seen(NamedTuple):
    """One run, and what of it came to the server."""

    ran: Ran
    sent: Entries  # label and entries of each import POST
    commits: List[str]  # labels
    builds: List[str]
    requests: List[str]  # method and path of each

    def about(self, label: str) -> List[str]:
        return [each for each in self.requests if label in each]

    @property
    def writes(self) -> List[str]:
        return [each for each in self.requests if each.split()[0] != "GET"
                and "JSESSION" not in each]


class CompareTest(UploadTest):
    """A tree of sessions, and runs from here and elsewhere."""

    def plant(self, *series: str, subject: str = "007", files: int = 2, root: Any = None,
              **more: Any) -> None:
        """Series folders `session/NAME_NUMBER`: a study for each session."""
        for path in series:
            write_series(Path(root or self.root) / subject / path,
                         study=uid(subject, path.split("/")[0]), number=int(path[-4:]),
                         files=files, **more)

    def image(self, path: str, instance: int, name: str = "", **more: Any) -> None:
        """One more image of a series, as `plant` would have made it."""
        subject, session, folder = path.split("/")
        study, number = uid(subject, session), int(folder[-4:])
        place = self.root / path / (name or f"IM{instance:04d}.dcm")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(dicom_file(study=study, series=uid(study, number), number=number,
                                     instance=instance, description=folder, **more))

    def change(self, path: Path, text: bytes) -> None:
        """Other bytes, of the same number, under the same UID."""
        data = path.read_bytes()
        path.write_bytes(data[:-len(text)] + text)

    def elsewhere(self) -> None:
        """From now on with an empty workdir."""
        self.work = self.work.with_name(self.work.name + "x")

    def run_once(self, server: Standin, *options: str, status: int = 0, **call: Any) -> Seen:
        """One run, with its exit status checked: what a real run would end with 0 a dry run ends
        with 1 as long as something is missing on the server."""
        before = len(server.requests)
        ran = self.upload(server, *options, **call)
        if "--dry-run" in options:
            status = status or int(bool(re.search(r"(?m)^[0-9]+ sessions?: .*would be", ran.out)))
        self.assertEqual(ran.status, status, ran.text)
        self.assertEqual("All is there." in ran.out, status == 0, ran.text)
        posts = [each for each in server.requests[before:] if each.method == "POST"]
        sent = sorted((each.params.get("EXPT_LABEL", ""), sorted(each.entries)) for each in posts
                      if each.path.endswith("/services/import"))

        def acted(action: str) -> List[str]:
            return sorted(each.path.rpartition("/")[2] for each in posts
                          if each.params.get("action") == action)

        return Seen(ran, sent, acted("commit"), acted("build"),
                    [f"{each.method} {each.path}" for each in server.requests[before:]])

    def there(self, server: Standin, *options: str, **call: Any) -> Seen:
        """A run that finds everything there: it changes nothing on the server."""
        before = state(server)
        seen = self.run_once(server, *options, **call)
        self.assertEqual(seen.writes, [], seen.ran.text)
        self.assertEqual(state(server), before, seen.ran.text)
        return seen

    def told(self, server: Standin, words: str, *options: str, **call: Any) -> Seen:
        """A run that ends with 1, says this, and neither sends nor commits anything."""
        before = state(server)
        seen = self.run_once(server, *options, status=1, **call)
        self.assertEqual((seen.sent, seen.commits), ([], []), seen.ran.text)
        self.assertEqual(state(server), before, seen.ran.text)
        self.assertRegex(seen.ran.out, words)
        return seen

    def foretold(self, server: Standin, words: str, *options: str, status: int = 0) -> Seen:
        """A dry run that says this, and writes nothing."""
        before = state(server)
        seen = self.run_once(server, "--dry-run", *options, status=status)
        self.assertEqual(seen.writes, [], seen.ran.text)
        self.assertEqual(state(server), before, seen.ran.text)
        self.assertRegex(seen.ran.text, words)
        return seen

    def whole(self, server: Standin, left: int = 0) -> None:
        """The archive holds the tree, each image once; so many rows are left in the prearchive."""
        archived = sorted(file.sha256 for session in server.archive.values()
                          for file in session.files)
        self.assertEqual(archived, sorted(digests(self.root).values()))
        self.assertEqual(len(server.prearchive), left, server.tree())

    def other_tool(self, server: Standin, rename: Callable[[int, str], str], *options: str,
                   only: str = "*", **call: Any) -> None:
        """Send a copy of the tree's files, under other names, from elsewhere."""
        root = self.folder / "theirs"
        for path in sorted(self.root.rglob(only)):
            if path.is_file():
                place = root / path.relative_to(self.root)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place.with_name(
                    rename(int(re.sub(r"\D", "", path.stem)), place.parent.name)))
        ran = self.run_command([
            *self.arguments(server.url, *options, root=root, **call), "--workdir",
            str(self.folder / "theirs-work")])
        self.assertEqual(ran.status, 0, ran.text)
        shutil.rmtree(root)
        shutil.rmtree(self.folder / "theirs-work")

    def put_back(self, server: Standin, row: Row) -> Row:
        """The row lies in the prearchive, and is what an import of its study finds there."""
        server.store._by_key[row.project, row.tag, row.name] = row
        return server.store.add(row)

    def copy_of_what_is_archived(self, server: Standin, **call: Any) -> None:
        """All of the tree is archived, and lies in the prearchive too, under other names."""
        self.other_tool(server, uid_name(uid("007", "pre")), "--review", **call)
        row = server.prearchive[0]
        server.store.remove(row)
        self.run_once(server, **call)
        self.put_back(server, row)
        self.elsewhere()

    def leave(self, server: Standin, status: str, *options: str) -> None:
        """What a run leaves in the prearchive whose workdir is lost then."""
        if status == "READY":
            self.assertEqual(self.upload(server, "--review", *options).status, 0)
        else:
            server.fail("error page", "action=commit", status=500, text="not now", times=None)
            self.assertEqual(self.upload(server, *options).status, 1)
            server.faults.clear()
            for row in server.prearchive:
                if status != "RECEIVING":
                    server.store.build(row)
                    row.status = status
        self.assertEqual({row.status for row in server.prearchive}, {status})
        self.elsewhere()

    def advice(self, ran: Ran, *, after: str = "add ") -> List[str]:
        """The options that a run says to add."""
        found = re.search(after + r"((?:--[a-z-]+(?: [^\s-]\S*)?(?:,? and |,? )?)+)", ran.out)
        self.assertIsNotNone(found, ran.out)
        return shlex.split(re.sub(r",? and |,", " ", found[1]))  # type: ignore[index]


def state(server: Standin) -> List[Any]:
    """All that the server holds, and the status of what waits."""
    rows = [(row.uri, row.status, row.built is not None, sorted(row.files))
            for row in server.prearchive]
    return [rows, sorted((session.uri, sorted((file.scan, file.name, file.sha256)
                                              for file in session.files))
                         for session in server.archive.values())]


def uid_name(study: str) -> Callable[[int, str], str]:
    return lambda instance, folder: uid(uid(study, int(folder[-4:])), instance) + ".dcm"


def random_name(instance: int, folder: str) -> str:
    return uid(instance, folder, "random")[8:20]


class AllIsThere(CompareTest):
    """The same call again, from anywhere."""

    def test_an_empty_workdir_another_folder_and_a_shard_find_all_of_it_archived(self) -> None:
        self.plant(ONE, TWO, "post/T1_0001")
        self.plant(ONE, subject="008")
        with self.xnat() as server:
            first = self.run_once(server)
            self.assertEqual((len(first.sent), len(first.commits)), (4, 3))
            self.whole(server)
            self.elsewhere()
            self.assertEqual(len(self.foretold(server, "3 already there").ran.out.split(
                "would be sent")), 1)
            seen = self.there(server)
            self.assertRegex(seen.ran.out, "007_pre +already there, 4 files")
            for label in ("007_pre", "007_post", "008_pre"):  # each is counted, and once
                self.assertEqual(len(seen.about(f"/{label}/scans/ALL/")), 1, seen.requests)
            self.assertEqual({row["status"] for row in self.report()}, {"already there"})
            self.assertEqual([row["files"] for row in self.report()], ["2"] * 4)
            moved = self.folder / "another"
            shutil.copytree(self.root, moved)  # copies have other times
            shards = []
            for number in ("1", "2"):
                self.elsewhere()
                shards.append(self.there(server, "--shard", f"{number}/2", root=moved))
            told = "".join(each.ran.out for each in shards)
            self.assertEqual(told.count("already there, "), 3, told)

    def test_unchanged_verified_sessions_cost_no_request_each_and_no_file_is_opened(self) -> None:
        self.plant(ONE, TWO)
        self.plant("pre/NOTES_0003", files=0)
        (self.root / "007/pre/NOTES_0003/readme.txt").write_text("nothing")
        with self.xnat() as server:
            self.run_once(server)
            for path in self.root.rglob("*.*"):
                path.chmod(0)
            seen = self.there(server, preexec=drop_root_rights)
            self.assertEqual(seen.about("007_pre"), [])
            for path in self.root.rglob("*.*"):
                path.chmod(0o644)
            self.elsewhere()
            self.there(server)  # this one writes a ledger of what others have sent
            self.assertEqual(self.there(server).about("007_pre"), [])

    @variation
    def test_what_another_tool_archived_under_other_names_is_there(self) -> None:
        for name in cases(random_name, uid_name(uid("007", "pre"))):
            with self.subTest(name=name), self.xnat() as server:
                self.plant(ONE, TWO)
                self.other_tool(server, name)
                self.foretold(server, "1 already there")
                self.there(server)
                self.assertEqual(self.there(server).about("007_pre"), [])
                self.elsewhere()

    @variation
    def test_a_part_under_the_names_of_its_uids_is_completed(self) -> None:
        series = uid(uid("007", "pre"), 1)
        self.plant(ONE, TWO, files=3)
        # Of 1.2.3.1 and 1.2.3.10, one begins the other.
        odd = {4: "1.2.3.1", 11: "1.2.3.10", 12: "1.2.3.11"}
        for number, sop in odd.items():
            self.image(f"007/{ONE}", number, sop_instance=sop)
        with self.xnat() as server:
            self.other_tool(server, lambda number, folder: odd.get(
                number, uid(series, number)) + ".dcm", only="T1_0001/IM00[01][123].dcm")
            there = {file.sop_instance for file in server.files("007_pre")}
            self.assertEqual(len(there), 6 - 1, there)
            self.foretold(server, "T1_0001 +would send +1 file")
            seen = self.run_once(server)
            self.assertEqual(seen.sent, [("007_pre", [f"IM000{each}.dcm" for each in (1, 2, 3)]),
                                         ("007_pre", ["IM0004.dcm"])])
            self.whole(server)

    @variation
    def test_a_part_of_a_series_under_unknown_names_is_told_and_not_guessed(self) -> None:
        self.plant(ONE, TWO, files=3)
        with self.xnat() as server:
            self.other_tool(server, random_name, only="IM000[12].dcm")
            words = "T1_0001: XNAT has 2 of its 3 files, under other names"
            self.foretold(server, words, status=1)
            seen = self.told(server, words)
            seen = self.told(server, words)  # and again, now that there is a ledger
            seen = self.run_once(server, *self.advice(seen.ran))
            self.assertEqual(len(seen.sent), 2)
            self.whole(server)

    @variation
    def test_series_that_are_missing_beside_one_in_doubt_are_held_back(self) -> None:
        self.plant(ONE, TWO, files=3)
        with self.xnat() as server:
            self.other_tool(server, random_name, only="T1_0001/IM000[12].dcm")
            before = state(server)[1]
            for sent in ([("007_pre", [f"IM000{each}.dcm" for each in (1, 2, 3)])], []):
                seen = self.run_once(server, status=1)
                self.assertEqual((seen.sent, seen.commits), (sent, []))
                self.assertIn("T1_0001: XNAT has 2 of its 3 files", seen.ran.out)
                self.assertEqual(state(server)[1], before)
            self.run_once(server, *self.advice(seen.ran))
            self.whole(server)

    @variation
    def test_listings_that_are_refused_are_asked_per_session(self) -> None:
        for refused in cases(("archive", "prearchive"), ("archive",), ("prearchive",)):
            with self.subTest(refused=refused), self.xnat(refuse_lists=refused) as server:
                self.plant(ONE)
                self.run_once(server)
                self.assertEqual(self.there(server).writes, [])
                self.elsewhere()
                self.foretold(server, "1 already there")
                self.there(server)
                self.plant(TWO)
                seen = self.run_once(server)
                self.assertEqual(seen.sent, [("007_pre", ["IM0001.dcm", "IM0002.dcm"])])
                self.whole(server)
                shutil.rmtree(self.root)
                self.elsewhere()

    def test_statistics_and_listings_that_a_server_does_not_have_are_found_another_way(
            self) -> None:
        for knobs in cases({"all_scans": False, "statistics": "never"}, {"file_names": False},
                           {"statistics": "on request"}, {"statistics": "never"},
                           {"all_scans": False}, {"snapshots": True, "statistics": "never"}):
            with self.subTest(knobs=knobs), self.xnat(**knobs) as server:  # type: ignore
                self.plant(ONE, TWO)
                self.run_once(server)
                self.elsewhere()
                self.foretold(server, "1 already there")
                self.there(server)
                self.plant("pre/PD_0003")
                self.assertEqual(self.run_once(server).sent,
                                 [("007_pre", ["IM0001.dcm", "IM0002.dcm"])])
                self.elsewhere()
                self.image(f"007/{ONE}", 3)
                words = "T1_0001: XNAT has 2 of its 3 files"
                if "file_names" in knobs:
                    self.told(server, words)
                else:
                    self.assertEqual(self.run_once(server).sent, [("007_pre", ["IM0003.dcm"])])
                    self.whole(server)
                shutil.rmtree(self.root)
                self.elsewhere()

    def test_a_server_that_tells_neither_counts_nor_names_gets_nothing_twice(self) -> None:
        self.plant(ONE)
        with self.xnat() as server:
            self.run_once(server)
            self.elsewhere()
            server.knobs.statistics, server.knobs.file_names = "never", False
            self.told(server, "does not tell")


class SomethingIsNew(CompareTest):
    """Something was added to what the archive has."""

    def test_of_an_added_series_and_an_added_file_only_these_are_sent(self) -> None:
        for ledger in cases(False, True):
            with self.subTest(ledger=ledger), self.xnat() as server:
                self.plant(ONE, TWO)
                self.run_once(server)
                if not ledger:
                    self.elsewhere()
                self.plant("pre/PD_0003")
                self.foretold(server, "PD_0003 +would send +2 files")
                seen = self.run_once(server)
                self.assertEqual(seen.sent, [("007_pre", ["IM0001.dcm", "IM0002.dcm"])])
                self.assertEqual(seen.commits, ["007_pre"])
                if not ledger:
                    self.elsewhere()
                self.image(f"007/{ONE}", 3)
                self.image(f"007/{TWO}", 3)
                self.foretold(server, "T1_0001 +would send +1 file")
                seen = self.run_once(server)
                self.assertEqual(seen.sent, [("007_pre", ["IM0003.dcm"])] * 2)
                self.assertEqual(seen.commits, ["007_pre"])
                self.whole(server)
                self.there(server)
                shutil.rmtree(self.root)
                self.elsewhere()

    @variation
    def test_of_files_with_one_base_name_the_third_is_sent(self) -> None:
        for ledger in cases(False, True):
            with self.subTest(ledger=ledger), self.xnat() as server:
                self.image(f"007/{ONE}", 1, "a/IM.dcm")
                self.image(f"007/{ONE}", 2, "b/IM.dcm")
                self.run_once(server)
                self.assertEqual(Counter(file.name == "IM.dcm" for file in
                                         server.files("007_pre")), {True: 1, False: 1})
                if not ledger:
                    self.elsewhere()
                self.there(server)
                self.image(f"007/{ONE}", 3, "c/other.dcm")
                self.foretold(server, "would send +1 file")
                self.assertEqual(self.run_once(server).sent, [("007_pre", ["c/other.dcm"])])
                self.image(f"007/{ONE}", 4, "c/IM.dcm")
                if not ledger:
                    self.elsewhere()
                # Alone it would be refused, or replace a/IM.dcm.
                seen = self.told(server, "XNAT has 3 of its 4 files")
                self.run_once(server, *self.advice(seen.ran))
                self.whole(server)
                shutil.rmtree(self.root)
                self.elsewhere()

    def test_a_new_file_that_takes_the_name_of_one_that_is_there_is_never_taken_for_it(
            self) -> None:
        for ledger, project in cases((True, "OVER"), (True, "BRAIN"), (False, "BRAIN")):
            with self.subTest(ledger=ledger, project=project), self.xnat() as server:
                self.image(f"007/{ONE}", 1, "b/IM.dcm")
                self.run_once(server, project=project)
                if not ledger:
                    self.elsewhere()
                self.image(f"007/{ONE}", 2, "a/IM.dcm")
                seen = self.told(server, "XNAT has 1 of its 2 files", project=project)
                self.run_once(server, *self.advice(seen.ran), project=project)
                self.whole(server)
                self.assertEqual(set(server.instances("007_pre").values()), {1})
                shutil.rmtree(self.root)
                self.elsewhere()

    @variation
    def test_where_files_went_and_others_came_the_new_ones_are_not_taken_for_the_old(self) -> None:
        for ledger in cases(False, True):
            with self.subTest(ledger=ledger), self.xnat() as server:
                self.plant(ONE, files=4)
                self.run_once(server)
                if not ledger:
                    self.elsewhere()
                for number in (3, 4):
                    (self.root / "007" / ONE / f"IM000{number}.dcm").unlink()
                self.image(f"007/{ONE}", 5)
                seen = self.told(server, "T1_0001")
                self.run_once(server, *self.advice(seen.ran))
                self.assertEqual(sorted(file.name for file in server.files("007_pre")),
                                 [f"IM000{number}.dcm" for number in range(1, 6)])
                shutil.rmtree(self.root)
                self.elsewhere()

    def test_renamed_files_and_renamed_series_folders_are_there(self) -> None:
        self.plant(ONE, TWO)
        with self.xnat() as server:
            self.run_once(server)
            for path in sorted(self.root.rglob("*.dcm")):
                path.rename(path.with_name("R" + path.name))
            self.there(server)
            (self.root / "007" / ONE).rename(self.root / "007/pre/renamed")
            self.foretold(server, "1 already there")
            self.there(server)
            self.elsewhere()
            self.there(server)

    def test_files_removed_here_are_a_word_and_no_failure_and_stay_so(self) -> None:
        for ledger in cases(False, True):
            with self.subTest(ledger=ledger), self.xnat() as server:
                self.plant(ONE, TWO)
                self.run_once(server)
                if not ledger:
                    self.elsewhere()
                (self.root / "007" / ONE / "IM0001.dcm").unlink()
                seen = self.there(server)
                self.assertRegex(seen.ran.text, "007_pre: XNAT counts 2 files where the folder "
                                                "has 1")
                seen = self.there(server)
                self.assertEqual(seen.about("007_pre"), [])
                self.foretold(server, "1 already there")
                shutil.rmtree(self.root / "007" / TWO)  # of a whole series more than a word
                self.told(server, f"007_pre {TWO.rpartition('/')[2]}: earlier runs sent images")
                shutil.rmtree(self.root)
                self.elsewhere()

    def test_a_file_added_after_a_reviewer_archived_waits_for_review_and_counts(self) -> None:
        self.plant(ONE, files=3)
        with self.xnat() as server:
            for options, project in cases(([], "MANUAL"), (["--review"], "BRAIN")):
                seen = self.run_once(server, *options, project=project)
                self.assertIn("waiting for review", seen.ran.out)
                server.store.commit(server.prearchive[-1], True, False)
                self.image(f"007/{ONE}", 4)
                seen = self.run_once(server, *options, project=project)
                self.assertEqual(seen.sent, [("007_pre", ["IM0004.dcm"])])
                self.assertEqual([len(row.files) for row in server.prearchive], [1])
                self.there(server, *options, project=project)
                server.store.commit(server.prearchive[-1], True, False)
                self.there(server, *options, project=project)
                (self.root / "007" / ONE / "IM0004.dcm").unlink()
                self.elsewhere()


class WhatTheLedgerKnows(CompareTest):
    """It is never taken for proof that something is there; what it knows goes by UIDs."""

    def held_back(self, server: Standin, *series: str) -> Seen:
        """A run in which the last of these series has a link to nothing: the others are sent."""
        self.plant(*series)
        lost = self.root / "007" / series[-1] / "lost.dcm"
        lost.symlink_to("nowhere")
        seen = self.run_once(server, status=1)
        lost.unlink()
        return seen

    def test_late_images_in_a_folder_that_was_emptied_are_not_taken_for_what_is_there(self
                                                                                      ) -> None:
        self.plant(ONE, files=5)
        with self.xnat() as server:
            self.run_once(server)
            for path in (self.root / "007" / ONE).iterdir():
                path.unlink()
            for instance in (6, 7):
                self.image(f"007/{ONE}", instance, f"MR{instance}")
                os.utime(self.root / "007" / ONE / f"MR{instance}", (1, 1))
            # By names alone another program's might be there; but it was this one that sent them.
            self.told(server, "T1_0001: XNAT has 5 files of it, here are 2, under other names")
            for path in (self.root / "007" / ONE).iterdir():
                path.rename(path.with_name(f"IM000{path.name[2:]}.dcm"))
            self.elsewhere()
            seen = self.told(server, "T1_0001: XNAT has 5 files of it, here are 2, under other name"
                                     "s .*cannot be told")
            self.run_once(server, *self.advice(seen.ran))
            self.assertEqual(len(server.files("007_pre")), 7)

    def test_a_good_file_that_comes_back_after_it_was_damaged_has_not_changed(self) -> None:
        self.plant(ONE, files=3)
        with self.xnat() as server:
            self.run_once(server)
            path = self.root / "007" / ONE / "IM0002.dcm"
            whole = path.read_bytes()
            path.write_bytes(whole[:-100])
            self.told(server, "damaged: IM0002.dcm")
            path.write_bytes(whole)
            self.there(server)
            self.change(path, b"BB")
            self.told(server, "T1_0001: has changed since it was sent")

    @variation
    def test_where_another_program_named_the_files_as_many_or_more_are_there(self) -> None:
        self.plant(ONE, files=5)
        with self.xnat() as server:
            self.run_once(server)
            for number, path in enumerate(sorted((self.root / "007" / ONE).iterdir())):
                path.rename(path.with_name(f"MR{number}"))
            self.elsewhere()
            self.there(server)
            (self.root / "007" / ONE / "MR0").unlink()
            seen = self.there(server)
            self.assertIn("XNAT counts 5 files where the folder has 4", seen.ran.err)

    def test_a_series_that_moved_to_another_session_is_not_archived_with_the_old_one(self) -> None:
        with self.xnat() as server:
            self.held_back(server, ONE, TWO)
            (self.root / "007/post").mkdir()
            (self.root / "007" / ONE).rename(self.root / "007/post/T1_0001")
            self.run_once(server, "--overwrite-files", "--again", "--only", "007/pre", status=1)
            self.assertEqual(server.archive, {})
            self.elsewhere()  # with its ledger lost, it is said at least
            seen = self.run_once(server, "--only", "007/pre")
            self.assertRegex(seen.ran.err, "007_pre: XNAT also has 1 series that this")

    def test_an_image_that_came_after_another_went_is_sent_though_the_counts_are_equal(self
                                                                                       ) -> None:
        self.plant(ONE, TWO, files=4)
        with self.xnat() as server:
            self.run_once(server)
            (self.root / "007" / ONE / "IM0002.dcm").unlink()
            self.there(server)
            self.image(f"007/{ONE}", 5)
            self.foretold(server, "T1_0001 +would send +1 file,")
            self.assertEqual(self.run_once(server).sent, [("007_pre", ["IM0005.dcm"])])
            self.there(server)
            self.elsewhere()
            self.there(server)

    @variation
    def test_what_an_earlier_run_sent_of_a_session_has_changed_when_its_bytes_have(self) -> None:
        with self.xnat() as server:
            self.held_back(server, ONE, TWO)
            self.assertEqual(self.run_once(server).sent,
                             [("007_pre", ["IM0001.dcm", "IM0002.dcm"])])
            for path in (ONE, TWO):
                self.change(self.root / "007" / path / "IM0002.dcm", b"BB")
            self.told(server, "T1_0001: has changed since it was sent\n.* 1 more like it.* T2_0002")
            self.run_once(server, "--overwrite-files")
            self.whole(server)

    def test_another_study_that_came_in_place_of_ours_is_told_by_every_run(self) -> None:
        self.plant(ONE)
        with self.xnat() as server:
            self.run_once(server)
            server.store.archive.clear()
            write_series(self.folder / "other/007" / ONE, study="1.2.3", number=1, files=2)
            other = self.arguments(server.url, "--workdir", str(self.folder / "w"),
                                   root=self.folder / "other")
            self.assertEqual(self.run_command(other).status, 0)
            for options in ((), ("--dry-run",)):
                self.told(server, "007_pre: XNAT's archive has another study under the label",
                          *options)

    @variation
    def test_another_subject_that_has_our_session_now_is_told(self) -> None:
        self.plant(ONE)
        with self.xnat() as server:
            self.run_once(server)
            server.archive["BRAIN", "007_pre"].subject = "999"
            self.told(server, "has 007_pre under subject 999, here it is subject 007")

    def test_two_roots_with_a_part_of_a_session_each_are_both_whole(self) -> None:
        self.plant(ONE)
        disk = self.folder / "disk2"
        self.plant(TWO, root=disk)
        with self.xnat() as server:
            self.run_once(server)
            self.run_once(server, root=disk)
            for root in (self.root, disk, disk, self.root):
                self.there(server, root=root)
            self.change(self.root / "007" / ONE / "IM0001.dcm", b"BB")
            self.told(server, "T1_0001: has changed since it was sent")
            shutil.rmtree(disk / "007" / TWO)
            (disk / "007" / TWO).mkdir()
            self.told(server, "Gone .1.:\n  007_pre T2_0002", root=disk)

    def test_what_another_machine_has_of_a_session_is_not_taken_for_what_is_missing(self) -> None:
        self.plant(ONE)
        disk = self.folder / "disk2"
        self.plant(TWO, root=disk)
        with self.xnat() as server:
            self.run_once(server)
            self.elsewhere()
            server.fail("error page", COMMIT, status=500, text="not today")
            self.run_once(server, "--retries", "0", root=disk, status=1)
            server.store.remove(server.prearchive[0])
            self.assertEqual(self.run_once(server, root=disk).sent,
                             [("007_pre", ["IM0001.dcm", "IM0002.dcm"])])
            self.assertEqual(len(server.files("007_pre")), 4)
            del server.archive["BRAIN", "007_pre"].scans["2"]
            self.told(server, "T2_0002: an earlier run saw it archived", "--dry-run", root=disk)

    @variation
    def test_what_changed_while_it_waits_for_review_is_told_until_it_is_replaced(self) -> None:
        self.plant(ONE)
        with self.xnat() as server:
            self.run_once(server, "--review")
            self.change(self.root / "007" / ONE / "IM0001.dcm", b"BB")
            self.plant(TWO)
            for _ in range(2):
                seen = self.run_once(server, "--review", status=1)
                self.assertIn("T1_0001: has changed since it was sent", seen.ran.out)
            seen = self.run_once(server, "--review", "--overwrite-files")
            self.assertEqual(seen.sent, [("007_pre", ["IM0001.dcm", "IM0002.dcm"])])

    @variation
    def test_a_series_that_was_sent_and_went_before_its_session_was_whole_is_gone(self) -> None:
        with self.xnat() as server:
            self.held_back(server, ONE, TWO)
            (self.root / "007" / ONE).rename(self.folder / "T1")
            for _ in range(2):  # its half of the session is not archived either
                seen = self.run_once(server, status=1)
                self.assertRegex(seen.ran.out, "007_pre: some of T1_0001 lies in the prearchive")
                self.assertRegex(seen.ran.out, r"Gone \(1\):\n  007_pre T1_0001: earlier runs")
                self.assertEqual(server.archive, {})
            (self.folder / "T1").rename(self.root / "007" / ONE)
            self.assertEqual(self.run_once(server).sent, [])
            self.whole(server)

    def test_a_series_that_was_sent_in_part_and_is_left_out_then_is_not_archived_by_half(self
                                                                                         ) -> None:
        self.plant(ONE, TWO, files=4)
        config = self.folder / "config.json"
        config.write_text('{"Exclude": ["T2"]}')
        with self.xnat() as server:
            server.fail("error page", IMPORT, status=413, skip=3)
            self.run_once(server, "--max-files", "2", "--procs", "1", status=1)
            seen = self.run_once(server, "--config", str(config), status=1)
            self.assertRegex(seen.ran.out, "007_pre: some of T2_0002 lies in the prearchive.*\n"
                                           ".*delete the session in XNAT's prearchive, then run")
            server.store.remove(server.prearchive[0])
            self.run_once(server, "--config", str(config))
            self.assertEqual(len(server.files("007_pre")), 4)

    @variation
    def test_a_new_image_under_the_name_of_one_that_is_there_is_told_after_any_removal(self
                                                                                       ) -> None:
        def later(name: str, instance: int) -> None:
            """An image that was made after the last run."""
            self.image(f"007/{ONE}", instance, name)
            path = self.root / "007" / ONE / name
            os.utime(path, ns=(time.time_ns() + 10 ** 9,) * 2)

        for at_once in cases(False, True):
            with self.subTest(at_once=at_once), self.xnat() as server:
                self.plant(ONE, files=4)
                self.run_once(server)
                (self.root / "007" / ONE / "IM0004.dcm").unlink()
                if at_once:
                    later("IM0002.dcm", 9)
                else:
                    self.there(server)
                    later("IM0004.dcm", 9)
                for options in ((), ("--dry-run",)):
                    self.told(server, "T1_0001: has changed since it was sent", *options)
                self.run_once(server, "--overwrite-files")
                self.there(server)
                shutil.rmtree(self.root)
                self.elsewhere()

    def test_what_another_tool_left_is_not_sent_again_after_our_half_was_held_back(self) -> None:
        self.plant(ONE, TWO, files=4)
        lost = self.root / "007" / TWO / "lost.dcm"
        with self.xnat() as server:
            self.other_tool(server, uid_name(uid("007", "pre")), "--review", "--only", "007/pre",
                            only="T1_0001/IM000[12].dcm")
            lost.symlink_to("nowhere")
            seen = self.run_once(server, status=1)
            self.assertEqual(seen.sent, [("007_pre", ["IM0003.dcm", "IM0004.dcm"])])
            self.change(self.root / "007" / ONE / "IM0004.dcm", b"BB")
            lost.unlink()
            seen = self.run_once(server)
            self.assertEqual(sum(len(names) for _, names in seen.sent), 6, seen.sent)
            self.whole(server)

    @variation
    def test_what_waits_for_review_is_not_sent_again_after_a_part_was_held_back(self) -> None:
        self.plant(ONE)
        with self.xnat() as server:
            self.run_once(server, "--review")
            self.assertEqual(len(self.held_back(server, TWO, "pre/T3_0003").sent), 1)
            self.assertEqual(len(self.run_once(server, "--review").sent), 1)
            self.assertEqual(len(server.files("007_pre")), 6)

    @variation
    def test_what_a_script_changed_waits_for_review_for_a_dry_run_too(self) -> None:
        self.plant(ONE)
        with self.xnat(site_script=("uids",)) as server:
            self.run_once(server, project="MANUAL")
            seen = self.run_once(server, "--dry-run", project="MANUAL")
            self.assertRegex(seen.ran.out, "007_pre +in the prearchive, waiting for review")
            self.image(f"007/{ONE}", 3)
            self.told(server, "its UIDs changed by a script of the site", project="MANUAL")

    @variation
    def test_what_another_machine_has_added_meanwhile_is_there(self) -> None:
        self.plant(ONE)
        with self.xnat() as server:
            self.run_once(server)
            here = self.work
            self.elsewhere()
            self.image(f"007/{ONE}", 3)
            self.run_once(server)
            self.work = here
            self.there(server)

    def test_single_files_that_somebody_deleted_do_not_come_back_by_themselves(self) -> None:
        self.plant(ONE, files=4)
        with self.xnat() as server:
            self.run_once(server)
            scan = server.archive["BRAIN", "007_pre"].scans["1"]
            del scan["IM0002.dcm"]
            os.utime(self.root / "007" / ONE / "IM0001.dcm", (1, 1))  # so that it is asked for
            seen = self.told(server, "T1_0001: an earlier run saw it archived, and 1 file of it is")
            self.run_once(server, *self.advice(seen.ran))
            self.whole(server)

    def test_a_session_that_was_sent_in_part_and_whose_folder_went_is_gone(self) -> None:
        with self.xnat() as server:
            self.held_back(server, "post/T1_0001", TWO, ONE)
            shutil.rmtree(self.root / "007/pre")
            seen = self.told(server, r"Gone \(1\):\n  007_pre: earlier runs")
            self.run_once(server, *self.advice(seen.ran))
            self.run_once(server)

    @variation
    def test_series_that_were_renamed_split_merged_or_left_as_one_of_two_are_not_gone(self
                                                                                      ) -> None:
        def rename(pre: Path) -> None:
            (pre / "T1_0001").rename(pre / "renamed")
            self.image("007/pre/T1_0001", 5)
            (pre / "T1_0001/IM0005.dcm").rename(pre / "renamed/IM0005.dcm")
            (pre / "T1_0001").rmdir()

        def split(pre: Path) -> None:
            for name in ("a", "b"):
                (pre / name).mkdir()
            for path in (pre / "T1_0001").iterdir():
                path.rename(pre / ("a" if path.name < "IM0003" else "b") / path.name)
            (pre / "T1_0001").rmdir()

        def merge(pre: Path) -> None:
            for path in sorted((pre / "T1_0001").iterdir()):
                path.rename(pre / "T2_0002" / ("T1" + path.name))
            (pre / "T1_0001").rmdir()

        def drop_the_first_of_two(pre: Path) -> None:
            shutil.rmtree(pre / "T1_0001")

        def swap(pre: Path) -> None:
            (pre / "T1_0001").rename(pre / "x")
            (pre / "T2_0002").rename(pre / "T1_0001")
            (pre / "x").rename(pre / "T2_0002")

        for change in cases(rename, split, merge, drop_the_first_of_two, swap):
            with self.subTest(change.__name__), self.xnat() as server:
                self.plant(ONE, TWO, files=4)
                if change is drop_the_first_of_two:
                    shutil.copytree(self.root / "007" / ONE, self.root / "007/pre/T1_copy")
                self.run_once(server)
                change(self.root / "007/pre")
                self.run_once(server)
                self.there(server)
                self.whole(server)
                shutil.rmtree(self.root)
                self.elsewhere()

    def test_what_waits_for_review_is_there_for_a_dry_run_too(self) -> None:
        self.plant(ONE)
        with self.xnat() as server:
            for options, project in ((["--review"], "BRAIN"), ([], "MANUAL")):
                self.run_once(server, *options, project=project)
                seen = self.run_once(server, "--dry-run", project=project)
                self.assertEqual(seen.writes, [])
                self.assertRegex(seen.ran.out, "007_pre +in the prearchive, waiting for review")
            self.elsewhere()
            seen = self.run_once(server, "--dry-run", project="MANUAL")
            self.assertRegex(seen.ran.out, "007_pre +in the prearchive, waiting for review")
            self.foretold(server, "007_pre +in the prearchive, would be archived")

    @variation
    def test_what_is_archived_and_what_was_added_for_review_are_there_together(self) -> None:
        self.plant(ONE)
        with self.xnat() as server:
            self.run_once(server)
            self.plant(TWO, files=3)
            self.run_once(server, "--review")
            for options in ([], ["--review"]):
                seen = self.run_once(server, "--dry-run", *options)
                self.assertRegex(seen.ran.out, "007_pre +in the prearchive, waiting for review")

    def test_what_changes_while_its_session_is_completed_is_not_taken_for_what_was_sent(self
                                                                                        ) -> None:
        path = self.root / "007" / ONE / "IM0001.dcm"
        with self.xnat() as server:
            self.held_back(server, ONE, TWO)
            server.knobs.reject = once(lambda: self.change(path, b"BB"), "T2_0002")
            seen = self.run_once(server, status=1)
            self.assertIn("its folder changed while it was sent", seen.ran.out)
            self.run_once(server)
            self.whole(server)

    @variation
    def test_a_file_of_another_series_makes_no_known_series_forgotten(self) -> None:
        self.plant(ONE)
        folder = self.root / "007" / ONE
        with self.xnat() as server:
            self.run_once(server)
            write_series(folder, study=uid("007", "pre"), number=9, files=1, name="other{}.dcm")
            self.run_once(server)
            self.change(folder / "IM0001.dcm", b"BB")
            self.told(server, "T1_0001: has changed since it was sent")

    @variation
    def test_of_two_folders_of_one_series_one_may_be_renamed_and_is_missed_when_it_goes(self
                                                                                        ) -> None:
        for instance in range(1, 7):
            self.image(f"007/pre/{'a' if instance < 4 else 'b'}_0001", instance)
        with self.xnat() as server:
            self.run_once(server)
            (self.root / "007/pre/b_0001").rename(self.root / "007/pre/c_0001")
            self.there(server)
            shutil.rmtree(self.root / "007/pre/c_0001")
            self.told(server, r"Gone \(1\):\n  007_pre c_0001")

    def test_what_an_older_ledger_knows_is_still_known(self) -> None:
        self.plant(ONE, TWO)
        with self.xnat() as server:
            self.run_once(server)
            (ledger,) = self.work.glob("*ledger*")
            lines = [json.loads(line) for line in ledger.read_text().splitlines()]
            for line in lines:
                line.pop("study", None)
                line.pop("uid", None)
                if line["event"] == "ended":
                    line["series"] = {name: each[:4] for name, each in line["series"].items()}
            ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
            self.assertEqual(self.there(server).about("007_pre"), [])
            self.change(self.root / "007" / ONE / "IM0001.dcm", b"BB")
            self.told(server, "T1_0001: has changed since it was sent")
            shutil.rmtree(self.root / "007" / TWO)
            self.told(server, r"Gone \(1\):\n  007_pre T2_0002")


class InThePrearchive(CompareTest):
    """What earlier runs, or others, have left there."""

    def test_what_a_lost_run_left_is_completed_and_committed_once(self) -> None:
        for status in cases("RECEIVING", "READY", "ERROR", "CONFLICT"):
            with self.subTest(status=status), self.xnat() as server:
                self.plant(ONE, TWO)
                self.leave(server, status)
                self.foretold(server, r"waits in the prearchive|would be archived|would be sent")
                seen = self.run_once(server)  # nothing is missing
                self.assertEqual((seen.sent, seen.commits), ([], ["007_pre"]))
                self.whole(server)
                self.elsewhere()
                self.plant("post/T1_0001", "post/T2_0002")
                self.image("007/post/PD_0003", 1)
                self.leave(server, status)
                self.plant("post/PD_0003")  # a file of it is there
                self.plant("post/T3_0004")
                seen = self.run_once(server)
                self.assertEqual(seen.sent, [("007_post", ["IM0001.dcm", "IM0002.dcm"]),
                                             ("007_post", ["IM0002.dcm"])])
                self.assertEqual(seen.commits, ["007_post"])
                self.whole(server)
                self.there(server)
                shutil.rmtree(self.root)
                self.elsewhere()

    @variation
    def test_a_run_killed_in_the_middle_is_completed_without_its_workdir(self) -> None:
        self.plant(ONE, files=4)
        with self.xnat() as server:
            server.fail("stall before", "services/import", seconds=30, skip=2)
            run = self.start(self.arguments(server.url, "--max-files", "1", "--procs", "1"))
            self.assertTrue(server.wait_for(lambda: len(server.imports()) == 3, 30))
            run.send_signal(signal.SIGKILL)
            run.communicate()
            server.faults.clear()
            self.elsewhere()
            seen = self.run_once(server)
            self.assertEqual(seen.sent, [("007_pre", ["IM0003.dcm", "IM0004.dcm"])])
            self.assertEqual((seen.commits, seen.builds), (["007_pre"], ["007_pre"]))
            self.whole(server)

    @variation
    def test_what_another_tool_left_under_other_names_is_committed_and_not_sent(self) -> None:
        self.plant(ONE, TWO)
        with self.xnat() as server:
            self.other_tool(server, uid_name(uid("007", "pre")), "--review")
            for status in ("RECEIVING", "ERROR"):
                row = server.prearchive[0]
                row.status, row.built = status, None
                self.image("007/post/T1_0001", 1)  # another session beside it
                seen = self.run_once(server)
                self.assertEqual([label for label, _ in seen.sent], ["007_post"] * (
                    status == "RECEIVING"))
                self.assertIn("007_pre", seen.commits)
                self.whole(server)
                if status == "RECEIVING":
                    server.store.archive.pop(("BRAIN", "007_pre"))
                    self.elsewhere()
                    self.other_tool(server, uid_name(uid("007", "pre")), "--review",
                                    "--only", "007/pre")
                    self.elsewhere()

    @variation
    def test_a_half_joins_what_the_archive_has_of_that_session(self) -> None:
        for status in cases("READY", "RECEIVING"):
            with self.subTest(status=status), self.xnat() as server:
                self.plant(ONE)
                self.run_once(server)
                self.plant(TWO)
                self.leave(server, status)
                self.assertEqual(len(server.prearchive), 1)
                self.plant("pre/PD_0003")
                seen = self.run_once(server)
                self.assertEqual(seen.sent, [("007_pre", ["IM0001.dcm", "IM0002.dcm"])])
                self.assertEqual(seen.commits, ["007_pre"])
                self.whole(server)
                shutil.rmtree(self.root)
                self.elsewhere()

    @variation
    def test_a_leftover_copy_of_what_is_archived_is_named_and_not_touched(self) -> None:
        for status in cases("CONFLICT", "RECEIVING", "READY", "ERROR"):
            with self.subTest(status=status), self.xnat() as server:
                self.plant(ONE, TWO)
                self.leave(server, status)
                row = server.prearchive[0]
                self.run_once(server)
                self.put_back(server, row).status = status
                for ledger in (True, False):
                    if not ledger:
                        self.elsewhere()
                    seen = self.there(server)
                    self.assertIn(f"/data{row.uri}", seen.ran.text)
                    self.assertIn("may be deleted", seen.ran.text)
                self.elsewhere()
                self.foretold(server, "(?s)1 already there.*may be deleted")
                self.plant("pre/PD_0003")
                words = r"(?s)copy of what is archived.*delete that copy in the prearchive"
                if status in ("READY", "CONFLICT"):
                    self.foretold(server, words, status=1)
                    self.told(server, words)
                else:  # these are asked to say what they hold
                    seen = self.run_once(server, status=1)
                    self.assertEqual((seen.sent, seen.commits), ([], []))
                    self.assertRegex(seen.ran.out, words)
                server.store.remove(row)
                self.assertEqual(len(self.run_once(server).sent), 1)
                self.whole(server)
                shutil.rmtree(self.root)
                self.elsewhere()

    @variation
    def test_a_copy_is_no_matter_where_xnat_replaces_what_it_has(self) -> None:
        for project, options in cases(("OVER", ()), ("BRAIN", ("--overwrite-files",))):
            with self.subTest(project=project), self.xnat() as server:
                self.plant(ONE, TWO)
                self.copy_of_what_is_archived(server, project=project)
                self.plant("pre/PD_0003")
                seen = self.run_once(server, *options, project=project)
                self.assertEqual(seen.sent, [("007_pre", ["IM0001.dcm", "IM0002.dcm"])])
                self.assertEqual(server.prearchive, [])
                shutil.rmtree(self.root)
                self.elsewhere()

    def test_a_copy_under_other_names_is_a_copy(self) -> None:
        self.plant(ONE)
        with self.xnat() as server:
            self.copy_of_what_is_archived(server)
            self.assertIn("may be deleted", self.there(server).ran.text)
            self.image(f"007/{ONE}", 3)
            self.told(server, "copy of what is archived")

    @variation
    def test_two_machines_each_send_a_half(self) -> None:
        halves = {"one": ONE, "two": TWO}
        for order in cases(("one", "two"), ("two", "one")):
            for whole in cases(False, True):  # the first half waits, or was archived
                with self.subTest(order=order, whole=whole), self.xnat() as server:
                    self.plant(halves[order[0]])
                    self.work = first = self.folder / "-".join((*order, str(whole)))
                    if not whole:
                        server.fail("error page", "action=commit", status=500, text="no", times=1)
                    self.run_once(server, status=int(not whole))
                    self.plant(halves[order[1]])
                    self.work = first.with_name(first.name + "second")
                    seen = self.run_once(server)
                    self.assertEqual(seen.sent, [("007_pre", ["IM0001.dcm", "IM0002.dcm"])])
                    self.assertEqual(seen.commits, ["007_pre"])
                    self.whole(server)
                    self.there(server)
                    self.work = first
                    self.there(server)
                    self.there(server)
                    shutil.rmtree(self.root)

    @variation
    def test_what_a_person_archived_and_then_deleted_is_not_taken_for_sent(self) -> None:
        self.plant(ONE, TWO)
        with self.xnat() as server:
            server.fail("error page", "action=commit", status=500, text="no", times=1)
            self.run_once(server, status=1)
            server.store.commit(server.prearchive[0], True, False)
            server.archive["BRAIN", "007_pre"].scans.pop("2")
            seen = self.run_once(server)
            self.assertEqual(seen.sent, [("007_pre", ["IM0001.dcm", "IM0002.dcm"])])
            self.whole(server)

    @variation
    def test_a_row_that_went_and_came_again_elsewhere_is_joined(self) -> None:
        self.plant(ONE, TWO)
        with self.xnat() as server:
            server.fail("error page", "action=commit", status=500, text="no", times=1)
            self.run_once(server, status=1)
            server.store.remove(server.prearchive[0])
            self.other_tool(server, uid_name(uid("007", "pre")), "--review", only="T1*/*")
            seen = self.run_once(server)
            self.assertEqual(seen.sent, [("007_pre", ["IM0001.dcm", "IM0002.dcm"])])
            self.assertEqual(seen.commits, ["007_pre"])
            self.whole(server)


class Review(CompareTest):
    """Sessions that a person archives."""

    def test_a_session_left_for_review_is_there_until_its_reviewer_archives_it_and_after(
            self) -> None:
        for refused in cases((), ("prearchive",), ("archive", "prearchive")):
            with self.subTest(refused=refused), self.xnat(refuse_lists=refused) as server:
                self.plant(ONE, TWO)
                seen = self.run_once(server, "--review")
                self.assertEqual((seen.commits, seen.builds), ([], ["007_pre"]))
                self.assertEqual([row.status for row in server.prearchive], ["READY"])
                seen = self.there(server, "--review")
                self.assertRegex(seen.ran.out, "007_pre +in the prearchive, waiting for review, 4")
                self.assertIn("wait for review", seen.ran.out)
                if not refused:
                    self.assertEqual(seen.about("007_pre"), [])
                self.assertEqual({row["status"] for row in self.report()}, {"already there"})
                server.store.commit(server.prearchive[0], True, False)
                for _ in range(2):
                    seen = self.there(server, "--review")
                    self.assertNotIn("review", seen.ran.out.split("\n", 1)[1].split("Report")[0]
                                     .replace("--review", ""))
                self.whole(server)
                shutil.rmtree(self.root)
                self.elsewhere()

    @variation
    def test_without_its_ledger_it_is_left_there_too(self) -> None:
        self.plant(ONE)
        with self.xnat() as server:
            self.run_once(server, "--review")
            self.elsewhere()
            seen = self.run_once(server, "--review")
            self.assertEqual((seen.sent, seen.commits), ([], []))
            self.assertEqual([row.status for row in server.prearchive], ["READY"])
            self.assertEqual(server.archive, {})


class Deleted(CompareTest):
    """What somebody has deleted does not come back by itself."""

    def deletes(self, server: Standin, delete: Callable[[], Any], *options: str,
                more: Callable[[], Any] = lambda: None) -> None:
        """Told every time, also if the folder has changed since; sent as the words say."""
        self.run_once(server, *options)
        delete()
        for dry in (["--dry-run"], [], []):
            seen = self.told(server, r"any more(?s:.*)--again", *options, *dry)
        more()
        seen = self.told(server, r"any more(?s:.*)--again", *options)
        seen = self.run_once(server, *options, *self.advice(seen.ran))
        self.assertTrue(seen.sent)

    def test_a_session_deleted_from_the_archive_comes_only_when_it_is_asked_for(self) -> None:
        for refused in cases((), ("archive",)):
            with self.subTest(refused=refused), self.xnat(refuse_lists=refused) as server:
                self.plant(ONE, TWO)
                self.deletes(server, server.store.archive.clear,
                             more=lambda: self.image(f"007/{ONE}", 3))
                self.whole(server)
                shutil.rmtree(self.root)
                self.elsewhere()

    @variation
    def test_a_session_with_a_damaged_file_that_was_deleted_does_not_come_back_either(
            self) -> None:
        self.plant(ONE)
        whole = (self.root / "007" / ONE / "IM0001.dcm").read_bytes()
        (self.root / "007" / ONE / "IM0003.dcm").write_bytes(whole[:-100])
        with self.xnat() as server:
            self.run_once(server, status=1)
            self.assertEqual(len(server.files("007_pre")), 2)
            server.store.archive.clear()
            seen = self.told(server, r"any more")
            seen = self.run_once(server, *self.advice(seen.ran), status=1)
            self.assertEqual(len(server.files("007_pre")), 2)

    @variation
    def test_a_session_deleted_from_the_prearchive_comes_only_when_it_is_asked_for(self) -> None:
        self.plant(ONE, TWO)
        with self.xnat() as server:
            self.deletes(server, lambda: server.store.remove(server.prearchive[0]), "--review",
                         more=lambda: self.image(f"007/{ONE}", 3))
            self.assertEqual(len(server.files("007_pre")), 5)

    @variation
    def test_a_scan_deleted_from_the_archive_comes_only_when_it_is_asked_for(self) -> None:
        for series in cases((ONE, TWO), (ONE,)):  # among others, and the only one
            with self.subTest(series=series), self.xnat() as server:
                self.plant(*series)

                def delete() -> None:
                    server.store.archive["BRAIN", "007_pre"].scans.pop("1")

                self.run_once(server)
                delete()
                # To see a scan go, somebody must look: what is unchanged here is not asked for.
                os.utime(self.root / "007" / ONE / "IM0001.dcm", (1, 1))
                self.assertRegex(self.upload(server, "-n").out, r"T1_0001: .*any more\n.*--again")
                self.told(server, r"T1_0001: .*any more")
                seen = self.told(server, r"any more(?s:.*)--again")
                self.run_once(server, *self.advice(seen.ran))
                self.whole(server)
                shutil.rmtree(self.root)
                self.elsewhere()


class SomethingElseIsThere(CompareTest):
    """The label holds what is not ours."""

    def row(self, server: Standin, subject: str, study: str, label: str = "007_pre") -> Row:
        return self.put_back(server, Row("BRAIN", server.store.timestamp(), label, subject, study))

    def test_another_study_or_subject_is_told_with_both_and_other_sessions_go_on(self) -> None:
        other = uid("somebody else")
        for refused in ((), ("archive",)):
            with self.subTest(refused=refused), self.xnat(refuse_lists=refused) as server:
                words = []
                for number, (subject, study) in enumerate((("", other), ("999", "")) * 2):
                    ours = f"00{number}"
                    self.plant(ONE, subject=ours)
                    mine = uid(ours, "pre")
                    if number < 2:
                        server.make_session("BRAIN", ours + "_pre", subject or ours, study or mine)
                    else:
                        self.row(server, subject or ours, study or mine, ours + "_pre")
                    where = "archive" if number < 2 else "prearchive"
                    words.append(f"{ours}_pre +not sent: XNAT's {where} .*" + (
                        f"there {other}, here {mine}" if study else
                        f"subject 999, here it is subject {ours}"))
                self.plant(ONE)
                seen = self.foretold(server, "007_pre +would be sent", status=1)
                for each in words:
                    self.assertRegex(seen.ran.text, each)
                seen = self.run_once(server, status=1)
                self.assertEqual([label for label, _ in seen.sent], ["007_pre"])
                self.assertEqual(seen.commits, ["007_pre"])
                for each in words:
                    self.assertRegex(seen.ran.text, each)
                self.told(server, "5 sessions: 4 not sent, 1 already there")
                shutil.rmtree(self.root)
                self.elsewhere()

    def test_again_sends_nothing_under_a_label_that_somebody_elses_study_has(self) -> None:
        """What may be sent again is what an earlier run has brought there."""
        self.plant(ONE)
        with self.xnat() as server:
            server.make_session("BRAIN", "007_pre", "007", uid("somebody else"))
            seen = self.told(server, "another study under the label 007_pre", "--again")
            self.assertNotIn("script of the site", seen.ran.out)  # we have sent it nothing

    def test_another_study_in_a_folder_of_which_all_is_there_is_told_with_what_it_may_be(
            self) -> None:
        self.plant(ONE)
        with self.xnat() as server:
            self.run_once(server)
            shutil.rmtree(self.root)
            write_series(self.root / "007" / ONE, study=uid("another"), number=1, files=2)
            seen = self.told(server, "another study under the label 007_pre")
            self.assertIn("if it is a script of the site that changes UIDs", seen.ran.out)
            self.assertEqual(self.advice(seen.ran),
                             ["--overwrite-files", "--again", "--only", "007/pre"])

    @variation
    def test_subjects_are_the_same_in_any_case(self) -> None:
        self.plant(ONE, subject="Sub1")
        with self.xnat() as server:
            server.make_session("BRAIN", "Sub1_pre", "SUB1", uid("Sub1", "pre"))
            self.assertEqual(self.run_once(server).commits, ["Sub1_pre"])
            self.elsewhere()
            self.there(server)
            self.whole(server)
        with self.xnat() as server:
            self.row(server, "sUB1", uid("Sub1", "pre"), "Sub1_pre")
            self.run_once(server)
            self.whole(server)


class Scripts(CompareTest):
    """Site and project scripts change sizes and UIDs."""

    def test_what_scripts_have_changed_is_there_by_the_ledger(self) -> None:
        for where in cases("site_script", "project_script"):
            for changes in cases(["sizes", "uids"], ["sizes"], ["uids"]):
                with self.subTest(where=where, changes=changes), \
                        self.xnat(**{where: changes}) as server:
                    self.plant(ONE, TWO)
                    self.run_once(server)
                    self.assertEqual(self.there(server).about("007_pre"), [])
                    for path in self.root.rglob("*.dcm"):
                        os.utime(path, (1, 1))
                    self.there(server)
                    self.foretold(server, "1 already there")
                    self.plant("pre/PD_0003")
                    # XNAT merges nothing into a study whose UID was changed in the archive.
                    refused = where == "project_script" and "uids" in changes
                    seen = self.run_once(server, status=int(refused))
                    self.assertEqual(seen.sent, [("007_pre", ["IM0001.dcm", "IM0002.dcm"])])
                    self.assertEqual(len(server.files("007_pre")), 6)
                    if refused:
                        self.assertIn("Invalid modification of session UID", seen.ran.out)
                    else:
                        self.assertEqual(server.prearchive, [])
                        self.there(server)
                    shutil.rmtree(self.root)
                    self.elsewhere()

    def test_an_added_file_is_never_taken_for_one_that_a_script_changed(self) -> None:
        for added in cases([ONE], [ONE, TWO]):
            with self.subTest(added=added), self.xnat(site_script=["uids"]) as server:
                self.plant(ONE, TWO)
                self.run_once(server)
                for path in added:
                    self.image(f"007/{path}", 3)
                seen = self.told(server, "007_pre")
                self.run_once(server, *self.advice(seen.ran))
                self.assertEqual(len(server.archive["BRAIN", "007_pre"].files), 4 + len(added))
                self.assertEqual(server.prearchive, [])
                self.there(server)
                shutil.rmtree(self.root)
                self.elsewhere()

    @variation
    def test_another_study_in_the_folder_is_never_taken_for_what_the_ledger_knows(self) -> None:
        for files in cases(1, 2, 3):
            with self.subTest(files=files), self.xnat() as server:
                self.plant(ONE, TWO)
                self.run_once(server)
                shutil.rmtree(self.root)
                for path in (ONE, TWO):
                    write_series(self.root / "007" / path, study=uid("another"),
                                 number=int(path[-1]), files=files)
                self.foretold(server, f"007_pre.*{uid('007', 'pre')}|changed", status=1)
                self.told(server, "007_pre")
                shutil.rmtree(self.root)
                self.elsewhere()

    def test_without_a_ledger_nothing_is_archived_by_halves_and_nothing_untrue_is_said(
            self) -> None:
        for left in cases("archived", "RECEIVING", "READY", first=2):
            for where in cases("site_script", "project_script"):
                for changes in cases(["uids"], ["sizes"]):
                    with self.subTest(where=where, changes=changes, left=left), \
                            self.xnat(**{where: changes}) as server:
                        self.without_ledger(server, left, changes)

    def without_ledger(self, server: Standin, left: str, changes: List[str]) -> None:
        self.plant(ONE, TWO)
        if left == "archived":
            self.run_once(server)
            self.elsewhere()
        else:
            self.leave(server, left)
            self.plant("pre/PD_0003")
        files = len(list(self.root.rglob("*.dcm")))
        for _ in range(2):
            ran = self.upload(server)
            archived = [len(each.files) for each in server.archive.values()]
            self.assertEqual(ran.status == 0, "All is there." in ran.out, ran.text)
            self.assertIn(archived, ([files],) if ran.status == 0 else ([files], []), ran.text)
        if changes == ["sizes"]:
            self.assertEqual(ran.status, 0, ran.text)
        if changes == ["uids"] and left == "archived":
            self.assertIn(other_uid(uid("007", "pre")), ran.out)
        shutil.rmtree(self.root)
        self.elsewhere()


class Changed(CompareTest):
    """The same image with other times, or other bytes."""

    def test_other_times_are_no_change_and_other_bytes_are_told(self) -> None:
        self.plant(ONE, TWO)
        path = self.root / "007" / ONE / "IM0001.dcm"
        with self.xnat() as server:
            self.run_once(server)
            for stamp in (1, 2):
                os.utime(path, (stamp, stamp))
                self.there(server)
            first = path.read_bytes()
            self.change(path, b"BB")
            words = "T1_0001: has changed since it was sent"
            for _ in range(2):
                seen = self.told(server, words)
            self.assertEqual(self.upload(server, "--dry-run").status, 1)
            seen = self.run_once(server, "--overwrite-files")
            self.assertEqual(seen.sent, [("007_pre", ["IM0001.dcm", "IM0002.dcm"])])
            self.whole(server)
            self.there(server)
            self.there(server, "--overwrite-files")
            path.write_bytes(first)  # A again, after B
            os.utime(path, (2, 2))
            self.told(server, words)
            self.run_once(server, "--overwrite-files")
            self.whole(server)

    @variation
    def test_a_change_is_seen_after_other_series_were_added_to_and_after_a_touch(self) -> None:
        self.plant(ONE, TWO)
        with self.xnat() as server:
            self.run_once(server)
            self.image(f"007/{ONE}", 3)
            self.assertEqual(self.run_once(server).sent, [("007_pre", ["IM0003.dcm"])])
            os.utime(self.root / "007" / TWO / "IM0001.dcm", (1, 1))
            self.there(server)
            for path in (ONE, TWO):
                self.change(self.root / "007" / path / "IM0002.dcm", b"CC")
                self.told(server, path[4:] + " +not sent +has changed")
            self.run_once(server, "--overwrite-files")
            self.whole(server)

    @variation
    def test_a_change_beside_an_added_file_is_seen(self) -> None:
        self.plant(ONE)
        with self.xnat() as server:
            self.run_once(server)
            self.change(self.root / "007" / ONE / "IM0001.dcm", b"DD")
            self.image(f"007/{ONE}", 3)
            self.told(server, "T1_0001: has changed")
            self.run_once(server, "--overwrite-files")
            self.whole(server)


class TooFew(CompareTest):
    """XNAT counts fewer files than were sent."""

    def losing(self, server: Standin, scan: str, times: int) -> None:
        """The archive step loses a file of this scan, so many times."""
        move, left = server.store._move, [times]

        def lose(row: Row, overwrite: bool) -> Any:
            if left[0] and row.built and len(row.built.get(scan, {})) > 1:
                left[0] -= 1
                row.built[scan].popitem()
            return move(row, overwrite)

        server.store._move = lose  # type: ignore[method-assign]

    def test_too_few_files_name_the_series_and_both_numbers_and_the_next_run_heals_it(
            self) -> None:
        self.plant(ONE, TWO, files=3)
        with self.xnat() as server:
            self.losing(server, "2", 1)
            seen = self.run_once(server, status=1)
            self.assertRegex(seen.ran.out, r"007_pre T2_0002: .*XNAT counts 2 files where 3 should")
            self.assertNotIn("T1_0001:", seen.ran.out)
            self.assertNotIn("All is there", seen.ran.out)
            self.foretold(server, "T2_0002 +would send +1 file")
            seen = self.run_once(server)
            self.assertEqual(seen.sent, [("007_pre", ["IM0003.dcm"])])
            self.whole(server)

    @variation
    def test_where_uids_are_not_told_the_total_counts(self) -> None:
        for knobs in cases({"site_script": ["uids"]}, {"project_script": ["uids"]}):
            with self.subTest(knobs=knobs), self.xnat(**knobs) as server:  # type: ignore
                self.plant(ONE, TWO, files=3)
                self.losing(server, "2", 1)
                seen = self.run_once(server, status=1)
                self.assertRegex(seen.ran.out, r"007_pre: .*XNAT counts 5 files where 6 should be")
                seen = self.run_once(server, status=1)  # the same verdict, and nothing twice
                self.assertRegex(seen.ran.out, r"007_pre")
                self.assertEqual(set(server.instances("007_pre").values()), {1})
                shutil.rmtree(self.root)
                self.elsewhere()

    @variation
    def test_in_the_prearchive_too(self) -> None:
        self.plant(ONE, TWO, files=3)
        with self.xnat() as server:
            build = server.store.build

            def lose(row: Row) -> None:
                row.files.pop(("2", "IM0002.dcm"), None)
                build(row)

            server.store.build = lose  # type: ignore[method-assign]
            words = "(?s)Failed.*XNAT counts [25] files where [36] should be"
            self.assertRegex(self.run_once(server, "--review", status=1).ran.out, words)
            server.store.build = build  # type: ignore[method-assign]
            seen = self.run_once(server, "--review")
            self.assertEqual(seen.sent, [("007_pre", ["IM0002.dcm"])])
            self.assertEqual([len(row.files) for row in server.prearchive], [6])


