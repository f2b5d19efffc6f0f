import threading
import time

import numpy as np
import pytest

from examples.pathology.cohort.patients import Patient
from examples.pathology.features.files import Bag
from examples.pathology.features.kind import FeatureKind
from examples.pathology.training import bags as module
from examples.pathology.training.bags import BagStore
from tests.pathology.tiny import make_tables


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    return make_tables(tmp_path_factory.mktemp("cohort")).load().patients


def test_a_stream_gives_every_step_its_own_tiles_in_order(patients):
    store = BagStore(cache_bytes=0)
    steps = [(patients[i], patients[(i + 5) % 12]) for i in (3, 0, 7, 7, 1)]
    for step, tiles in zip(steps, store.stream(steps), strict=True):
        for one, bag in zip(step, tiles, strict=True):
            np.testing.assert_array_equal(bag, BagStore().load(one))


def test_the_next_tiles_are_read_while_a_step_is_taken(patients, monkeypatch):
    """Reading takes 10 ms and a step 30 ms: only the first bag is waited for."""
    original = BagStore.load
    monkeypatch.setattr(
        BagStore, "load", lambda store, one: (time.sleep(0.01), original(store, one))[1]
    )
    store = BagStore(cache_bytes=0)
    started = time.perf_counter()
    for _ in store.stream([(patient,) for patient in patients]):
        time.sleep(0.03)
    assert store.waited < 0.25 * (time.perf_counter() - started)  # 1/4 if nothing overlapped


def test_no_more_is_read_ahead_than_agreed(patients, monkeypatch):
    read = []
    original = BagStore.load
    monkeypatch.setattr(
        BagStore, "load", lambda store, one: (read.append(one.name), original(store, one))[1]
    )
    stream = BagStore().stream([(patient,) for patient in patients])
    next(stream)
    time.sleep(0.1)
    assert len(read) <= module.READ_AHEAD + 1
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("tiles")]


def test_an_error_of_the_reader_comes_out_of_the_stream(patients, tmp_path):
    broken = Patient("P", "MSS", {}, (tmp_path / "none.h5",), 1)
    with pytest.raises(ValueError, match=r"none.h5"):
        list(BagStore().stream([(patients[0],), (broken,)]))


def test_half_precision_is_kept_only_where_it_loses_nothing(monkeypatch, tmp_path):
    halves = np.array([[0.5, 1.25], [-2.0, 3.0]], dtype=np.float32)
    singles = np.array([[0.1, 1e6], [-2.0, 3.0]], dtype=np.float32)
    for feats, nbytes in ((halves, 8), (singles, 16)):
        bag = Bag(feats, np.zeros((2, 2), dtype=np.float32), FeatureKind(2, "x"))
        monkeypatch.setattr(module, "read_features", lambda _, bag=bag: bag)
        store = BagStore()
        patient = Patient("P", "", {}, (tmp_path,), 2)
        for _ in range(2):  # read, and from memory
            loaded = store.load(patient)
            assert loaded.dtype == np.float32
            np.testing.assert_array_equal(loaded, feats)
        assert store._used == nbytes


def test_memory_is_bounded(patients):
    one = BagStore()
    one.load(patients[0])
    store = BagStore(cache_bytes=3 * one._used)
    for patient in patients:
        store.load(patient)
    assert len(store._cache) == 3
    assert store._used <= store.cache_bytes
