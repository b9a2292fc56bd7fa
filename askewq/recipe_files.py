"""Recipes as YAML files: read, written, and those that come with askewq."""

from pathlib import Path
from typing import Any

import yaml

from askewq.config import Recipe
from askewq.errors import RecipeError, near

# The recipe beside what was made by it.
RECIPE = "recipe.yaml"


class _Loader(yaml.SafeLoader):
    """yaml's safe loader, which takes the last of keys that are given twice; this one refuses."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping.

        Raises:
            yaml.MarkedYAMLError: a key that is there twice.
        """
        seen: set[str] = set()
        for given, _ in node.value:
            if given.tag == "tag:yaml.org,2002:merge":
                continue
            key = str(self.construct_object(given, deep=True))
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key} is given twice", given.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def text_of(path: Path) -> str:
    """Return the text of a recipe file.

    Raises:
        RecipeError: a file that is missing, or no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the keys and values of a recipe file.

    Raises:
        RecipeError: a file that is missing, not YAML, or not a mapping.
    """
    try:
        content = yaml.load(text_of(path), _Loader)  # it is a safe one
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"the recipe {path} must be a mapping of keys to values.")
    return {str(key): value for key, value in content.items()}


def to_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML, every key in the order of the class."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def recipe_folder() -> Path:
    """Return the folder of the recipes that come with askewq."""
    installed = Path(__file__).parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with askewq, by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by path or by the name of a shipped one.

    Raises:
        RecipeError: neither exists.
    """
    if name in (shipped := shipped_recipes()):
        return shipped[name]
    if Path(name).is_file():
        return Path(name)
    raise RecipeError(
        f"there is no recipe {name!r}, neither as a file nor among those that come with askewq"
        f"{near(name, shipped)}; they are: {', '.join(shipped) or 'none'}."
    )
