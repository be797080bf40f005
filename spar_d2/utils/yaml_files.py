"""Safe reading of YAML files from untrusted sources."""

from __future__ import annotations

import math
import os

import yaml

# Maximum number of values in a file; Detectron2's largest config has a few hundred.
_MAX_VALUES = 100_000
_MAX_BYTES = 2**22
_TAG = "tag:yaml.org,2002:"


def read_yaml(path: str | os.PathLike) -> dict:
    """Read a YAML file of keys and values.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not valid YAML, has no keys or a key twice, would execute code, or expands without
            limit.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    if os.path.getsize(path) > _MAX_BYTES:
        raise ValueError(f"{path} has more than {_MAX_BYTES >> 20} MiB, which is too much for a YAML file of settings")
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        check_yaml(root, str(path))
        _check_unique(root, str(path), set())
        return yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def check_yaml(root: yaml.Node | None, file: str) -> None:
    """Raise ``ValueError`` for YAML that is no mapping, would execute code, or expands without limit."""
    if not isinstance(root, yaml.MappingNode):
        what = "is empty" if root is None or root.tag == f"{_TAG}null" else f"is a {getattr(root, 'id', 'value')}"
        raise ValueError(f"{file} {what}, but must have lines of KEY: VALUE")
    if _size(root, {}, file) > _MAX_VALUES:
        raise ValueError(f"{file} must have at most {_MAX_VALUES} values, including expanded aliases (*NAME)")


def is_string(node: yaml.Node) -> bool:
    """Whether a node is a string."""
    return node.tag == f"{_TAG}str"


def _size(node: yaml.Node, known: dict[int, float], file: str) -> float:
    """Return the number of values after expansion of aliases; each node is visited once."""
    if id(node) not in known:
        known[id(node)] = math.nan
        position = f"{file}, line {node.start_mark.line + 1}"
        if node.tag.startswith(f"{_TAG}python/"):
            tag = node.tag.removeprefix(_TAG)
            raise ValueError(
                f"!!{tag} ({position}) is not allowed, because it would execute code; write the value itself"
            )
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            if odd := [key for key, _ in parts if key.tag not in (f"{_TAG}str", f"{_TAG}merge")]:
                got = repr(odd[0].value) if isinstance(odd[0], yaml.ScalarNode) else f"a {odd[0].id}"
                raise ValueError(f"keys must be strings ({position}), got {got}; quote it")
            parts = [value for _, value in parts]
        known[id(node)] = 1 + sum(_size(part, known, file) for part in parts)
    if math.isnan(known[id(node)]):
        raise ValueError(f"an alias (*NAME) in {file} refers to a node that contains it; write the value itself")
    return known[id(node)]


def _check_unique(node: yaml.Node | None, file: str, seen: set[int]) -> None:
    """Raise ``ValueError`` for a key that occurs twice in a mapping; PyYAML would use the last one."""
    if node is None or isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, _ in node.value:
            if key.value in keys:
                raise ValueError(f"{file}, line {key.start_mark.line + 1}: the key {key.value!r} occurs twice")
            keys.add(key.value)
    for part in node.value:
        _check_unique(part[1] if isinstance(node, yaml.MappingNode) else part, file, seen)
