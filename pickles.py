"""Pickles of numpy arrays, read without executing anything.

A pickle is a program for a small machine with a stack, which may call any function of Python. Here
that machine knows containers, text, numbers and the four functions by which numpy writes arrays,
data types and scalars; none of Python's or numpy's own is called by name. A file that asks for
more is refused.
"""

import math
import mmap
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Of a file; one of 700 arrays has about 30,000.
MOST_OPERATIONS = 300_000


class Refused(ValueError):
    """A pickle that holds, or asks for, more than arrays of numbers and builtin containers."""


class _Dtype:
    """numpy.dtype while its parts come in."""

    def __init__(self, name: Any, *_: Any) -> None:
        name = name.decode("latin-1") if isinstance(name, bytes) else name
        if not isinstance(name, str) or name.lstrip("<>=|") not in _NUMBERS:
            raise Refused(f"holds an array of {name!r:.40}, where only numbers are read")
        self.dtype = np.dtype(name)

    def build(self, state: Any) -> None:
        order: Any = state[1].decode() if isinstance(state[1], bytes) else state[1]
        if any(part is not None for part in state[2:5]) or order not in ("<", ">", "=", "|"):
            raise Refused("holds an array of records, where only numbers are read")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """numpy.ndarray while its parts come in."""

    array: np.ndarray | None = None

    def build(self, state: Any) -> None:
        shape, dtype, fortran, data = state[-4:]  # an old numpy has no version in front
        self.array = _array(data, dtype, shape, "F" if fortran else "C")


_NUMBERS = {f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)} - {"f1"} | {"b1"}


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """An array over the bytes of the file, which must be as many as it declares."""
    data = data.encode("latin-1") if isinstance(data, str) else data  # of Python 2
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise Refused("holds an array that is not of numbers")
    sides = [shape] if type(shape) is int else list(shape)
    if len(sides) > 32 or not all(type(side) is int and 0 <= side < 2**62 for side in sides):
        raise ValueError("an array of an impossible shape")
    if math.prod(sides) * dtype.dtype.itemsize != len(data):
        raise ValueError(
            f"an array of shape {tuple(sides)} and type {dtype.dtype} with {len(data):,} bytes"
        )
    return np.ndarray(sides, dtype.dtype, data, order="F" if order == "F" else "C")


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C").item()


def _encode(text: Any, encoding: Any = "latin-1") -> bytes:
    """How Python 3 writes bytes in the protocols of Python 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise Refused("holds bytes in another encoding than latin-1")
    return text.encode(encoding)


def _bytes(kind: type) -> Callable[..., Any]:
    def make(*arguments: Any) -> Any:
        if len(arguments) == 2:
            return kind(_encode(*arguments))
        if not all(isinstance(argument, bytes | bytearray) for argument in arguments):
            raise Refused("holds bytes that are not written out")
        return kind(*arguments)

    return make


def _dict(pairs: Any = ()) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for pair in pairs:
        key, value = pair
        found[_key(key)] = _finished(value)
    return found


def _key(key: Any) -> Any:
    """Only plain keys: to hash nested tuples takes as many levels of the C stack."""
    if key is not None and not isinstance(key, str | bytes | int | float):
        raise Refused(f"holds a dict with a key of type {type(key).__name__}")
    return key.decode("latin-1") if isinstance(key, bytes) else key


# What a name in the file stands for. Marks for numpy's own types, which are not theirs.
_NDARRAY = object()


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _NDARRAY:
        raise Refused("holds an array of a type of its own")
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return _array(data, dtype, shape, order)


_NAMES: dict[str, Any] = {
    "numpy ndarray": _NDARRAY,
    "numpy dtype": _Dtype,
    **dict.fromkeys(
        ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"), _reconstruct
    ),
    **dict.fromkeys(("numpy.core.multiarray scalar", "numpy._core.multiarray scalar"), _scalar),
    **dict.fromkeys(
        ("numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer"), _from_buffer
    ),
    "collections OrderedDict": _dict,
    "_codecs encode": _encode,
    **{f"{module} bytes": _bytes(bytes) for module in ("builtins", "__builtin__")},
    **{f"{module} bytearray": _bytes(bytearray) for module in ("builtins", "__builtin__")},
}
_MARK = object()
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class _Machine:
    """The stack, and what was put aside."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: Any) -> Any:
        for number, (code, argument, _) in enumerate(pickletools.genops(content)):
            if number >= MOST_OPERATIONS:
                raise Refused(f"has more than {MOST_OPERATIONS:,} parts")
            if code.name == "STOP":
                break
            self.step(code.name, argument)
        (result,) = self.stack
        return _finished(result)

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("POP", "POP_MARK"):
            self.pop() if name == "POP" else self.above_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                leaf, module = self.pop(), self.pop()
                argument = f"{module} {leaf}"
            stack.append(_named(argument))
        elif name == "REDUCE":
            arguments, function = self.pop(), self.pop()
            stack.append(_call(function, arguments))
        elif name == "BUILD":
            self.build()
        elif name not in ("PROTO", "FRAME"):
            self.contain(name)

    def contain(self, name: str) -> None:
        """What makes or fills containers."""
        stack = self.stack
        if name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in ("LIST", "TUPLE"):
            items = self.above_mark()
            stack.append(items if name == "LIST" else tuple(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [self.pop() for _ in range(int(name[-1]))]
            stack.append(tuple(reversed(items)))
        elif name in ("APPEND", "APPENDS"):
            items = [self.pop()] if name == "APPEND" else self.above_mark()
            _of_type(list, stack[-1]).extend(map(_finished, items))
        elif name in ("DICT", "SETITEM", "SETITEMS"):
            items = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.above_mark()
            if name == "DICT":
                stack.append({})
            pairs = zip(items[::2], map(_finished, items[1::2]), strict=True)
            _of_type(dict, stack[-1]).update(_dict(pairs))
        else:
            raise Refused(f"makes an object ({name})")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value belongs")
        return value

    def above_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def build(self) -> None:
        state, thing = self.pop(), self.stack[-1]
        if isinstance(thing, _Array | _Dtype):
            thing.build(_of_type(tuple, state))
        elif not isinstance(thing, dict):  # attributes, which torch gives to a state_dict
            raise Refused("gives a state to an object")


def _named(name: str) -> Any:
    if name in _NAMES:
        return _NAMES[name]
    if name.startswith("torch"):
        raise Refused(
            "holds torch tensors in a pickle that torch.save did not write; save them with it"
        )
    shown = name.replace(" ", ".")[:100]
    shown = shown if shown.isprintable() else repr(shown)
    raise Refused(f"asks for {shown}, which is not run")


def _call(function: Any, arguments: Any) -> Any:
    if not any(function is known for known in _NAMES.values()) or function is _NDARRAY:
        raise Refused("calls what is no function")
    return function(*_of_type(tuple, arguments))


def _finished(value: Any) -> Any:
    """The array or number type behind what the machine worked on."""
    if isinstance(value, _Array):
        if value.array is None:
            raise ValueError("an array without content")
        return value.array
    if callable(value) or value is _NDARRAY or value is _MARK:
        raise Refused("holds functions or types")
    return value


def _of_type(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def read_pickle(path: Path) -> Any:
    """What a pickle holds: containers, text, numbers and arrays of numbers.

    Keys that are bytes become text. Arrays cannot be written to: they are the bytes of the file.

    Raises:
        Refused: it holds or asks for more, which was not executed.
        Exception: of many kinds, for a damaged file.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Machine().run(content)
