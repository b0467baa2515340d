"""nginx in front of the stand-in, as XNAT sites run it: TLS, limits, timeouts, restarts, HTTP/2.

Debian's nginx is the judge of both: what it makes of the uploader's requests, and whether the
stand-in speaks HTTP well enough for a proxy that keeps connections. Keys and certificates are made
by openssl for each run of this module and are gone after it.
"""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

from tests.support import Ran, missing, need, variation
from tests.running import AGAIN, RunningTest, until
from tests.xnat_standin import Standin

ONCE = True  # the Python that it runs on makes no difference

# Each is a port of its own: whether it speaks TLS, and what else is said of it.
LISTENERS: Dict[str, Tuple[str, str]] = {
    "good": ("good", "client_max_body_size 0;"),
    "expired": ("expired", ""),
    "other name": ("other", ""),
    "redirect": ("", "return 301 https://127.0.0.1:%(good)d$request_uri;"),
    "small": ("good", "client_max_body_size 300k;"),
    "impatient": ("good", "client_max_body_size 0; proxy_read_timeout 500ms;"),
    "streaming": ("good", "client_max_body_size 0; proxy_request_buffering off;"),
}
CONFIG = """
%(user)s
worker_processes 1;
daemon off;
pid %(folder)s/pid;
error_log %(folder)s/error.log;
events { worker_connections 256; }
http {
    log_format judge '$server_port|$server_protocol|$connection|$connection_requests|'
                     '$request_method|$uri|$status|$upstream_status|$request_length';
    access_log %(folder)s/access.log judge;
    client_body_temp_path %(folder)s/body;
    proxy_temp_path %(folder)s/proxy;
    fastcgi_temp_path %(folder)s/fastcgi;
    uwsgi_temp_path %(folder)s/uwsgi;
    scgi_temp_path %(folder)s/scgi;
    upstream xnat { server 127.0.0.1:%(upstream)d max_fails=0; keepalive 8; }
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host $http_host;
%(servers)s
}
"""
SERVER = """    server {
        listen 127.0.0.1:%(port)d%(tls)s;
        %(certificate)s
        %(words)s
        location / { proxy_pass http://xnat; }
    }
"""
AUTHORITY = """
[ca]
default_ca = mine
[mine]
database = index
serial = serial
new_certs_dir = .
default_md = sha256
unique_subject = no
policy = anything
[anything]
commonName = supplied
"""


class Line(NamedTuple):
    """A line of nginx's access log."""

    port: int
    protocol: str
    connection: int
    number: int         # of the request on its connection
    method: str
    path: str
    status: int
    upstream: str       # status of the stand-in's own answer
    length: int         # bytes of the request


def make_certificates(folder: Path) -> None:
    """A private CA, and certificates: good for 127.0.0.1, expired, and of another name."""
    (folder / "ca.cnf").write_text(AUTHORITY)
    (folder / "index").write_text("")
    (folder / "serial").write_text("01\n")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=str(folder), check=True, stdin=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=Our own CA")
    openssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-keyout", "key.pem", "-out", "request.pem", "-subj", "/CN=xnat")
    for name, host, end in (("good", "IP:127.0.0.1", "20991231235959Z"),
                            ("expired", "IP:127.0.0.1", "20200102000000Z"),
                            ("other", "DNS:xnat.other.example", "20991231235959Z")):
        (folder / "names").write_text("subjectAltName = " + host)
        openssl("ca", "-batch", "-config", "ca.cnf", "-cert", "ca.pem", "-keyfile", "ca.key",
                "-in", "request.pem", "-out", name + ".pem", "-notext", "-extfile", "names",
                "-startdate", "20200101000000Z", "-enddate", end)


class Nginx:
    """nginx on ports of its own, in a folder of its own, before the stand-in at `upstream`."""

    def __init__(self, upstream: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dicomUpload-test-nginx-"))
        self.ca = str(self.folder / "ca.pem")
        make_certificates(self.folder)
        # The sockets are made here and handed over, as nginx does when it replaces itself: no
        # port can be lost to somebody else, and nobody need wait until it listens.
        sockets = {name: socket.create_server(("127.0.0.1", 0), backlog=64) for name in LISTENERS}
        self.ports = {name: each.getsockname()[1] for name, each in sockets.items()}
        self._configure(upstream)
        numbers = [each.fileno() for each in sockets.values()]
        self.process = subprocess.Popen(
            [self.program(), "-p", str(self.folder), "-c", "nginx.conf"], pass_fds=numbers,
            env={"NGINX": "".join("%d;" % number for number in numbers)},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for each in sockets.values():
            each.close()

    @staticmethod
    def program() -> str:
        """Where nginx is; Debian's place is not on everybody's way."""
        return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin") or ""

    def _configure(self, upstream: int) -> None:
        servers = ""
        for name, (certificate, words) in LISTENERS.items():
            pair = "ssl_certificate %s/%s.pem; ssl_certificate_key %s/key.pem;" % (
                self.folder, certificate, self.folder)
            servers += SERVER % {
                "port": self.ports[name], "tls": " ssl http2" if certificate else "",
                "certificate": pair if certificate else "", "words": words % self.ports}
        (self.folder / "nginx.conf").write_text(CONFIG % {
            "user": "user root;" if os.geteuid() == 0 else "", "folder": self.folder,
            "upstream": upstream, "servers": servers})

    def url(self, name: str) -> str:
        """The address of one of LISTENERS."""
        return "%s://127.0.0.1:%d" % ("https" if LISTENERS[name][0] else "http", self.ports[name])

    def lines(self, name: str) -> List[Line]:
        """What the access log says of one of LISTENERS, imports and all."""
        found = []
        for text in (self.folder / "access.log").read_text().splitlines():
            port, protocol, connection, number, method, path, status, upstream, size = \
                text.split("|")
            if int(port) == self.ports[name]:
                found.append(Line(int(port), protocol, int(connection), int(number), method, path,
                                  int(status), upstream, int(size)))
        return found

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(str(self.folder), ignore_errors=True)


class NginxTest(RunningTest):
    """A class with a stand-in and an nginx; each test finds both as new."""

    server: Standin
    nginx: Nginx

    @classmethod
    def setUpClass(cls) -> None:
        cls.tools = bool(Nginx.program() and shutil.which("openssl"))
        if not cls.tools:
            return
        cls.server = Standin()
        cls.server.__enter__()
        cls.nginx = Nginx(cls.server.port)

    @classmethod
    def tearDownClass(cls) -> None:  # Python 3.8 has one list of cleanups for all classes
        if cls.tools:
            cls.nginx.close()
            cls.server.__exit__(None, None, None)

    def setUp(self) -> None:
        super().setUp()
        need(self, "openssl")
        if not self.tools:
            missing(self, "nginx is not installed")
        self.assertIsNone(self.nginx.process.poll(), "nginx has ended")
        self.server.forget()
        (self.nginx.folder / "access.log").write_text("")
        for name, value in (("seconds_per_file", 0), ("reject", ())):
            self.addCleanup(setattr, self.server.knobs, name, value)

    def tearDown(self) -> None:
        self.assertEqual(self.server.abuses, [])
        super().tearDown()

    def through(self, name: str, *options: str, status: int = 0, trusted: bool = True,
                path: str = "") -> Ran:
        """A run through one of LISTENERS."""
        ca = ("--cacert", self.nginx.ca) if trusted else ()
        ran = self.run_command(self.arguments(self.nginx.url(name) + path, *ca, *options))
        self.assertEqual(ran.status, status, ran.text)
        self.tidy(ran)
        return ran

    def assert_nothing_came(self) -> None:
        self.assertEqual([each.path for each in self.server.requests], [])


class Certificates(NginxTest):

    def setUp(self) -> None:
        super().setUp()
        self.tree()

    def test_a_private_ca_is_refused_with_the_advice_to_give_it(self) -> None:
        ran = self.through("good", trusted=False, status=3)
        self.assertRegex(ran.text, "certificate.*--cacert")
        self.assert_nothing_came()

    def test_a_private_ca_that_is_given_is_trusted(self) -> None:
        self.through("good")
        self.assert_whole(self.server)

    def test_another_ca_than_the_servers_is_refused(self) -> None:
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                        "ec_paramgen_curve:P-256", "-nodes", "-keyout", "/dev/null", "-out",
                        str(self.folder / "wrong.pem"), "-subj", "/CN=Another CA"],
                       check=True, stderr=subprocess.DEVNULL)
        ran = self.through("good", "--cacert", str(self.folder / "wrong.pem"), trusted=False,
                           status=3)
        self.assertRegex(ran.text, "certificate.*--cacert")
        self.assert_nothing_came()

    def test_insecure_works_and_says_loudly_what_is_not_checked(self) -> None:
        ran = self.through("good", "--insecure", trusted=False)
        self.assert_whole(self.server)
        self.assertRegex(ran.err, "(?i)--insecure.*not checked|certificate.*not checked")

    def test_an_expired_certificate_is_called_expired_and_no_ca_is_asked_for(self) -> None:
        ran = self.through("expired", status=3)
        self.assertRegex(ran.text, "certificate.*expired")
        self.assertNotIn("--cacert", ran.text)
        self.assert_nothing_came()

    def test_a_certificate_of_another_name_is_told_so_and_no_ca_is_asked_for(self) -> None:
        ran = self.through("other name", status=3)
        self.assertRegex(ran.text, "(?i)certificate.*(another|other|name).*127.0.0.1")
        self.assertNotIn("--cacert", ran.text)
        self.assert_nothing_came()

    def test_http_that_answers_with_a_redirect_to_https_is_told_the_address_to_give(self) -> None:
        ran = self.through("redirect", trusted=False, status=3)
        self.assertIn(self.nginx.url("good"), ran.text)
        self.assert_nothing_came()

    def test_the_address_to_give_keeps_the_path_that_xnat_has(self) -> None:
        ran = self.through("redirect", trusted=False, status=3, path="/xnat")
        self.assertIn(self.nginx.url("good") + "/xnat", ran.text)


class Limits(NginxTest):

    def imports(self, name: str) -> List[Line]:
        return [line for line in self.nginx.lines(name) if line.path == "/data/services/import"]

    def test_a_part_over_the_body_limit_is_told_with_its_size_and_both_remedies(self) -> None:
        self.tree("007/pre/A_0001")
        self.big("007/pre/B_0002", files=6, kilobytes=100)
        ran = self.through("small", status=1)
        self.assertEqual(self.statuses(), "sent, not sent")
        refused = [line for line in ran.out.splitlines() if "413" in line]
        self.assertEqual(len(refused), 2, ran.text)  # as it happens, and at the end
        for line in refused:
            self.assertIn("B_0002", line)
            self.assertRegex(line, r"\b6\d\d(\.\d)? [kK]i?B|\b0?\.6\d* MB")
        self.assertRegex(ran.out, "lower --max-files.*client_max_body_size")
        self.assertEqual([line.status for line in self.imports("small")], [200, 413])
        ran = self.through("small", "--max-files", "2")
        self.assert_whole(self.server)
        self.assertEqual([line.status for line in self.imports("small")], [200, 413] + [200] * 3)

    def big(self, path: str, files: int, kilobytes: int) -> None:
        """A series that does not compress."""
        self.tree(path, files=files)
        for number, file in enumerate(sorted((self.root / path).iterdir())):
            head = file.read_bytes()[:-512]  # all but the 16x16 pixels, whose length stands before
            pixels = os.urandom(kilobytes * 500) * 2
            file.write_bytes(head[:-4] + len(pixels).to_bytes(4, "little") + pixels)
            self.assertEqual(number + 1, int(file.stem[2:]))

    def test_after_a_timeout_of_the_proxy_the_import_is_waited_for_and_nothing_is_doubled(
            self) -> None:
        self.tree("007/pre/A_0001", files=40)
        # At the 504 the first file is there, and 3.6 s are left, in one pause: each of many would
        # last longer than it says on a busy machine.
        pauses = iter((4.1,))

        def pause_once(_: str) -> bool:
            self.server.knobs.seconds_per_file = next(pauses, 0)
            return False

        self.server.knobs.reject = pause_once
        process = self.start(self.arguments(self.nginx.url("impatient"), "--cacert",
                                            self.nginx.ca))
        out, err = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0, out + err)
        self.assertRegex(err, "504.*" + AGAIN)
        statuses = [line.status for line in self.imports("impatient")]
        self.assertEqual((statuses[0], statuses[-1]), (504, 200))
        first, second = self.server.imports()[:2]
        assert first.answered
        self.assertGreater(second.started, first.answered, "it did not wait")
        self.assert_whole(self.server)

    @variation
    def test_a_part_that_always_outlasts_the_proxy_is_told_with_a_remedy_that_works(self) -> None:
        self.tree("007/pre/A_0001", files=10)
        self.server.knobs.seconds_per_file = 0.075  # as slow as XNAT gets
        ran = self.through("impatient", "--retries", "0", status=1)
        told = [line for line in ran.out.splitlines() if "504" in line and "A_0001" in line]
        self.assertTrue(told, ran.text)
        self.quiet(self.server)  # the proxy's timeout does not end an import
        self.through("impatient", "--max-files", "2")
        self.assert_whole(self.server)
        self.assertIn("lower --max-files", ran.out)

    def test_a_server_killed_and_started_again_in_the_middle_gets_everything_once(self) -> None:
        self.tree(*(f"00{number}/pre/{name}" for number in (1, 2) for name in ("A_0001", "B_0002")),
                  files=5)
        self.server.knobs.seconds_per_file = 0.1
        process = self.start(self.arguments(self.nginx.url("good"), "--cacert", self.nginx.ca,
                                            "--procs", "2"))
        self.assertTrue(self.server.wait_for(
            lambda: any(row.files for row in self.server.prearchive)))
        with self.server.down():
            self.assertTrue(until(lambda: 502 in [line.status for line in self.imports("good")]))
            self.quiet(self.server)
        out, err = process.communicate(timeout=30)
        self.assertEqual(process.returncode, 0, out + err)
        self.assertRegex(err, "502.*" + AGAIN)
        self.assert_whole(self.server)


class Connections(NginxTest):

    def all_lines(self, name: str) -> List[Line]:
        """The log, when nginx has written of every request."""
        until(lambda: len(self.nginx.lines(name)) >= len(self.server.requests), 5)
        return self.nginx.lines(name)

    @variation
    def test_it_speaks_http2_and_a_body_of_megabytes_arrives_whole(self) -> None:
        self.tree("007/pre/B_0002", files=2)
        Limits.big(self, "007/pre/A_0001", files=3, kilobytes=1000)  # type: ignore[arg-type]
        self.through("good")
        self.assert_whole(self.server)
        lines = self.all_lines("good")
        self.assertEqual({line.protocol for line in lines}, {"HTTP/2.0"})
        self.assertEqual(len(lines), len(self.server.requests))
        self.assertGreater(max(line.length for line in lines), 3000000)

    def test_a_proxy_that_streams_the_body_gets_it_through(self) -> None:
        self.tree("007/pre/B_0002", files=2)
        Limits.big(self, "007/pre/A_0001", files=3, kilobytes=1000)  # type: ignore[arg-type]
        self.through("streaming")
        self.assert_whole(self.server)

    @variation
    def test_the_proxy_keeps_its_connections_to_the_stand_in(self) -> None:
        self.tree()
        before = self.server.connections
        self.through("good", "--procs", "1")
        self.assert_whole(self.server)
        self.assertGreater(len(self.server.requests), 8)
        self.assertLessEqual(self.server.connections - before, 2)

    def test_a_client_may_keep_its_connection_over_an_import_and_a_refusal(self) -> None:
        url = self.nginx.url("good")
        body = "a body that is no zip, and does not stop the next request " * 1000
        words: List[str] = []
        for path, more in (("/data/JSESSION", []), ("/data/projects/NOT_THERE", []),
                           ("/data/services/import?inbody=true", ["--data-binary", "@-"]),
                           ("/data/auth", [])):
            words += ["--next"] if words else []
            words += ["--silent", "--http1.1", "--cacert", self.nginx.ca, "--user", "alice:s3cret",
                      "--output", "/dev/null", "--write-out", "%{http_code} ", *more, url + path]
        ran: Any = subprocess.run([need(self, "curl"), "--disable", *words], input=body.encode(),
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30,
                                  env={"PATH": os.environ.get("PATH", os.defpath)})
        self.assertEqual(ran.stdout.decode(), "200 404 400 200 ", ran.stderr)
        lines = self.all_lines("good")
        self.assertEqual([line.number for line in lines], [1, 2, 3, 4])
        self.assertEqual({(line.connection, line.protocol) for line in lines},
                         {(lines[0].connection, "HTTP/1.1")})
