"""What a docstring has to say, in a form that a machine can check.

A public function says what it does in a first sentence that ends with a full stop; the unit of the sizes and
times it takes ("byte", "page" or "block"; "second"); the shape of arrays, unless it takes one by that name;
and it names each error that its own body raises. Names that begin with an underscore, dunder methods and
overloads are left alone; a method that overrides a documented one need not say it again.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator

SIZES = re.compile(r"^(offset|length|nbytes|size|limit|memory_limit|block|address|start|end|n|len)$")
TIMES = re.compile(r"^(timeout|retry_for|interval|seconds|deadline|delay|time_limit)$")
ARRAYS = re.compile(r"\bndarray\b|\bArrayLike\b|\bNDArray\b")


@dataclasses.dataclass(frozen=True)
class Definition:
    """A public class or function as the source shows it."""

    name: str
    docstring: str | None
    parameters: dict[str, str] = dataclasses.field(default_factory=dict)
    returns: str = ""
    raises: frozenset[str] = frozenset()

    def with_docstring(self, docstring: str | None) -> Definition:
        return dataclasses.replace(self, docstring=docstring)

    def or_inherited(self, docstring: str | None) -> Definition:
        return self if self.docstring else self.with_docstring(docstring)


def public_definitions(tree: ast.Module, *, stub: bool = False) -> Iterator[Definition]:
    """Classes, functions, and the methods of classes, by dotted name."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and public(node, stub):
            yield function(node, node.name)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield Definition(node.name, ast.get_docstring(node))
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and public(member, stub):
                    yield function(member, f"{node.name}.{member.name}")


def public(node: ast.FunctionDef | ast.AsyncFunctionDef, stub: bool) -> bool:
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if any(name.endswith((".setter", ".deleter")) for name in decorators):
        return False
    if decorators & {"overload", "typing.overload", "override", "typing.override"}:
        return False
    # A stub has nothing but signatures, and its __init__ or __new__ is documented by the class.
    return not node.name.startswith("_")


def function(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Definition:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return Definition(
        name,
        ast.get_docstring(node),
        {
            a.arg: ast.unparse(a.annotation) if a.annotation else ""
            for a in arguments
            if a.arg not in {"self", "cls"}
        },
        ast.unparse(node.returns) if node.returns else "",
        frozenset(raised(node)),
    )


def raised(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Errors that the body itself raises by name; not those of functions inside it, nor what it catches."""
    inner = {
        id(child)
        for each in ast.walk(node)
        if each is not node and isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(each)
    }
    for child in ast.walk(node):
        if isinstance(child, ast.Raise) and id(child) not in inner and isinstance(child.exc, ast.Call):
            name = ast.unparse(child.exc.func).rpartition(".")[2]
            if name[:1].isupper() and name != "AssertionError":
                yield name


def complaints(definition: Definition, *, whole: bool) -> list[str]:
    """What is missing from a docstring; with `whole`, errors, units and shapes count."""
    text = definition.docstring
    if not text:
        return [f"{definition.name} has no docstring"]
    found = []
    if not re.search(r"[.:!?)`]$", text.strip().split("\n\n")[0].strip()):
        found.append(f"{definition.name}: the first sentence of the docstring has no end")
    if not whole:
        return found
    found += [
        f"{definition.name} raises {name} and does not say so"
        for name in sorted(definition.raises)
        if name not in text
    ]
    numbers = {
        name
        for name, kind in definition.parameters.items()
        if re.search(r"\b(int|float|str)\b", kind) or not kind
    }
    if any(SIZES.match(name) for name in numbers) and not re.search(r"\b(bytes?|pages?|blocks?)\b", text):
        found.append(f"{definition.name}: sizes have a unit (bytes, pages or blocks)")
    if any(TIMES.match(name) for name in numbers) and not re.search(r"\bseconds?\b|\d s\b", text):
        found.append(f"{definition.name}: times have a unit (seconds)")
    arrays = ARRAYS.search(definition.returns) or any(
        ARRAYS.search(kind) for kind in definition.parameters.values()
    )
    if (
        arrays
        and "shape" not in definition.parameters
        and not re.search(r"\b(shapes?|dimension|one-dimensional|flat)\b", text)
    ):
        found.append(f"{definition.name}: arrays have a shape")
    return found
