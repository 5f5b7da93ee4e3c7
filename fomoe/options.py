"""Trees of options: frozen sections, types of values, and one line per mistake (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fomoe.errors import ConfigError
from fomoe.hints import near


def _check_text(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    if "\0" in text:
        raise ValueError("must not hold a NUL")
    return text


MOST = 10**9  # of any count: beyond it a mistyped exponent would run for ever, or overflow
Positive = Annotated[int, Field(ge=1, le=MOST)]
NonNegative = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0)]
Text = Annotated[str, AfterValidator(_check_text)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=1e7)]  # most: four months
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of a running mean
# YAML has lists only; the tree is frozen, so it keeps tuples. Items stay strictly typed.
IntTuple = Annotated[tuple[int, ...], Field(strict=False)]
TextTuple = Annotated[tuple[Text, ...], Field(strict=False)]
AnyTuple = Annotated[tuple[Any, ...], Field(strict=False)]


class Options(BaseModel):
    """Base of every section: unknown keys are errors, values are strict and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


T = TypeVar("T", bound=Options)


def parse_options(tree: dict[str, Any], kind: type[T]) -> T:
    """Build a section and those below it from nested dicts.

    Raises:
        ConfigError: for the first mistake; an unknown key names the nearest valid one, wherever
            that one stands.
    """
    _refuse_unknown(tree, kind, "", sorted(option_names(kind)))
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _first_problem(error) from None


def _refuse_unknown(tree: Any, section: type[Options], prefix: str, names: list[str]) -> None:
    for key, value in tree.items():
        field = f"{prefix}{key}"
        if key not in section.model_fields:
            raise _unknown(field, value, section, prefix, names)
        kind = section.model_fields[key].annotation
        if isinstance(kind, type) and issubclass(kind, Options):
            if not isinstance(value, dict):
                shown = "null" if value is None else value
                raise ConfigError(field, shown, "must be a section of options")
            _refuse_unknown(value, kind, f"{field}.", names)


def option_names(section: type[Options], prefix: str = "") -> Iterator[str]:
    """Dotted names of every option of a section."""
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Options):
            yield from option_names(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _unknown(
    field: str, value: Any, section: type[Options], prefix: str, names: list[str]
) -> ConfigError:
    sections = {name.rpartition(".")[0] for name in names if "." in name}
    # A section's name may be what is misspelled.
    found = near(field, sorted(sections)) if isinstance(value, dict) else None
    found = found or near(field, names)
    rule = f"did you mean {found}?" if found else f"there are {', '.join(section.model_fields)}"
    where = f" of {prefix.rstrip('.')}" if prefix and not found else ""
    shown = field if field == field.strip() else repr(field)
    return ConfigError(shown or repr(field), "", f"is not an option{where}; {rule}")


_RULES = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_unicode": "must be text in UTF-8",
    "literal_error": "must be one of {expected}",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
}


def _first_problem(error: ValidationError) -> ConfigError:
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    value = problem["input"]
    if problem["type"] == "string_type":
        rule = "must be text"
        if value is not None and not isinstance(value, list | dict):
            rule += f"; in a file it needs quotes, as in '{yaml_word(value)}'"
        return ConfigError(field, yaml_word(value), rule)
    context = problem.get("ctx", {})
    rule = _RULES.get(problem["type"], str(context.get("error", problem["msg"])))
    return ConfigError(field, yaml_word(value), rule.format(**context).replace("'", ""))


def yaml_word(value: Any) -> str:
    """A value as the user would write it in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)
