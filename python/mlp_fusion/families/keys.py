"""Which key of a config moves a width: change one number, build again on the meta device, and compare shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from mlp_fusion.families.building import WIDTHS, build, put, shapes

#: Numbers that cannot be widths; to save time only.
_NO_WIDTHS = re.compile(
    r".*(token_id|token_index|_ids?$|^transformers_version|^seed$|^num_labels$|dropout|_eps$|^eps$|initializer|epsilon"
    r"|theta|temperature|penalty|_loss|loss_|coef|top_p|^top_k$|num_beams|max_length|min_length).*"
)
_RATIOS = re.compile(r".*(ratio|mult|expan|factor).*")
_NO_NUMBERS = {"id2label", "label2id", "rope_parameters", "rope_scaling", "task_specific_params", "quantization_config"}

Path = tuple[str, ...]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Move:
    """What a change of one key does.

    Attributes:
        path, value: the key and what it says.
        trial: what it was changed to.
        axes: parameter -> the axes that moved; None where its number of axes changed.
        same_names: no parameter came or went.
    """

    path: Path
    value: Any
    trial: Any
    axes: dict[str, tuple[int, ...] | None]
    same_names: bool

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def kind(self) -> str:
        """`int`, `ratio`, `list` or `unset`."""
        if self.value is None:
            return "unset"
        return {list: "list", float: "ratio"}.get(type(self.value), "int")

    @property
    def pure(self) -> bool:
        """It moves parameters along one axis each, and nothing comes or goes."""
        return self.same_names and all(axes is not None and len(axes) == 1 for axes in self.axes.values())


def leaves(values: dict[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Numbers, lists of numbers and unset likely widths of a config's dict, nested ones too."""
    for name, value in values.items():
        here = (*path, str(name))
        if isinstance(value, dict):
            if name not in _NO_NUMBERS:
                yield from leaves(value, here)
        elif isinstance(value, bool) or _NO_WIDTHS.fullmatch(str(name)):
            continue
        elif value is None:
            if WIDTHS.fullmatch(str(name)) and "types" not in name:
                yield here, None
        elif isinstance(value, int) or (isinstance(value, float) and _RATIOS.fullmatch(str(name))):
            yield here, value
        elif isinstance(value, (list, tuple)) and value and all(type(entry) in (int, float) for entry in value):
            yield here, list(value)


class Keys:
    """Experiments with the keys of one config, each done once.

    Args:
        cls: the model's class.
        config: the user's; it is not changed.
        base: shapes of the model that it describes.
    """

    def __init__(self, cls: type[PreTrainedModel], config: Any, base: Shapes) -> None:
        self.cls, self.config, self.base = cls, config, base
        self.values = config.to_dict()
        self.leaves = dict(leaves(self.values))
        self._moves: dict[Path, Move | None] = {}

    @property
    def likely(self) -> list[Path]:
        """Keys whose name speaks of a width."""
        return [path for path in self.leaves if WIDTHS.fullmatch(path[-1])]

    def leaves_of(self, keys: Iterable[str | None]) -> list[Path]:
        """Paths of keys by their dotted names."""
        wanted = set(keys)
        return [path for path in self.leaves if ".".join(path) in wanted]

    def explaining(self, width: int, d_in: int) -> list[Path]:
        """All keys, those first whose value can explain a width."""

        def far(path: Path) -> int:
            value = self.leaves[path]
            numbers = value if isinstance(value, list) else [value]
            if any(n is not None and width in (n, round(n * d_in)) for n in numbers):
                return 0
            if any(isinstance(n, float) or n is None or width == 2 * n for n in numbers):
                return 1
            return 2 if any(n and (width % n == 0 or n % width == 0) for n in numbers) else 3

        return sorted(self.leaves, key=lambda path: (far(path), [*self.leaves].index(path)))

    def move(self, path: Path) -> Move | None:
        """What changing the key does, or None where it does nothing or no other value can be built."""
        if path not in self._moves:
            self._moves[path] = self._try(path)
        return self._moves[path]

    def _try(self, path: Path) -> Move | None:
        value = self.leaves[path]
        for trial in _trials(value):
            try:
                config = type(self.config).from_dict(put(self.values, path, trial))
                found = shapes(build(self.cls, config))
            except Exception:  # noqa: BLE001  (a config with a wrong number may fail in any way)
                continue
            axes = {
                name: _moved(shape, found[name])
                for name, shape in self.base.items()
                if name in found and found[name] != shape
            }
            same_names = found.keys() == self.base.keys()
            if axes or not same_names:
                return Move(path, value, trial, axes, same_names)
        return None


def _moved(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...] | None:
    if len(before) != len(after):
        return None
    return tuple(axis for axis, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)


def _trials(value: Any) -> list[Any]:
    """Other values of a key, one of which should build."""
    if value is None:
        return [1000, 24]
    if isinstance(value, list):
        return [[entry * 2 for entry in value], [entry + 8 for entry in value]]
    if isinstance(value, float):
        return [value * 2]
    return [value + 1, value * 2] if 0 < value < 16 else [value + 8, value * 2] if value > 0 else [8]
