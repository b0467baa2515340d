"""The file that remembers: what it spares, what it survives, and that truth does not need it."""

import json
import re
import shlex
import shutil
import sys
import unittest
from typing import Callable, List

from tests.faults import COMMIT, HELD, IMPORT, THERE, FaultTest
from tests.support import cases, drop_root_rights, variation
from tests.support import load_tests as load_tests  # these mostly wait: several at a time
from tests.xnat_standin import Standin

# Run a command that may make no file larger than so many bytes.
FULL = """import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


class LedgerTest(FaultTest):

    def lines(self) -> List[bytes]:
        return self.ledger().read_bytes().splitlines(keepends=True)

    def held_back(self, server: Standin) -> None:
        """A run after which both series are sent and nothing is committed."""
        server.fail("error page", COMMIT, status=500, text="not today", times=None)
        self.run_it(server, "--procs", "1", "--retries", "0", status=1, posts=2)
        server.faults.clear()


class WhatItSpares(LedgerTest):

    def test_a_second_run_sends_nothing_and_asks_nothing_about_what_it_knows(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2, commits=1)
            before = len(server.requests)
            self.run_it(server, status=0, posts=0, commits=0, words="already there")
            self.assertEqual(self.statuses(), THERE)
            self.assertEqual([each for each in server.requests[before:] if "007" in each.path], [])
            self.assert_whole(server)

    @variation
    def test_a_session_held_back_is_completed_by_the_next_run(self) -> None:
        self.tree("007/pre/A_0001", "007/pre/B_0002", "008/pre/A_0001")
        with self.xnat() as server:
            server.fail("error page", IMPORT, status=400, text="no", skip=1)
            self.run_it(server, "--procs", "1", status=1, posts=3, commits=1, words=HELD)
            self.run_it(server, "--procs", "1", status=0, posts=1, commits=1)
            self.assert_whole(server)

    def test_what_was_sent_and_not_committed_is_committed_by_the_next_run(self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("stall before", COMMIT, seconds=60)
            run = self.start(self.arguments(server.url, "--procs", "1"))
            self.assertTrue(server.wait_for(server.commits, 60))
            run.kill()
            run.wait()
            server.faults.clear()
            self.run_it(server, status=0, posts=0, commits=1)
            self.assert_whole(server)

    @variation
    def test_what_was_sent_and_deleted_in_the_prearchive_is_sent_again(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.held_back(server)
            for row in server.prearchive:
                server.store.remove(row)
            self.run_it(server, status=0, posts=2, commits=1, words="no longer in the prearchive")
            self.assert_whole(server)

    @variation
    def test_what_somebody_else_has_archived_meanwhile_is_neither_sent_nor_committed(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.held_back(server)
            server.store.commit(server.prearchive[0], archive=True, overwrite=False)
            self.run_it(server, status=0, posts=0, commits=0, words="007_pre +already there")
            self.assert_whole(server)
            self.stays_so(server)

    @variation
    def test_a_new_series_in_an_archived_session_is_merged(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0)
            self.tree("007/pre/C_0003")
            self.run_it(server, status=0, posts=1, commits=1, words="6 files")
            self.assert_whole(server)
            self.stays_so(server)

    @variation
    def test_a_changed_file_in_an_archived_series_is_told_and_overwritten_on_demand(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0)
            self.tree("007/pre/A_0001", rows=24)
            self.run_it(server, status=1, posts=0, commits=0,
                        words="A_0001.*changed | --overwrite-files")
            self.run_it(server, "--overwrite-files", status=0, posts=1, commits=1)
            self.assert_whole(server)
            self.stays_so(server)
            self.stays_so(server, "--overwrite-files")

    @variation
    def test_other_max_files_send_no_file_twice(self) -> None:
        self.tree(files=9)
        with self.xnat() as server:
            server.fail("error page", IMPORT, status=400, text="no", skip=2)
            self.run_it(server, "--procs", "1", "--max-files", "2", status=1, commits=0)
            self.run_it(server, "--procs", "1", "--max-files", "4", status=0, commits=1)
            sent = [(each.params["EXPT_LABEL"], each.address, name)
                    for each in server.imports() if each.status == 200 for name in each.entries]
            self.assertEqual(len(sent), 18, "9 files of 2 series")
            self.assert_whole(server)
            self.stays_so(server, "--max-files", "3")

    def test_again_sends_all_of_it_again(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.held_back(server)
            self.run_it(server, "--again", status=0, posts=2, commits=1)
            self.assert_whole(server)
            self.run_it(server, "--again", status=1, posts=2, words="--overwrite-files")
            self.run_it(server, "--again", "--overwrite-files", status=0, posts=2, commits=1)
            self.assert_whole(server)
            self.stays_so(server)

    @variation
    def test_again_forgets_only_what_is_chosen(self) -> None:
        self.tree("007/pre/A_0001", "008/pre/A_0001")
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2)
            self.run_it(server, "--again", "--only", "008", "--overwrite-files", status=0, posts=1)
            self.stays_so(server)
            self.assert_whole(server)

    def test_another_project_knows_nothing_of_the_first(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2)
            self.run_it(server, status=0, posts=2, commits=1, project="OVER")
            self.assertEqual({project for project, _ in server.archive}, {"BRAIN", "OVER"})
            self.stays_so(server)
            self.stays_so(server, project="OVER")

    def test_one_server_has_one_ledger_however_its_name_is_written(self) -> None:
        self.tree()
        with self.xnat(context_path="/Xnat") as server:
            for site in "localhost:{}/Xnat", "LOCALHOST:{}/Xnat/":
                ran = self.run_command(self.arguments("http://" + site.format(server.port)))
                self.assertEqual(ran.status, 0, ran.text)
            self.assertEqual(len(server.imports()), 2)
            self.assertIn("already there", ran.out)
            # The second run has asked for no session: it knew it from the first one's line.
            farewell = max(number for number, each in enumerate(server.requests[:-1])
                           if each.method == "DELETE")
            self.assertEqual([each for each in server.requests[farewell:] if "007" in each.path],
                             [])


class WhatIsGone(LedgerTest):
    """Folders that an earlier run knew with images: their absence is told until it is settled."""

    PATHS = "007/pre/A_0001", "007/pre/B_0002", "008/pre/A_0001"

    def gone(self, server: Standin, *options: str, words: str) -> None:
        """A run that says so under a heading of its own, and ends with 1; nothing is sent."""
        ran = self.run_it(server, *options, status=1, posts=0, words=words)
        self.assertRegex(ran.out, r"(?m)^Gone \(\d\):$")
        self.assertIn("put it back, or if it is meant so add --overwrite-files --again --only ",
                      ran.out)
        self.assertNotIn("All is there", ran.out)
        # Beside another --only it would send what that chooses too.
        self.assertEqual("once (in place of the --only that was given)" in ran.out,
                         "--only" in options)

    def test_a_session_without_its_folder_is_told_until_the_folder_or_again_settles_it(
            self) -> None:
        self.tree(*self.PATHS)
        with self.xnat() as server:
            self.run_it(server, status=0, posts=3)
            (self.root / "008").rename(self.folder / "008")
            for options in cases((), ("-n",), ("--only", "008/pre"), ("-q",), ("--only", "00*"),
                                 first=3):
                with self.subTest(options):
                    self.gone(server, *options, words="\n  008_pre: .*now there are none")
            self.stays_so(server, "--only", "007")  # tells of its own only
            (self.folder / "008").rename(self.root / "008")
            self.stays_so(server)
            (self.root / "008").rename(self.folder / "008")
            again = "--overwrite-files", "--again", "--only", "008/pre"
            self.run_it(server, "-n", *again, status=0)  # remembers nothing
            self.gone(server, words="008_pre")
            self.run_it(server, *again, status=0, posts=0, words="All is there")
            self.stays_so(server)
            self.run_it(server, "--only", "008", status=2, words="--only 008")  # a mistake now
            (self.folder / "008").rename(self.root / "008")
            self.stays_so(server)
            self.assert_whole(server)

    @variation
    def test_what_is_said_of_many_that_are_gone_settles_all_of_them_at_once(self) -> None:
        paths = [f"{subject}/pre/A_0001" for subject in ("007", "it's", "a b", "x*[1]")]
        self.tree(*paths, "008/pre/A_0001")
        with self.xnat() as server:
            self.run_it(server, status=0, posts=5)
            for path in paths:
                shutil.rmtree(self.root / path.split("/")[0])
            ran = self.run_it(server, status=1, posts=0)
            self.assertIn("and 3 more like it", ran.out)
            advice = re.findall("meant so add (.*) once", ran.out)
            self.assertEqual(len(advice), 1, ran.out)
            self.run_it(server, *shlex.split(advice[0]), status=0, posts=0)
            self.stays_so(server)

    def test_what_cannot_be_read_is_not_gone(self) -> None:
        self.tree(*self.PATHS)
        with self.xnat() as server:
            self.run_it(server, status=0, posts=3)
            self.addCleanup((self.root / "008").chmod, 0o700)
            (self.root / "008").chmod(0)
            ran = self.upload(server, preexec=drop_root_rights)
        if ran.status:  # permission bits do not hold everywhere
            self.assertIn("008: the folder cannot be read", ran.out)
        self.assertNotIn("Gone", ran.out)

    def test_a_series_without_images_is_told_until_its_folder_or_again_settles_it(self) -> None:
        self.tree(*self.PATHS)
        with self.xnat() as server:
            self.run_it(server, status=0, posts=3)
            series, place = self.root / "007/pre/B_0002", self.folder / "B_0002"
            series.rename(place)
            for make in (lambda: None, series.mkdir):  # gone, then empty
                make()
                for options in cases((), ("-n",), ("-q",), (), first=2):
                    with self.subTest(options, make=make):
                        self.gone(server, *options, words=r"\n  007_pre B_0002: .*none")
            self.stays_so(server, "--only", "008")
            series.rmdir()
            place.rename(series)
            self.stays_so(server)
            self.stays_so(server)
            series.rename(place)
            self.gone(server, words="007_pre B_0002")
            self.run_it(server, "--overwrite-files", "--again", "--only", "007/pre", status=0,
                        posts=1, words="All is there")
            self.stays_so(server)


class WithoutIt(LedgerTest):

    @variation
    def test_what_waits_in_the_prearchive_is_joined_and_what_is_archived_is_there(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.held_back(server)
            self.ledger().unlink()
            self.run_it(server, status=0, posts=0, commits=1, words="archived, 4 files verified")
            self.assert_whole(server)
            for options in (), ("--overwrite-files",):
                with self.subTest(options):
                    self.ledger().unlink()
                    self.run_it(server, *options, status=0, posts=0, commits=0,
                                words="already there, 4 files")
                    self.assertEqual(self.statuses(), THERE)
            self.assert_whole(server)

    @variation
    def test_lines_of_the_first_version_are_passed_over_and_the_server_is_asked(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.held_back(server)
            for version, commits in ((1, 1), (1, 0), (99, 0)):
                with self.subTest(version):
                    text, changed = re.subn(r'"v": ?\d+', f'"v": {version}',
                                            self.ledger().read_text())
                    self.assertGreater(changed, 0, text)
                    self.ledger().write_text(text)
                    self.run_it(server, status=0, posts=0, commits=commits)
                    self.assert_whole(server)


class WhatItSurvives(LedgerTest):

    def torn(self, tear: Callable[[List[bytes]], List[bytes]], posts: int) -> None:
        """After this has happened to the ledger of a session that is on its way, the next run
        sends so many parts, and the one after it knows all that."""
        self.tree("007/pre/A_0001", "007/pre/B_0002", "007/pre/C_0003")
        with self.xnat() as server:
            server.fail("error page", IMPORT, status=400, text="no", skip=2)
            self.run_it(server, "--procs", "1", status=1, posts=3, commits=0, words=HELD)
            self.ledger().write_bytes(b"".join(tear(self.lines())))
            self.run_it(server, "--procs", "1", status=0, posts=posts, commits=1)
            self.assert_whole(server)
            before = len(server.requests)
            self.stays_so(server)
            self.assertEqual([each for each in server.requests[before:] if "007" in each.path], [])

    def test_a_torn_last_line_costs_one_part(self) -> None:
        self.torn(lambda lines: [lines[0], lines[1][:len(lines[1]) // 2]], posts=2)

    @variation
    def test_a_torn_line_in_the_middle_loses_only_itself(self) -> None:
        self.torn(lambda lines: [lines[0][:len(lines[0]) // 2] + b"\n", lines[1]], posts=2)

    @variation
    def test_a_lost_newline_at_the_end_costs_nothing(self) -> None:
        self.torn(lambda lines: [lines[0], lines[1].rstrip()], posts=1)

    @variation
    def test_zeros_at_the_end_as_after_a_power_cut_cost_nothing(self) -> None:
        self.torn(lambda lines: [*lines, b"\0" * 4096], posts=1)

    @variation
    def test_lines_that_mean_nothing_do_no_harm(self) -> None:
        self.torn(lambda lines: [lines[0], b'[]\nnull\n"x"\n17\n{"v": 2}\n\xff\xfe\n[[[[\n',
                                 b'{"v": 99, "event": "sent"}\n', lines[1]], posts=1)

    def test_a_line_of_another_shape_is_one_less_to_believe(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2, commits=1)
            *sent, ended = self.ledger().read_text().splitlines(keepends=True)
            for series in cases(
                    [], {"A_0001": ["x", 2, 3, [], None]}, {"A_0001": 7}, 7, {"A_0001": {}}, None,
                    {"A_0001": [1, 2, 3, 4, 5, 6, 7]}, {"A_0001": "abc"}, first=2):
                with self.subTest(series):
                    line = json.dumps(dict(json.loads(ended), series=series))
                    self.ledger().write_text("".join(sent) + line + "\n")
                    self.stays_so(server)
            lines = [json.dumps(dict(json.loads(ended), **more)) + "\n" for more in (
                {"session": None}, {"session": 7, "subject": []}, {"files": float("inf")})]
            self.ledger().write_text("".join([*sent, *lines]))
            self.stays_so(server)
            self.assert_whole(server)

    @variation
    def test_a_line_torn_at_the_end_of_a_whole_run_costs_nothing(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2, commits=1)
            self.ledger().write_bytes(self.ledger().read_bytes()[:-10])
            self.stays_so(server)
            self.assert_whole(server)


class WhereItCannotBeWritten(LedgerTest):

    def test_a_ledger_that_cannot_be_used_stops_before_anything_is_sent(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0)
            place = self.ledger()
            place.unlink()
            place.mkdir()
            self.run_it(server, status=3, posts=0, words="ledger.*delete it")

    def full_disk(self, lines: int, more: int, posts: int, archived: int = 0) -> None:
        """The ledger's disk has room for so many lines and `more` bytes: no file may grow beyond
        a limit that it has nearly reached, and that no other file comes near to."""
        self.tree()
        limit = 300_000
        with self.xnat() as server:
            place, self.work = self.work, self.folder / "rehearsal"
            self.run_it(server, "--procs", "1", status=0)
            name, written = self.ledger().name, self.lines()
            self.assertEqual([re.findall(b'"event": "(.*?)"', line)[0] for line in written],
                             [b"sent", b"sent", b"ended"])
            server.store.archive.clear()
            self.work = place
            self.work.mkdir()
            filled = limit - sum(map(len, written[:lines])) - more
            (self.work / name).write_bytes(b"#" * (filled - 1) + b"\n")
            before = len(server.imports())
            ran = self.run_command([sys.executable, "-c", FULL, str(limit), *self.arguments(
                server.url, "--procs", "1")])
            self.assertEqual(ran.status, 3, ran.text)
            self.assertRegex(ran.text, "ledger.*cannot be written.*make room")
            self.assertRegex(ran.out, "Report: ")  # the summary comes nevertheless
            self.tidy(ran)
            self.gives_back(server)
            self.assertEqual(len(server.imports()) - before, posts, "it went on unrecorded")
            self.assertEqual(len(server.archive), archived)
            # Cut back to the last whole line: nothing that comes later is lost with half of one.
            self.assertEqual(len(self.lines()), lines + 1)
            self.assertTrue(self.ledger().read_bytes().endswith(b"\n"))
            self.run_it(server, "--procs", "1", status=0, posts=2 - max(lines, 1),
                        commits=1 - archived)
            self.assert_whole(server)

    # The lines of a run here: sent, sent, ended.

    def test_a_full_disk_under_the_ledger_stops_the_run_after_one_part(self) -> None:
        self.full_disk(0, 0, posts=1)

    @variation
    def test_a_disk_that_fills_after_the_first_line_stops_the_run(self) -> None:
        self.full_disk(1, 0, posts=2)

    @variation
    def test_a_disk_that_fills_in_the_middle_of_a_line_stops_the_run(self) -> None:
        self.full_disk(1, 100, posts=2)

    @variation
    def test_a_disk_that_fills_in_the_last_line_stops_the_run(self) -> None:
        self.full_disk(2, 100, posts=2, archived=1)


if __name__ == "__main__":
    unittest.main()
