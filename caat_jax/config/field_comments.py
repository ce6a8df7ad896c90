"""What configs/base.py says of each field, for the commands' --help."""

import ast
import inspect
import io
import tokenize

from configs import base


def field_comments() -> dict[str, str]:
    """The comments above and beside each field, as one text; "" where the name says it all.

    By the fields' whole names, in the order of the file.
    """
    source = inspect.getsource(base)
    above, beside = _comments(source)
    found = {}
    for field, node in _fields(ast.parse(source)):
        lines = [beside.get(node.end_lineno, "")]
        number = node.lineno - 1
        while number in above:
            lines.insert(0, above[number])
            number -= 1
        found[field] = " ".join(filter(None, lines))
    return found


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments by line: those with a line to themselves, and those after code."""
    above: dict[int, str] = {}
    beside: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            place = beside if token.line[:column].strip() else above
            place[line] = token.string.removeprefix("#").strip()
    return above, beside


def _fields(tree: ast.Module) -> list[tuple[str, ast.Assign | ast.keyword]]:
    """Of `config.FIELD = VALUE` and `config.SECTION = ConfigDict(dict(FIELD=VALUE, ...))`."""
    fields: list[tuple[str, ast.Assign | ast.keyword]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            name = node.targets[0].attr
            if isinstance(node.value, ast.Call):
                (section,) = node.value.args
                fields += [(f"{name}.{field.arg}", field) for field in section.keywords]
            else:
                fields.append((name, node))
    return fields
