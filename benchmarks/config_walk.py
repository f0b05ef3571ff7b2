"""Counts how often a run's config climbs back up on its way through training, from the text of the code."""

import ast
from collections.abc import Iterator
import dataclasses
import functools
from pathlib import Path

# The config, its sections, and what is made of it and handed on in its place.
_ON_ITS_WAY = {"Mesh", "AbstractMesh", "Layout", "PreparedRun"}

_Found = tuple[str, ast.FunctionDef, str]  # file, function, its class or ""


def config_climbs(tree: Path) -> list[str]:
    """Lists the climbs of `config` from `training.loop.train` to the last step.

    Follows every call that takes a config, a section of it (`*Config`), a mesh or layout of it, in the order
    in which the code is written: arguments first, then the call, then its body. A function is walked once. A
    call climbs if it goes to a folder that lies above the one that was called last; a folder (or a module
    beside the folders) lies above all that it imports.

    Args:
        tree: Root of a checkout.

    Returns:
        One line a climb, such as "data/stream.py:train_stream -> sharding.py:local_rows".

    Raises:
        ValueError: For a checkout without `train`.
    """
    package = _Package(tree)
    walk = _Walk(package)
    entry = package.named("topklm/training/loop.py", "train")
    if entry is None:
        raise ValueError(f"{tree} has no topklm/training/loop.py with a function `train`")
    walk.enter(*entry)
    floors = package.floors()
    return [
        f"{left.removeprefix('topklm/')} -> {entered.removeprefix('topklm/')}"
        for left, entered in zip(walk.stays, walk.stays[1:], strict=False)
        if floors[_folder(entered)] > floors[_folder(left)]
    ]


def _folder(stay: str) -> str:
    return "/".join(stay.partition(":")[0].split("/")[:2])


def _carries(annotation: ast.expr | None) -> bool:
    return any(name in _ON_ITS_WAY or name.endswith("Config") for name in _names(annotation))


def _names(annotation: ast.expr | None) -> Iterator[str]:
    for node in ast.walk(annotation) if annotation else ():
        if isinstance(node, ast.Name | ast.Attribute):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


class _Package:
    """The modules of a checkout, their imports and definitions."""

    def __init__(self, tree: Path):
        self.trees = {
            str(path.relative_to(tree)): ast.parse(path.read_text())
            for path in (tree / "topklm").rglob("*.py")
        }
        self.imports = {file: dict(self._imports(parsed)) for file, parsed in self.trees.items()}
        self.classes = {
            c.name: f for f, t in self.trees.items() for c in t.body if isinstance(c, ast.ClassDef)
        }

    @staticmethod
    def _imports(parsed: ast.Module) -> Iterator[tuple[str, tuple[str, str]]]:
        for node in ast.walk(parsed):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "topklm":
                for alias in node.names:
                    yield alias.asname or alias.name, (node.module or "", alias.name)

    def file(self, module: str, name: str) -> str | None:
        """Finds the file that `from module import name` reads."""
        base = module.replace(".", "/")
        options = (f"{base}/{name}.py", f"{base}/{name}/__init__.py", f"{base}.py", f"{base}/__init__.py")
        return next((option for option in options if option in self.trees), None)

    def floors(self) -> dict[str, int]:
        """Maps each folder to the length of the longest way down its imports; a circle counts once."""
        below: dict[str, set[str]] = {}
        for file, imports in self.imports.items():
            targets = {self.file(*target) for target in imports.values()} - {None, "topklm/__init__.py"}
            below.setdefault(_folder(file), set()).update(_folder(str(target)) for target in targets)

        @functools.cache
        def floor(folder: str, above: frozenset[str] = frozenset()) -> int:
            seen = above | {folder}
            return 1 + max((floor(b, seen) for b in below[folder] if b not in seen), default=0)

        return {folder: floor(folder) for folder in below}

    def functions(self, file: str) -> dict[str, ast.FunctionDef]:
        """Returns the functions of a module, methods as "Class.method"."""
        found = {}
        for node in self.trees[file].body:
            if isinstance(node, ast.FunctionDef):
                found[node.name] = node
            elif isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{f.name}": f for f in node.body if isinstance(f, ast.FunctionDef)}
        return found

    def named(self, file: str | None, name: str) -> _Found | None:
        """Finds a function, a method or the constructor of a class, by its name in a module."""
        if file is None:
            return None
        functions = self.functions(file)
        for option, cls in ((name, name.rpartition(".")[0]), (f"{name}.__init__", name)):
            if option in functions:
                return file, functions[option], cls
        handed_on = self.imports[file].get(name) if file.endswith("__init__.py") else None
        return self.named(self.file(*handed_on), handed_on[1]) if handed_on else None


@dataclasses.dataclass
class _Walk:
    package: _Package
    stays: list[str] = dataclasses.field(default_factory=list)  # "file:function"
    passed: set[tuple[str, str]] = dataclasses.field(default_factory=set)

    def enter(self, file: str, function: ast.FunctionDef, cls: str) -> None:
        """Visits a function that takes the config, and all it calls with it."""
        name = f"{cls}.{function.name}".removeprefix(".")
        self.stays.append(f"{file}:{name}")
        if (file, name) in self.passed:
            return
        self.passed.add((file, name))
        types = {a.arg: self._class(a.annotation) for a in _parameters(function)} | {"self": cls}
        if cls:
            types |= self._attributes(file, cls)
        for node in _in_order(function.body):
            if isinstance(node, ast.Assign):
                self._bind(file, node.targets[0], node.value, types)
            elif isinstance(node, ast.withitem):
                self._bind(file, node.optional_vars, node.context_expr, types)
            elif isinstance(node, ast.Call) and (found := self._target(file, node.func, types)):
                _, called, of = found
                carries = any(_carries(a.annotation) for a in _parameters(called))
                if of in _ON_ITS_WAY or of.endswith("Config") or carries:
                    self.enter(*found)

    def _attributes(self, file: str, cls: str) -> dict[str, str]:
        """Returns the classes of the attributes that a constructor sets."""
        init = self.package.functions(file).get(f"{cls}.__init__")
        types = {a.arg: self._class(a.annotation) for a in _parameters(init)} if init else {}
        for node in _in_order(init.body) if init else ():
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._bind(file, target, node.value, types)
        return {name: of for name, of in types.items() if name.startswith("self.")}

    def _bind(self, file: str, target: ast.expr | None, value: ast.expr, types: dict[str, str]) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=False):
                self._bind(file, one, other, types)
        elif target is not None:
            of = types.get(ast.unparse(value), "")
            if isinstance(value, ast.Call) and (found := self._target(file, value.func, types)):
                of = found[2] if found[1].name == "__init__" else self._class(found[1].returns)
            elif isinstance(value, ast.Attribute):
                of = of or self._field(types.get(ast.unparse(value.value), ""), value.attr)
            types[ast.unparse(target)] = of

    def _field(self, cls: str, name: str) -> str:
        """Returns the class of a field of a dataclass."""
        file = self.package.classes.get(cls, "")
        body = [c for c in self.package.trees[file].body if isinstance(c, ast.ClassDef)] if file else []
        fields = [f for c in body if c.name == cls for f in c.body if isinstance(f, ast.AnnAssign)]
        return next((self._class(f.annotation) for f in fields if ast.unparse(f.target) == name), "")

    def _class(self, annotation: ast.expr | None) -> str:
        """Returns the class of the package that an annotation names first, or ""."""
        return next((name for name in _names(annotation) if name in self.package.classes), "")

    def _target(self, file: str, call: ast.expr, types: dict[str, str]) -> _Found | None:
        imports = self.package.imports[file]
        if isinstance(call, ast.Name):
            module, name = imports.get(call.id, ("", call.id))
            return self.package.named(self.package.file(module, name) if module else file, name)
        if not isinstance(call, ast.Attribute):
            return None
        if isinstance(call.value, ast.Call):
            made = self._target(file, call.value.func, types)
            return self.package.named(made[0], f"{made[2]}.{call.attr}") if made and made[2] else None
        owner = ast.unparse(call.value)
        cls = types.get(owner) or (owner if owner in self.package.classes else "")
        if cls:
            return self.package.named(self.package.classes[cls], f"{cls}.{call.attr}")
        return self.package.named(self.package.file(*imports[owner]), call.attr) if owner in imports else None


def _parameters(function: ast.FunctionDef) -> list[ast.arg]:
    arguments = function.args
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]


def _in_order(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Yields the calls and bindings of a body as they are done: parts first, then the whole."""

    def visit(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            yield from visit(child)
        if isinstance(node, ast.Call | ast.Assign | ast.withitem):
            yield node

    for statement in body:
        yield from visit(statement)
