"""Headers are believed only as far as the file bears them out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorafit.errors import LorafitError, ModelError, SafetyError
from lorafit.files.safetensors import INDEX, build_header, dtype_name, read_header, read_index, read_rows, torch_dtype


def write_raw(file: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return file


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), begin: int = 0, end: int = 8) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(7, 3).to(torch.bfloat16), "whole": torch.randn(5), "scalar": torch.tensor(2.5),
        "numbers": torch.arange(6).reshape(2, 3), "none": torch.zeros(0, 4), "flags": torch.tensor([True, False]),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    entries = read_header(tmp_path / "a.safetensors")
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        got = read_rows(entries[name])
        assert got.dtype == tensor.dtype and torch.equal(got, tensor)
        assert torch_dtype(entries[name].dtype) is tensor.dtype and dtype_name(tensor.dtype) == entries[name].dtype
    assert torch.equal(read_rows(entries["half"], 2, 5), tensors["half"][2:5])


def test_headers_it_builds_are_read_by_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    file = tmp_path / "a.safetensors"
    values = torch.randn(3, 2)
    file.write_bytes(build_header([("x", "F32", (3, 2)), ("y", "BF16", (0,))]) + values.numpy().tobytes())
    assert torch.equal(load_file(file)["x"], values)
    assert len(build_header([("x", "F32", (3, 2))])) % 8 == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"12345", "incomplete"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer"),
        (b"PK\x03\x04aaaaaaaaaa", "pickle"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "header claims"),
        ((200_000_000).to_bytes(8, "little") + b"{}", "header claims"),
        ((500).to_bytes(8, "little") + b"{}", "ends inside the header"),
    ],
)
def test_files_that_are_no_weights_are_named_for_what_they_are(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=says) as caught:
        read_header(file)
    assert "model.safetensors" in str(caught.value) and caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"{not json", "header is not valid JSON"),
        (b"[1]", "header is not an object"),
        (
            b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}",
            "duplicate tensor 'a'",
        ),
        ({"a": entry(), "b": entry(begin=4, end=12)}, "header is wrong: invalid offset for tensor `b`"),
        ({"a": entry(begin=4, end=12)}, "header is wrong: invalid offset"),
        ({"a": entry(begin=8, end=0)}, "header's entry for 'a'"),
        ({"a": entry(shape=(2**62, 4))}, "header's entry for 'a'"),
        ({"a": entry(dtype="F99")}, "header's entry for 'a'"),
        ({"a": entry(dtype="F4", shape=(16,))}, "header's entry for 'a'"),
        ({"a": entry(shape=(-2,))}, "header's entry for 'a'"),
        ({"a": entry(shape=(-2, -1))}, "header is wrong: .*invalid value: integer `-2`"),
        ({"a": {"dtype": "F32"}}, "header's entry for 'a'"),
        ({"a": 3}, "header's entry for 'a'"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: object, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        read_header(write_raw(tmp_path / "model.safetensors", header, b"\0" * 8))


def test_a_truncated_file_and_one_that_goes_on_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="incomplete: 100 bytes are missing"):
        read_header(file)
    file.write_bytes(whole + b"x")
    with pytest.raises(ModelError, match="more bytes"):
        read_header(file)


def test_index_problems(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    cases: list[tuple[dict[str, object], type[LorafitError], str]] = [
        ({"a": "one.safetensors", "b": "two.safetensors"}, ModelError, "two.safetensors"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, ModelError, "1 missing tensors"),
        ({"a": "../one.safetensors"}, SafetyError, "outside"),
        ({"a": str(tmp_path / "one.safetensors")}, SafetyError, "outside"),
        ({"a": 3}, LorafitError, "outside|index"),
    ]
    for weight_map, kind, says in cases:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(kind, match=says) as caught:
            read_index(tmp_path)
        if kind is SafetyError:
            assert INDEX in str(caught.value) and caught.value.exit_code == 8
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(ModelError, match="no valid index"):
        read_index(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert list(read_index(tmp_path)) == ["a"]


def test_pickles_are_refused_unopened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (tmp_path / "pytorch_model.bin").chmod(0)
    with pytest.raises(SafetyError, match=r"pytorch_model.bin is a pickle file"):
        read_index(tmp_path)
    with pytest.raises(ModelError, match="holds no weights"):
        read_index(tmp_path / "nothing")
