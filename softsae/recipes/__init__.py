"""Recipes: configurations as files of this folder, every value with its source in a comment.

A recipe is NAME.yaml; its first line, a comment, says what it is. A new file is a new recipe.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from softsae.checks import nearest_choice
from softsae.config import RunConfig
from softsae.keys import build, read_yaml

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from softsae.options import RecipesOptions


def names() -> list[str]:
    """The names of all recipes."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def file_of(name: str) -> Traversable:
    """The file of a recipe. Raises ValueError for a name that there is not, with the nearest one."""
    nearest_choice("recipe", name, names())
    return resources.files(__name__) / f"{name}.yaml"


def recipe(name: str) -> RunConfig:
    """The configuration of a recipe, to be changed and given to `Trainer`.

    Raises ValueError for a name that there is not, with the nearest one.
    """
    file = file_of(name)
    return build(RunConfig, read_yaml(file), file.name)


def recipes(options: RecipesOptions) -> None:
    """softsae recipes: all of them with a line each, or one as it is."""
    if options.name is not None:
        print(file_of(options.name).read_text(encoding="utf-8"), end="")
        return
    width = max(map(len, names()))
    for name in names():
        about = file_of(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        print(f"{name:<{width}}  {about}")
