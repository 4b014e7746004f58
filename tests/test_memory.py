"""The rehearsal memory: quotas, prefixes, and herding of whole classes from raw features."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastil import memory
from fastil.errors import UserError
from fastil.memory import MemoryConfig, RehearsalMemory, herd, herd_classes, select_at_random
from fastil.plan import Key
from fastil.settings import build

KEY = Key(seed=3, step=1, phase="memory")


def released_loop(features, m):
    """iCaRL's loop as LUCIR and PODNet release it, in float64, on features as the network gives them."""
    D = np.asarray(features, dtype=np.float64).T  # [d, n]
    norms = np.linalg.norm(D, axis=0)
    D = D / np.where(norms > 0, norms, 1)
    mu = np.mean(D, axis=1)
    w_t = mu
    herding = np.zeros(D.shape[1], dtype=np.int64)
    wanted = min(m, D.shape[1])
    iter_herding, iter_herding_eff = 0, 0
    while np.sum(herding != 0) != wanted:
        tmp_t = np.dot(w_t, D)
        if iter_herding_eff >= 1000:  # where the released loop stops: the rest among the images not yet picked
            tmp_t[herding != 0] = -np.inf
        ind_max = int(np.argmax(tmp_t))
        iter_herding_eff += 1
        if herding[ind_max] == 0:
            herding[ind_max] = 1 + iter_herding
            iter_herding += 1
        w_t = w_t + mu - D[:, ind_max]
    return np.argsort(np.where(herding > 0, herding, len(herding) + 1), kind="stable")[:wanted].tolist()


def clustered(random, n, d, centres):
    return centres[random.integers(0, len(centres), n)] + 0.02 * random.standard_normal((n, d))


@pytest.mark.parametrize(
    ("n", "d", "m"), [(1, 1, 1), (3, 2, 2), (19, 7, 20), (20, 7, 20), (21, 7, 20), (64, 3, 50), (500, 64, 20)]
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_herding_is_the_released_loop_on_normalised_features(n, d, m, scale):
    """Each image has a length of its own, which must not count."""
    random = np.random.default_rng(n + d + m)
    features = (random.standard_normal((n, d)) + 0.5) * scale * random.uniform(0.1, 10, (n, 1))
    picks = herd(features, m)
    assert picks.dtype == np.int64
    assert picks.tolist() == released_loop(features, m)


@pytest.mark.parametrize("m", [5, 20, 30, 45])
def test_herding_of_clusters_and_blank_images_is_the_released_loop(m):
    random = np.random.default_rng(8)
    features = clustered(random, 40, 6, np.abs(random.standard_normal((3, 6))))
    features[[11, 30]] = 0  # two blank images
    assert herd(features, m).tolist() == released_loop(features, m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_features_of_any_precision_are_herded_in_float64(dtype):
    features = torch.randn(80, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = released_loop(features.double().numpy(), 20)
    assert herd(features, 20).tolist() == wanted
    assert herd(features.double().numpy(), 20).tolist() == wanted


@given(st.integers(3, 40), st.integers(2, 10), st.integers(0, 2**32 - 1), st.data())
@settings(deadline=None, database=None, derandomize=True, max_examples=30)
def test_a_smaller_m_is_a_prefix(n, d, seed, data):
    features = np.random.default_rng(seed).standard_normal((n, d)) + 0.3
    m = data.draw(st.integers(0, n))
    assert herd(features, m).tolist() == herd(features, n)[:m].tolist()


def test_a_class_with_fewer_images_than_asked_for_keeps_them_all():
    features = np.random.default_rng(0).standard_normal((7, 4))
    assert sorted(herd(features, 20).tolist()) == list(range(7))


@pytest.mark.parametrize("gram_bytes", [1, 8 * 40**2 * 2, 2**28])
@pytest.mark.parametrize("m", [1, 8, 60])
def test_many_classes_at_once_equal_one_by_one_however_they_are_grouped(monkeypatch, gram_bytes, m):
    monkeypatch.setattr(memory, "GRAM_BYTES", gram_bytes)
    random = np.random.default_rng(2)
    features = [random.standard_normal((n, 5)) + 0.4 for n in (40, 3, 17, 1, 40, 8, 25)]
    picks = herd_classes([torch.from_numpy(f) for f in features], m)
    assert [p.tolist() for p in picks] == [released_loop(f, m) for f in features]
    assert all(p.dtype == np.int64 for p in picks)


@pytest.mark.parametrize("shape", [(5,), (0, 4), (2, 3, 4), ()])
def test_features_that_are_no_images_by_dimensions_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        herd(np.zeros(shape), 3)


def test_a_growing_memory_has_the_same_quota_at_every_step():
    config = MemoryConfig(exemplars_per_class=20)
    assert [config.quota(seen) for seen in (1, 50, 1000)] == [20, 20, 20]


@pytest.mark.parametrize(("budget", "seen", "wanted"), [(2000, 50, 40), (2000, 60, 33), (2000, 1, 2000), (100, 100, 1)])
def test_a_fixed_budget_is_divided_among_the_classes_seen(budget, seen, wanted):
    assert MemoryConfig(exemplars_per_class=None, memory_budget=budget).quota(seen) == wanted


def test_a_budget_smaller_than_the_classes_is_one_clear_error():
    with pytest.raises(UserError, match=r"memory_budget=99.*100 classes; raise it"):
        MemoryConfig(exemplars_per_class=None, memory_budget=99).quota(100)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"exemplars_per_class": 20, "memory_budget": 2000}, "exactly one"),
        ({"exemplars_per_class": None}, "exactly one"),
        ({"exemplars_per_class": -3}, "exemplars_per_class=-3"),
        ({"exemplars_per_class": None, "memory_budget": 0}, "memory_budget=0"),
    ],
)
def test_a_memory_needs_one_size_above_zero(keys, complaint):
    with pytest.raises(UserError, match=complaint):
        build(MemoryConfig, keys)


def test_the_memory_gives_every_exemplar_class_after_class_in_the_order_learned():
    kept = RehearsalMemory()
    assert kept.ids().tolist() == []
    assert kept.ids().dtype == np.int64
    kept.add(7, np.array([30, 10, 20]))
    kept.add(2, np.array([5]))
    kept.add(4, np.array([9, 8]))
    assert kept.ids().tolist() == [30, 10, 20, 5, 9, 8]
    assert kept.ids().dtype == np.int64


def test_reducing_keeps_the_first_exemplars_of_every_class():
    kept = RehearsalMemory()
    ranked = {7: [30, 10, 20, 40], 2: [5], 4: [9, 8]}
    for class_id, ids in ranked.items():
        kept.add(class_id, np.array(ids))
    for quota in (3, 2, 2, 1):
        kept.reduce(quota)
        assert {c: ids.tolist() for c, ids in kept.exemplars.items()} == {c: ids[:quota] for c, ids in ranked.items()}
    kept.reduce(5)  # what is gone does not come back
    assert kept.ids().tolist() == [30, 5, 9]


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=50, unique=True), st.data())
@settings(deadline=None, database=None, derandomize=True, max_examples=40)
def test_a_random_selection_is_a_prefix_of_a_larger_one_whatever_the_order_of_the_ids(ids, data):
    m = data.draw(st.integers(0, len(ids) + 3))
    ids = np.array(ids)
    shuffled = ids[data.draw(st.permutations(range(len(ids))))]
    whole = select_at_random(ids, len(ids), KEY)
    assert select_at_random(shuffled, m, KEY).tolist() == whole[:m].tolist()
    assert sorted(whole.tolist()) == sorted(ids.tolist())


@pytest.mark.parametrize("change", [{"seed": 4}, {"step": 2}])
def test_a_random_selection_changes_with_seed_and_step(change):
    ids = np.arange(500)
    a, b = select_at_random(ids, 20, KEY), select_at_random(ids, 20, KEY._replace(**change))
    assert len(np.intersect1d(a, b)) < 10


def test_a_random_selection_favours_no_image():
    """20 of 100 over 1000 seeds: each image about 200 times; 0.999 quantile of chi-square with 99 degrees is 148.2."""
    ids = np.arange(100)
    counts = np.zeros(100)
    for seed in range(1000):
        counts[select_at_random(ids, 20, KEY._replace(seed=seed))] += 1
    # Drawing without replacement makes the counts vary by 1 - 20/100 of what independent draws would.
    assert ((counts - 200) ** 2 / 200).sum() / 0.8 < 148.2


def test_a_class_gives_no_more_exemplars_than_it_has_images():
    counts = np.array([3, 50, 7, 20])
    assert MemoryConfig(exemplars_per_class=10).total(counts) == 3 + 10 + 7 + 10
    assert MemoryConfig(exemplars_per_class=None, memory_budget=30).total(counts) == 3 + 7 + 7 + 7


def test_features_that_require_a_gradient_are_herded_too():
    """Positions have no derivative; nobody need detach for them."""
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert herd(features.clone().requires_grad_(), 5).tolist() == herd(features, 5).tolist()


@pytest.mark.parametrize("many", [7, 10**6, 10**17])
def test_more_exemplars_than_images_are_all_images_and_cost_no_memory(many):
    features = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (3, 7)]
    picked = herd_classes(features, many)
    assert [sorted(ids.tolist()) for ids in picked] == [list(range(3)), list(range(7))]
    assert [ids.tolist() for ids in picked] == [herd(f, len(f)).tolist() for f in features]
