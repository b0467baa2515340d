"""One request to one answer: curl's output taken apart, and the reason found in any error page.

Tables of bytes, as curl hands them over; then one curl for real, to see that it hands them so.
"""

import subprocess
import time
import unittest
from typing import Any, List

import dicomUpload
from tests.dicom import uid, write_series
from tests.support import UploadTest, variation
from tests.support import load_tests as load_tests  # several at a time

ADDRESS = "/data/prearchive/projects/BRAIN/20200102_101500123/007_pre"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/uri-list\r\n\r\n"


def answer(out: bytes, code: int = 0, err: bytes = b"", location: bytes = b"") -> Any:
    """curl's output, as the program reads it."""
    return answers(out + b" %s mark\n" % location if out else b"", 1, code, err)[0]


def answers(out: bytes, count: int, code: int = 0, err: bytes = b"") -> List[Any]:
    """curl's output for so many URLs."""
    done = subprocess.CompletedProcess(["curl"], code, out, err)
    return dicomUpload.read_answers(done, "mark", ["/data/JSESSION"] * count)


def page(body: bytes, status: int = 400) -> Any:
    """An answer with this body."""
    return answer(b"HTTP/1.1 %d X\r\n\r\n%s\n%d" % (status, body, status))


class Answers(unittest.TestCase):
    def test_the_last_headers_and_the_body_are_taken_apart(self) -> None:
        address = ADDRESS.encode() + b"\r\n"
        for title, out, status, body in (
                ("plain", HEAD + address + b"\n200", 200, ADDRESS + "\r\n"),
                ("100 first", b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + address + b"\n200", 200,
                 ADDRESS + "\r\n"),
                ("103 first", b"HTTP/2 103 \r\nlink: x\r\n\r\n" + HEAD + address + b"\n200", 200,
                 ADDRESS + "\r\n"),
                ("HTTP/2", b"HTTP/2 200 \r\ndate: x\r\n\r\n" + address + b"\n200", 200,
                 ADDRESS + "\r\n"),
                ("no body", HEAD + b"\n200", 200, ""),
                ("line feeds only", b"HTTP/1.1 200 OK\nA: b\n\nbody\n200", 200, "body"),
                ("a blank line in the body", HEAD + b"a\r\n\r\nb\n200", 200, "a\r\n\r\nb"),
                ("a status in the body", HEAD + b"\n404 x\n\n200", 200, "\n404 x\n"),
                ("headers in the body", HEAD + b"x\nHTTP/1.1 404 X\r\n\r\n\n200", 200,
                 "x\nHTTP/1.1 404 X\r\n\r\n"),
                ("bytes that are no text", HEAD + b"\xff\xfe\n200", 200, "\ufffd\ufffd"),
                ("nothing at all", b"", 0, ""), ("no answer", b"\n000", 0, "")):
            with self.subTest(title):
                found = answer(out)
                self.assertEqual((found.status, found.body), (status, body))

    def test_a_failed_transfer_has_no_status_whatever_curl_says(self) -> None:
        found = answer(b"HTTP/1.1 200 OK\r\n\r\nhalf\n200", 18, b"curl: (18) closed with 9 bytes\n")
        self.assertEqual((found.code, found.status), (18, 0))
        self.assertEqual(found.evidence, "curl exit 18, closed with 9 bytes")

    def test_each_of_several_answers_keeps_its_own_status_and_body(self) -> None:
        head = b"HTTP/1.1 200 OK\r\n\r\n"
        whole = head + b"one\n200  mark\n" + b"\n000  mark\n" + head + b"three\n200  mark\n"
        for title, out, code, wanted in (
                ("all", whole, 0, [(200, "one", 0), (0, "", 0), (200, "three", 0)]),
                ("the last is cut short", whole, 18, [(200, "one", 0), (0, "", 0), (0, "", 18)]),
                ("the first is cut short, and no other is tried", head + b"on\n200  mark\n", 18,
                 3 * [(0, "", 18)]),
                ("curl was killed", head + b"one\n200  mark\n" + head + b"tw", -9,
                 [(200, "one", 0), (0, "", -9), (0, "", -9)]),
                ("it was killed before it began", b"", -9, 3 * [(0, "", -9)])):
            with self.subTest(title):
                found = answers(out, 3, code)
                self.assertEqual([(each.status, each.body, each.code) for each in found], wanted)

    def test_an_answer_without_an_end_is_not_searched_for_long(self) -> None:
        began = time.monotonic()
        (found,) = answers(b"HTTP/1.1 200 OK\r\n\r\n" + b"200 x\n" * 20_000, 1, -9)
        self.assertEqual((found.code, found.body), (-9, ""))
        self.assertLess(time.monotonic() - began, 1)

    def test_curls_own_words_are_found_behind_its_progress(self) -> None:
        bars = b"\r##   4.0%\r#####  41.5%\ncurl: (56) Recv failure:\nConnection reset\n"
        self.assertEqual(answer(b"\n000", 56, bars).error, "Recv failure: Connection reset")
        self.assertEqual(answer(b"", -15, b"\r## 4.0%").evidence, "curl exit -15")

    def test_retry_after_is_seconds_and_has_an_end(self) -> None:
        for value, wanted in ((b"7", 7), (b" 120 ", 120), (b"999999", 600), (b"-1", 0),
                              (b"Fri, 31 Dec 1999 23:59:59 GMT", 0), (b"9" * 400, 0), (b"", 0),
                              (b"1.5", 0), (b"\xb2", 0)):
            with self.subTest(value):
                found = answer(b"HTTP/1.1 503 X\r\nRETRY-AFTER:" + value + b"\r\n\r\n\n503")
                self.assertEqual(found.retry_after, wanted)

    def test_headers_are_found_whatever_their_case_and_never_in_the_body(self) -> None:
        out = (b"HTTP/1.1 200 X\r\nSET-COOKIE: JSESSIONID=head\r\nx-retry-after: 3\r\n\r\n"
               b"Retry-After: 9\nset-cookie: JSESSIONID=body\n200")
        self.assertEqual((answer(out).cookie, answer(out).retry_after), ("head", 0))
        self.assertEqual((page(b"\nRetry-After: 9").retry_after, page(b"x").cookie), (0, ""))

    def test_a_redirect_points_to_the_url_that_would_have_been_right(self) -> None:
        for location, wanted in ((b"https://x/y/data/JSESSION", "https://x/y"),
                                 (b"https://x/y z", "https://x/y z"), (b"", ""),
                                 (b"https://x/data/JSESSION?a", "https://x/data/JSESSION?a")):
            with self.subTest(location):
                found = answer(b"HTTP/1.1 302 X\r\n\r\nhere\n302", location=location)
                self.assertEqual(found.location, wanted)
                self.assertEqual(found.evidence, f"HTTP 302, {'to ' * bool(wanted)}"
                                                 f"{wanted or 'here'}")

    def test_a_cookie_is_taken_from_an_answer_that_let_us_in_only(self) -> None:
        for status, value, wanted in ((200, b"A1.node-2; Path=/", "A1.node-2"), (401, b"A1", ""),
                                      (302, b"A1", ""), (301, b"A1", "A1"),
                                      (200, b"\"x y\"", ""), (200, b"", "")):
            with self.subTest(status=status, value=value):
                found = answer(b"HTTP/1.1 %d X\r\nSet-Cookie: JSESSIONID=%s\r\n\r\n\n%d"
                               % (status, value, status))
                self.assertEqual(found.cookie, wanted)
                self.assertNotIn("A1", repr(found))  # a secret

    def test_json_is_an_answer_of_200_that_is_json(self) -> None:
        for body, status, wanted in ((b'{"a": 1}', 200, {"a": 1}), (b'{"a": 1}', 404, None),
                                     (b"<html>", 200, None), (b"", 200, None),
                                     (b"[" * 100_000, 200, None), (b"5", 200, 5)):
            with self.subTest(body[:20], status=status):
                self.assertEqual(page(body, status).json(), wanted)

    def test_html_is_known(self) -> None:
        for body, wanted in ((b"<!DOCTYPE html>", True), (b"\r\n <HTML lang=en>", True),
                             (b"<!-- BEGIN x -->", True), (ADDRESS.encode(), False), (b"", False),
                             (b"<?xml version='1.0'?>\n<!DOCTYPE html PUBLIC ''>", True),
                             (b"<META HTTP-EQUIV='refresh'>", True), (b"<head >", True),
                             (b"<?xml version='1.0'?>\n<xnat:MRSession ID=''>", False),
                             (b"<?xml version='1.0'?>\n<!-- x --><xnat:MRSession ID=''>", False),
                             (b"<metadata>", False), (b"{}", False)):
            with self.subTest(body):
                self.assertIs(page(body, 200).is_html, wanted)


class Sentences(unittest.TestCase):
    """The reason in an error page."""

    def test_the_servers_own_sentence_is_found_in_pages_of_all_kinds(self) -> None:
        restlet = (b"<html>\n<head>\n   <title>Status page</title>\n</head>\n<body>\n%s"
                   b"<p>You can get technical details <a href=\"http://www.w3.org/x\">here</a>.<br>"
                   b"\nPlease continue your visit at our <a href=\"/\">home page</a>.\n</p>\n"
                   b"</body>\n</html>\n")
        for title, body, wanted in (
                ("with <h3>", restlet % b"<h3>unable to read\nDICOM object a&amp;b.txt</h3>",
                 "HTTP 400, unable to read DICOM object a&b.txt"),
                ("with <h3> and more in it", restlet % b"<h3 class='x'>a <b>bold</b> word</h3>",
                 "HTTP 400, a bold word"),
                ("1.11: no <h3>, the reason in <p>", restlet %
                 b"<h2>Bad Request</h2><p>Session processing in progress</p>",
                 "HTTP 400, Session processing in progress"),
                ("1.11: the status alone", restlet % b"<p style='x'>Unauthorized</p>",
                 "HTTP 400, Unauthorized"),
                ("Tomcat", b"<!doctype html><html><head><title>HTTP Status 404</title><style>p {x}"
                 b"</style></head><body><h1>HTTP Status 404</h1><hr><p><b>Type</b> Report</p>",
                 None),
                ("nginx", b"<html><head><title>413 Request Entity Too Large</title></head><body>"
                 b"<center><h1>413</h1></center>", "HTTP 400, 413 Request Entity Too Large"),
                ("Apache", b"<!DOCTYPE HTML><html><head><title>502 Proxy Error</title></head><body>"
                 b"<h1>Proxy Error</h1><p>The proxy server received an invalid response</p>",
                 "HTTP 400, The proxy server received an invalid response"),
                ("words", b"  Session is\n locked ", "HTTP 400, Session is locked"),
                ("words after a script", b"<script>var x = 'no';</script>gone", "HTTP 400, gone"),
                ("empty", b"", "HTTP 400"), ("tags only", b"<br><hr>", "HTTP 400"),
                ("an empty <h3>", b"<h3> </h3><p>because</p>", "HTTP 400, because"),
                ("no end of it", b"<h3>unclosed", "HTTP 400, unclosed")):
            with self.subTest(title):
                found = page(body).evidence
                if wanted is not None:
                    self.assertEqual(found, wanted)
                self.assertNotIn("Status page", found)
                self.assertNotIn("<", found)
                self.assertNotIn("technical details", found)

    @variation
    def test_a_sentence_without_end_is_cut(self) -> None:
        for body in (b"x" * 100_000, b"<h3>" + b"y " * 100_000 + b"</h3>", b"<p>" * 50_000):
            self.assertLess(len(page(body).evidence), 400)


class OneCurl(UploadTest):
    """What the real curl is given and gives."""

    def test_a_request_and_several_over_one_connection(self) -> None:
        class Told:
            lines: List[str] = []

            def log(self, text: str) -> None:
                self.lines.append(text)

        with self.xnat() as server:
            settings = dicomUpload.read_options(
                [server.url, "alice", "s3cret", "BRAIN", str(self.home)])
            programs, told = dicomUpload.Programs(), Told()
            self.addCleanup(programs.close)
            curl = dicomUpload.Curl(settings, programs, told)
            login = curl.ask("POST", "/data/JSESSION")
            self.assertEqual((login.code, login.status), (0, 200))
            self.assertRegex(login.body, r"\A\w+\s*\Z")
            odd = "/data/projects/a%20b{1,2}[3-4]"  # no [] or {} means anything to curl
            first, second, third = curl.ask_once("/xapi/siteConfig/buildInfo", odd,
                                                 "/data/projects?format=json")
            self.assertEqual([each.status for each in (first, second, third)], [200, 404, 200])
            self.assertIn("version", first.json())
            self.assertIn("ResultSet", third.json())
            self.assertIsNone(second.json())
            self.assertEqual(curl.rows("/data/projects")[0].get("id"), "BRAIN")
            self.assertEqual(curl.rows("/data/projects/NOPE"), [])
            server.fail("reset before", "GET /data/projects", times=1)
            self.assertNotEqual(curl.ask("GET", "/data/projects").code, 0)
            curl.ask("DELETE", "/data/JSESSION")
            self.assertEqual(sum(each.path == odd for each in server.requests), 1)
            for password in ('a"b', "a\\b", '\\"', "#;,: ", "ä日 '$HOME", "\\n"):
                server.accounts.users["alice"].password = password
                curl = dicomUpload.Curl(
                    dicomUpload.replace(settings, password=password), programs, told)
                self.assertEqual(curl.ask("GET", "/data/projects").status, 200, password)
        text = "\n".join(told.lines)
        self.assertNotIn("s3cret", text)
        self.assertNotIn(login.body.strip(), text)


    def test_what_curl_says_of_a_proxy_holds_no_password(self) -> None:
        write_series(self.root / "007/pre/T1", study=uid("p"), files=1)
        for scheme in "http://", "":
            ran = self.run_command(
                self.arguments("http://127.0.0.1:9", "--retries", "0"),
                {"http_proxy": scheme + "bob:h1dden@127.0.0.1:99999"})
            self.assertEqual(ran.status, 3, ran.text)
            self.assertIn("127.0.0.1:99999", ran.err)
            self.assertNotIn("h1dden", ran.text + self.log())


if __name__ == "__main__":
    unittest.main()
