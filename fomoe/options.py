"""Trees of options: frozen sections, types of values, and one line per mistake (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

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

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class KindOptions(Options):
    """Base of the kinds of a section that has several: `kind` chooses, and each has its options.

    A null for an option of another kind is ignored. Any other value for one is kept until
    `refuse_other_kinds` refuses it, because a method may still replace the section.
    """

    model_config = ConfigDict(extra="allow")
    kind: str

    @model_validator(mode="before")
    @classmethod
    def _drop_null_of_another_kind(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {k: value for k, value in tree.items() if k in cls.model_fields or value is not None}


def default_kind(kind: str) -> BeforeValidator:
    """The kind of a section that does not give one."""
    return BeforeValidator(lambda tree: {"kind": kind, **tree} if isinstance(tree, dict) else tree)


T = TypeVar("T", bound=Options)


def parse_options(tree: dict[str, Any], kind: type[T]) -> T:
    """Build a section and those below it from nested dicts.

    Raises:
        ConfigError: for the first mistake; for an unknown key it names the nearest valid one,
            in whatever section that is.
    """
    _refuse_unknown(tree, kind, "", sorted(option_names(kind)))
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _first_problem(error, kind) from None


def section_kinds(declared: Any) -> tuple[type[Options], ...]:
    """The sections that a declared type allows: none for an option, several if `kind` chooses."""
    union = get_origin(declared) in (Union, UnionType)
    named = get_args(declared) if union else (declared,)
    return tuple(kind for kind in named if isinstance(kind, type) and issubclass(kind, Options))


def declared_options(section: Any) -> dict[str, Any]:
    """The declared type of every option of a section, of all its kinds, by name."""
    options: dict[str, Any] = {}
    for kind in section_kinds(section):
        for name, info in kind.model_fields.items():
            own = info.annotation
            options[name] = options[name] | own if name in options else own
    return options


def option_names(section: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of every option of a section, of all its kinds."""
    for name, declared in declared_options(section).items():
        if section_kinds(declared):
            yield from option_names(declared, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def refuse_other_kinds(options: Options, prefix: str = "") -> None:
    """Refuse a value for an option that only other kinds of its section have.

    Raises:
        ConfigError: naming the option, its value and the kinds that have it.
    """
    for name, section in options:
        if isinstance(section, KindOptions):
            kinds = section_kinds(type(options).model_fields[name].annotation)
            for option, value in (section.model_extra or {}).items():
                owners = [k.model_fields["kind"].default for k in kinds if option in k.model_fields]
                rule = (
                    f"is an option of {' and '.join(owners)} {name} and has no meaning for "
                    f"{section.kind} {name}; set it to null"
                )
                raise ConfigError(f"{prefix}{name}.{option}", value, rule)
        elif isinstance(section, Options):
            refuse_other_kinds(section, f"{prefix}{name}.")


def _refuse_unknown(tree: Any, section: Any, prefix: str, names: list[str]) -> None:
    options = declared_options(section)
    for key, value in tree.items():
        field = f"{prefix}{key}"
        if key not in options:
            raise _unknown(field, value, list(options), prefix, names)
        if section_kinds(options[key]):
            if not isinstance(value, dict):
                shown = "null" if value is None else value
                raise ConfigError(field, shown, "must be a section of options")
            _refuse_unknown(value, options[key], f"{field}.", names)


def _unknown(
    field: str, value: Any, section: list[str], prefix: str, names: list[str]
) -> ConfigError:
    sections = {name.rpartition(".")[0] for name in names if "." in name}
    # A section's name may be what is misspelled.
    found = near(field, sorted(sections)) if isinstance(value, dict) else None
    found = found or near(field, names)
    rule = f"did you mean {found}?" if found else f"choose from {', '.join(section)}"
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


def _first_problem(error: ValidationError, section: type[Options]) -> ConfigError:
    problem = error.errors()[0]
    field = _field(problem["loc"], section)
    value = problem["input"]
    if problem["type"] == "union_tag_invalid":
        kinds = " or ".join(problem["ctx"]["expected_tags"].replace("'", "").rsplit(", ", 1))
        return ConfigError(f"{field}.kind", yaml_word(value["kind"]), f"must be one of {kinds}")
    if problem["type"] == "string_type":
        rule = "must be text"
        if value is not None and not isinstance(value, list | dict):
            rule += f"; in a file it needs quotes, as in '{yaml_word(value)}'"
        return ConfigError(field, yaml_word(value), rule)
    context = problem.get("ctx", {})
    rule = _RULES.get(problem["type"], str(context.get("error", problem["msg"])))
    return ConfigError(field, yaml_word(value), rule.format(**context).replace("'", ""))


def _field(place: tuple[int | str, ...], declared: Any) -> str:
    """The dotted name of a location; pydantic's has the kind after a section with several kinds."""
    names, parts = [], iter(place)
    for part in parts:
        names.append(str(part))
        declared = declared_options(declared).get(str(part))
        if len(section_kinds(declared)) > 1:
            next(parts, None)
    return ".".join(names)


def yaml_word(value: Any) -> str:
    """A value as the user would write it in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)
