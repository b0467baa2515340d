"""What an answer means and what to do about it; and every message, held against one form.

Each message is one line, `thing: what (evidence): what to do`. `python3 -m tests.test_meanings`
prints all that the program can say, to be read aloud as the coordinator would.
"""

import ast
import re
import sys
import types
import unittest
from typing import Any, Iterator, List, NamedTuple, Optional, Tuple

import dicomUpload
from tests.support import SCRIPT
from tests.support import load_tests as load_tests  # several at a time
from tests.trees import TreeTest

# What a person is told to do begins with one of these.
DO = (r"(?:add|ask|check|choose|compare|copy|delete|do not run again|fix|give|have|here it reads|"
      r"install|look|lower|make|move|put|remove|rename|reset|run|see|send|set|sort|try|"
      r"unpack|wait|with|write|to send|nothing|is this|raise)\b|chmod|--|apt-get|XNAT has|"
      r"an import that|the label belongs")


def answer(code: int = 0, status: int = 0, text: str = "", **more: Any) -> Any:
    """An answer with this exit status of curl, or this status and text of the server."""
    return dicomUpload.Answer(code, status, text if not code else "", text if code else "", **more)


def meaning(code: int = 0, status: int = 0, text: str = "") -> Any:
    return dicomUpload.meaning_of(answer(code, status, text))


Case = Tuple[int, int, str, str, bool, bool]  # code, status, text, words, heals, gone


class Meanings(unittest.TestCase):
    """The table MEANINGS."""

    # By XNAT's own words (xnat.md 4.2, 6, 13.3 and 13.4), and those of curl and proxies.
    CASES: List[Case] = [
        (5, 0, "Could not resolve proxy: x", "proxy settings", True, True),
        (6, 0, "Could not resolve host: x", "check URL, network", True, True),
        (7, 0, "Failed to connect", "whether XNAT is up", True, True),
        (16, 0, "HTTP/2 framing", "connection broke", True, True),
        (18, 0, "transfer closed", "connection broke", True, True),
        (28, 0, "Operation too slow", "--timeout", True, True),
        (35, 0, "wrong version number", "https or http", True, True),
        (52, 0, "Empty reply from server", "connection broke", True, True),
        (55, 0, "Send failure: Broken pipe", "connection broke", True, True),
        (56, 0, "Recv failure", "connection broke", True, True),
        (56, 0, "CONNECT tunnel failed, response 407", "https_proxy", False, False),
        (56, 0, "Received HTTP code 403 from proxy after CONNECT", "https_proxy", False, False),
        (56, 0, "CONNECT tunnel failed, response 503", "connection broke", True, True),
        (65, 0, "necessary data rewind was not possible", "connection broke", True, True),
        (60, 0, "SSL certificate problem: certificate has expired", "XNAT admin", False,
         False),
        (60, 0, "certificate is not yet valid", "clock", False, False),
        (60, 0, "no alternative certificate subject name matches", "and the URL", False, False),
        (60, 0, "self-signed certificate", "--cacert FILE", False, False),
        (77, 0, "error setting certificate verify locations", "check --cacert", False, False),
        (-9, 0, "", "killed", True, True),
        (1, 0, "Received HTTP/0.9 when not allowed", "curl failed", False, False),
        (0, 401, "", "login refused: check USER and PASS", False, False),
        (0, 200, "<html>Maintenance</html>", "is this XNAT's own address", False, False),
        (0, 404, "Not here", "is XNAT's own address", False, False),
        (0, 502, "502 Bad Gateway", "behind its proxy", True, True),
        (0, 503, "503 Service Unavailable", "behind its proxy", True, True),
        (0, 504, "504 Gateway Time-out", "--max-files", True, True),
        (0, 407, "Proxy Authentication Required", "http_proxy", False, False),
        (0, 524, "A timeout occurred", "--max-files", True, True),
        (0, 522, "Connection timed out", "behind its proxy", True, True),
        (0, 408, "", "busy", True, False), (0, 429, "", "busy", True, False),
        (0, 413, "413 Request Entity Too Large", "client_max_body_size", False, False),
        (0, 403, "", "right to edit", False, False),
        (0, 400, "unable to read DICOM object IM1.dcm", "disk is full", False, False),
        (0, 400, "unable to read DICOM object exit 5.dcm", "disk is full", False, False),
        (0, 400, "object IM1 contains no SOP Class UID", "copy that file again", False, False),
        (0, 500, "Scan 5 DICOM catalog contains duplicated SOP instance UIDs: 1.2, 1.3",
         "delete the session in XNAT's prearchive", False, False),
        (0, 500, "Scan 5 has 1 non-DICOM (or non-parsable DICOM) files",
         "delete the session in XNAT's prearchive", False, False),
        (0, 409, "Session already contains a scan with the same UID, but a different number "
         "(5-MR1).", "under another number", False, False),
        (0, 409, "Invalid modification of session modality via archive process.",
         "modality under this label", False, False),
        (0, 409, "Invalid modification of session UID via archive process.",
         "study or modality under this label", False, False),
        (0, 409, "Invalid modification of session subject via archive process.",
         "XNAT has another subject", False, False),
        (0, 409, "Invalid modification of session project via archive process.",
         "under this label", False, False),
        (0, 500, "FAILED: Operation Failed: Session already exists with matching files.",
         "--overwrite-files", False, False),
        (0, 500, "User alice cannot read event tracking for it", "another user", False, False),
        (0, 500, "a timeout interval elapsed", "still at work", False, False),
        (0, 500, "java.lang.NullPointerException", "ask the XNAT admin", False, False),
        (0, 507, "", "ask the XNAT admin", False, False),
        (0, 400, "something new", "prearchive", False, False),
        (0, 418, "", "prearchive", False, False),
    ]

    def words(self, found: Any) -> str:
        return f"{found.means}: {found.to_do}"

    def test_each_known_answer_means_what_it_should(self) -> None:
        for code, status, text, words, heals, gone in self.CASES:
            with self.subTest(code=code, status=status, text=text):
                found = meaning(code, status, text)
                self.assertIn(words, self.words(found))
                self.assertEqual((found.heals, found.gone), (heals, gone))

    def test_waiting_heals_what_speaks_of_concurrency_whatever_its_status(self) -> None:
        for status in (400, 409, 423, 500):
            for text in ("Concurrent file sends of the same data is not supported.",
                         "Session processing in progress", "Session processing may already be in "
                         "progress", "Concurrent modification is discouraged.",
                         "Duplicate archive attempt", "Destination session in use"):
                for page in (text, f"<html><title>Status page</title><h3>{text}</h3></html>",
                             f"<html><title>Status page</title><body><p>{text}</p></body></html>"):
                    with self.subTest(status=status, page=page):
                        found = meaning(0, status, page)
                        self.assertTrue(found.heals)
                        self.assertFalse(found.gone)
                        self.assertIn("busy", found.means)

    def test_only_a_lost_answer_lets_the_server_go_on(self) -> None:
        for code, status, goes_on in ((28, 0, True), (0, 504, True), (7, 0, False), (0, 503, False),
                                      (0, 429, False), (0, 413, False)):
            with self.subTest(code=code, status=status):
                self.assertEqual(meaning(code, status).goes_on, goes_on)

    def test_every_answer_has_a_meaning_and_something_to_do(self) -> None:
        for code in (*range(-64, 0), *range(1, 130)):
            with self.subTest(code=code):
                self.assertRegex(meaning(code).to_do, rf"\A(?:{DO})")
        for status in range(100, 600):
            for text in ("", "x\ny", "<html></html>"):
                with self.subTest(status=status, text=text):
                    self.assertTrue(meaning(0, status, text).means)

    def test_every_row_can_be_reached(self) -> None:
        met = {id(meaning(code, status, text)) for code, status, text, *_ in self.CASES}
        met.add(id(meaning(0, 409, "Session processing in progress")))
        met.add(id(meaning(0, 200, "<html>Login</html>")))
        met |= {id(dicomUpload.meaning_of(answer(0, 302, location=f"https://x/{page}")))
                for page in ("", "XDATScreen_UpdateUser.vm", "InactiveAccount.vm", "saml2/sso")}
        for row in dicomUpload.MEANINGS:
            with self.subTest(row.sign):
                self.assertIn(id(row), met)

    def test_advice_on_one_thing_does_not_catch_another(self) -> None:
        for text, no in (
                ("Session already contains a scan with the same UID, but a different number (5).",
                 "rename"),
                ("Session already contains a scan with the same UID", "rename"),
                ("Invalid modification of session UID via archive process.", "another number"),
                ("Invalid modification of session modality via archive process.", "another number"),
                ("Scan 5 DICOM catalog contains duplicated SOP instance UIDs: x", "copy that file"),
                ("Scan 5 has 1 non-DICOM (or non-parsable DICOM) files", "copy that file")):
            with self.subTest(text):
                self.assertNotIn(no, self.words(meaning(0, 409, text)))


class Refusal(unittest.TestCase):
    """Why the server does not let us in."""

    def test_each_has_its_sentence_with_the_remedy(self) -> None:
        url, app, page = "http://xnat.example.org/x", "/app/template/", "<!DOCTYPE html><html>"
        settings: Any = types.SimpleNamespace(url=url, password="s3cret")
        curl = dicomUpload.Curl(settings, dicomUpload.Programs, dicomUpload.Teller)
        for given, stops, words in (
                (answer(0, 401), True, "login refused .HTTP 401.: check USER and PASS"),
                (answer(0, 302, location=f"{url}{app}Login.vm"), True, "login refused"),
                (answer(0, 302, location=f"{url}{app}XDATScreen_UpdateUser.vm"), True,
                 "the password has expired.*browser"),
                (answer(0, 302, location=f"{url}{app}InactiveAccount.vm"), True,
                 "not active yet.*admin"),
                (answer(0, 301, location="https://login.example.org:8443/x"), True,
                 "another address .HTTP 301, to https://login.example.org:8443/x.: give that one"),
                (answer(0, 302, location=f"{url}{app}MfaVerify.vm"), True, "second login.*token"),
                (answer(0, 302, location="https://idp.example.org/saml2/x"), True, "alias token"),
                (answer(0, 301, location="https://sso.example.org/x"), True, "another address"),
                (answer(0, 302, location="https://lessons.example.org/x"), True, "another address"),
                (answer(0, 200, page + "<form>Login"), True, "web page.*XNAT's own address"),
                (answer(0, 200, page), False, "HTTP 200, a web page.*XNAT's own address"),
                (answer(0, 301, "/data/archive/projects/BRAIN", location=f"{url}/data/archive/x"),
                 False, ""),
                (answer(0, 301, "/data/archive/projects/BRAIN"), False, ""),
                (answer(0, 404, "<h3>Not here</h3>"), False, "HTTP 404, Not here.*own address"),
                (answer(7, 0, "Failed to connect"), False, "nothing answers.*exit 7.*check URL")):
            with self.subTest(words):
                told = str(curl.stop_for(given))
                self.assertRegex(told, rf"\A{re.escape(url)}: .*{words}")
                self.assertNotIn("s3cret", told)
                self.assertEqual(dicomUpload.meaning_of(given).stops, stops)


class ThroughTheProgram(TreeTest):
    """What XNAT refuses to archive, said with what to do."""

    def test_each_refusal_to_archive_comes_with_its_remedy_and_the_rest_is_archived(self) -> None:
        refusals = {
            "twice": (500, "Scan 5 DICOM catalog contains duplicated SOP instance UIDs: 1.2"),
            "half": (500, "Scan 5 has 1 non-DICOM (or non-parsable DICOM) files"),
            "number": (409, "Session already contains a scan with the same UID, but a different "
                       "number (5-MR1)."),
            "modality": (409, "Invalid modification of session modality via archive process."),
            "study": (409, "Invalid modification of session UID via archive process."),
        }
        for name in (*refusals, "good"):
            self.series(f"{name}/pre/T1", files=1)
        with self.xnat() as server:
            for name, (status, text) in refusals.items():
                server.fail("error page", f"POST .*/{name}_pre.*action=commit", status=status,
                            text=text, times=None)
            ran = self.run_it(server, status=1)
            self.assertEqual(set(server.archive), {("BRAIN", "good_pre")})
            self.assertEqual(len(server.commits()), len(refusals) + 1, "none is tried again")
        joined = " ".join(ran.text.split())  # lines may be broken
        for name, (status, text) in refusals.items():
            with self.subTest(name):
                self.assert_told(ran, f"{name}_pre", f"HTTP {status}, {text}")
                self.assertIn(meaning(0, status, text).to_do, joined)
        self.assertEqual({row["session"] + row["subject"] for row in self.report()
                          if row["message"]}, {f"pre{name}" for name in refusals})


# ---- Every message of the program -------------------------------------------------------------

class Message(NamedTuple):
    """A message in the source, with … for what is filled in."""

    line: int
    kind: str            # of the call that makes it
    what: str            # all of it, where it is one text
    to_do: Optional[str]


def text_of(node: ast.AST) -> str:
    """A text of the source, with … for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "…"
                       for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "…"


def found_messages() -> Iterator[Message]:
    """Each message in the program."""
    for node in ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        kind = getattr(node.func, "id", "")
        texts = [text_of(each) for each in node.args]
        if kind in ("Stop", "Misplaced") and texts:
            yield Message(node.lineno, kind, texts[0], None)
        elif kind == "refuse":
            yield Message(node.lineno, kind, ": ".join(texts[:2]), None)
        elif kind == "Trouble" and texts[0]:
            yield Message(node.lineno, kind, texts[0], texts[1])
        elif kind == "Meaning":
            yield Message(node.lineno, kind, texts[1], texts[2])


MESSAGES = sorted(found_messages(), key=lambda each: each.line)


class Messages(unittest.TestCase):
    """Thing, what, evidence, what to do: in one line."""

    def test_they_are_found(self) -> None:
        kinds = [each.kind for each in MESSAGES]
        for kind in ("Stop", "Misplaced", "refuse", "Trouble", "Meaning"):
            self.assertIn(kind, kinds)
        self.assertGreater(len(kinds), 70)

    def test_each_is_one_line_of_plain_text(self) -> None:
        for each in MESSAGES:
            for text in (each.what, each.to_do or ""):
                with self.subTest(line=each.line, text=text):
                    self.assertNotRegex(text, r"[\n\t!]|\.\s*$|\s$|  |\bplease\b|\bPlease\b")

    def test_each_says_what_to_do(self) -> None:
        for each in MESSAGES:
            with self.subTest(line=each.line, what=each.what, to_do=each.to_do):
                if each.to_do is not None:
                    if not each.to_do.startswith("…"):  # that is advice filled in
                        self.assertRegex(each.to_do, rf"\A(?:{DO})")
                elif ": " in each.what and not each.what.rstrip().endswith("…"):
                    plain = re.sub(r" \([^()]*\)", "", each.what).replace("://", "//")
                    self.assertRegex(plain, rf"(?::|[,;:] (?:then|or|and)|[?],?) (?:{DO})")

    def test_each_that_stops_the_run_begins_with_its_thing(self) -> None:
        for each in MESSAGES:
            if each.kind in ("Stop", "Misplaced", "refuse") and "stopp" not in each.what:
                with self.subTest(line=each.line, what=each.what):
                    self.assertRegex(each.what, r"\A[^:]+: |\A…\Z")


if __name__ == "__main__":
    for found in MESSAGES:
        sys.stdout.write(f"{found.line:5} {found.what}"
                         + (f": {found.to_do}\n" if found.to_do else "\n"))
