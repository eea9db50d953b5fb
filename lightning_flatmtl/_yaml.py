"""YAML as people mean it: no key twice, and ``1e-3`` is a number."""

import re
from collections.abc import Iterable
from typing import Any

import yaml  # type: ignore[import-untyped]

__all__ = ["load_yaml", "once"]


def load_yaml(text: str) -> Any:
    """Parse YAML safely.

    Raises:
        ValueError: If a mapping has two equal keys.
        yaml.YAMLError: If it is no YAML.
    """
    return yaml.load(text, _Loader)


def once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping of ``pairs``, whose keys differ; the parsers would take the last of two.

    Raises:
        ValueError: If a key comes twice.
    """
    mapping: dict[Any, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(
                f"{key!r} is given twice in the same mapping: remove or merge one of the two."
            )
        mapping[key] = value
    return mapping


class _Loader(yaml.SafeLoader):
    """Safe YAML that also takes ``1e-3`` for a number, as YAML 1.2 does and PyYAML does not.

    Two equal keys of a mapping are refused.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Before a merge key brings entries that those of the mapping may override.
        own = (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge")
        once((self.construct_object(key, deep=True), None) for key in own)
        super().flatten_mapping(node)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
