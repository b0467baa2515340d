"""Every message that can appear, pinned, and read aloud: thing, what, evidence, what to do.

MESSAGES is what the program's source holds, with … for what it fills in. Who changes a message
changes it here too, and reads it as the coordinator would. `python3 -m tests.test_messages` prints
the messages as they are now.
"""

import ast
import re
import sys
import unittest
from typing import Iterator, List

from tests.support import SCRIPT

CALLS = {"Stop": 0, "Misplaced": 0, "Trouble": 0, "refuse": 1}  # which argument is the message
TABLES = {"CURL_TROUBLE", "CERTIFICATES"}       # of messages; REMEDIES is one of advice
# What a sentence to a person in trouble ends with: something to do, or that nothing is to be done.
ADVICE = re.compile(
    r"(?:^|: |; |, |, then |, and |or )(ask|check|choose|compare|delete|give|let|look|lower|make|mend|"
    r"move|rename|run|see|set|sort|try|wait|write|save|put|remove|is this|trying|waiting|--again|"
    r"--overwrite-files|or leave|reset|install|apt-get)\b[^:;]*$")
WITHOUT = {  # no advice of their own: the words around them have it, or nobody reads them
    "stopping", "stopped by …", "an earlier part of it was not sent",
}


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


def found_in(source: str) -> Iterator[str]:
    """Each message in the program."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            at = CALLS.get(name, 0)
            owner = getattr(getattr(node.func, "value", None), "id", "")
            said = name in CALLS or name == "append" and owner == "problems"
            if said and len(node.args) > at:
                yield text_of(node.args[at])
            for keyword in node.keywords:
                if keyword.arg in ("message", "problem") and text_of(keyword.value):
                    yield text_of(keyword.value)
        elif isinstance(node, ast.Assign) and getattr(
                node.targets[0], "id", "") in TABLES | {"why"}:
            table = node.value
            rows: List[ast.AST] = [table]
            if isinstance(table, ast.Dict):
                rows = list(table.values)
            elif isinstance(table, ast.Tuple):
                rows = [row.elts[1] for row in table.elts if isinstance(row, ast.Tuple)]
            yield from map(text_of, rows)


def messages() -> List[str]:
    return sorted(set(found_in(SCRIPT.read_text(encoding="utf-8"))) - {"…", ""})


MESSAGES = """\
ROOTDIR …: …. The layout is
XNAT did not archive it (…): …
XNAT is still at work on it (… is …): run again later
XNAT kept none of these files (empty answer): ask the project's owner about import filters and anonymization scripts
XNAT put it into another session (…): look there
a web page came instead of an answer (login?): is this XNAT's own address?
an earlier run saw it …, and it is not there any more: …
cannot be used (…): mend it, or set XNAT_PASS
chooses none of the … sessions in …: give subject or subject/session, as the folders go
curl ….…: is too old: install 7.61 or newer
give a whole number from … to …
give bytes per second, such as 500k or 5M
has … where only a list of parts of names belongs: write {"Exclude": ["AAHEAD"]}
holds a login: give …, and the login as USER and PASS
is empty, or holds a character that is no text: give it again
is empty: give a name, or leave the option out
is mistyped: give it like …
is neither subject nor subject/session: give one of these
is no file: give the CA's certificate in PEM form
is no plain name: give the folder as --workdir
is not JSON in UTF-8 (…): mend it there
it is gone from the prearchive, and XNAT's archive does not have it: run again to send it again
it was left for review, and is neither in the prearchive nor in the archive any more: …
ledger …: cannot be used (…): mend it, it remembers what was sent
ledger …: cannot be written (…): make room, then run again
lies inside ROOTDIR: choose one outside
login refused for … (HTTP …): check USER and PASS (20 wrong ones lock the account for an hour; too many open sessions look the same)
no address came back (…): look in the log
no encrypted connection comes about: check https or http, and the port
no password that could be sent in XNAT_PASS, in ~/.netrc for this host and user, or from a terminal: set XNAT_PASS
nothing answers there: check URL, network, and whether XNAT is up
project …: XNAT put … … into project … (…): do not run again, have it deleted there, and ask the XNAT admin
project …: not on this XNAT, or … cannot see it: check its ID
project …: …
project …: … can see it but not add to it: ask its owner to make … a member
see --help
stopped by …
stopping
the CA file cannot be read: check --cacert
the account … is not active yet: ask the XNAT admin
the connection broke while sending: run again later
the connection broke: run again later
the connection went silent: check the network, and see --timeout
the folder …
the password of … has expired: set a new one in the browser
the proxy's name cannot be found: check the proxy settings
the server closed the connection without an answer: run again later
the server does not tell its ID: is this XNAT's own address?
the server redirects to …: give the address that XNAT itself has
the server refused it (…): …
the server wants https: give https://…… as URL
the server's certificate has expired: ask the XNAT admin to renew it
the server's certificate is for another name: give the URL by that name
the server's certificate is not trusted: give your site's CA with --cacert FILE
the server's certificate is not valid yet: check this machine's clock
the server's name cannot be found: check URL and network
this system starts no more threads: lower --procs
two folders would become one (… and …; XNAT keeps only letters, digits, _ and -): rename one of them
unexpected answer (…): is this XNAT's own address?
workdir … is too full (needs …, has …): make room, lower --max-files, or move all of it, ledger too, to a larger disk
workdir …: cannot be used (…): choose another
workdir …: in use by another run: wait until it ends
zip failed (exit ……): …
zip made no readable archive (…): run again
… beside …: cannot be written (…): make room, then run again
… cannot be read: …
… cannot be started in … (…): check both, then run again
… changed during this run: run again when it is still
… could not be read in full, or changed while it was read: check it, then run again
… has a line break or DEL in its name: rename it, then run again
… has a name that is not UTF-8: rename it, then run again
… is DICOM named as an archive: rename it, then run again
… is a link to nothing: mend or remove it, then run again
… is no listing: is this XNAT's own address?
… …
…: is not installed: apt-get install … (Debian, Ubuntu), dnf install … (RHEL, Fedora) or brew install … (macOS)
…: the server is gone (…): run again later, it goes on where it stopped
…: …
""".splitlines()


class Messages(unittest.TestCase):
    maxDiff = None

    def test_each_message_is_one_that_was_read_aloud(self) -> None:
        self.assertEqual(messages(), MESSAGES)

    def test_each_message_is_one_line_and_ends_with_what_to_do(self) -> None:
        for message in messages():
            with self.subTest(message):
                self.assertNotIn("\n", message)
                plain = re.sub(r" \([^()]*\)$|\{.*\}$|https://…+ as URL$|\. The layout is$", "",
                               message)
                if message not in WITHOUT and not plain.endswith("…"):  # that is advice filled in
                    self.assertRegex(plain, ADVICE)


if __name__ == "__main__":
    sys.stdout.write("\n".join(messages()) + "\n")
