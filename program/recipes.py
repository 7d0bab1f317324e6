"""Reading recipes: strict YAML, lists that replace earlier ones, a mistake in one line, and no null where a setting takes none."""

import contextlib
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from program.screen import one_sentence

RECIPES = Path(__file__).parents[1] / "configs"
_MOST = 100_000  # settings in a file, aliases counted as what they stand for


class Parser(LightningArgumentParser):
    """A parser that answers a mistake in one line, not below seventy lines of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say it and exit with 2; where the parser tries one type after another, it goes on."""
        if not self.exit_on_error or os.environ.get("POTSTILL_DEBUG"):
            super().error(message, ex)
        program = (getattr(ex, "subcommand_parser", None) or self).prog.replace(" [options]", "")
        self.exit(2, f"error: {one_sentence(message)} (all options: {program} --help)\n")


class ConfigFile(ActionConfigFile):
    """A file whose lists replace those of the files before it; `name+:` appends.

    jsonargparse does so unless both lists are equally long: then entries of one class take over earlier `init_args`.
    """

    def __call__(  # type: ignore[override]
        self, parser: ArgumentParser, cfg: Namespace, values: str, option_string: str | None = None
    ) -> None:
        """Forget the earlier lists that the file names, then read it."""
        try:
            text, is_file = Path(values).read_text(encoding="utf-8"), True
        except OSError:
            text, is_file = values, False  # settings written on the command line, or nothing that can be read
        with contextlib.suppress(yaml.YAMLError):  # the parser says so
            if mistake := _mistake(yaml.compose(text, yaml.SafeLoader), {}):
                parser.error(f"{mistake} in {values}; correct the file")
            settings = yaml.safe_load(text)
            if not is_file and not isinstance(settings, Mapping):
                found = "a folder" if os.path.isdir(values) else "no file that can be read"
                ours = ", ".join(sorted(path.name for path in RECIPES.glob("*.yaml")))
                parser.error(
                    f"expected a recipe at {values!r}, found {found}; check the path, or take one of configs/: {ours}"
                )
            for key, value in flatten(settings if isinstance(settings, Mapping) else {}).items():
                if isinstance(value, list):
                    cfg.pop(key, None)
        super().__call__(parser, cfg, values, option_string)


def _mistake(node: yaml.Node | None, sizes: dict[yaml.Node, int]) -> str | None:
    """What YAML would take without a word: a key given twice, or aliases of aliases that stand for more than anybody wrote."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            return f"expected every setting once, found {twice!r} twice below line {node.start_mark.line + 1}"
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    else:
        return None
    for part in parts:
        if part not in sizes and (mistake := _mistake(part, sizes)):
            return mistake
    sizes[node] = 1 + sum(sizes.get(part, 1) for part in parts)
    return f"expected at most {_MOST:,} settings, found aliases for {sizes[node]:,}" if sizes[node] > _MOST else None


def class_at(class_path: str) -> type[Any]:
    """The class that the user has named; the parser has imported it."""
    module, _, name = class_path.rpartition(".")
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found


def callbacks_of(config: Namespace) -> list[Namespace]:
    """Those that are listed; the parser takes one alone, too."""
    listed = config.trainer.callbacks if isinstance(config.trainer.callbacks, list) else [config.trainer.callbacks]
    return [each for each in listed if isinstance(each, Namespace) and "class_path" in each]


def refuse_nulls(config: Namespace, others: Mapping[str, tuple[type[Any], Any]]) -> None:
    """Raise `ValueError` for a null that its setting's type does not know: the parser takes one for anything.

    `others` are the class and the settings of what is neither model nor data nor a callback, by place.
    """
    parts = {"model": config.model, "data": config.data}
    parts |= {f"trainer.callbacks.{at}": callback for at, callback in enumerate(callbacks_of(config))}
    typed = {f"{name}.init_args": (class_at(part.class_path), part.get("init_args")) for name, part in parts.items()}
    nulls = [name for name in ("name", "root", "trainer.accumulate_grad_batches") if config.get(name) is None]
    for place, (kind, settings) in {**typed, **others}.items():
        hints: dict[str, Any] = {}
        for base in (base for base in kind.__mro__ if "__init__" in vars(base)):
            with contextlib.suppress(NameError):  # types of other libraries that exist for type checkers only
                hints = get_type_hints(vars(base)["__init__"]) | hints
        for name, value in (settings or {}).items():
            hint = hints.get(name, Any)
            if value is None and hint is not Any and NoneType not in get_args(hint):
                nulls.append(f"{place}.{name}")
    if nulls:
        raise ValueError(f"expected a value for {nulls[0]}, found null; leave it out for its default, or give one")


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their full name, with dots."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
