"""Old curls, old shells, and systems that are not Linux: nothing is used that these lack.

What no machine here can run, curl 7.61 (RHEL 8) and bash 3.2 (macOS), is held against lists.
"""

import os
import re
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Iterator, List, Set, Tuple

from tests.dicom import readme_tree
from tests.support import EXCLUSIONS, ROOT, SCRIPT, UploadTest, need, variation

ONCE = True  # the Python that it runs on makes no difference

# The long options of curl 7.61 that have to do with HTTP, TLS or no protocol: names from curl's
# docs/options-in-versions; --include is --show-headers there, which is its name since 8.10.
CURL_7_61 = set("""
    anyauth basic cacert capath cert cert-status cert-type ciphers compressed config connect-timeout
    connect-to continue-at cookie cookie-jar create-dirs crlfile data data-ascii data-binary
    data-raw data-urlencode digest disable disallow-username-in-url dns-interface dns-ipv4-addr
    dns-ipv6-addr dns-servers dump-header engine expect100-timeout fail fail-early false-start form
    form-string get globoff happy-eyeballs-timeout-ms haproxy-protocol head header help http1.0
    http1.1 http2 http2-prior-knowledge ignore-content-length include insecure interface ipv4 ipv6
    junk-session-cookies keepalive-time key key-type libcurl limit-rate local-port location
    location-trusted max-filesize max-redirs max-time negotiate netrc netrc-file netrc-optional next
    no-alpn no-buffer no-keepalive no-npn no-sessionid noproxy ntlm oauth2-bearer output pass
    path-as-is pinnedpubkey post301 post302 post303 preproxy progress-bar proto proto-default
    proto-redir proxy proxy-anyauth proxy-basic proxy-cacert proxy-capath proxy-cert proxy-digest
    proxy-header proxy-insecure proxy-key proxy-ntlm proxy-pass proxy-tlsv1 proxy-user proxy1.0
    proxytunnel random-file range raw referer remote-name remote-time request request-target resolve
    retry retry-connrefused retry-delay retry-max-time show-error silent socks4 socks5 speed-limit
    speed-time stderr styled-output suppress-connect-headers tcp-fastopen tcp-nodelay time-cond
    tls-max tls13-ciphers tlsv1 tlsv1.0 tlsv1.1 tlsv1.2 tlsv1.3 tr-encoding trace trace-ascii
    trace-time unix-socket upload-file url use-ascii user user-agent verbose version write-out
    """.split())
# Those of them that take no value, among what the program could use.
ALONE = set("""
    anyauth basic compressed digest disable fail fail-early get globoff head http1.0 http1.1 http2
    include insecure ipv4 ipv6 location netrc-optional next no-buffer no-keepalive no-sessionid
    path-as-is
    progress-bar raw show-error silent suppress-connect-headers tcp-nodelay tlsv1 tlsv1.2 verbose
    version
    """.split())
WRITE_OUT_7_61 = set("""
    content_type filename_effective http_code http_connect http_version local_ip local_port
    num_connects num_redirects redirect_url remote_ip remote_port response_code scheme size_download
    size_header size_request size_upload speed_download speed_upload ssl_verify_result
    time_appconnect time_connect time_namelookup time_pretransfer time_redirect time_starttransfer
    time_total url_effective
    """.split())
# Writes down what curl is given, and starts the real one.
RECORDER = """#!/bin/sh
call=$(mktemp -d '{folder}/call.XXXXXX')
for word; do printf '%s\\0' "$word"; done >"$call/words"
cat >"$call/input"
exec '{curl}' "$@" <"$call/input"
"""

# What bash 3.2 has not, and what the tools of macOS have not; each with something that it catches.
NEWER_THAN_BASH_3_2: List[Tuple[str, str]] = [
    (r"\$\{\w+(\[[^]]*\])?(,,?|\^\^?)", "${name,,}"),
    (r"\$\{[^}]*@[QEPAaUuLKk]\}", "${name@Q}"),
    (r"\$\{\w+:[^}]*: ?-\d", "${name:0:-1}"),
    (r"\b(mapfile|readarray|coproc)\b", "mapfile -t lines"),
    (r"\b(declare|local|typeset) -\w*[Agnlu]", "declare -A table"),
    (r"&>>|\|&|;;?&(\s|$)", "command |& other"),
    (r"\[\[ -[vR] ", "[[ -v name ]]"),
    (r"\bwait -n", "wait -n"),
    (r"\bread\b[^|;]* -\w*[iN]\b", "read -N 1"),
    (r"\bread\b[^|;]* -t ?0?\.\d", "read -t 0.5"),
    (r"printf .*%\([^)]*\)T", "printf '%(%F)T'"),
    (r"\bprintf -v \w+\[", "printf -v name[0] x"),
    (r"\bshopt -s\w* .*(globstar|lastpipe|inherit_errexit)", "shopt -s globstar"),
    (r"\$\{?(BASHPID|EPOCH\w+|SRANDOM|BASH_ARGV0|PIPESTATUS_)\b", "$BASHPID"),
    (r"\{\d+\.\.\d+\.\.\d+\}|\{0\d+\.\.", "{0..9..2}"),
    (r"exec \{\w+\}[<>]", "exec {fd}>file"),
    (r"\[-\d+\]\}", "${list[-1]}"),
    (r"\\u[0-9a-fA-F]{4}", r"$'\u00fc'"),
]
NOT_ON_MACOS: List[Tuple[str, str]] = [
    (r"/proc/", "/proc/self"),
    (r"\breadlink -\w*[fem]", "readlink -f x"),
    (r"\b(realpath|timeout|setsid|flock|tac|nproc|shuf|ionice|getent|numfmt|truncate)\s", "nproc "),
    (r"\bsed -\w*[irz]", "sed -i s/a/b/"),
    (r"\bgrep -\w*P", "grep -P x"),
    (r"\bdate -\w*[dI]|\bdate --", "date -d now"),
    (r"\bstat -c|\bstat --", "stat -c %s x"),
    (r"(?<![\w-])(cp|mv|rm|ls|mkdir|ln|cat|tail|head|sort|mktemp|du|df|tr|cut|wc|id) --[a-z]",
     "cp --link"),
    (r"\bmktemp -\w*p|\bxargs -\w*[rd]|\bsort -\w*V|\bhead -n ?-|\bcp -\w*[at]", "head -n -1"),
    (r"\bfind\b.* -(printf|regextype|maxdepth=)", "find . -printf x"),
]
SCRIPTS = (ROOT / "runupload.sh", ROOT / "runuploadDocker.sh")


def options(words: List[str]) -> Iterator[Tuple[str, str]]:
    """The options of a curl command line without its values, and each one's value."""
    rest = iter(words)
    for word in rest:
        name = re.sub("^--", "", word)
        yield name, "" if name in ALONE else next(rest, "")


def code_of(script: Path) -> str:
    """A shell script without its comments."""
    return re.sub(r"(?m)(^|\s)#.*$", "", script.read_text(encoding="utf-8"))


class OldCurl(UploadTest):
    def setUp(self) -> None:
        super().setUp()
        self.bin = self.folder / "bin"
        self.calls = self.folder / "calls"
        self.bin.mkdir()
        self.calls.mkdir()
        (self.bin / "curl").write_text(RECORDER.format(folder=self.calls, curl=need(self, "curl")))
        (self.bin / "curl").chmod(0o755)
        need(self, "openssl")
        self.certificate = str(self.folder / "ca.pem")
        self.key = str(self.folder / "key.pem")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                        "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
                        "-keyout", self.key, "-out", self.certificate],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def used(self) -> Set[str]:
        """All options that curl was given, on its command line and in its config."""
        names: Set[str] = set()
        for call in self.calls.iterdir():
            words = (call / "words").read_text(errors="replace").split("\0")[:-1]
            for name, _ in options(words):
                names.add(name)
            for line in (call / "input").read_text(errors="replace").split("\n")[1:]:
                found = re.fullmatch(r'--([a-z0-9.-]+)(?: (".*"))?', line)
                self.assertTrue(found, f"a line of curl's config of another form: {line}")
                name, value = found.groups("") if found else ("", "")
                names.add(name)
                self.assertEqual(not value, name in ALONE, f"has it a value? {line}")
                if name == "write-out":
                    self.assertLessEqual(set(re.findall(r"%\{(\w+)\}", value)), WRITE_OUT_7_61)
        return names

    @variation
    def test_curl_gets_no_option_that_7_61_has_not(self) -> None:
        readme_tree(self.root, files=2)
        (self.home / ".netrc").write_text("machine 127.0.0.1 login alice password s3cret\n")
        (self.home / ".netrc").chmod(0o600)
        path = {"PATH": f"{self.bin}:{os.environ['PATH']}"}
        with self.xnat(tls=(self.certificate, self.key)) as server:
            server.fail("status", "services/import", status=503)
            for options_given in (
                    ("--cacert", self.certificate, "--limit-rate", "50M", "--only", "007"),
                    ("--insecure", "--overwrite-files", "--again", "--config", str(EXCLUSIONS),
                     "--max-files", "1"),
                    ("--insecure", "--review", "--only", "008/pre", "--again"),
                    ("--insecure", "--dry-run", "--only", "008/pre")):
                ran = self.upload(server, *options_given, password="-", environment=path)
                self.assertEqual(ran.status, 0, ran.text)  # 008/pre is there by then
        used = self.used()
        self.assertLessEqual({"cacert", "insecure", "limit-rate", "form", "url", "header"}, used)
        self.assertEqual(used - CURL_7_61, set())

    def test_the_program_names_no_option_that_neither_it_nor_curl_7_61_has(self) -> None:
        text = SCRIPT.read_text(encoding="utf-8")
        shown = self.run_command([sys.executable, str(SCRIPT), "--help"]).out
        own = set(re.findall(r"--([a-z-]+)", shown))
        named = set(re.findall(r'"--([a-z][a-z0-9.-]+)"', text))
        self.assertIn("suppress-connect-headers", named)
        self.assertEqual(named - own - CURL_7_61, set())


class OldShell(unittest.TestCase):
    def test_each_rule_catches_what_it_is_for(self) -> None:
        for rule, example in NEWER_THAN_BASH_3_2 + NOT_ON_MACOS:
            self.assertRegex(example, rule)

    def test_the_wrappers_use_nothing_that_bash_3_2_or_macos_has_not(self) -> None:
        for script in SCRIPTS:
            for rule, _ in NEWER_THAN_BASH_3_2 + NOT_ON_MACOS:
                with self.subTest(script=script.name, rule=rule):
                    self.assertNotRegex(code_of(script), rule)

    def test_arrays_that_may_be_empty_are_guarded_for_bash_before_4_4(self) -> None:
        """With set -u an empty "${list[@]}" is an unset variable there."""
        for script in SCRIPTS:
            code = code_of(script)
            filled = set(re.findall(r"(?m)^\s*(\w+)=\([^)\s]", code))
            for name in re.findall(r'(?<!\+)"\$\{(\w+)\[@\]\}', code):
                self.assertIn(name, filled, f"{script.name}: {name} may be empty")

    @variation
    def test_the_program_itself_reads_no_proc_and_starts_nothing_of_gnu(self) -> None:
        text = SCRIPT.read_text(encoding="utf-8")
        for rule, _ in NOT_ON_MACOS:
            with self.subTest(rule=rule):
                code = re.sub(r"(?m)#.*$|--timeout|timeout interval", "", text)
                self.assertEqual(re.findall(rf".*(?:{rule}).*", code), [])


if __name__ == "__main__":
    unittest.main()
