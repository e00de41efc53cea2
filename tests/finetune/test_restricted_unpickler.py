import io
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from lit_generative.finetune.restricted_unpickler import PersistentObject, restricted_load
from tests.finetune.persistent_pickles import EasyDict, Persistent, persistent_pickle


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Reads bytes in an empty folder, where a command that ran would leave the file ``ran``."""
    monkeypatch.chdir(tmp_path)

    def read(content: bytes):
        (tmp_path / "file.pkl").write_bytes(content)
        return restricted_load(tmp_path / "file.pkl")

    yield read
    assert not (tmp_path / "ran").exists()


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_tensors_and_plain_data_come_back(load, protocol):
    weight = torch.randn(3, 2, dtype=torch.float64)
    value = {
        "tensor": weight,
        "view": weight.T[1:],
        "half": weight.half(),
        "parameter": torch.nn.Parameter(weight.float()),
        "plain": [1, 2.5, None, True, "text", (3, 4), {5, 6}],
        "ordered": OrderedDict(a=1, b=torch.tensor([7])),
        "easy": EasyDict(kind="class"),
    }
    loaded = load(persistent_pickle(value, protocol))
    for key in ("tensor", "view", "half", "parameter"):
        assert torch.equal(loaded[key], value[key]), key
        assert loaded[key].dtype == value[key].dtype
        assert not loaded[key].requires_grad
    assert loaded["plain"] == value["plain"]
    assert loaded["ordered"] == {"a": 1, "b": torch.tensor([7])}
    assert loaded["easy"] == {"kind": "class"}
    assert type(loaded["easy"]) is dict


@pytest.mark.parametrize("kind", ["f4", ">f8", "i8", "u1", "b1"])
def test_arrays_and_scalars_of_numbers_come_back_as_tensors_and_numbers(load, kind):
    array = np.arange(6).reshape(2, 3).astype(kind)
    loaded = load(pickle.dumps([array, np.asfortranarray(array), array[1, 2]], protocol=4))
    for value in loaded[:2]:
        assert torch.equal(value, torch.from_numpy(array.astype(array.dtype.newbyteorder("="))))
    assert loaded[2] == array[1, 2].item()
    assert type(loaded[2]) in (bool, int, float)


def test_a_persistent_object_becomes_its_class_name_and_state_without_its_source(load):
    module = Persistent("Generator", {"b4.weight": torch.ones(2)}, {"w_avg": torch.zeros(3)}, **{"b4.group_size": 4})
    loaded = load(persistent_pickle({"G": module}))["G"]
    assert isinstance(loaded, PersistentObject)
    assert loaded.class_name == "Generator"
    assert torch.equal(loaded.state["_buffers"]["w_avg"], torch.zeros(3))
    layer = loaded.state["_modules"]["b4"]
    assert layer.class_name == "Layer"
    assert torch.equal(layer.state["_parameters"]["weight"], torch.ones(2))
    assert (layer.state["group_size"], layer.state["weight_gain"]) == (4, 0.5)


def hostile_storage() -> bytes:
    """A tensor whose values are a file of torch's that calls a command."""
    return pickle.dumps({"G": Call(torch.storage._load_from_bytes, torch_file(Call(os.system, "touch ran")))})


def torch_file(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


HOSTILE = {
    "top level": lambda: pickle.dumps(Call(os.system, "touch ran")),
    "field": lambda: persistent_pickle({"G": Persistent("Generator", {"w": Call(os.system, "touch ran")})}),
    "storage": hostile_storage,
    "old protocol": lambda: b"cos\nsystem\n(S'touch ran'\ntR.",
}


@pytest.mark.parametrize("where", HOSTILE)
def test_a_command_is_refused_by_name_wherever_it_stands(load, where):
    with pytest.raises(ValueError, match=r"file.pkl was refused: .*(posix|os)\.system.* Nothing of it was run"):
        load(HOSTILE[where]())


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.getattr", "builtins.type", "torch.load", "torch.jit.load", "numpy.load"]
)
def test_functions_that_lead_further_are_refused(load, name):
    module, _, function = name.rpartition(".")
    with pytest.raises(ValueError, match=f"asks for {name}"):
        load(f"c{module}\n{function}\n(S'x'\ntR.".encode())


def test_the_source_of_an_object_is_never_run_nor_its_class_imported(load):
    load(persistent_pickle(Persistent("os.system", {})))


def test_another_kind_of_persistent_object_is_refused(load):
    meta = EasyDict(type="function", class_name="x", state={})
    body = persistent_pickle(meta, 2)[2:-1]
    with pytest.raises(ValueError, match="persistent 'function'"):
        load(b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n" + body + b"\x85R.")


@pytest.mark.parametrize(
    "name", ["torch._utils\n_rebuild_tensor_v2", "numpy\ndtype", "dnnlib.util\nEasyDict", "collections\nOrderedDict"]
)
def test_what_a_file_may_call_cannot_be_changed_by_it(load, name):
    """BUILD with a pair of states sets attributes."""
    with pytest.raises(ValueError, match=r"file\.pkl (was refused|cannot be read)"):
        load(f"c{name}\n(N}}S'_function'\nI1\nstb.".encode())


def test_an_array_of_objects_is_refused(load):
    with pytest.raises(ValueError, match="array of 'O8', not of numbers"):
        load(pickle.dumps(np.array([None, "x"], dtype=object), protocol=4))


def test_a_tensor_beyond_its_values_is_refused(load):
    storage = torch.zeros(3).untyped_storage()
    call = Call(
        torch._utils._rebuild_tensor_v2,
        torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True),
    )
    call.call = (call.call[0], (*call.call[1], 1, (3,), (1,), False, OrderedDict()))
    with pytest.raises(ValueError, match=r"cannot be read as a pickle of tensors: RuntimeError.*out of bounds"):
        load(pickle.dumps(call))


def test_what_is_no_storage_cannot_stand_for_one(load):
    with pytest.raises(ValueError, match="holds a dict where a tensor's values are expected"):
        load(pickle.dumps(Call(torch.storage._load_from_bytes, torch_file({"a": 1}))))


def test_data_outside_of_the_file_is_refused(load):
    with pytest.raises(ValueError, match="persistent_load"):
        load(b"S'id'\nQ.")


@pytest.mark.parametrize("content", [b"", b"no pickle", persistent_pickle({"G": torch.ones(99)})[:-20]])
def test_a_damaged_file_is_named(load, content):
    with pytest.raises(ValueError, match=r"file\.pkl (cannot be read|was refused)"):
        load(content)


def test_a_value_that_holds_itself_is_refused(load):
    value = []
    value.append(value)
    with pytest.raises(ValueError, match="RecursionError"):
        load(pickle.dumps(value))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*lost\.pkl"):
        restricted_load(tmp_path / "lost.pkl")
