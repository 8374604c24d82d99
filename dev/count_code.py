"""The figures of docs/development/architecture.md: python dev/count_code.py [FOLDER]

Lines by kind, small modules, long functions, private functions that are called once. It reads text and syntax alone; nothing is imported.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SMALL, LONG = 60, 80
_DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def main(folder: Path) -> None:
    paths = sorted(folder.rglob("*.py"))
    sources = {path: path.read_text(encoding="utf-8") for path in paths}
    trees = {path: ast.parse(source) for path, source in sources.items()}
    lines = {path: len(source.splitlines()) for path, source in sources.items()}
    total = sum(lines.values())
    blank = sum(not line.strip() for source in sources.values() for line in source.splitlines())
    imports = sum(_length(node) for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    docs = sum(_length(text) for tree in trees.values() for text in _strings(tree))
    functions = [(path, node) for path, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    longest = max(functions, key=lambda pair: _length(pair[1]))
    largest = max(lines, key=lines.__getitem__)
    modules = [path for path in paths if path.name != "__init__.py"]
    private = [(path, node.name) for path, node in functions if node.name.startswith("_") and not node.name.startswith("__")]
    words = {path: Counter(re.findall(r"[A-Za-z_]\w*", source)) for path, source in sources.items()}
    rows = {
        "modules": len(modules),
        f"modules under {SMALL} lines": sum(0 < lines[path] < SMALL for path in modules),
        "lines": total,
        "lines of code (without blank lines, imports, docstrings)": total - blank - imports - docs,
        "blank lines and imports, of all lines": f"{(blank + imports) / total:.1%}",
        "lines with comments": sum(len(_commented(source)) for source in sources.values()),
        "functions": len(functions),
        "private functions": len(private),
        "private functions called once": sum(words[path][name] == 2 for path, name in private),
        f"functions over {LONG} lines": sum(_length(node) > LONG for _, node in functions),
        "longest function": f"{_length(longest[1])} lines ({longest[0].relative_to(folder).as_posix()}: {longest[1].name})",
        "largest file": f"{lines[largest]} lines ({largest.relative_to(folder).as_posix()})",
    }
    for name, value in rows.items():
        print(f"{name:58s} {value}")


def _strings(tree: ast.Module) -> Iterator[ast.AST]:
    """Docstrings, and the texts that stand under a field or a constant."""
    for node in ast.walk(tree):
        for statement in node.body if isinstance(node, _DEFINITIONS) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str):
                yield statement


def _commented(source: str) -> set[int]:
    return {token.start[0] for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT}


def _length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "src" / "musubi_tuner")
