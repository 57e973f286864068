"""What a definition looks like in the documentation, on the site that Quarto publishes as on the one of `make docs`: its call, its
docstring, and a list of its parameters by their docments. (nbdev's own is a block of code with the docments as comments.)"""
import re
from dataclasses import is_dataclass
from inspect import Parameter, getsource, isclass
from itertools import chain, takewhile
from pydoc import locate
from types import FunctionType
from typing import get_args

from fastcore.docments import ShowDocRenderer, _fullname
from nbdev.doclinks import NbdevLookup

MEMBERS = FunctionType, classmethod, staticmethod, property


def plain(text):
    "A docment as Markdown: code stays code, and nothing else means anything"
    parts = re.split(r"(`[^`]*`)", text if isinstance(text, str) else "")
    return "".join(part if i % 2 else re.sub(r"([\\*_<>$~^@#|])", r"\\\1", part) for i, part in enumerate(parts))


def type_name(type_):
    "A type as one would say it, without the modules it comes from; nothing where there is none"
    if type_ in (Parameter.empty, type(None)): return ""
    if hasattr(type_, "__metadata__"): type_ = type_.__origin__  # Annotated[bool, …]
    words = type_ if isinstance(type_, str) else type_.__name__ if isclass(type_) and not get_args(type_) else repr(type_)
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])|'", "", words).replace("NoneType", "None")


def default_of(about):
    "A parameter's default as one would write it; nothing where there is none"
    default = about["default"]
    if default is Parameter.empty: return ""
    if is_dataclass(default) and not isclass(default): return f"{type(default).__name__}(…)"
    return getattr(default, "__name__", None) or repr(default)


def row(term, kind, words):
    "A line of a definition list"
    return f"{term}{f' `{kind}`'*bool(kind)}\n:   {words or '&nbsp;'}"


def header(definition):
    "The lines that name the parameters: of a function those above the docstring, of a dataclass those between docstring and methods"
    if isclass(definition) and not is_dataclass(definition): definition = definition.__init__
    try: lines = getsource(definition).splitlines()
    except (OSError, TypeError): return []
    at = next((i for i, line in enumerate(lines) if line.lstrip().startswith('"')), 1)
    return takewhile(lambda line: not re.match(r"\s*(def|@)", line), lines[at + 1:]) if isclass(definition) else lines[:at]


class Signature(ShowDocRenderer):
    "What nbdev puts into the documentation for each definition that a notebook exports"
    def __init__(self, sym, **options):
        try: super().__init__(sym, **options)
        except NameError: self.dm, self.docs, self.fn = None, sym.__doc__, _fullname(sym)  # inherited, in words of another module (torch's)

    def call(self):
        "The name and what stands in the brackets"
        given = ((label, default_of(about)) for name, label, about in self.parameters() if name != "return")
        return f"```python\n{self.nm}({', '.join(label + f'={default}'*bool(default) for label, default in given)})\n```" if callable(self.sym) else ""

    def parameters(self):
        "Name, name with its stars, and what is known of each"
        stars = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}
        return [(name, stars.get(about.get("kind"), "") + name, about) for name, about in (self.dm.dm if self.dm else {}).items()]

    def comment(self, name):
        "The docment that fastcore does not read: of *args, of several parameters on one line, of a dataclass that lives in a notebook"
        pattern = re.compile(rf"[^#]*(?<!\w){name}\s*[:=,)][^#]*#\s*(.+)")
        found = locate(self.fn) or self.sym
        lines = chain.from_iterable(map(header, found.__mro__[:-1] if is_dataclass(found) else [found]))
        return next((match[1] for match in map(pattern.match, lines) if match), None)

    def rows(self):
        "Each parameter with its type, default and docment, and what is returned"
        for name, label, about in self.parameters():
            words, kind = plain(about["docment"] or self.comment(name)), " = ".join(filter(None, (type_name(about["anno"]), default_of(about))))
            if name == "return" and words: yield row("[returns]{.returns}", kind, words)
            elif name not in ("return", "self") and (words or kind): yield row(f"[{plain(label)}]{{.parameter}}", kind, words)

    def members(self):
        "Methods and properties of the class's own cell; what @patch adds has its own place"
        for name, member in vars(self.sym).items() if isclass(self.sym) else ():
            if name[0] == "_" or not isinstance(member, MEMBERS): continue
            yield row(f"[{plain(name)}]{{.parameter #{self.nm.lower()}.{name.lower()}}}", "property" if isinstance(member, property) else "method", plain(member.__doc__))

    def _repr_markdown_(self):
        source = NbdevLookup().code(self.fn)
        return "\n\n".join(filter(None, [f"{'#'*self.title_level} {self.nm}", "::: {.signature}", f"[source]({source}){{.source}}" if source else "", self.call(), plain(self.docs), *self.rows(),
                                         *(["::: {.members}", *members, ":::"] if (members := list(self.members())) else []), ":::"]))
    __repr__ = __str__ = lambda self: self.nm
