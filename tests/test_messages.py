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

CALLS = {"Stop": 0, "Trouble": 0, "refuse": 1}  # which argument is the message
TABLES = {"CURL_TROUBLE", "CERTIFICATES"}       # of messages; REMEDIES is one of advice
# What a sentence to a person in trouble ends with: something to do, or that nothing is to be done.
ADVICE = re.compile(
    r"(?:^|: |; |, |, then |or )(ask|check|choose|compare|delete|give|let|look|lower|make|mend|"
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
