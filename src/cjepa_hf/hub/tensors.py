"""Reads pickle-based files (`torch.save`, `pickle.dump`) as data: nothing in them is ever imported or called.

An interpreter of the pickle opcodes (protocols 0 to 5) that knows a handful of names: those that rebuild dictionaries,
byte strings, tensors and numpy arrays. Every other class or function, `getattr` included, becomes an inert [`Record`]
of its name and arguments, so a file can name whatever it likes without effect.

`torch.load(weights_only=True)` is not used: it trusts the sizes that a file declares (the old format allocates them
before it reads, `bytearray(n)` is on its list of allowed calls). Here work and memory follow the size of the file:

- tensors and arrays are views of the mapped file, bounds checked, and together hold at most a few times its bytes;
- every object counts against a budget (8 times the file's size plus 150 MB) and every opcode against `MAX_OPCODES`;
- dictionary keys are short and simple (hashing a nested tuple recurses in C, crafted integers collide);
- archives with compressed entries are refused (`torch.save` writes none), so there is nothing to inflate.
"""

import math
import mmap
import os
import re
import struct
from collections.abc import Callable

import numpy as np
import torch

__all__ = [
    "ConversionError",
    "LongText",
    "PickledArray",
    "Record",
    "is_module",
    "module_attribute",
    "module_tensors",
    "read_buffer",
    "read_for_streaming",
    "read_pickled",
]

MAX_OPCODES = 3_000_000  # some 100,000 pickled arrays; a second or two of work
_INLINE = 1024  # longer byte strings and texts stay in the file
_MAX_NAME = 1024  # characters of a module or class name
_RELEASE = 1 << 28  # bytes read from a mapping between two `release`s


class ConversionError(ValueError):
    """An original file cannot be read or converted; the message names the file, the reason and the next step."""


class Record:
    """A class, function or object that a pickle names; inert.

    Attributes:
        module, name: where a loader would have imported it from.
        args: what it was called with, `None` for a bare reference to the class or function.
        state: what `__setstate__` (or `__dict__.update`) would have received.
        items: entries of a dictionary or list subclass (dict or list), or `None`.
    """

    __slots__ = ("args", "items", "module", "name", "state")

    def __init__(self, module, name, args=None):
        self.module, self.name, self.args, self.state, self.items = module, name, args, None, None

    def __repr__(self):
        return f"<inert {self.module}.{self.name}>"


class LongText:
    """A text of more than a kilobyte, left in the file until `str(text)`."""

    __slots__ = ("view",)

    def __init__(self, view):
        self.view = view

    def __str__(self):
        return str(self.view, "utf-8", "surrogatepass")


class _Latin1:
    """Bytes that protocols 0 to 2 write as a text, `_codecs.encode(text, "latin1")`; decoded when needed."""

    __slots__ = ("text",)

    def __init__(self, text):
        self.text = text

    def __bytes__(self):
        return str(self.text).encode("latin-1")


class _Dtype:
    __slots__ = ("code", "order")

    def __init__(self, code):
        self.code, self.order = code, "="

    def numpy(self) -> np.dtype:
        code = self.code if isinstance(self.code, str) else ""
        if not re.fullmatch(r"[biufcSU]\d{1,6}", code) or self.order not in ("=", "<", ">", "|"):
            raise ValueError(f"arrays of dtype {code[:20]!r} are not numbers or texts of fixed size")
        return np.dtype(code).newbyteorder(self.order)


class PickledArray:
    """A numpy array in the file. `shape` and `dtype` are known; `numpy()` reads it (a read-only view if it can be)."""

    __slots__ = ("data", "dtype", "fortran", "shape")

    def __init__(self):
        self.data = self.dtype = self.fortran = self.shape = None

    def __repr__(self):
        return f"<array {self.shape} {self.dtype}>"

    def numpy(self) -> np.ndarray:
        """The array [*shape]. Raises ConversionError if the bytes are not those of such an array."""
        if self.dtype is None:
            raise ConversionError("an array of the file has no content or holds objects: only numbers can be read.")
        try:
            data = bytes(self.data) if isinstance(self.data, _Latin1) else self.data
            return np.frombuffer(data, self.dtype).reshape(self.shape, order="F" if self.fortran else "C")
        except ValueError as error:
            raise ConversionError(f"an array of the file is damaged ({error}): download the file again.") from None


class _Storage:
    __slots__ = ("dtype", "numel", "tensor")

    def __init__(self, dtype, numel, tensor):
        self.dtype, self.numel, self.tensor = dtype, numel, tensor


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
# what a file may ask of a tensor without a typed storage: looked up here, as torch imports some attributes when asked
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGES.values()}
_DTYPES |= {name: getattr(torch, name) for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")}
_BUILTINS = ("builtins", "__builtin__")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MARK = object()


# --------------------------------------------------------------------------------------------------------------------
# The interpreter


class _Machine:
    """Interprets pickles of one file.

    Args:
        data: the file, or the part of it that holds pickles (mmap, bytes or bytearray).
        file_size: bytes of the whole file, which the budgets follow.
        find_storage: gives the tensor [numel] of a storage from (key, dtype, numel); None: not known yet.
        release: called from time to time with the position reached, to let go of pages that were read.
    """

    def __init__(self, data, file_size: int, release: Callable[[int], None] | None = None):
        self.data, self.view, self.size = data, memoryview(data), len(data)
        self.find_storage = None
        self.memory_left = 8 * file_size + 150_000_000
        self.arrays_left = 4 * file_size + 1_000_000
        self.opcodes_left = MAX_OPCODES
        self.tuple_keys_left = 1000
        self.release, self.released = release, 0
        self.storages: dict[str, _Storage] = {}
        self.operations = {getattr(_Opcode, name): getattr(self, f"_{name.lower()}") for name in _Opcode.implemented}

    def run(self, position: int, end: int | None = None):
        """Value of the pickle that starts at `position`, and the position after it."""
        self.position, self.end = position, self.size if end is None else end
        self.stack, self.marks, self.memo = [], [], {}
        operations, data = self.operations, self.data
        while True:
            if self.position >= self.end:
                raise ConversionError("it ends in the middle of a pickle")
            opcode = data[self.position]
            self.position += 1
            self.opcodes_left -= 1
            if self.opcodes_left < 0:
                raise ConversionError(f"it has more than {MAX_OPCODES} pickle instructions")
            if opcode == _Opcode.STOP:
                return self._pop(), self.position
            operation = operations.get(opcode)
            if operation is None:
                raise ConversionError(f"it holds the byte {opcode:#04x} where a pickle instruction was expected")
            self._charge(16)
            operation()

    # ---- helpers

    def _charge(self, amount: int) -> None:
        self.memory_left -= amount
        if self.memory_left < 0:
            raise ConversionError("its objects would need far more memory than the file has bytes")

    def _take(self, count: int) -> int:
        """Moves over `count` bytes and returns where they start."""
        start = self.position
        if count < 0 or start + count > self.end:
            raise ConversionError("it declares more bytes than it has")
        self.position = start + count
        if self.release is not None and self.position - self.released > _RELEASE:
            self.release(self.position)
            self.released = self.position
        return start

    def _unpack(self, code: struct.Struct):
        return code.unpack_from(self.data, self._take(code.size))[0]

    def _line(self, limit: int) -> bytes:
        stop = self.data.find(b"\n", self.position, min(self.end, self.position + limit + 1))
        if stop < 0:
            raise ConversionError("it holds a text without end")
        start = self._take(stop + 1 - self.position)
        return bytes(self.view[start:stop])

    def _push(self, value, charge: int = 32) -> None:
        self._charge(charge)
        self.stack.append(value)

    def _pop(self):
        # the base of the stack moves with the marks, as in the original: nothing below a mark can be taken
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ConversionError("its pickle takes more from the stack than it put there")
        return self.stack.pop()

    def _top(self):
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ConversionError("its pickle takes more from the stack than it put there")
        return self.stack[-1]

    def _since_mark(self) -> list:
        if not self.marks:
            raise ConversionError("its pickle closes a group that it did not open")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _key(self, key):
        kind = type(key)
        if kind is tuple:
            self.tuple_keys_left -= 1
            if len(key) > 8 or self.tuple_keys_left < 0:
                raise ConversionError("it uses long or many tuples as dictionary keys")
            for part in key:
                if type(part) is tuple:
                    raise ConversionError("it uses nested tuples as dictionary keys")
                self._key(part)
        elif kind is int:
            if not -(2**60) < key < 2**60:
                raise ConversionError("it uses huge integers as dictionary keys")
        elif kind not in (str, float, bool, bytes, Record, type(None)):
            raise ConversionError(f"it uses a {kind.__name__} as a dictionary key")
        return key

    def _update(self, target: dict, keys, values) -> None:
        for key, value in zip(keys, values):
            self._charge(120)
            target[self._key(key)] = value

    # ---- what a pickle calls

    def _call(self, function, args, kwargs=None):
        self._charge(200)
        if not isinstance(function, Record) or function.args is not None or not isinstance(args, tuple):
            return Record("", "<call>", (function, args))
        known = _KNOWN.get((function.module, function.name))
        if known is not None and kwargs is None:
            return known(self, function, args)
        record = Record(function.module, function.name, args)
        if kwargs:
            record.items = kwargs
        return record

    def _mapping(self, function, args):
        """OrderedDict(), OrderedDict([[key, value], ...]), defaultdict(factory)."""
        result = {}
        if args and isinstance(args[0], list):
            for pair in args[0]:
                if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                    raise ConversionError("it holds a damaged OrderedDict")
                self._update(result, pair[:1], pair[1:])
        return result

    def _sequence(self, function, args):
        """set(items), frozenset(items), list(items), tuple(items), torch.Size(items): sets stay lists."""
        items = args[0] if args else ()
        if not isinstance(items, (list, tuple)):
            return Record(function.module, function.name, args)
        self._charge(56 + 8 * len(items))
        return tuple(items) if function.name in ("frozenset", "tuple", "Size") else list(items)

    def _bytes(self, function, args):
        """bytes(), bytearray(b"..."), bytearray("...", "latin-1"); a size as argument allocates nothing."""
        if not args:
            return b""
        if isinstance(args[0], (bytes, memoryview)) and len(args) == 1:
            return args[0]
        return self._encode(function, args)

    def _encode(self, function, args):
        if len(args) == 2 and args[1] in ("latin1", "latin-1"):
            if isinstance(args[0], str):
                self._charge(len(args[0]))
                return args[0].encode("latin-1")
            if isinstance(args[0], LongText):
                return _Latin1(args[0])
        return Record(function.module, function.name, args)

    def _new_object(self, function, args):
        """copyreg._reconstructor(cls, object, None) and __newobj__(cls, ...) of protocols 0 and 1."""
        if args and isinstance(args[0], Record) and args[0].args is None:
            self._charge(8 * len(args))  # which are copied
            return Record(args[0].module, args[0].name, args[1:])
        return Record(function.module, function.name, args)

    def _array(self, function, args):
        return PickledArray()  # what it holds comes with BUILD

    def _array_from_buffer(self, function, args):
        """_frombuffer(buffer, dtype, shape, order) of protocol 5."""
        data, dtype, shape, order = args
        array = PickledArray()
        self._fill(array, shape, dtype, order == "F", data)
        return array

    def _fill(self, array: PickledArray, shape, dtype, fortran, data) -> None:
        if isinstance(data, list) or not isinstance(dtype, _Dtype):
            return  # an array of objects or records: it stays empty, and `numpy()` refuses
        if isinstance(data, str):  # written by Python 2
            self._charge(len(data))
            data = data.encode("latin-1")
        if not isinstance(shape, tuple) or len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
            raise ConversionError("it holds an array whose shape is no shape")
        if not isinstance(data, (bytes, memoryview, _Latin1)):
            raise ConversionError("it holds an array without data")
        dtype = dtype.numpy()
        size = math.prod(shape) * dtype.itemsize
        if isinstance(data, _Latin1):  # one or two bytes of the file for each of the array
            length = len(data.text.view)
            complete = size <= length <= 2 * size
        else:
            complete = len(data) == size
        if not complete:
            raise ConversionError(f"it holds an array whose data do not fill its shape {shape[:8]}")
        self._share(size)
        array.shape, array.dtype, array.fortran, array.data = shape, dtype, bool(fortran), data

    def _share(self, size: int) -> None:
        self.arrays_left -= size
        if self.arrays_left < 0:
            raise ConversionError("its arrays use the same bytes over and over, and would fill several times the file")

    def _scalar(self, function, args):
        dtype, data = args
        if not isinstance(dtype, _Dtype) or not isinstance(data, (str, bytes)):  # longer ones are views, and no number
            return Record(function.module, function.name, args)
        dtype = dtype.numpy()
        if len(data) != dtype.itemsize:
            raise ConversionError("it holds a number whose data are not of its type")
        data = data.encode("latin-1") if isinstance(data, str) else data
        return np.frombuffer(data, dtype, count=1)[0].item()

    def _dtype(self, function, args):
        return _Dtype(args[0] if args else None)

    def _tensor(self, function, args):
        """_rebuild_tensor(storage, offset, size, stride), _v2(..., requires_grad, hooks), _v3(..., dtype, ...)."""
        self._charge(600)
        storage, offset, size, stride = args[:4]
        if not isinstance(storage, _Storage):
            return Record(function.module, function.name, args)
        base, dtype = storage.tensor, storage.dtype
        if function.name == "_rebuild_tensor_v3":
            wanted = args[6]
            dtype = _DTYPES.get(wanted.name) if isinstance(wanted, Record) and wanted.module == "torch" else None
            if dtype is None or base is None or storage.dtype != torch.uint8:
                return Record(function.module, function.name, args)
            if storage.numel % dtype.itemsize:
                raise ConversionError("it holds a tensor whose data do not fill its type")
            base = base.view(dtype)
        flat = len(size) == len(stride) <= 16  # before anything is made of them
        if not flat or not all(type(n) is int and 0 <= n < 2**62 for n in (offset, *size, *stride)):
            raise ConversionError("it holds a tensor whose shape is no shape")
        count, capacity = math.prod(size), storage.numel * storage.dtype.itemsize // dtype.itemsize
        if count and offset + sum((n - 1) * s for n, s in zip(size, stride)) >= capacity:
            raise ConversionError(f"it holds a tensor of shape {tuple(size)[:8]} that is larger than its data")
        if count > capacity or base is None:  # an expanded view, which would grow when it is copied
            return Record(function.module, function.name, args)
        self._share(count * dtype.itemsize)
        return base.as_strided(size, stride, offset) if count else torch.empty(size, dtype=dtype)

    def _parameter(self, function, args):
        return args[0]

    # ---- opcodes: constants

    def _none(self):
        self._push(None)

    def _newtrue(self):
        self._push(True)

    def _newfalse(self):
        self._push(False)

    def _int(self):
        line = self._line(64)
        self._push(line == b"01" if line in (b"00", b"01") else int(line))

    def _long(self):
        self._push(int(self._line(1000).rstrip(b"L")), 500)

    def _binint(self):
        self._push(self._unpack(_I4))

    def _binint1(self):
        self._push(self.data[self._take(1)])

    def _binint2(self):
        self._push(self._unpack(_U2))

    def _long1(self):
        count = self.data[self._take(1)]
        start = self._take(count)
        self._push(int.from_bytes(self.view[start : start + count], "little", signed=True), 32 + 2 * count)

    def _float(self):
        self._push(float(self._line(400)))

    def _binfloat(self):
        self._push(self._unpack(_F8))

    # ---- texts and bytes

    def _text(self, count: int) -> None:
        start = self._take(count)
        if count > _INLINE:
            self._push(LongText(self.view[start : start + count]), 300)
        else:
            self._push(str(self.view[start : start + count], "utf-8", "surrogatepass"), 80 + 4 * count)

    def _short_binunicode(self):
        self._text(self.data[self._take(1)])

    def _binunicode(self):
        self._text(self._unpack(_U4))

    def _binunicode8(self):
        self._text(self._unpack(_U8))

    def _unicode(self):
        line = self._line(self.size)
        self._push(str(line, "raw-unicode-escape"), 80 + 4 * len(line))

    def _data(self, count: int) -> None:
        start = self._take(count)
        view = self.view[start : start + count]
        self._push(view if count > _INLINE else bytes(view), 250 + min(count, _INLINE))

    def _short_binbytes(self):
        self._data(self.data[self._take(1)])

    def _binbytes(self):
        self._data(self._unpack(_U4))

    def _binbytes8(self):
        self._data(self._unpack(_U8))

    _bytearray8 = _binbytes8

    def _latin(self, count: int) -> None:
        start = self._take(count)
        self._push(str(self.view[start : start + count], "latin-1"), 80 + count)

    def _binstring(self):
        self._latin(self._unpack(_I4))

    def _short_binstring(self):
        self._latin(self.data[self._take(1)])

    def _string(self):
        line = self._line(self.size)
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise ConversionError("it holds a text without quotes")
        text = str(line[1:-1], "latin-1")
        if "\\" in text:
            text = text.encode("latin-1").decode("unicode-escape")
        self._push(text, 80 + 4 * len(line))

    # ---- containers

    def _mark(self):
        self._charge(16)
        self.marks.append(len(self.stack))

    def _empty_dict(self):
        self._push({}, 250)

    def _empty_list(self):
        self._push([], 120)

    _empty_set = _empty_list

    def _empty_tuple(self):
        self._push(())

    def _tuple(self):
        items = tuple(self._since_mark())
        self._push(items, 80 + 8 * len(items))

    _frozenset = _tuple

    def _tuple1(self):
        self._push((self._pop(),), 80)

    def _tuple2(self):
        second, first = self._pop(), self._pop()
        self._push((first, second), 80)

    def _tuple3(self):
        third, second, first = self._pop(), self._pop(), self._pop()
        self._push((first, second, third), 80)

    def _list(self):
        items = self._since_mark()
        self._push(items, 120 + 8 * len(items))

    def _dict(self):
        items = self._since_mark()
        result = {}
        self._update(result, items[::2], items[1::2])
        self._push(result, 250)

    def _extend(self, target, items) -> None:
        self._charge(16 * len(items))
        if isinstance(target, Record) and target.args is not None:
            if not isinstance(target.items, list):
                target.items = []
            target = target.items
        if not isinstance(target, list):
            raise ConversionError(f"it appends to a {type(target).__name__}")
        target.extend(items)

    def _append(self):
        item = self._pop()
        self._extend(self._top(), [item])

    def _appends(self):
        items = self._since_mark()
        self._extend(self._top(), items)

    _additems = _appends

    def _set(self, target, keys, values) -> None:
        if isinstance(target, Record) and target.args is not None:
            if not isinstance(target.items, dict):
                target.items = {}
            target = target.items
        if not isinstance(target, dict):
            raise ConversionError(f"it sets entries of a {type(target).__name__}")
        self._update(target, keys, values)

    def _setitem(self):
        value, key = self._pop(), self._pop()
        self._set(self._top(), [key], [value])

    def _setitems(self):
        items = self._since_mark()
        self._set(self._top(), items[::2], items[1::2])

    # ---- stack and memo

    def _pop_opcode(self):
        if self.marks and len(self.stack) == self.marks[-1]:
            self.marks.pop()
        else:
            self._pop()

    def _pop_mark(self):
        self._since_mark()

    def _dup(self):
        self._push(self._top(), 0)

    def _remember(self, index: int) -> None:
        if not 0 <= index < 2**32:
            raise ConversionError("it numbers its objects wrongly")
        self._charge(120)
        self.memo[index] = self._top()

    def _put(self):
        self._remember(int(self._line(20)))

    def _binput(self):
        self._remember(self.data[self._take(1)])

    def _long_binput(self):
        self._remember(self._unpack(_U4))

    def _memoize(self):
        self._remember(len(self.memo))

    def _recall(self, index: int) -> None:
        if index not in self.memo:
            raise ConversionError("it refers to an object that it does not hold")
        self._push(self.memo[index], 0)

    def _get(self):
        self._recall(int(self._line(20)))

    def _binget(self):
        self._recall(self.data[self._take(1)])

    def _long_binget(self):
        self._recall(self._unpack(_U4))

    # ---- protocol

    def _proto(self):
        if self.data[self._take(1)] > 5:
            raise ConversionError("its pickle protocol is newer than 5")

    def _frame(self):
        self._take(8)

    def _readonly_buffer(self):
        pass

    # ---- names and objects

    def _named(self, module, name) -> Record:
        if not isinstance(module, str) or not isinstance(name, str) or max(len(module), len(name)) > _MAX_NAME:
            raise ConversionError("it names something by what is no name")
        self._charge(200)
        return Record(module, name)

    def _global(self):
        module, name = (str(self._line(4 * _MAX_NAME), "utf-8") for _ in range(2))
        self._push(self._named(module, name))

    def _stack_global(self):
        name, module = self._pop(), self._pop()
        self._push(self._named(module, name))

    def _reduce(self):
        args, function = self._pop(), self._pop()
        self._push(self._call(function, args))

    def _newobj(self):
        args, cls = self._pop(), self._pop()
        self._push(self._call(cls, args))

    def _newobj_ex(self):
        kwargs, args, cls = self._pop(), self._pop(), self._pop()
        self._push(self._call(cls, args, kwargs or None))

    def _inst(self):
        module, name = (str(self._line(4 * _MAX_NAME), "utf-8") for _ in range(2))
        items = tuple(self._since_mark())
        self._charge(8 * len(items))
        self._push(self._call(self._named(module, name), items))

    def _obj(self):
        items = self._since_mark()
        self._charge(8 * len(items))
        self._push(self._call(items[0], tuple(items[1:])))

    def _build(self):
        state, target = self._pop(), self._top()
        if isinstance(target, Record):
            target.state = state
        elif isinstance(target, _Dtype):
            if not isinstance(state, tuple) or len(state) < 2 or (len(state) > 4 and (state[3] or state[4])):
                target.code = None  # fields: an array of records, which `_Dtype.numpy` refuses
            else:
                target.order = state[1]
        elif isinstance(target, PickledArray):
            self._fill(target, *state[-4:])
        elif not isinstance(target, (dict, list, torch.Tensor)):  # attributes of those are of no use
            raise ConversionError(f"it sets the state of a {type(target).__name__}")

    def _persistent(self, identity) -> None:
        self._charge(200)
        if not isinstance(identity, tuple) or not identity:
            raise ConversionError("it refers to data outside of the file")
        if identity[0] == "module" and len(identity) >= 2:  # a class with its source, in the old format
            self.stack.append(identity[1])
            return
        if identity[0] != "storage" or len(identity) < 5 or (len(identity) > 5 and identity[5] is not None):
            raise ConversionError("it refers to data outside of the file")
        cls, key, numel = identity[1], identity[2], identity[4]
        if isinstance(key, int):
            key = str(key)
        if not isinstance(cls, Record) or not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 2**50:
            raise ConversionError("it holds a damaged storage")
        if (cls.module, cls.name) == ("torch.storage", "UntypedStorage"):
            dtype = torch.uint8
        else:
            dtype = _STORAGES.get(cls.name) if cls.module == "torch" else None
        if dtype is None:  # quantised and other types: inert
            self.stack.append(Record(cls.module, cls.name, identity))
            return
        storage = self.storages.get(key)
        if storage is None:
            self._charge(1000)
            tensor = self.find_storage(key, dtype, numel) if self.find_storage else None
            if tensor is not None:  # those of the old format, and in archives that lie about places, are copies
                self._charge(numel * dtype.itemsize)
            storage = self.storages[key] = _Storage(dtype, numel, tensor)
        elif (storage.dtype, storage.numel) != (dtype, numel):
            raise ConversionError(f"it declares storage {key[:20]} twice, differently")
        self.stack.append(storage)

    def _binpersid(self):
        self._persistent(self._pop())

    def _persid(self):
        self._persistent(str(self._line(_MAX_NAME), "utf-8"))


_U2, _U4, _U8, _I4, _F8 = (struct.Struct(code) for code in ("<H", "<I", "<Q", "<i", ">d"))


class _Opcode:
    """The pickle opcodes (PEP 3154, PEP 574). EXT1, EXT2, EXT4, NEXT_BUFFER and LONG4 are left out: refused."""

    MARK, STOP, POP_OPCODE, POP_MARK, DUP = b"(.012"
    FLOAT, INT, BININT, BININT1, LONG, BININT2, NONE, PERSID, BINPERSID, REDUCE = b"FIJKLMNPQR"
    STRING, BINSTRING, SHORT_BINSTRING, UNICODE, BINUNICODE, APPEND, BUILD, GLOBAL, DICT, EMPTY_DICT = b"STUVXabcd}"
    APPENDS, GET, BINGET, INST, LONG_BINGET, LIST, EMPTY_LIST, OBJ, PUT, BINPUT, LONG_BINPUT = b"eghijl]opqr"
    SETITEM, TUPLE, EMPTY_TUPLE, SETITEMS, BINFLOAT = b"st)uG"
    PROTO, NEWOBJ, TUPLE1, TUPLE2, TUPLE3, NEWTRUE, NEWFALSE, LONG1 = b"\x80\x81\x85\x86\x87\x88\x89\x8a"
    BINBYTES, SHORT_BINBYTES = b"BC"
    SHORT_BINUNICODE, BINUNICODE8, BINBYTES8, EMPTY_SET, ADDITEMS, FROZENSET = b"\x8c\x8d\x8e\x8f\x90\x91"
    NEWOBJ_EX, STACK_GLOBAL, MEMOIZE, FRAME, BYTEARRAY8, READONLY_BUFFER = b"\x92\x93\x94\x95\x96\x98"
    implemented = ()


_Opcode.implemented = tuple(name for name in vars(_Opcode) if name.isupper() and name != "STOP")

_KNOWN: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): _Machine._mapping,
    ("collections", "defaultdict"): _Machine._mapping,
    ("torch", "Size"): _Machine._sequence,
    ("_codecs", "encode"): _Machine._encode,
    ("numpy", "dtype"): _Machine._dtype,
    ("torch._utils", "_rebuild_tensor"): _Machine._tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _Machine._tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _Machine._tensor,
    ("torch._utils", "_rebuild_parameter"): _Machine._parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _Machine._parameter,
}
for _module in _BUILTINS:
    _KNOWN |= {(_module, name): _Machine._sequence for name in ("set", "frozenset", "list", "tuple")}
    _KNOWN |= {(_module, name): _Machine._bytes for name in ("bytes", "bytearray")}
for _module in ("copyreg", "copy_reg"):
    _KNOWN |= {(_module, name): _Machine._new_object for name in ("_reconstructor", "__newobj__")}
for _module in ("numpy.core", "numpy._core"):
    _KNOWN[f"{_module}.multiarray", "_reconstruct"] = _Machine._array
    _KNOWN[f"{_module}.multiarray", "scalar"] = _Machine._scalar
    _KNOWN[f"{_module}.numeric", "_frombuffer"] = _Machine._array_from_buffer


# --------------------------------------------------------------------------------------------------------------------
# Files


def read_pickled(path: str | os.PathLike):
    """The content of a file of `torch.save` (archive or old format) or `pickle.dump`, as data.

    Args:
        path: the file. Nothing in it is imported or called; it may come from anyone.

    Returns:
        dicts, lists (sets too), tuples, numbers, strings, `torch.Tensor`s and [`PickledArray`]s, which are views of
        the mapped file (copy on write), [`Record`]s for everything else, and for more than a kilobyte [`LongText`]
        and memoryviews.

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: it is no such file, damaged, or made to exhaust the reader.
    """
    return read_buffer(_mapped(path, mmap.ACCESS_COPY), path)


def read_for_streaming(path: str | os.PathLike):
    """As [`read_pickled`], for a file larger than memory: also returns a function that lets go of the pages read so
    far (they are read again where needed), or `None` where the system has none. Arrays are read-only views, tensors
    stay records."""
    data = _mapped(path, mmap.ACCESS_READ)
    release = None
    if hasattr(mmap, "MADV_DONTNEED"):

        def release(_: int) -> None:
            data.madvise(mmap.MADV_DONTNEED)

    return read_buffer(data, path, release), release


def _mapped(path: str | os.PathLike, access: int) -> mmap.mmap:
    if os.path.isdir(path):
        raise ConversionError(f"{path} is a folder: give the file in it.")
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ConversionError(f"{path} is empty: download it again.")
        return mmap.mmap(file.fileno(), 0, access=access)


def read_buffer(data, name="the file", release: Callable[[int], None] | None = None):
    """As [`read_pickled`], of a file's content (mmap or bytearray)."""
    try:
        head = bytes(data[:64])
        if head.startswith(b"version https://git-lfs"):
            raise ConversionError("it is a Git LFS pointer, not the file itself")
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < len(data):
            raise ConversionError("it is a safetensors file, which needs no conversion (use from_pretrained)")
        if head[:4] == b"PK\x03\x04":
            return _read_archive(data)
        return _read_stream(data, release)
    except ConversionError as error:
        reason = str(error)
    except Exception as error:  # what a damaged file makes of valid instructions: wrong types, shapes, texts
        reason = f"it is damaged ({type(error).__name__}: {str(error)[:200]})"
    raise ConversionError(
        f"{name} cannot be read as a checkpoint or pickle: {reason}. Download it again and compare its size and "
        f"checksum with those of the repository."
    ) from None


def _read_stream(data, release):
    machine = _Machine(data, len(data), release)
    value, position = machine.run(0)
    if value != _LEGACY_MAGIC if type(value) is int else True:
        return value
    # The old format: magic number, version, system, content, names of the storages, the storages.
    version, position = machine.run(position)
    system, position = machine.run(position)
    if version != _LEGACY_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ConversionError("it is a torch file of an unknown version, or of a big-endian machine")
    start = position
    _, position = machine.run(start)  # once for the types of the storages, which follow
    types = machine.storages
    keys, position = machine.run(position)
    places = {}
    for key in keys:
        if key not in types or key in places or position + 8 > len(data):
            raise ConversionError("its storages do not fit its content")
        storage = types[key]
        (numel,) = struct.unpack_from("<q", data, position)
        if numel != storage.numel:
            raise ConversionError("its storages do not fit its content")
        places[key] = (position + 8, numel * storage.dtype.itemsize)
        position += 8 + numel * storage.dtype.itemsize
        if position > len(data):
            raise ConversionError("it ends in the middle of a storage")
    if len(places) != len(types):
        raise ConversionError("its storages do not fit its content")
    machine = _Machine(data, len(data), release)
    machine.find_storage = lambda key, dtype, numel: _storage_tensor(data, *places[key], dtype, numel)
    return machine.run(start)[0]


def _storage_tensor(data, start: int, size: int, dtype: torch.dtype, numel: int) -> torch.Tensor | None:
    if numel * dtype.itemsize > size:
        raise ConversionError("it declares a storage larger than its data")
    if memoryview(data).readonly:  # read for its arrays alone: tensors, which cannot be read-only, stay records
        return None
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    if start % dtype.itemsize:  # the old format does not align
        data, start = bytearray(memoryview(data)[start : start + numel * dtype.itemsize]), 0
    return torch.frombuffer(data, dtype=dtype, count=numel, offset=start)


def _read_archive(data):
    entries = _archive_entries(data)
    contents = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(contents) != 1:
        raise ConversionError("it is a zip archive, but not one of torch.save (no data.pkl)")
    folder = contents[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in entries:
        start, size = entries[f"{folder}byteorder"]
        if bytes(data[start : start + min(size, 16)]) != b"little":
            raise ConversionError("it was written by a big-endian machine")

    def find_storage(key, dtype, numel):
        if f"{folder}data/{key}" not in entries:
            raise ConversionError(f"its storage {key[:20]} is missing")
        return _storage_tensor(data, *entries[f"{folder}data/{key}"], dtype, numel)

    machine = _Machine(data, len(data))
    machine.find_storage = find_storage
    start, size = entries[contents[0]]
    return machine.run(start, start + size)[0]


def _archive_entries(data, limit: int = 100_000) -> dict[str, tuple[int, int]]:
    """Start and size of every entry of a zip archive. Entries must be stored, not compressed (as torch writes)."""
    size = len(data)
    end = data.rfind(b"PK\x05\x06", max(0, size - 65557))
    if end < 0 or end + 22 > size:
        raise ConversionError("it is cut off: the directory at its end is missing")
    count, length, position = struct.unpack_from("<HII", data, end + 10)
    if 0xFFFF in (count,) or 0xFFFFFFFF in (length, position):  # zip64
        locator = end - 20
        if locator < 0 or data[locator : locator + 4] != b"PK\x06\x07":
            raise ConversionError("the directory at its end is damaged")
        (end64,) = struct.unpack_from("<Q", data, locator + 8)
        if end64 + 56 > size or data[end64 : end64 + 4] != b"PK\x06\x06":
            raise ConversionError("the directory at its end is damaged")
        count, length, position = struct.unpack_from("<QQQ", data, end64 + 32)
    if count > limit:
        raise ConversionError(f"it has {count} entries: expected at most {limit}")
    entries = {}
    for _ in range(count):
        if position + 46 > size or data[position : position + 4] != b"PK\x01\x02":
            raise ConversionError("the directory at its end is damaged")
        flags, method = struct.unpack_from("<HH", data, position + 8)
        packed, unpacked, name_length, extra_length, comment_length = struct.unpack_from("<IIHHH", data, position + 20)
        (header,) = struct.unpack_from("<I", data, position + 42)
        name = bytes(data[position + 46 : position + 46 + name_length]).decode("utf-8")
        extra = bytes(data[position + 46 + name_length : position + 46 + name_length + extra_length])
        position += 46 + name_length + extra_length + comment_length
        if flags & 1 or method != 0:
            raise ConversionError(f"its entry {name[:80]!r} is compressed or encrypted, which torch.save never does")
        wide = iter(_zip64_values(extra))
        unpacked, packed, header = (
            next(wide, value) if value == 0xFFFFFFFF else value for value in (unpacked, packed, header)
        )
        if header + 30 > size or data[header : header + 4] != b"PK\x03\x04":
            raise ConversionError("the directory at its end is damaged")
        local_name, local_extra = struct.unpack_from("<HH", data, header + 26)
        start = header + 30 + local_name + local_extra
        if packed != unpacked or start + unpacked > size or name in entries:
            raise ConversionError(f"its entry {name[:80]!r} is damaged")
        entries[name] = (start, unpacked)
    return entries


def _zip64_values(extra: bytes) -> tuple[int, ...]:
    position = 0
    while position + 4 <= len(extra):
        tag, size = struct.unpack_from("<HH", extra, position)
        if tag == 1 and position + 4 + size <= len(extra):
            return struct.unpack_from(f"<{size // 8}Q", extra, position + 4)
        position += 4 + size
    return ()


# --------------------------------------------------------------------------------------------------------------------
# Pickled torch modules


def is_module(value) -> bool:
    """Whether a value is the record of a pickled `torch.nn.Module`."""
    return (
        isinstance(value, Record)
        and isinstance(value.state, dict)
        and all(isinstance(value.state.get(key), dict) for key in ("_parameters", "_buffers", "_modules"))
    )


def module_tensors(module: Record) -> tuple[dict[str, torch.Tensor], dict[str, Record]]:
    """What `module.state_dict()` would give, and every sub-module's record by its path ("" is the module itself).

    Raises:
        ConversionError: the modules contain each other, or hold parameters that are no tensors.
    """
    tensors, modules, waiting = {}, {}, [("", module)]
    while waiting:
        path, record = waiting.pop()
        if (
            path.count(".") > 64
            or len(path) > _MAX_NAME
            or len(modules) + len(waiting) > 50_000
            or len(tensors) > 100_000
        ):
            raise ConversionError("its modules contain each other")
        modules[path] = record
        prefix = f"{path}." if path else ""
        temporary = record.state.get("_non_persistent_buffers_set") or ()
        if not isinstance(temporary, (list, tuple)) or len(temporary) > 10_000:
            raise ConversionError("the list of buffers that one of its modules does not save is none")
        for group in ("_parameters", "_buffers"):
            if len(record.state[group]) > 10_000:
                raise ConversionError("one of its modules holds more than 10,000 parameters")
            for name, tensor in record.state[group].items():
                if len(str(name)) > _MAX_NAME:
                    raise ConversionError("it names a parameter by what is no name")
                if tensor is None or (group == "_buffers" and name in temporary):
                    continue
                if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                    raise ConversionError(f"its {prefix}{str(name)[:80]} is no tensor")
                tensors[prefix + name] = tensor
        for name, child in reversed(record.state["_modules"].items()):
            if child is None:
                continue
            if not isinstance(name, str) or not is_module(child):
                raise ConversionError(f"its {prefix}{str(name)[:80]} is no module")
            waiting.append((prefix + name, child))
    return tensors, modules


def module_attribute(module: Record | None, name: str, kind: type | tuple[type, ...] = int):
    """Attribute `name` of a pickled module, `None` if it is missing or of another type."""
    value = module.state.get(name) if module is not None and isinstance(module.state, dict) else None
    return value if isinstance(value, kind) and not (kind is int and isinstance(value, bool)) else None
