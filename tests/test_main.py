"""How a run begins and what it may find there: closed streams, and servers to wait for."""

import types
import unittest
from typing import Any, List

import dicomUpload
from tests.faults import FaultTest
from tests.support import Ran
from tests.support import load_tests as load_tests  # these mostly wait: several at a time


class HowItBegins(FaultTest):

    def closed(self, url: str, how: str, **call: Any) -> Ran:
        """A run with some of its streams closed."""
        return self.run_command(["sh", "-c", f'exec "$@" {how}', "sh",
                                 *self.arguments(url, **call)])

    def test_closed_streams_stop_no_upload(self) -> None:
        for number, how in enumerate((">&-", "2>&-", "<&- >&- 2>&-")):
            with self.subTest(how), self.xnat() as server:
                self.tree(f"007/pre/A_{number:04}")
                ran = self.closed(server.url, how)
                self.assertEqual(ran.status, 0, ran.text)
                self.assert_whole(server)

    def test_without_an_input_to_ask_at_a_missing_password_is_told(self) -> None:
        self.tree()
        with self.xnat() as server:
            ran = self.closed(server.url, "<&-", password="-")
            self.assertEqual(ran.status, 2, ran.text)
            self.assertRegex(ran.err, "dicomUpload: PASS -: .*XNAT_PASS")


class Waits(unittest.TestCase):

    def test_thirty_retries_and_thousands_wait_no_longer_than_minutes_each(self) -> None:
        waits: List[float] = []
        settings: Any = types.SimpleNamespace(retries=9999)
        programs: Any = types.SimpleNamespace(pause=waits.append)
        teller: Any = types.SimpleNamespace(say=lambda text: None)
        curl = dicomUpload.Curl(settings, programs, teller)
        answer = dicomUpload.Answer(0, 503, "")
        for tries in (1, 2, 3, 30, 9999):
            curl.wait_to_heal("007_pre", answer, dicomUpload.meaning_of(answer), tries)
        self.assertEqual(waits[:3], sorted(waits[:3]), "they grow")
        self.assertLess(max(waits), 300)


if __name__ == "__main__":
    unittest.main()
