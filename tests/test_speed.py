"""What may go side by side and what may not, read from the stand-in's log. No clock decides: where
uploads have to meet, the stand-in holds the first ones until the others are there too."""

import contextlib
import os
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, List, Tuple

import dicomUpload
from tests.dicom import uid, write_series
from tests.support import UploadTest, cases, variation
from tests.support import load_tests as load_tests  # several at a time
from tests.xnat_standin import Request, Standin

IMPORT = "POST /data/services/import"
TIMEOUT = 20  # seconds; only a failure takes so long
CHANCE = 0.2  # seconds for which what must not happen is given the opportunity


def overlap(one: Request, other: Request) -> bool:
    """Whether two requests were in the server at the same time."""
    return (one.started < (other.answered or float("inf"))
            and other.started < (one.answered or float("inf")))


def most_at_once(requests: List[Request]) -> int:
    """How many of them were in the server at the same time, at most."""
    return max(sum(each.started <= moment.started < (each.answered or float("inf"))
                   for each in requests) for moment in requests)


def label(request: Request) -> str:
    return request.params["EXPT_LABEL"]


def hold_until(server: Standin, condition: Callable[[], Any], skip: int = 0) -> None:
    """No import is answered before the condition has been met once, but for the first `skip`."""
    met = threading.Event()

    def wait(_: str) -> bool:
        if len(server.imports()) > skip and not met.is_set():
            server.wait_for(lambda: met.is_set() or condition(), TIMEOUT)
            met.set()
        return False

    server.knobs.reject = wait  # asked of every file, while it is imported


def in_flight(server: Standin) -> int:
    """How many imports are in the server now."""
    return sum(each.answered is None for each in server.imports())


def slow_down(server: Standin, count: int) -> None:
    """Let so many imports take a little longer."""
    server.fail("stall", IMPORT, times=count, seconds=CHANCE)


class Turns(unittest.TestCase):

    def test_what_is_quick_goes_one_after_another(self) -> None:
        lock, inside, most = threading.Lock(), [0], [0]

        def work(_: int) -> None:
            with dicomUpload.turn(lock, TIMEOUT):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(40)))
        self.assertEqual((most[0], lock.locked()), (1, False))

    def test_who_has_waited_long_enough_for_one_that_is_slow_goes_on_beside_it(self) -> None:
        lock = threading.Lock()
        with dicomUpload.turn(lock):
            with dicomUpload.turn(lock, 0.01):
                pass
            self.assertTrue(lock.locked(), "the slow one still has its turn")
        self.assertFalse(lock.locked())


class SpeedRules(UploadTest):
    def grow(self, sessions: int = 1, series: int = 1, files: int = 1) -> None:
        """A tree whose files' names tell their series."""
        for session in range(1, sessions + 1):
            for number in range(1, series + 1):
                folder = self.root / "s{}".format(session) / "mr" / "series{}".format(number)
                write_series(folder, study=uid("rules", session), number=number, files=files,
                             name="%d-{:04d}.dcm" % number)

    def send(self, server: Standin, *options: str) -> None:
        """An upload that has to end well."""
        ran = self.upload(server, *options, timeout=2 * TIMEOUT)
        self.assertEqual(ran.status, 0, ran.text)

    def zips_now(self) -> int:
        """Zips, whole or in the making; the folder may go away meanwhile."""
        return sum(name.endswith(".zip") or name.startswith("zi")
                   for _, _, names in os.walk(str(self.work)) for name in names)

    def assert_arrived(self, server: Standin, files: int) -> None:
        """Every file is in the archive, was sent once, and no zip is left."""
        self.assertEqual(sum(len(session.files) for session in server.archive.values()), files)
        done = [each for each in server.imports() if each.status == 200]
        self.assertEqual(sum(len(each.entries) for each in done), files)
        self.assertEqual(self.zips(), [])

    def assert_parts_in_order(self, server: Standin) -> None:
        """Parts of one series came one after another, in the order of their files."""
        series: Dict[Tuple[str, str], List[Request]] = {}
        for request in server.imports():
            series.setdefault((label(request), request.entries[0].split("-")[0]),
                              []).append(request)
        for parts in series.values():
            done = [each for each in parts if each.status == 200]
            sent = [name for part in done for name in part.entries]
            self.assertEqual(sent, sorted(sent))
            self.assertEqual(most_at_once(parts), 1)

    def test_sessions_go_side_by_side_up_to_procs_and_never_more(self) -> None:
        self.grow(sessions=6, series=2)
        with self.xnat() as server:
            hold_until(server, lambda: in_flight(server) == 4)
            slow_down(server, 8)
            self.send(server, "--procs", "4")
            imports = server.imports()
            self.assertEqual(most_at_once(imports), 4)
            self.assertEqual(len({label(each) for each in imports[:4]}), 4)
            self.assert_arrived(server, 12)

    def test_procs_1_sends_strictly_one_after_another(self) -> None:
        self.grow(sessions=2, series=2, files=2)
        with self.xnat() as server:
            slow_down(server, 3)
            self.send(server, "--procs", "1", "--max-files", "1")
            self.assertEqual(most_at_once(server.requests), 1)  # commits and questions too
            self.assert_arrived(server, 8)

    def test_series_of_one_session_go_one_by_one_before_1_8_8(self) -> None:
        for version in ("1.7.6", "1.8.7.1"):
            with self.subTest(version=version), self.xnat(version=version) as server:
                self.setUp()
                self.grow(series=4, files=2)
                slow_down(server, 3)
                self.send(server, "--procs", "4")
                self.assertEqual(most_at_once(server.imports()), 1)
                self.assert_arrived(server, 8)

    def test_series_of_one_session_go_side_by_side_from_1_8_8_on(self) -> None:
        self.side_by_side("1.8.8")

    @variation
    def test_and_so_they_do_in_newer_versions(self) -> None:
        self.side_by_side("1.10.2")

    def side_by_side(self, version: str) -> None:
        self.grow(series=7, files=2)
        with self.xnat(version=version) as server:
            hold_until(server, lambda: in_flight(server) == 3, skip=1)
            slow_down(server, 5)
            self.send(server, "--procs", "3")
            first, *rest = server.imports()
            for each in rest:  # the first answer makes the session
                self.assertGreaterEqual(each.started, first.answered)
            self.assertEqual(most_at_once(rest), 3)
            self.assert_arrived(server, 14)

    def test_parts_of_a_series_go_in_order_and_never_overlap(self) -> None:
        self.grow(series=5, files=7)
        with self.xnat() as server:
            hold_until(server, lambda: in_flight(server) == 4, skip=1)
            self.send(server, "--procs", "4", "--max-files", "2")
            self.assert_parts_in_order(server)
            self.assertEqual(most_at_once(server.imports()), 4)
            self.assert_arrived(server, 35)

    @variation
    def test_a_part_that_is_tried_again_keeps_its_place(self) -> None:
        self.grow(series=2, files=6)
        with self.xnat() as server:
            server.fail("late status", IMPORT, skip=2, status=502)
            self.send(server, "--procs", "4", "--max-files", "2")
            self.assertEqual([each.status for each in server.imports()].count(502), 1)
            self.assert_parts_in_order(server)
            self.assert_arrived(server, 12)

    def test_no_part_follows_one_that_was_refused(self) -> None:
        self.grow(series=1, files=8)
        with self.xnat() as server:
            server.fail("error page", IMPORT, skip=1, status=400, text="unable to read DICOM")
            ran = self.upload(server, "--procs", "4", "--max-files", "2")
            self.assertEqual(ran.status, 1, ran.text)
            self.assertEqual([each.status for each in server.imports()], [200, 400])
            self.assertEqual(server.commits(), [])
            self.assertEqual(self.zips(), [])

    def test_nothing_is_sent_into_a_session_that_is_being_committed(self) -> None:
        self.grow(sessions=4, series=3, files=2)
        with self.xnat(archive_seconds=CHANCE) as server:
            slow_down(server, 4)
            self.send(server, "--procs", "4")
            self.assertEqual(len(server.commits()), 4)
            for commit in server.commits():
                own = [each for each in server.imports() if each.address.strip() == commit.path]
                self.assertEqual(sum(len(each.entries) for each in own), 6)
                for each in own:
                    self.assertFalse(overlap(each, commit), (each, commit))
            self.assert_arrived(server, 24)

    @variation
    def test_other_sessions_go_on_while_one_is_committed(self) -> None:
        self.grow(sessions=1)
        write_series(self.root / "s2" / "mr" / "late", study=uid("late"), files=1)
        with self.xnat() as server:
            def wait(series: str) -> bool:
                server.wait_for(server.commits if series == "late"
                                else lambda: in_flight(server) == 2, TIMEOUT)
                return False

            server.knobs.reject = wait
            self.send(server, "--procs", "2")
            early, late = sorted(server.commits(), key=lambda each: each.started)
            last = max(server.imports(), key=lambda each: each.answered or 0)
            self.assertTrue(overlap(early, last), (early, last))
            self.assertFalse(overlap(late, last), (late, last))
            self.assertEqual(label(last), "s2_mr")
            self.assert_arrived(server, 2)

    def test_no_post_has_more_files_than_max_files(self) -> None:
        self.grow(series=2, files=11)
        with self.xnat() as server:
            self.send(server, "--max-files", "4")
            self.assertLessEqual(max(len(each.entries) for each in server.imports()), 4)
            self.assert_arrived(server, 22)

    @variation
    def test_the_default_is_500_files_a_post_and_four_posts_at_once(self) -> None:
        self.grow(sessions=5)
        write_series(self.root / "s6" / "mr" / "long", study=uid("long"), files=501, rows=1,
                     columns=1, name="1-{:04d}.dcm")
        with self.xnat() as server:
            hold_until(server, lambda: in_flight(server) == 4)
            self.send(server)
            self.assertEqual(most_at_once(server.imports()), 4)
            self.assertLessEqual(max(len(each.entries) for each in server.imports()), 500)
            self.assert_parts_in_order(server)
            self.assert_arrived(server, 506)

    def test_the_workdir_never_holds_more_zips_than_twice_procs(self) -> None:
        for procs in cases(3, 1):
            with self.subTest(procs=procs):
                self.setUp()
                self.grow(sessions=4, series=2, files=4)
                _, zips = self.count_zips(procs)
                self.assertLessEqual(zips, 2 * procs)

    @variation
    def test_of_small_series_it_never_holds_more_than_twice_as_many_loads(self) -> None:
        self.grow(sessions=4, series=8)
        loads, zips = self.count_zips(3)
        self.assertLessEqual(loads, 2 * 3)
        self.assertLessEqual(zips, 4 * 2 * 3)

    def count_zips(self, procs: int) -> Tuple[int, int]:
        """Look into the workdir all the time: at what happens in the server, and in between. How
        many folders for zips, and zips, there were at most."""
        loads, zips = [0], [0]
        over = threading.Event()
        with self.xnat() as server:
            def watch() -> None:
                while not over.is_set():
                    with contextlib.suppress(FileNotFoundError):  # at the run's end it goes
                        loads.append(len(list((self.work / "dicomUpload.zips").glob("part-*"))))
                    zips.append(self.zips_now())
                    with server.changed:
                        server.changed.wait(0.005)

            hold_until(server, lambda: in_flight(server) == procs)
            slow_down(server, 4)
            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                self.send(server, "--procs", str(procs), "--max-files", "2")
            finally:
                over.set()
                watcher.join()
            self.assertLessEqual(most_at_once(server.imports()), procs)
            self.assert_arrived(server, 32)
        return max(loads), max(zips)

    def test_a_long_series_is_packed_ahead_while_its_parts_are_posted_in_order(self) -> None:
        self.grow(files=5)
        with self.xnat() as server:
            ahead = self.hold_for_zips(server, 2)  # the one in the server, and the next
            self.send(server, "--procs", "4", "--max-files", "1")
            self.assertTrue(ahead.is_set(), "nothing was packed meanwhile")
            self.assert_parts_in_order(server)
            self.assert_arrived(server, 5)

    @variation
    def test_a_long_series_leaves_room_for_other_sessions(self) -> None:
        self.grow(sessions=1, files=12)  # of which twelve parts would fill all places
        for session in ("t1", "t2"):
            write_series(self.root / session / "mr" / "S", study=uid(session), files=1)
        for version in ("1.8.11", "1.7.6"):
            with self.subTest(version=version), self.xnat(version=version) as server:
                hold_until(server, lambda: in_flight(server) == 3)
                self.send(server, "--procs", "3", "--max-files", "1", "--workdir",
                          str(self.folder / version))
                self.assertEqual(most_at_once(server.imports()), 3)
                self.assert_parts_in_order(server)
                self.assert_arrived(server, 14)

    def hold_for_zips(self, server: Standin, count: int) -> threading.Event:
        """No file is taken in until so many zips lie in the workdir at once."""
        seen, patience = threading.Event(), time.monotonic() + TIMEOUT

        def wait(_: str) -> bool:
            while not seen.is_set() and time.monotonic() < patience:
                if self.zips_now() >= count:
                    seen.set()
                seen.wait(0.005)
            return False

        server.knobs.reject = wait
        return seen

    @variation
    def test_one_file_opens_a_long_session_that_has_no_company(self) -> None:
        self.grow(series=6, files=5)
        with self.xnat() as server:
            self.send(server, "--procs", "4")
            self.assertEqual([len(each.entries) for each in server.imports()][0], 1)
            self.assertEqual(len(server.imports()), 7)
            self.assert_arrived(server, 30)

    @variation
    def test_sessions_that_have_company_are_not_cut_for_it(self) -> None:
        self.grow(sessions=4, series=6, files=2)
        with self.xnat() as server:
            hold_until(server, lambda: in_flight(server) == 4)
            self.send(server, "--procs", "4")
            self.assertEqual(len(server.imports()), 24)
            self.assert_arrived(server, 48)

    @variation
    def test_the_first_part_of_a_run_is_small_where_its_answer_tells_the_level(self) -> None:
        self.grow(sessions=2, files=120)
        for level in ("auto", "1"):
            with self.subTest(level=level), self.xnat() as server:
                self.send(server, "--procs", "1", "--compression", level)
                sent = [len(each.entries) for each in server.imports()]
                self.assertEqual(sent, [*([50, 70] if level == "auto" else [120]), 120])
                self.assert_arrived(server, 240)
            self.work = self.work.with_name("again")

    @variation
    def test_a_zip_is_gone_once_its_part_is_answered(self) -> None:
        self.grow(series=2, files=3)
        found: List[List[str]] = []

        def look(_: str) -> bool:
            found.append([path.name for path in self.zips()])
            return False

        with self.xnat(reject=look) as server:
            self.send(server, "--procs", "1", "--max-files", "1")
            names = [each.file_name for each in server.imports()]
            for at, zips in enumerate(found):
                self.assertIn(names[at], zips)
                self.assertFalse(set(names[:at]) & set(zips), "answered, and still there")
            self.assertEqual(len(found), 6)
            self.assert_arrived(server, 6)

    @variation
    def test_a_limit_of_the_rate_is_shared_among_the_uploads(self) -> None:
        for session in range(2):
            write_series(self.root / f"s{session}" / "mr" / "S", study=uid(session), files=1,
                         rows=256, columns=512)
        with self.xnat() as server:
            began = time.monotonic()
            self.send(server, "--procs", "2", "--limit-rate", "400k", "--compression", "0")
            self.assertGreater(time.monotonic() - began, 0.5 * 2 * 262144 / 409600)
            self.assert_arrived(server, 2)
        log = (next(self.work.glob("*.log"))).read_text()
        self.assertEqual(log.count("--limit-rate 204800"), 2)

    @variation
    def test_faults_do_not_make_it_send_more_at_once(self) -> None:
        self.grow(sessions=5, series=2)
        with self.xnat() as server:
            server.fail("status", IMPORT, times=2, status=502)
            server.fail("close", IMPORT)
            slow_down(server, 6)
            self.send(server, "--procs", "3")
            self.assertLessEqual(most_at_once(server.imports()), 3)
            self.assert_arrived(server, 10)
