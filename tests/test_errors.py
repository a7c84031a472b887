from __future__ import annotations

import inspect
import pickle
import re

import pytest

import proteus_pipeline
from proteus_pipeline import errors
from proteus_pipeline.errors import IntegrityError, ProteusError, StorageError

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, Exception) and value is not ProteusError
}
_LINE = re.compile(r"^( +)[│ ]*[├└]── (\w+) +(?:\((\w+)\) +)?exit (\d)", re.MULTILINE)


def documented() -> dict[str, tuple[str | None, int]]:
    lines = _LINE.findall(errors.__doc__ or "")
    return {name: (builtin or None, int(code)) for _, name, builtin, code in lines}


def test_the_tree_in_the_docstring_is_the_tree():
    found = {}
    for name, cls in CLASSES.items():
        builtins = [b.__name__ for b in cls.__bases__ if b.__module__ == "builtins"]
        found[name] = (builtins[0] if builtins else None, cls.exit_code)
    assert documented() == found
    assert IntegrityError.__base__ is StorageError


@pytest.mark.parametrize("cls", [ProteusError, *CLASSES.values()])
def test_each_error_survives_pickling_and_reads_as_one_line(cls: type[ProteusError]):
    error = cls("esm2@v1.0.0 is gone", "run: proteus model list")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert (again.what, again.remedy) == ("esm2@v1.0.0 is gone", "run: proteus model list")
    assert str(again) == "esm2@v1.0.0 is gone; run: proteus model list"
    assert str(cls("alone")) == "alone"


@pytest.mark.parametrize(("name", "builtin"), [(n, b) for n, (b, _) in documented().items() if b])
def test_each_error_is_caught_as_its_builtin(name: str, builtin: str):
    import builtins

    with pytest.raises(getattr(builtins, builtin)):
        raise CLASSES[name]("x", "y")


def test_an_integrity_error_is_an_oserror_and_exits_with_4():
    error = IntegrityError("x", "y")
    assert isinstance(error, OSError)
    assert error.exit_code == 4


def test_every_error_can_be_imported_from_the_top():
    for name, cls in CLASSES.items():
        assert getattr(proteus_pipeline, name) is cls
