"""Pickles of arrays, and pickles that would run something."""

import builtins
import collections
import contextlib
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import pickles
import weights
from pickles import Refused, read_pickle


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pkl"


def read(path, content):
    path.write_bytes(content)
    return read_pickle(path)


ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "Fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big endian": np.arange(3, dtype=">f4"),
    "half": np.ones(2, np.float16),
    "empty": np.zeros((0, 3)),
    "counter": np.array(7, np.int64),
    "bool": np.array([True, False]),
}


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_plain_values_are_read(path, protocol):
    other = {"__author__": "é", "list": [1, 2.5, None, True, (1, 2), b"a\xff"], "big": 1 << 70}
    other |= {"scalar": np.float64(1.5), "bytes": b"", "array": bytearray(b"ab\xfe")}
    data = {"model": collections.OrderedDict(ARRAYS), **other}
    found = read(path, pickle.dumps(data, protocol=protocol))
    assert {key: value for key, value in found.items() if key != "model"} == other
    assert found["model"].keys() == ARRAYS.keys()
    for key, array in ARRAYS.items():
        assert found["model"][key].dtype == array.dtype
        np.testing.assert_array_equal(found["model"][key], array)


def test_python_2_and_old_numpy(path):
    """Protocol 2 with str for bytes, as cPickle wrote it, and bytes for keys."""
    raw = np.arange(3, dtype="<f4").tobytes()
    content = (
        b"\x80\x02}q\x01(U\x07conv1_wq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03"
        b"cnumpy\nndarray\nq\x04K\x00\x85q\x05U\x01bq\x06\x87q\x07Rq\x08(K\x01K\x03\x85q\t"
        b"cnumpy\ndtype\nq\nU\x02f4q\x0bK\x00K\x01\x87q\x0cRq\r(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tbI00\nT" + len(raw).to_bytes(4, "little") + raw + b"tb"
        b"C\x03keyK\x05u."
    )
    found = read(path, content)
    np.testing.assert_array_equal(found["conv1_w"], np.arange(3, dtype=np.float32))
    assert found["key"] == 5


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def short(text):
    data = text.encode()
    return b"\x8c" + bytes([len(data)]) + data


def stack_global(module, name, *arguments):
    """STACK_GLOBAL with any names, called with texts."""
    values = b"".join(map(short, arguments))
    return b"\x80\x04" + short(module) + short(name) + b"\x93(" + values + b"tR."


def attacks(target):
    """{name: content}; each would create the target, or read it, if it were run."""
    command = f"touch {target}"
    code = f"open({str(target)!r}, 'w')"
    calls = {
        "os.system": Call(os.system, command),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(target), "w"),
        "touch": Call(Path.touch, Path(target)),
        "getattr": Call(getattr, os, "system"),
        "nested": Call(Call(getattr, builtins, "eval"), code),
        "numpy.load": Call(np.load, str(target)),
        "numpy.memmap": Call(np.memmap, str(target), "u1", "w+", 0, 9),
        "numpy.fromfile": Call(np.fromfile, str(target)),
        "numpy.save": Call(np.save, str(target), [1]),
        "objects": np.array([Call(os.system, command)], dtype=object),
        "inside": {"model": {"a": np.ones(2), "b": Call(os.system, command)}},
        "key": {Call(os.system, command): 1},
    }
    found = {}
    for name, call in calls.items():
        for protocol in (0, 2, 4):
            try:
                found[f"{name}, protocol {protocol}"] = pickle.dumps(call, protocol)
            except (pickle.PicklingError, TypeError, AttributeError):
                continue
    ufunc = ("numpy.core.multiarray", "_reconstruct.__globals__")
    return {
        **found,
        "dotted": stack_global("numpy", "lib.npyio.os.system", command),
        "dotted allowed": stack_global(*ufunc),
        "dotted module": stack_global("os", "path.os.system", command),
        "runstring": stack_global("numpy.testing._private.utils", "runstring", code, "{}"),
        "f2py": stack_global("numpy.f2py.crackfortran", "myeval", code),
        "setup": stack_global("numpy.distutils.core", "exec_mod_from_location", "a", str(target)),
        "codecs": stack_global("_codecs", "lookup", "a"),
        "encode": stack_global("_codecs", "encode", "a", "zlib_codec"),
        "bytes of objects": stack_global("builtins", "bytes", "text"),
        "empty names": stack_global("", ""),
        "inst": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + command.encode() + b"'\no.",
        "newobj": b"\x80\x02cpathlib\nPath\n)\x81.",
        "newobj_ex": b"\x80\x04cpathlib\nPath\n)}\x92.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Pname\n.",
        "function as data": b"cnumpy\ndtype\n.",
        "state of a function": b"c_codecs\nencode\n}S'__code__'\nNsb.",
        "state of a type": b"ccollections\nOrderedDict\n(NS'a'\nNtb.",
        "call of a number": b"K\x01(tR.",
        "array of another type": (
            b"cnumpy.core.multiarray\n_reconstruct\n(c_codecs\nencode\nK\x00tR."
        ),
        "type called": b"cnumpy\nndarray\n(K\x09tR.",
        "frozenset": b"\x80\x04(\x91.",
    }


def test_nothing_is_run(path, tmp_path, monkeypatch):
    target = tmp_path / "touched"
    contents = attacks(target)
    assert len(contents) > 50
    for module in (os, builtins):
        for name in ("system", "eval", "exec", "getattr"):
            if module is os and hasattr(os, name):
                monkeypatch.setattr(os, name, lambda *_: pytest.fail("it was run"))
    for name, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - of many kinds
            read_pickle(path)
        assert isinstance(caught.value, Refused), name
        assert not target.exists(), name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.pkl") as caught:
            weights.read_state_dict(path)
        assert str(caught.value).isprintable(), name
        assert len(str(caught.value)) < 600, name
        assert not target.exists(), name


def test_the_attacks_would_work_elsewhere(tmp_path):
    target = tmp_path / "touched"
    pickle.loads(attacks(target)["os.system, protocol 2"])
    assert target.exists()


def test_what_is_asked_for_is_named(path):
    path.write_bytes(pickle.dumps({"model": {"w": Call(os.system, "true")}}))
    with pytest.raises(ValueError, match=r"pickle that asks for posix\.system, which is not run"):
        weights.read_state_dict(path)
    path.write_bytes(pickle.dumps({"model": {"w": torch.ones(2)}}))
    with pytest.raises(ValueError, match=r"holds torch tensors in a pickle that torch\.save did"):
        weights.read_state_dict(path)
    path.write_bytes(pickle.dumps({"model": {"w": np.array(["a"])}}))
    with pytest.raises(ValueError, match="holds an array of 'U1', where only numbers are read"):
        weights.read_state_dict(path)
    path.write_bytes(pickle.dumps({"model": {"w": np.zeros(2, [("a", "f4")])}}))
    with pytest.raises(ValueError, match="holds an array of"):
        weights.read_state_dict(path)


def array_of(shape, data):
    """The pickle of one float32 array, in a dict, with any shape and bytes."""
    sides = b"(" + b"".join(b"\x8a\x09" + side.to_bytes(9, "little") for side in shape) + b"t"
    dtype = b"cnumpy\ndtype\n(\x8c\x02f4\x89\x88tR(K\x03\x8c\x01<NNN" + b"J\xff\xff\xff\xff" * 2
    content = b"B" + len(data).to_bytes(4, "little") + data
    return (
        b"\x80\x04}(\x8c\x01wcnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85"
        b"C\x01btR(K\x01" + sides + dtype + b"K\x00tb\x89" + content + b"tbu."
    )


def test_shapes_must_have_their_bytes(path):
    found = read(path, array_of((2, 3), bytes(24)))
    assert found["w"].shape == (2, 3)
    for shape in ((10**15,), (2**62, 2**62), (2**63,), (2, 4), (1,) * 40, (0, 2**62, 2**62)):
        with pytest.raises(ValueError, match="array|shape|dimension|too big|overflow"):
            read(path, array_of(shape, b"" if 0 in shape else bytes(24)))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04B\xff\xff\xff\x7fabc.",  # two gigabytes of bytes
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0fabc.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0fabc.",
        b"\x80\x04Nr\xff\xff\xff\xff.",  # put aside in the place 2 ** 32 - 1
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.",
        b"\x80\x04" + b"}" * 300_001 + b".",
        b"\x80\x04" + b"(" * 100_000 + b".",
        b"\x80\x04" + b"N" + b"\x85" * 30_000 + b"K\x01" + b"}\x94s.",
        b"\x80\x04}" + b"N" + b"\x85" * 30_000 + b"K\x01s.",  # a key of 30,000 levels
    ],
)
def test_memory_is_bounded(path, content):
    path.write_bytes(content)
    tracemalloc.start()
    with contextlib.suppress(ValueError, IndexError):
        read_pickle(path)
    assert tracemalloc.get_traced_memory()[1] < 150 << 20
    tracemalloc.stop()


def test_one_array_under_many_names_is_not_copied(path):
    array = np.ones(10**6, np.float32)
    names = {f"res2.{i}.conv3.weight": array for i in range(1000)}
    path.write_bytes(pickle.dumps({"model": names}))
    assert path.stat().st_size < 5 * 10**6
    with pytest.raises(ValueError, match="arrays of more bytes than it has itself"):
        weights.read_state_dict(path)


def test_damaged_pickles_are_named(path):
    content = pickle.dumps({"model": {"res2.0.conv3.weight": np.ones((2, 2), np.float32)}})
    for size in (3, 40, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"model\.pkl is damaged or truncated"):
            weights.read_state_dict(path)
    path.write_bytes(b"\x80\x04N0.")
    with pytest.raises(ValueError, match="is damaged or truncated"):
        weights.read_state_dict(path)


def test_most_operations_leave_room(path):
    """A model of 1000 arrays takes a fraction of what is allowed."""
    import pickletools

    content = pickle.dumps({f"a{i}": np.ones(1, np.float32) for i in range(1000)}, protocol=2)
    assert sum(1 for _ in pickletools.genops(content)) * 5 < pickles.MOST_OPERATIONS
