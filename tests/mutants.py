"""Which lines of dicomUpload.py could be wrong without a test noticing?

    python3 -m tests.mutants [HOW-MANY] [SEED]

changes one decision of the program at a time (a comparison, a boundary, a condition, an exit
status, a removed call, a dropped raise) in a copy of this folder, and runs the tests that belong
to its section there. What survives is printed with its line: read it, and add a test, or take out
what has no effect. Run by hand; it takes minutes to hours.
"""
import ast
import copy
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional

ROOT = Path(__file__).resolve().parent.parent
SECTIONS: Dict[str, str] = {  # the tests of each section, those that notice most first
    "words": "words options", "tree": "header walk read", "packing": "level packing speed upload",
    "curl": "curl send meet", "meanings": "meanings send commit",
    "xnat": "meet compare commit send", "ledger": "ledger compare commit upload",
    "upload": "compare commit send speed upload read", "telling": "words telling upload readme",
    "options": "options meet", "main": "options meet upload telling walk",
}
OPPOSITE = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
            ast.GtE: ast.Gt, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot,
            ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub,
            ast.Sub: ast.Add}


class Mutant(NamedTuple):
    """One change, told and done."""

    line: int
    what: str
    tree: ast.Module


def changed(node: ast.AST) -> Optional[str]:
    """Change one decision in place; what was done, or None if there is none to change."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPPOSITE:
        node.ops[0] = OPPOSITE[type(node.ops[0])]()
        return f"comparison is now {type(node.ops[0]).__name__}"
    if isinstance(node, (ast.BoolOp, ast.BinOp)) and type(node.op) in OPPOSITE:
        node.op = OPPOSITE[type(node.op)]()
        return f"operator is now {type(node.op).__name__}"
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        node.test = ast.UnaryOp(ast.Not(), node.test)
        return "condition is turned round"
    if isinstance(node, ast.Constant) and type(node.value) is int:
        node.value += 1
        return f"{node.value - 1} is now {node.value}"
    return None


def emptied(node: ast.AST) -> Optional[str]:
    """Drop a raise, or a call whose result nobody wants."""
    for field in ("body", "orelse", "finalbody"):
        block = getattr(node, field, None)
        for at, each in enumerate(block if isinstance(block, list) else []):
            call = isinstance(each, ast.Expr) and isinstance(each.value, ast.Call)
            if isinstance(each, ast.Raise) or call:
                getattr(node, field)[at] = ast.copy_location(ast.Pass(), each)
                return f"line {each.lineno} is left out"
    return None


def mutants(source: str, seed: int) -> Iterator[Mutant]:
    """Mutants of the program without end, drawn by `seed` over all its functions."""
    chance = random.Random(seed)
    whole = ast.parse(source)
    places = [at for at, node in enumerate(ast.walk(whole)) if isinstance(node, ast.FunctionDef)]
    while True:
        tree = copy.deepcopy(whole)
        function = list(ast.walk(tree))[chance.choice(places)]
        nodes = [node for node in ast.walk(function) if hasattr(node, "lineno")]
        node = chance.choice(nodes)
        what = (emptied if chance.random() < 0.3 else changed)(node)
        if what:
            yield Mutant(getattr(node, "lineno", 0), what, ast.fix_missing_locations(tree))


def section_of(source: str, line: int) -> str:
    """The section of the program in which this line stands."""
    above = re.findall(r"(?m)^# ---- (\w+) -", "\n".join(source.splitlines()[:line]))
    return above[-1] if above else "words"


def survives(folder: Path, mutant: Mutant, modules: List[str]) -> bool:
    """Whether no test notices it."""
    (folder / "dicomUpload.py").write_text(ast.unparse(mutant.tree), encoding="utf-8")
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
    for module in modules:
        if not (folder / f"tests/test_{module}.py").exists():
            continue
        try:
            ended = subprocess.run(
                [sys.executable, "-m", "unittest", "-f", f"tests.test_{module}"], cwd=folder,
                env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)
        except subprocess.TimeoutExpired:
            return False
        if ended.returncode:
            return False
    return True


def main() -> int:
    """Draw, try, tell; 1 if any survived."""
    many, seed = (int(each) for each in (sys.argv[1:] + ["150", "1"][len(sys.argv) - 1:])[:2])
    source = (ROOT / "dicomUpload.py").read_text(encoding="utf-8")
    alive = 0
    with tempfile.TemporaryDirectory(prefix="dicomUpload-mutants-") as name:
        folder = Path(name) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "work", "__pycache__"))
        for number, mutant in zip(range(1, many + 1), mutants(source, seed)):
            section = section_of(source, mutant.line)
            lives = survives(folder, mutant, SECTIONS[section].split())
            alive += lives
            print(f"{number} {'SURVIVES' if lives else 'caught  '} {section} line {mutant.line}: "
                  f"{mutant.what}: {source.splitlines()[mutant.line - 1].strip()}", flush=True)
    print(f"{many - alive} of {many} caught, {alive} survived")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main())
