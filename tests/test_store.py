"""The store of a search: what was put comes back, and keys follow content."""

import pytest
import torch
from graphwright.ir.content import content_key
from graphwright.ir.errors import DataError
from graphwright.search.store import Store


def test_a_value_comes_back_in_another_run(tmp_path):
    Store(tmp_path / "cache").put("scores", "k", {"loss": [1.5, 2.0]})
    assert Store(tmp_path / "cache").get("scores", "k") == {"loss": [1.5, 2.0]}
    assert Store(tmp_path / "cache").get("scores", "other") is None


def test_remember_computes_once(tmp_path):
    calls = []
    store = Store(tmp_path)
    for _ in range(2):
        assert store.remember("kind", "key", lambda: calls.append(1) or 7) == 7
    assert calls == [1]


def test_a_damaged_file_is_named(tmp_path):
    store = Store(tmp_path)
    store.put("scores", "k", 1.5)
    (tmp_path / "scores" / "k.json").write_bytes(b'{"loss": [1.5')
    with pytest.raises(DataError, match=r"k\.json is damaged.*delete it"):
        store.get("scores", "k")


def test_without_a_folder_nothing_is_kept(tmp_path):
    store = Store()
    store.put("kind", "key", 1)
    assert store.get("kind", "key") is None and not list(tmp_path.iterdir())


def test_keys_follow_content():
    value = torch.arange(6.0)
    assert content_key(value, 3) == content_key(value.clone(), 3)
    keys = {content_key(value, 3), content_key(value, 4), content_key(value.reshape(2, 3), 3), content_key(value + 1, 3)}
    assert len(keys) == 4
