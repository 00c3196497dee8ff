"""Files of torch.save and pickle.dump are read as data, whatever they hold."""

import collections
import io
import os
import pickle
import random
import resource
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cjepa_hf.hub.convert import _kind, _state_dict
from cjepa_hf.hub.tensors import (
    ConversionError,
    LongText,
    PickledArray,
    Record,
    _Dtype,
    _Machine,
    _Storage,
    module_attribute,
    module_tensors,
    read_buffer,
    read_pickled,
)

DATA = Path(__file__).parents[1] / "data"


def torch_bytes(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return bytearray(buffer.getvalue())


def state_dict():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 5, generator=generator)
    return collections.OrderedDict(
        weight=base,
        transposed=base.T,
        part=base[2:, 1:],
        same=base,
        half=base.half(),
        brain=base.bfloat16(),
        whole=torch.arange(7),
        flags=torch.tensor([True, False, True]),
        bytes=torch.arange(5, dtype=torch.uint8),
        scalar=torch.tensor(3.5),
        none=torch.empty(0, 4),
        parameter=torch.nn.Parameter(torch.ones(3)),
    )


class Evil:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_tensors_equal_those_of_torch_load(options):
    data = torch_bytes({"state_dict": state_dict(), "epoch": 3}, **options)
    # protocol 4 is more than weights_only reads
    expected = torch.load(io.BytesIO(data), weights_only="pickle_protocol" not in options)
    value = read_buffer(data)
    assert value["epoch"] == 3 and list(value["state_dict"]) == list(expected["state_dict"])
    for name, tensor in expected["state_dict"].items():
        got = value["state_dict"][name]
        assert got.dtype == tensor.dtype and got.shape == tensor.shape and torch.equal(got, tensor), name


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("numpy_1", [False, True])
def test_arrays_of_every_protocol_and_of_both_numpy_paths_are_read(protocol, numpy_1):
    value = {
        "small": np.arange(6, dtype=np.float32).reshape(2, 3),
        "large": np.random.default_rng(0).standard_normal((40, 3, 7)),
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "big_endian": np.arange(5, dtype=">i4"),
        "flags": np.array([True, False]),
        "empty": np.empty((0, 3), np.float16),
        "text": np.array(["ab", "c"]),
        "scalar": np.float64(2.5),
    }
    data = pickle.dumps(value, protocol=protocol)
    if numpy_1:
        if protocol >= 4:  # lengths are part of the names there
            data = data.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
            data = data.replace(b"\x8c\x13numpy._core.numeric", b"\x8c\x12numpy.core.numeric")
        else:
            data = data.replace(b"numpy._core", b"numpy.core")
        assert b"numpy._core" not in data and b"numpy.core" in data
    result = read_buffer(bytearray(data))
    assert result.pop("scalar") == 2.5
    for name, array in result.items():
        assert isinstance(array, PickledArray)
        np.testing.assert_array_equal(array.numpy(), value[name])
        assert array.numpy().dtype == value[name].dtype


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_equal_those_of_pickle(protocol):
    shared = [1, 2]
    value = {
        "a": (1, -1, 255, 256, 65536, -(2**31), 2**62, 2**200, -(2**200)),
        3: [0.5, float("inf"), None, True, False, "", "ü\n'\\", "x" * 500, b"", b"\x00\xff", ()],
        "nested": {"x": {"y": [[], {}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]}},
        "shared": [shared, shared],
        ("t", 1): collections.OrderedDict([("k", 1), ("l", [2])]),
    }
    result = read_buffer(bytearray(pickle.dumps(value, protocol=protocol)))
    assert result == value
    assert result["shared"][0] is result["shared"][1]
    assert read_buffer(bytearray(pickle.dumps({1, 2}, protocol=protocol))) == [1, 2]
    assert str(read_buffer(bytearray(pickle.dumps("ü" * 5000, protocol=max(protocol, 1))))) == "ü" * 5000


def test_a_text_of_megabytes_stays_in_the_file():
    assert isinstance(read_buffer(bytearray(pickle.dumps("x" * 10**6))), LongText)


@pytest.mark.parametrize("name", sorted(np.load(DATA / "original_malicious.npz").files))
def test_malicious_samples_run_nothing(name, tmp_path, monkeypatch):
    """Each of them writes a file CJEPA_MARKER_* when anything unpickles it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(np.load(DATA / "original_malicious.npz")[name].tobytes())
    try:
        value = read_pickled(tmp_path / name)
    except ConversionError:
        value = None
    assert [path.name for path in tmp_path.iterdir()] == [name]
    while isinstance(value, (dict, list)) and value:
        value = list(value.values())[-1] if isinstance(value, dict) else value[-1]
    assert not value or isinstance(value, (Record, torch.Tensor, tuple))


@pytest.mark.parametrize("protocol", range(6))
def test_classes_and_functions_become_records_of_their_name_and_arguments(protocol, tmp_path):
    marker = tmp_path / "marker"
    for function, args in ((os.mkdir, (str(marker),)), (eval, ("1",)), (getattr, ("text", "upper"))):
        value = read_buffer(bytearray(pickle.dumps(Evil(function, *args), protocol=protocol)))
        assert isinstance(value, Record) and value.name == function.__name__ and value.args == args
    assert not marker.exists()


def test_a_name_with_dots_does_not_reach_an_allowed_module():
    value = read_buffer(bytearray(b"\x80\x04\x8c\x05torch\x8c\x17serialization.os.system\x93\x8c\x02ls\x85R."))
    assert isinstance(value, Record) and value.name == "serialization.os.system"


def test_a_pickled_module_gives_its_state_dict_and_attributes():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.MultiheadAttention(4, 2))
    module.register_buffer("temporary", torch.ones(2), persistent=False)
    tensors, modules = module_tensors(read_buffer(torch_bytes(module)))
    expected = module.state_dict()
    assert list(tensors) == list(expected) or set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert module_attribute(modules["2"], "num_heads") == 2 and module_attribute(modules["2"], "nothing") is None


def test_modules_that_contain_each_other_are_refused():
    module = torch.nn.Sequential(torch.nn.Linear(1, 1))
    record = read_buffer(torch_bytes(module))
    record.state["_modules"]["again"] = record
    with pytest.raises(ConversionError, match="contain each other"):
        module_tensors(record)


def zip_bytes(entries, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return bytearray(buffer.getvalue())


def tensor_pickle(numel=4, offset=0, size=(4,), stride=(1,), repeat=1):
    """The pickle of a list of `repeat` tensors over one storage, with whatever geometry."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    args = (Storage(), offset, size, stride, False, collections.OrderedDict())
    Pickler(buffer, protocol=2).dump([Evil(rebuild, *args) for _ in range(repeat)])
    return buffer.getvalue()


HOSTILE = {
    "declared bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.",
    "declared text": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"x.",
    "negative string": b"T" + struct.pack("<i", -5) + b"xxxxx.",
    "deep lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep tuples as key": b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns.",
    "dictionaries": b"\x80\x02(" + b"}" * 3_000_000 + b"l.",
    "instructions": b"\x80\x02" + b"N0" * 3_000_000 + b"N.",
    "memo bomb": b"\x80\x02]q\x00" + b"".join(b"]q\x01h\x00ah\x00aq\x00" for _ in range(1000)) + b".",
    "memo of a large tuple": b"\x80\x02("
    + b"N" * 100_000
    + b"tq\x00"
    + b"".join(b"0cbuiltins\nlist\nh\x00\x85R" for _ in range(20_000))
    + b".",
    "huge integer": b"\x80\x02\x8b" + struct.pack("<I", 10**6) + b"\x01" * 10**6 + b".",
    "huge number": b"L" + b"9" * 10**6 + b"L\n.",
    "bytearray of a size": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
    "colliding keys": b"\x80\x02}("
    + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 2000))
    + b"u.",
    "storage larger than its data": zip_bytes({"a/data.pkl": tensor_pickle(numel=10**9), "a/data/0": b"\0" * 16}),
    "tensor beyond its storage": zip_bytes({"a/data.pkl": tensor_pickle(size=(5,)), "a/data/0": b"\0" * 16}),
    "offset beyond its storage": zip_bytes({"a/data.pkl": tensor_pickle(offset=1), "a/data/0": b"\0" * 16}),
    "expanded tensor": zip_bytes(
        {"a/data.pkl": tensor_pickle(size=(10**6, 10**6), stride=(0, 0)), "a/data/0": b"\0" * 16}
    ),
    "negative stride": zip_bytes({"a/data.pkl": tensor_pickle(stride=(-1,)), "a/data/0": b"\0" * 16}),
    "tensors over the same bytes": zip_bytes(
        {"a/data.pkl": tensor_pickle(10**5, size=(10**5,), repeat=100), "a/data/0": b"\0" * 400_000}
    ),
    "copies of a large tuple": b"\x80\x02](c_x\nY\n("
    + b"N" * 300_000
    + b"tq\x00"
    + b"0(c_x\nY\n"
    + b"N" * 300_000
    + b"tq\x010"
    + b"ccopyreg\n_reconstructor\nh\x01R" * 300
    + b"e.",
    "number of a size": b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R"
    + b"X\x05\x00\x00\x00aaaaa\x86R.",
    "zip bomb": zip_bytes({"a/data.pkl": b"\0" * 10**7}, zipfile.ZIP_DEFLATED),
    "missing storage": zip_bytes({"a/data.pkl": tensor_pickle()}),
    "no pickle": zip_bytes({"a/other": b"N."}),
    "cut off": torch_bytes(state_dict())[:-40],
    "cut off, old format": torch_bytes(state_dict(), _use_new_zipfile_serialization=False)[:-40],
    "extension": b"\x80\x02\x82\x01.",
    "memo": b"\x80\x02h\x07.",
    "empty stack": b"\x80\x02.",
    "below a mark": b"\x80\x02N(.",
    "text": b"<!DOCTYPE html><html>",
    "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "safetensors": struct.pack("<Q", 2) + b"{}" + b" " * 64,
}
INERT = {"deep lists", "memo bomb", "bytearray of a size", "expanded tensor"}  # harmless as data


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_bounded_time_and_memory(name):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    data = bytearray(HOSTILE[name])
    if name in INERT:
        read_buffer(data)
    else:
        with pytest.raises(ConversionError, match="the file cannot be read"):
            read_buffer(data)
    assert time.process_time() - start < 5
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 10 * len(data) + 200_000_000


def test_a_dtype_is_looked_up_where_nothing_is_imported(monkeypatch):
    """torch imports some of its attributes, `torch.onnx` for one, when it is asked for them."""
    asked = []
    monkeypatch.setattr(torch, "__getattr__", asked.append)
    machine, storage = _Machine(b"", 10**6), _Storage(torch.uint8, 16, torch.zeros(16, dtype=torch.uint8))

    def tensor(name):
        arguments = (storage, 0, (4,), (1,), False, None, Record("torch", name))
        return machine._call(Record("torch._utils", "_rebuild_tensor_v3"), arguments)

    assert tensor("float32").dtype == torch.float32
    assert isinstance(tensor("imported_lazily"), Record) and asked == []


def test_a_number_of_a_size_allocates_nothing():
    machine, dtype = _Machine(b"", 1000), _Dtype("f4")
    for data in (10**10, LongText(memoryview(b"a" * 2000)), memoryview(b"a" * 2000)):
        assert isinstance(machine._call(Record("numpy.core.multiarray", "scalar"), (dtype, data)), Record)


def test_storages_in_the_same_place_are_refused():
    """Unaligned in the file they have to be copied: each counts against the budget."""
    machine = _Machine(b"", 1000)
    machine.find_storage, machine.stack = lambda key, dtype, numel: torch.empty(0), []
    with pytest.raises(ConversionError, match="more memory"):
        for key in range(200):
            machine._persistent(("storage", Record("torch", "FloatStorage"), str(key), "cpu", 10**6))


def test_names_and_numbers_of_parameters_are_bounded():
    for parameters in ({"a" * 10**4: None}, {str(n): None for n in range(20_000)}):
        record = Record("torch.nn", "Module", ())
        record.state = {"_parameters": parameters, "_buffers": {}, "_modules": {}}
        with pytest.raises(ConversionError, match="parameter"):
            module_tensors(record)
    record.state = {"_parameters": {}, "_buffers": {"x": torch.ones(1)}, "_modules": {}}
    record.state["_non_persistent_buffers_set"] = 1
    with pytest.raises(ConversionError, match="buffers"):
        module_tensors(record)


def test_a_dictionary_that_holds_itself_is_no_model():
    value = {}
    value["state_dict"] = value
    with pytest.raises(ConversionError, match="no model"):
        _state_dict(value)


def test_an_expanded_tensor_is_a_record():
    assert isinstance(read_buffer(bytearray(HOSTILE["expanded tensor"]))[0], Record)


def test_an_array_whose_shape_is_not_its_data_is_refused():
    data = pickle.dumps(np.arange(6, dtype=np.float32), protocol=4).replace(b"K\x06\x85", b"K\x07\x85")
    with pytest.raises(ConversionError, match="do not fill its shape"):
        read_buffer(bytearray(data))


def test_an_array_of_objects_cannot_be_read():
    array = read_buffer(bytearray(pickle.dumps(np.array([{}, None], dtype=object))))
    with pytest.raises(ConversionError, match="holds objects"):
        array.numpy()


def test_errors_name_the_file(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"nothing of the kind")
    (tmp_path / "b.ckpt").touch()
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(ConversionError, match=name):
            read_pickled(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_pickled(tmp_path / "c.ckpt")
    with pytest.raises(ConversionError, match="is a folder"):
        read_pickled(tmp_path)


def test_tensors_of_a_file_can_be_changed_without_changing_it(tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(torch_bytes({"x": torch.zeros(1000)}))
    before = path.read_bytes()
    read_pickled(path)["x"].fill_(1.0)
    assert path.read_bytes() == before


# --------------------------------------------------------------------------------------------------------------------
# Fuzzing


def seeds():
    """Small files of every format."""
    arrays = {"train": {"0.mp4": np.arange(8, dtype=np.float32).reshape(2, 2, 2)}, "val": {"x": np.float64(1)}}
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    small = {"state_dict": collections.OrderedDict(a=torch.ones(2, 2), b=torch.arange(3)), "epoch": 1}
    files = [pickle.dumps(arrays, protocol=protocol) for protocol in range(6)]
    files += [torch_bytes(small), torch_bytes(small, _use_new_zipfile_serialization=False), torch_bytes(module)]
    files += [tensor_pickle(), zip_bytes({"a/data.pkl": tensor_pickle(), "a/data/0": b"\0" * 16})]
    values = [
        "x",
        b"y",
        2**70,
        1.5,
        {1, 2},
        frozenset({3}),
        (1, [2, {"k": None}]),
        bytearray(b"zz"),
        Evil(getattr, 1, "real"),
    ]
    return [bytearray(file) for file in files] + [bytearray(pickle.dumps(values, protocol=p)) for p in range(6)]


OPCODES = b"(.012FIJKLMNPQRSTUVXabcd}eghijl]opqrst)uGBC\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x90"
OPCODES += b"\x91\x92\x93\x94\x95\x96\x97\x98"
NUMBERS = [0, 1, 2, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]


def mutated(file: bytearray, others: list[bytearray], rng: random.Random) -> bytearray:
    file = bytearray(file)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        position, kind = rng.randrange(len(file) + 1), rng.randrange(8)
        if kind == 0 and position < len(file):
            file[position] ^= 1 << rng.randrange(8)
        elif kind == 1 and position < len(file):
            file[position] = rng.randrange(256)
        elif kind == 2:
            file[position:position] = bytes([rng.choice(OPCODES)]) * rng.choice((1, 1, 3, 50))
        elif kind == 3:
            del file[position : position + rng.randrange(1, 20)]
        elif kind == 4 and rng.random() < 0.3:
            del file[position:]
        elif kind == 5:
            size = rng.choice((2, 4, 8))
            number = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")
            file[position : position + size] = number
        elif kind == 6:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            file[position:position] = other[start : start + rng.randrange(1, 60)]
        elif kind == 7:
            start = rng.randrange(len(file) + 1)
            file[position:position] = file[start : start + rng.randrange(1, 200)]
        if not file:
            file = bytearray(b".")
    return file


def read_whole(data: bytearray) -> bool:
    """Reads everything that a converter would; True if the file could be read at all."""
    try:
        value = read_buffer(data)
    except ConversionError:
        return False
    try:
        for split in value.values() if isinstance(value, dict) else ():
            for array in split.values() if isinstance(split, dict) else ():
                if isinstance(array, PickledArray):
                    array.numpy()
        _kind(*_state_dict(value))
    except ConversionError:
        pass
    return True


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_mutated_files_raise_conversion_errors_only(data):
    files = seeds()
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    read_whole(mutated(data.draw(st.sampled_from(files)), files, rng))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.one_of(st.sampled_from(list(OPCODES)), st.integers(0, 255)), max_size=60))
def test_arbitrary_instructions_raise_conversion_errors_only(instructions):
    read_whole(bytearray(b"\x80\x04" + bytes(instructions) + b"."))


@pytest.mark.slow
def test_a_hundred_thousand_mutated_files():
    """Only ConversionError, no file over 5 s, and 200 MB in all (every file is a few kilobytes)."""
    files, rng = seeds(), random.Random(0)
    read_whole(files[0])
    before, longest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    for _ in range(100_000):
        data = mutated(rng.choice(files), files, rng)
        start = time.process_time()
        read_whole(data)
        longest = max(longest, time.process_time() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(f"longest {longest:.3f} s, memory grew by {grown / 1e6:.0f} MB")
    assert longest < 5 and grown < 200_000_000
