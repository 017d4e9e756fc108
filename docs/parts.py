"""Directives of the book: source by symbol, a chapter's exercises, modules from their docstrings; and formulas."""

import ast
import inspect
import pkgutil
import textwrap
from importlib import import_module
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from experiments.accounting import explain
from experiments.book.exercises import EXERCISES
from experiments.verbs.arguments import EXAMPLES, parser


class Parsed(SphinxDirective):
    def parsed(self, text: str) -> list[nodes.Node]:
        """The nodes of a text in the document's own language."""
        inside = nodes.container()
        self.state.nested_parse(StringList(text.splitlines(), self.env.docname), 0, inside)
        return inside.children


class Source(Parsed):
    """```{source} qwen_min.ops.rotate``` shows the lines of the real file, an op's prices first.

    Of a docstring the first line is shown, unless it is wanted `:whole:`; the file is a click away.
    """

    required_arguments, optional_arguments = 1, 20
    option_spec = {"whole": directives.flag}

    def run(self) -> list[nodes.Node]:
        shown: list[nodes.Node] = []
        for name in self.arguments:
            place, first, prices, lines = explain.source(thing := named(name))
            lines = lines if "whole" in self.options else brief(lines)
            text = "\n".join([*prices, *([""] * 2 * bool(prices)), *textwrap.dedent("\n".join(lines)).splitlines()])
            module = inspect.getmodule(thing).__name__
            label = f"`{place}:{first}`"
            if module.startswith(("qwen_min", "lora")):
                label += f", {{py:obj}}`{name.removeprefix(module + '.')} <{name}>`"
            code = nodes.literal_block(text, text, language="python")
            shown.append(nodes.container("", *self.parsed(label), code, classes=["source"]))
        return shown


def named(name: str) -> Any:
    """What a dotted name means, from its longest part that is a module."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            thing = getattr(thing, part)
        return inspect.unwrap(thing)
    raise ValueError(f"{name!r} is no symbol")


def brief(lines: list[str]) -> list[str]:
    """The lines of a function or class with the first line of each docstring alone."""
    tree = ast.parse(textwrap.dedent("\n".join(lines)))
    dropped: set[int] = set()
    lines = list(lines)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            text = node.body[0]
            if text.end_lineno > text.lineno:
                lines[text.lineno - 1] += '"""'
                dropped |= set(range(text.lineno, text.end_lineno))
    return [line for number, line in enumerate(lines) if number not in dropped]


class Exercises(Parsed):
    """```{exercises} 2``` shows the exercises of a chapter, from the table that checks them."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        shown: list[nodes.Node] = []
        for number, exercise in EXERCISES.items():
            if number.split(".")[0] == self.arguments[0]:
                command = nodes.literal_block(text := f"python -m experiments.run exercise {number} ANSWER", text)
                solution = nodes.literal_block(exercise.solution, exercise.solution, language="python")
                asked = self.parsed(f"**{number}** {exercise.question}")
                shown += [*asked, command, *folded("Hint", self.parsed(exercise.hint)), *folded("Solution", [solution])]
        if not shown:
            raise self.error(f"chapter {self.arguments[0]} has no exercises")
        return shown


class Verbs(Parsed):
    """```{verbs}``` shows every verb of the command line, from its parser, with its flags folded away."""

    def run(self) -> list[nodes.Node]:
        (verbs,) = (action for action in parser()._actions if action.dest == "verb")
        shown: list[nodes.Node] = []
        for name, verb in dict(verbs.choices or {}).items():
            example = nodes.literal_block(EXAMPLES[name], EXAMPLES[name])
            flags = [""] + [  # a list in the first line would be taken for the head of a file
                f"- `{', '.join(action.option_strings) or action.metavar}`: {action.help}"
                for action in verb._actions
                if action.dest not in ("help", "debug")
            ]
            inside = [*self.parsed(str(verb.description)), example, *folded("Flags", self.parsed("\n".join(flags)))]
            shown.append(nodes.section("", nodes.title("", name), *inside, ids=[name]))
        return shown


def folded(name: str, content: list[nodes.Node]) -> list[nodes.Node]:
    return [
        nodes.raw("", f"<details><summary>{name}</summary>", format="html"),
        *content,
        nodes.raw("", "</details>", format="html"),
    ]


class Modules(Parsed):
    """```{modules} qwen_min``` documents every module of a package by its docstrings."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        package = import_module(self.arguments[0])
        names = [m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
        text = "\n".join(f".. rubric:: {name}\n\n.. automodule:: {name}\n" for name in names)
        return self.parsed(f"```{{eval-rst}}\n{text}\n```")


def _plain(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """A docstring is text, not RST: a bar is no substitution, and an indented line may end without a blank one."""
    text: list[str] = []
    for line in lines:
        if text and text[-1].startswith(" ") and line and not line.startswith(" "):
            text.append("")
        text.append(line.replace("|", "\\|"))
    lines[:] = text


def _maths(self: Any, node: nodes.Element) -> None:
    """A formula as MathML, which browsers draw without a library."""
    self.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    for name, directive in (("source", Source), ("exercises", Exercises), ("modules", Modules), ("verbs", Verbs)):
        app.add_directive(name, directive)
    app.connect("autodoc-process-docstring", _plain, priority=900)  # after napoleon
    app.add_html_math_renderer("mathml", (_maths, None), (_maths, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
