"""Tensors of torch itself, where it is installed; everywhere else `exactness.torch_like` stands for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import userfault

torch = pytest.importorskip("torch", reason="torch is not installed")

TYPES = [kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)]


def test_tensors_of_every_type_are_saved_by_their_bytes(tmp_path: Path) -> None:
    tensors = {}
    for kind in TYPES:
        try:
            tensors[str(kind)] = torch.zeros(1 << 19, dtype=torch.uint8).view(kind)
        except RuntimeError:
            continue  # quantised types have no views
    assert {"torch.float32", "torch.bfloat16", "torch.bool", "torch.complex64"} <= tensors.keys()
    raw = {name: tensor.view(torch.uint8) for name, tensor in tensors.items()}
    for number, each in enumerate(raw.values()):
        each[7] = number % 2
    expected = {name: bytes(each.tolist()) for name, each in raw.items()}
    with userfault.Checkpointer(tmp_path, tensors) as ck:
        point = ck.save()
        for each in raw.values():
            each[7] = 3
        point.result(60)
    with userfault.restore(tmp_path) as state:
        for name, content in expected.items():
            assert state[name].view(np.uint8).tobytes() == content, name
    userfault.restore(tmp_path, into=tensors)
    assert {name: bytes(each.tolist()) for name, each in raw.items()} == expected


def test_a_models_tied_weights_are_saved_once(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(600, 600), torch.nn.Linear(600, 600), torch.nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    with userfault.Checkpointer(tmp_path, model.state_dict()) as ck:
        ck.save().result(60)
    with userfault.restore(tmp_path) as state:
        assert state["0.weight"].ctypes.data == state["1.weight"].ctypes.data
    weight = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.zero_()
    userfault.restore(tmp_path, into=model.state_dict())
    assert torch.equal(model[0].weight, weight)


def test_what_its_memory_does_not_say_is_refused(tmp_path: Path) -> None:
    complex_ones = torch.zeros(3, dtype=torch.complex64)
    for tensor, reason in (
        (torch.zeros(4, 4).T[:, ::2], "not contiguous"),
        (torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
        (complex_ones.conj(), "conjugate"),
        (torch.zeros(3, device="meta"), "only memory of the CPU"),
        (torch.zeros(1 << 20).share_memory_(), "always_copy"),
    ):
        with pytest.raises(ValueError, match=reason):
            userfault.Checkpointer(tmp_path, {"a": tensor})
