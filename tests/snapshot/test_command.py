"""`userfault snapshot`: list, check, export, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import userfault
from snapshot.exactness import torch_like
from userfault.__main__ import app


def run(*words: str | Path, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["snapshot", *map(str, words)])
    assert done.exit_code == status, (done.output, done.exception)
    return done.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two points: the second changes one page of the first array."""
    path = tmp_path / "points"
    weights = np.arange(600_000, dtype=np.float32).reshape(2, 300_000)
    bias, text = np.arange(5, dtype=np.int16), bytearray(b"hello")
    with userfault.Checkpointer(path, {"layer.0/weights": weights, "bias": bias, "text": text}) as ck:
        ck.save(1, meta={"epoch": 1}).result(60)
        weights[1, 7] = -1
        ck.save(2, meta={"epoch": 2}).result(60)
    return path


def test_ls_lists_points_and_arrays(folder: Path) -> None:
    text = run("ls", folder)
    assert "step 1" in text
    assert "layer.0/weights" in text
    assert "2x300000" in text
    listed = json.loads(run("ls", folder, "--json"))["points"]
    assert [point["step"] for point in listed] == [1, 2]
    assert listed[1]["meta"] == {"epoch": 2}
    assert listed[1]["arrays"][0] | {} == {
        "name": "layer.0/weights",
        "nbytes": 2_400_000,
        "kind": "ndarray",
        "dtype": "<f4",
        "shape": [2, 300_000],
    }


def test_verify_says_sound_and_names_a_wrong_byte(folder: Path) -> None:
    assert "2 points" in run("verify", folder)
    assert "sound" in run("verify", folder, "--step", "1")
    assert json.loads(run("verify", folder, "--json"))["damage"] == []
    largest = max(folder.glob("segment-*"), key=lambda path: path.stat().st_size)
    spoilt = bytearray(largest.read_bytes())
    spoilt[4096 * 100] ^= 1
    largest.write_bytes(spoilt)
    text = run("verify", folder, status=1)
    assert "step 1" in text
    assert "layer.0/weights" in text
    assert "block at byte" in text
    found = json.loads(run("verify", folder, "--json", status=1))["damage"]
    assert found[0]["array"] == "layer.0/weights"
    assert found[0]["offset"] > 0
    assert found[0]["path"] == str(largest)


def test_diff_says_how_much_changed(folder: Path) -> None:
    assert "4" in run("diff", folder, "1", "2", status=1)
    changes = json.loads(run("diff", folder, "1", "2", "--json", status=1))["arrays"]
    assert changes["bias"]["changed"] == 0
    assert 0 < changes["layer.0/weights"]["changed"] <= 8192
    run("diff", folder, "2", "2")


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors", "raw"])
def test_export_writes_what_others_read(folder: Path, tmp_path: Path, kind: str) -> None:
    suffix = {"npz": ".npz", "safetensors": ".safetensors"}.get(kind, "")
    target = tmp_path / f"out{suffix}"
    answer = json.loads(run("export", folder, target, "--step", "1", "--as", kind, "--json"))
    assert answer["step"] == 1
    read = {"npy": from_npy, "npz": from_npz, "safetensors": from_safetensors, "raw": from_raw}[kind]
    arrays = read(target, answer["files"])
    assert arrays["weights"].tobytes() == np.arange(600_000, dtype=np.float32).tobytes()
    assert arrays["bias"].tobytes() == np.arange(5, dtype=np.int16).tobytes()
    assert arrays["text"].tobytes() == b"hello"
    if kind != "raw":
        assert arrays["weights"].shape == (2, 300_000)
        assert arrays["bias"].dtype == np.int16


def from_npy(target: Path, files: list[str]) -> dict[str, Any]:
    return {Path(file).stem.rpartition("_")[2]: np.load(file) for file in files}


def from_raw(target: Path, files: list[str]) -> dict[str, Any]:
    return {Path(file).stem.rpartition("_")[2]: np.fromfile(file, np.uint8) for file in files}


def from_npz(target: Path, files: list[str]) -> dict[str, Any]:
    with np.load(target) as found:
        return {name.rpartition("/")[2]: found[name] for name in found.files}


def from_safetensors(target: Path, files: list[str]) -> dict[str, Any]:
    content = target.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    kinds = {"F32": np.float32, "I16": np.int16, "U8": np.uint8}
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(content[start + begin : start + end], kinds[entry["dtype"]])
        found[name.rpartition("/")[2]] = array.reshape(entry["shape"])
    return found


def test_no_array_takes_another_ones_place_whatever_they_are_called(tmp_path: Path) -> None:
    names = ["a/b", "a_b", "a b", "file", "args", "allow_pickle", "", "..", "x" * 300, "x" * 301, "\u4e2d"]
    arrays = {name: np.full(5, number) for number, name in enumerate(names)}
    with userfault.Checkpointer(tmp_path / "points", arrays) as ck:
        ck.save(1).result(60)
    run("export", tmp_path / "points", tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as found:
        assert {name: found[name][0] for name in found.files} == {
            name: number for number, name in enumerate(names)
        }
    for kind, read in (("npy", np.load), ("raw", lambda path: np.fromfile(path, np.int64))):
        answer = json.loads(run("export", tmp_path / "points", tmp_path / kind, "--as", kind, "--json"))
        assert answer["arrays"] == names
        assert len(list((tmp_path / kind).iterdir())) == len(names)
        for number, path in enumerate(answer["files"]):
            assert Path(path).parent == tmp_path / kind
            assert (read(path) == number).all()


def test_one_array_is_one_file_if_the_target_is_called_so(folder: Path, tmp_path: Path) -> None:
    run("export", folder, tmp_path / "bias.npy", "--name", "bias")
    assert np.load(tmp_path / "bias.npy").tolist() == [0, 1, 2, 3, 4]
    run("export", folder, tmp_path / "text.raw", "--name", "text")
    assert (tmp_path / "text.raw").read_bytes() == b"hello"
    done = CliRunner().invoke(app, ["snapshot", "export", str(folder), str(tmp_path / "all.npy")])
    assert done.exit_code == 2
    assert "is one file, and there are 3 arrays" in done.stderr


@pytest.mark.parametrize("target", ["all.npz", "all.safetensors", "folder", "layer.raw"])
def test_an_export_of_a_damaged_block_says_which_and_leaves_what_was_there(
    folder: Path, tmp_path: Path, target: str
) -> None:
    largest = max(folder.glob("segment-*"), key=lambda path: path.stat().st_size)
    spoilt = bytearray(largest.read_bytes())
    spoilt[4096 * 100] ^= 1
    largest.write_bytes(spoilt)
    out = tmp_path / "out"
    out.mkdir()
    if target != "folder":
        (out / target).write_text("as before")
    words = ["export", str(folder), str(out / target), "--name", "bias", "--name", "layer.0/weights"]
    if target.endswith("raw"):
        words[3:5] = []
    done = CliRunner().invoke(app, ["snapshot", *words])
    assert done.exit_code == 2, done.output
    assert 'array "layer.0/weights": block' in done.stderr
    assert "are damaged" in done.stderr
    left = [path for path in out.rglob("*") if path.is_file()]
    assert [path.read_text() for path in left] == ([] if target == "folder" else ["as before"])


def test_types_that_only_torch_has_keep_their_names_in_safetensors(tmp_path: Path) -> None:
    tensor, storage = torch_like(64)
    storage[:] = np.arange(64)
    big = np.arange(4, dtype=">i4")
    arrays = {"bf16": tensor, "big": big, "none": np.zeros((0, 3), np.float32)}
    with userfault.Checkpointer(tmp_path / "points", arrays) as ck:
        ck.save(1).result(60)
    run("export", tmp_path / "points", tmp_path / "all.safetensors")
    content = (tmp_path / "all.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    assert header["bf16"] == {"dtype": "BF16", "shape": [32], "data_offsets": [0, 64]}
    assert header["none"] == {"dtype": "F32", "shape": [0, 3], "data_offsets": [80, 80]}
    assert content[start : start + 64] == storage.tobytes()
    assert np.frombuffer(content[start + 64 :], "<i4").tolist() == [0, 1, 2, 3]
    dates = np.zeros(3, "datetime64[s]")
    with userfault.Checkpointer(tmp_path / "dates", {"dates": dates}) as ck:
        ck.save(1).result(60)
    words = ["snapshot", "export", str(tmp_path / "dates"), str(tmp_path / "dates.safetensors")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "which .safetensors files do not have" in done.stderr


def test_diff_compares_the_last_two_points_if_none_are_named(folder: Path) -> None:
    told = json.loads(run("diff", folder, "--json", status=1))
    assert (told["first"], told["second"]) == (1, 2)
    assert told == json.loads(run("diff", folder, "1", "2", "--json", status=1))
    done = CliRunner().invoke(app, ["snapshot", "diff", str(folder.parent / "nowhere")])
    assert done.exit_code == 2


def test_some_arrays_are_exported_by_name(folder: Path, tmp_path: Path) -> None:
    run("export", folder, tmp_path / "some.npz", "--name", "bias")
    with np.load(tmp_path / "some.npz") as found:
        assert found.files == ["bias"]


@pytest.mark.parametrize(
    "words",
    [
        ("ls", "nowhere"),
        ("verify", "nowhere"),
        ("verify", "FOLDER", "--step", "9"),
        ("export", "FOLDER", "out", "--as", "parquet"),
        ("export", "FOLDER", "out", "--name", "nobody"),
        ("diff", "FOLDER", "1", "9"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(
    folder: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    place = {"FOLDER": str(folder), "out": str(tmp_path / "out")}
    done = CliRunner().invoke(app, ["snapshot", *(place.get(word, word) for word in words)])
    assert done.exit_code == 2, done.output
    assert "userfault snapshot: " in done.stderr
    assert "Traceback" not in done.stderr
