"""Search spaces of `detkit tune`: which settings of a config are varied, and between what. YAML over dotted names."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import Field, PositiveFloat, TypeAdapter, ValidationError, model_validator

from detkit import config
from detkit.errors import UserError, nearest

DEFAULT = "default"  # the space where none is named
FIXED = ("name", "runs", "data")  # what all trials of a study share
_DRAWS = 20  # of the other settings, before a value is called impossible
_MOST_COMBINATIONS = 1000


class Range(config.Settings):
    """Numbers from one end to the other, both among them. Whether they are whole is the setting's affair."""

    low: float | None = Field(None, description="least value")
    high: float | None = Field(None, description="greatest value")
    times: tuple[PositiveFloat, PositiveFloat] | None = Field(
        None, description="both ends as multiples of the config's value, drawn by order of magnitude"
    )
    log: bool = Field(False, description="drawn by order of magnitude")
    step: PositiveFloat | None = Field(None, description="between neighbouring values, counted from low")

    @model_validator(mode="after")
    def _ends(self) -> Range:
        if (self.times is None) == (self.low is None) or (self.low is None) != (self.high is None):
            raise ValueError("give low and high, or times")
        ends = self.times or (self.low or 0.0, self.high or 0.0)
        if not ends[0] < ends[1] or not math.isfinite(ends[1] - ends[0]):
            raise ValueError(f"the first end is to be below the second, not {ends[0]:g} and {ends[1]:g}")
        if self.log and ends[0] <= 0:
            raise ValueError(f"log needs a low above 0, not {ends[0]:g}")
        if self.step and (self.log or self.times):
            raise ValueError("step goes with low and high, without log")
        return self


_SPACE = TypeAdapter(dict[str, Range | tuple[Any, ...]])


@dataclass(frozen=True, slots=True)
class Numbers:
    """A setting's values from `low` to `high`."""

    low: float
    high: float
    log: bool
    step: float | None
    whole: bool

    def ends(self) -> list[Any]:
        """The values that are tried before any is trained with."""
        return [self.low, self.high]

    def draw(self, rng: random.Random) -> Any:
        """One of them."""
        if self.step:
            return self.low + self.step * rng.randrange(int((self.high - self.low) / self.step + 1e-9) + 1)
        value = math.exp(rng.uniform(math.log(self.low), math.log(self.high))) if self.log else self.low
        value = value if self.log else rng.uniform(self.low, self.high)
        return round(value) if self.whole else value

    def has(self, value: Any) -> bool:
        """Whether a number is one of them."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            return False
        return not self.step or math.isclose((value - self.low) / self.step, round((value - self.low) / self.step))


@dataclass(frozen=True, slots=True)
class Choices:
    """A setting's or a whole group's values, by what they are called: themselves, or their YAML."""

    values: dict[Any, Any]

    def ends(self) -> list[Any]:
        """The values that are tried before any is trained with."""
        return [*self.values]

    def draw(self, rng: random.Random) -> Any:
        """What one of them is called."""
        return rng.choice([*self.values])


Space = dict[str, Numbers | Choices]


def _kind(name: str) -> type[int | float] | None:
    """Whether a setting is a whole number, a number, or neither."""
    found = {part for dotted, field in config.fields() if dotted == name for part in _parts(field.annotation)}
    return float if float in found else int if int in found else None


def _parts(annotation: Any) -> Iterator[Any]:
    """What is united in a type annotation."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        for part in get_args(annotation):
            yield from _parts(part)
    else:
        yield annotation


def label(value: Any) -> Any:
    """What a value is called in a study: itself, or where it is a list or a group, its YAML on one line."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True).strip()


def load(name: str | Path | None, settings: config.Config) -> tuple[Space, dict[str, Any], list[str]]:
    """Read the space `name` for a config: the space, its YAML as plain data, and what was left out of it, and why.

    name: a path, a file in ./configs/search or among those shipped; None: the default one, of which only what fits the
    config is kept. Raises UserError, one line, naming the file and the setting.
    """
    path = find(name or DEFAULT)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        raise UserError(f"{path}: not valid YAML{f' (line {where.line + 1})' if where else ''}") from None
    if name is not None:
        return parse(tree, settings, str(path)), tree, []
    space: Space = {}
    left_out = []
    for setting, values in tree.items():
        try:
            space |= parse({setting: values}, settings, str(path))
        except UserError as error:
            left_out.append(f"{setting} ({str(error).removeprefix(f'{path}: ')})")
    return space, {setting: tree[setting] for setting in space}, left_out


def find(name: str | Path) -> Path:
    """The file of a space: as a path, in ./configs/search, or among those shipped. Raises UserError."""
    name = Path(name)
    folders = (Path("configs") / "search", config.shipped() / "search")
    candidates = [name, *(folder / name for folder in folders)]
    if not name.suffix:
        candidates += [path.with_suffix(".yaml") for path in candidates]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted({path.name for folder in folders for path in folder.glob("*.yaml")})
    raise UserError(f"{name}: no such search space{nearest(name.name, known)}; shipped: {', '.join(known)}")


def parse(tree: object, settings: config.Config, source: str) -> Space:
    """A space from plain data, for a config. Raises UserError, one line, naming `source` and the setting, where a
    setting is unknown, or one of its values is possible with none of the others tried."""
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{source}: not a search space: expected lines such as 'train.batch_size: [4, 8, 16]'")
    known = config.names()
    for name in tree:
        if name not in known:
            raise UserError(f"{source}: no setting '{name}'{nearest(str(name), known)}")
        if name.split(".")[0] in FIXED:
            raise UserError(f"{source}: {name}: all trials of a study have the same {name.split('.')[0]}")
    try:
        given = _SPACE.validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name, *inside = [str(part) for part in first["loc"] if "Range" not in str(part)]
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "model_type":
            reason = "give a range, such as {low: 1, high: 9}, or a list of values"
        elif first["type"] == "extra_forbidden":
            reason = f"no such part of a range{nearest(inside[-1], Range.model_fields)}"
        raise UserError(f"{source}: {': '.join([name, *inside])}: {reason[:1].lower() + reason[1:]}") from None
    start = settings.model_dump(mode="json")
    space: Space = {}
    for name, values in given.items():
        where = f"{source}: {name}"
        space[name] = (
            _numbers(name, values, start, where) if isinstance(values, Range) else _choices(name, values, where)
        )
    _check(space, start, source)
    return space


def _numbers(name: str, values: Range, start: dict[str, Any], where: str) -> Numbers:
    kind = _kind(name)
    if kind is None:
        raise UserError(f"{where}: this is no number: give a list of values")
    low, high = values.low or 0.0, values.high or 0.0
    if values.times:
        now = value_at(start, name)
        if isinstance(now, bool) or not isinstance(now, (int, float)) or now <= 0:
            raise UserError(f"{where}: times needs a number above 0 in the config, not {now}: give low and high")
        low, high = (now * factor for factor in values.times)
    step = values.step
    if kind is int:
        low, high, step = math.ceil(low), math.floor(high), step and max(1, round(step))
        if low >= high:
            raise UserError(f"{where}: there are no two whole numbers between its ends")
    return Numbers(low, high, values.log or values.times is not None, step, kind is int)


def _choices(name: str, values: tuple[Any, ...], where: str) -> Choices:
    kind = _kind(name)
    if kind:  # YAML takes 1e-3 for text
        values = tuple(_number(value) for value in values)
    named = {label(value): value for value in values}
    if len(named) < max(2, len(values)):
        reason = "a value is there twice" if len(named) < len(values) else "give two values or more"
        raise UserError(f"{where}: {reason}, not {label(list(values))}")
    return Choices(named)


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def value_at(tree: Mapping[str, Any], name: str) -> Any:
    """The setting of that dotted name in a config's tree; None where there is none."""
    node: Any = tree
    for key in name.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def applied(start: dict[str, Any], space: Space, labels: Mapping[str, Any], source: str) -> config.Config:
    """The config `start` with settings of the space as `labels` say. Raises UserError, one line, naming `source`, where
    they make no config. Whole groups are set first, so that a setting of theirs can be varied as well."""
    tree = copy.deepcopy(start)
    for name in sorted(labels, key=lambda name: name.count(".")):
        values = space[name]
        try:
            config.put(tree, name, values.values[labels[name]] if isinstance(values, Choices) else labels[name])
        except UserError as error:
            raise UserError(f"{source}: {name}: {error}") from None
    return config.parse(tree, source)


def _check(space: Space, start: dict[str, Any], source: str) -> None:
    """Raise UserError for a value that is possible with none of the others tried."""
    rng = random.Random(0)
    for name, values in space.items():
        for value in values.ends():
            reason: UserError | None = None
            for draw in range(1 + _DRAWS):
                others = {other: space[other].draw(rng) for other in space} if draw else {}
                try:
                    applied(start, space, others | {name: value}, f"{source}: {name}={value}")
                    break
                except UserError as error:
                    reason = reason or error
            else:
                assert reason
                raise reason


def starting(space: Space, settings: config.Config) -> dict[str, Any]:
    """What the config itself has, as labels; of settings whose value there is not in the space, nothing."""
    start = settings.model_dump(mode="json")
    found: dict[str, Any] = {}
    for name, values in space.items():
        if isinstance(values, Numbers):
            now = value_at(start, name)
            found |= {name: now} if values.has(now) else {}
            continue
        for value in values.values:
            try:
                if applied(start, {name: values}, {name: value}, "") == settings:
                    found[name] = value
                    break
            except UserError:
                continue
    return found


def combinations(space: Space, source: str) -> dict[str, list[Any]]:
    """The values of each setting in a grid. Raises UserError where they are endless, or far too many."""
    grid: dict[str, list[Any]] = {}
    for name, values in space.items():
        if isinstance(values, Choices):
            grid[name] = [*values.values]
        elif values.step or (values.whole and not values.log):
            step = values.step or 1
            count = int((values.high - values.low) / step + 1e-9) + 1
            grid[name] = [values.low + step * k for k in range(min(count, _MOST_COMBINATIONS + 1))]
        else:
            raise UserError(f"{source}: {name}: a grid needs a list of values, or a step")
    if (count := math.prod(map(len, grid.values()))) > _MOST_COMBINATIONS:
        raise UserError(f"{source}: a grid of {count} combinations or more; give fewer values, or use random or tpe")
    return grid


def schema() -> dict[str, Any]:
    """The JSON schema of search spaces, for editors."""
    values = {"anyOf": [{"$ref": "#/$defs/Range"}, {"type": "array", "minItems": 2}]}
    properties = {
        name: values | ({"description": field.description} if field.description else {})
        for name, field in config.fields()
        if name.split(".")[0] not in FIXED
    }
    return {
        "title": "search space of detkit tune",
        "type": "object",
        "minProperties": 1,
        "properties": properties,
        "additionalProperties": False,
        "$defs": {"Range": Range.model_json_schema()},
    }
