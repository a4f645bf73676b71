"""Model files: exported programs load, everything that could run code or is damaged is refused."""

import pickle
import zipfile

import pytest
import torch
from graphwright.ir.errors import CaptureError
from graphwright.ir.load import load_program


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "model.pt2"
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())
    torch.export.save(torch.export.export(model.eval(), (torch.zeros(1, 1, 8, 8),)), path)
    return path, model


def test_an_exported_program_loads(archive):
    path, model = archive
    x = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(load_program(path)(x)[0], model(x))


def test_a_pickle_is_refused_and_not_run(tmp_path):
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    for name, write in (
        ("raw.pt2", lambda p: p.write_bytes(pickle.dumps(Bomb()))),
        ("zip.pt2", lambda p: torch.save(Bomb(), p)),
        ("weights.onnx", lambda p: p.write_bytes(pickle.dumps(Bomb()))),
    ):
        write(tmp_path / name)
        with pytest.raises(CaptureError, match="pickle"):
            load_program(tmp_path / name)
    assert not ran.exists()


def test_a_pickle_hidden_in_an_archive_is_refused_and_not_run(archive, tmp_path):
    path, _ = archive
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    hidden = tmp_path / "hidden.pt2"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(hidden, "w") as new:
        for item in old.infolist():
            sample = "sample_inputs" in item.filename
            new.writestr(item.filename, pickle.dumps(Bomb()) if sample else old.read(item.filename))
    with pytest.raises(CaptureError):
        load_program(hidden)
    assert not ran.exists()


def test_damaged_archives_are_refused(archive, tmp_path):
    path, _ = archive
    content = path.read_bytes()
    (tmp_path / "short.pt2").write_bytes(content[: len(content) // 2])
    with pytest.raises(CaptureError, match="damaged or truncated"):
        load_program(tmp_path / "short.pt2")
    with pytest.raises(CaptureError, match="no model file"):
        load_program(tmp_path / "absent.pt2")
    with pytest.raises(CaptureError, match="input shapes are fixed"):
        load_program(path, {"x": (1, 1, 8, 8)})
