"""Herding from Gram matrices against a transcription of iCaRL's released loop, which keeps w itself."""

import numpy as np
import pytest
import torch
from conftest import FEW, SOAK
from hypothesis import given, settings
from hypothesis import strategies as st

from fastil.kernels import herd
from fastil.kernels.herd import MAX_TURNS, TIE, plain

SHORT = 60  # turns, instead of the thousand, where the interpreter needs milliseconds for each


def jitted(gram, counts, m, max_turns=SHORT):
    """The Triton form, on a GPU or in the interpreter."""
    launcher = pytest.importorskip("fastil.kernels.jit.herd", reason="triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return launcher.herd(gram.to(device), counts.to(device), m, max_turns, TIE).cpu()


both_forms = pytest.mark.parametrize(
    ("herd", "limit"), [(herd, MAX_TURNS), (jitted, SHORT)], ids=["operator", "triton"]
)


def unit_rows(features):
    """float64, L2-normalised; a row of zeros stays one."""
    features = np.asarray(features, dtype=np.float64)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, norms, out=np.zeros_like(features), where=norms > 0)


def released_loop(rows, m, limit=1000):
    """iCaRL's loop as LUCIR and PODNet release it, then the rest by the same rule among images not yet picked.

    rows: float64 [n, d], normalised. Returns the picks and the number of turns the loop took."""
    mu = rows.mean(axis=0)
    w, picks, turns = mu, [], 0
    while len(picks) < min(m, len(rows)) and turns < limit:
        i = int(np.argmax(rows @ w))
        turns += 1
        if i not in picks:
            picks.append(i)
        w = w + mu - rows[i]
    while len(picks) < min(m, len(rows)):
        scores = rows @ w
        scores[picks] = -np.inf
        i = int(np.argmax(scores))
        picks.append(i)
        w = w + mu - rows[i]
    return picks, turns


def picks_of(rows, m, herd=herd):
    """The kernel on one class."""
    rows = torch.from_numpy(rows)
    return herd((rows @ rows.T)[None], torch.tensor([len(rows)]), m)[0].tolist()


def exact_rows(random, n, d=16):
    """Rows whose norms, products and (n a power of two) means are exact in binary, so that ties are ties: 1, 4 or 16
    entries of +-1 divided by 1, 2 or 4; every third row doubles another one, and some are zero."""
    rows = np.zeros((n, d))
    for row in rows:
        many = random.choice([1, 4, 16])
        row[random.permutation(d)[:many]] = random.choice([-1.0, 1.0], many) / np.sqrt(many)
    rows[::3] = rows[random.integers(0, n, len(rows[::3]))]
    rows[random.integers(0, n, n // 8)] = 0
    return rows


@both_forms
@pytest.mark.parametrize(
    ("n", "d", "m"),
    [(1, 1, 1), (1, 5, 3), (3, 2, 3), (5, 2, 2), (20, 3, 20), (50, 64, 20), (33, 512, 7), (120, 8, 50), (500, 64, 20)],
)
def test_random_features_are_picked_as_by_the_released_loop(n, d, m, herd, limit):
    for seed in range(3):
        rows = unit_rows(np.random.default_rng(seed).standard_normal((n, d)) + 0.3)
        wanted, _ = released_loop(rows, m, limit)
        assert picks_of(rows, m, herd) == wanted + [-1] * (m - len(wanted))


@both_forms
@pytest.mark.parametrize(("n", "spread", "m"), [(60, 0.02, 20), (60, 0.1, 20), (200, 0.05, 50)])
def test_clustered_features_repeat_picks_and_a_repeat_moves_the_target_only(n, spread, m, herd, limit):
    """A tight cluster and a few images far from it: the loop comes back to the far ones before it has m new ones."""
    random = np.random.default_rng(5)
    centre = np.eye(8)[0]
    rows = centre + spread * random.standard_normal((n, 8))
    rows[: n // 10] = random.standard_normal((n // 10, 8))
    rows = unit_rows(rows)
    wanted, turns = released_loop(rows, m, limit)
    assert turns > m  # the example does what its name says
    assert picks_of(rows, m, herd) == wanted


@both_forms
@pytest.mark.parametrize(("n", "d"), [(60, 2), (120, 3), (100, 4)])
@pytest.mark.parametrize("more", [0, 7])
def test_what_a_thousand_turns_did_not_pick_follows_greedily(n, d, more, herd, limit):
    """In few dimensions the loop returns to the same images; all are asked for, or more than there are."""
    rows = unit_rows(np.random.default_rng(1).standard_normal((n, d)) + 0.3)
    rows[[2, 7]] = 0
    wanted, turns = released_loop(rows, n, limit)
    assert turns == limit
    assert MAX_TURNS == 1000
    assert sorted(wanted) == list(range(n))
    assert picks_of(rows, n + more, herd) == wanted + [-1] * more


@both_forms
@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32])
def test_exact_ties_go_to_the_lowest_position(n, herd, limit):
    """Duplicates and blank images tie in exact arithmetic; numpy's argmax is the first of the largest."""
    random = np.random.default_rng(n)
    for _ in range(2):
        rows = exact_rows(random, n)
        for m in (1, n // 2 + 1, n):
            wanted, _ = released_loop(rows, m, limit)
            assert picks_of(rows, m, herd) == wanted


@both_forms
@pytest.mark.parametrize("n", [2, 3, 8, 37])
def test_all_blank_images_are_picked_in_order(n, herd, limit):
    assert picks_of(np.zeros((n, 4)), n, herd) == list(range(n))


@both_forms
def test_the_lower_one_of_two_equal_images_is_picked_first(herd, limit):
    """DESIGN section 5: ties to the lowest id. Equal images tie in exact arithmetic, whatever their features are; of
    60 images in equal pairs the first 20 picks are among the first 30."""
    for seed in range(20 if SOAK else 6):
        rows = unit_rows(np.random.default_rng(seed).standard_normal((30, 16)))
        assert max(picks_of(np.concatenate((rows, rows)), 20, herd)) < 30


@both_forms
@given(st.integers(3, 40), st.integers(2, 12), st.integers(0, 2**32 - 1), st.data())
@settings(deadline=None, database=None, derandomize=True, max_examples=40 if SOAK else 3 if FEW else 12)
def test_a_smaller_m_is_a_prefix_and_no_image_is_picked_twice(herd, limit, n, d, seed, data):
    rows = unit_rows(np.random.default_rng(seed).standard_normal((n, d)) + 0.5)
    m = data.draw(st.integers(1, n))
    longer, shorter = picks_of(rows, n, herd), picks_of(rows, m, herd)
    assert shorter == longer[:m]
    assert sorted(longer) == list(range(n))


@both_forms
@pytest.mark.parametrize("m", [1, 5, 12, 30])
def test_classes_of_different_sizes_in_one_call_equal_one_by_one(m, herd, limit):
    random = np.random.default_rng(3)
    classes = [unit_rows(random.standard_normal((n, 6)) + 0.4) for n in (12, 3, 25, 1, 12, 7)]
    classes[4][5:] = 0  # one class that needs all thousand turns among others that are long done
    longest = max(len(rows) for rows in classes)
    gram = torch.from_numpy(random.normal(0, 1e3, (len(classes), longest, longest)))  # padding holds anything finite
    for g, rows in enumerate(classes):
        gram[g, : len(rows), : len(rows)] = torch.from_numpy(rows @ rows.T)
    ranks = herd(gram, torch.tensor([len(rows) for rows in classes]), m)
    assert ranks.dtype == torch.int64
    assert ranks.shape == (len(classes), m)
    for row, rows in zip(ranks.tolist(), classes, strict=True):
        assert row == released_loop(rows, m, limit)[0] + [-1] * (m - min(m, len(rows)))


@both_forms
def test_a_class_without_images_gets_no_picks_and_disturbs_no_other(herd, limit):
    rows = unit_rows(np.random.default_rng(0).standard_normal((6, 4)))
    gram = torch.zeros(2, 6, 6, dtype=torch.float64)
    gram[1] = torch.from_numpy(rows @ rows.T)
    ranks = herd(gram, torch.tensor([0, 6]), 4)
    assert ranks[0].tolist() == [-1] * 4
    assert ranks[1].tolist() == picks_of(rows, 4)


def test_the_gram_matrices_given_are_not_changed():
    gram = torch.ones(1, 3, 3, dtype=torch.float64)
    herd(gram, torch.tensor([2]), 2)
    assert torch.equal(gram, torch.ones_like(gram))


@both_forms
def test_nothing_asked_for_is_nothing_picked(herd, limit):
    assert herd(torch.eye(3)[None], torch.tensor([3]), 0).shape == (1, 0)


@pytest.mark.parametrize("shape", [(3, 3), (3,), (1, 1, 3, 3), (1, 3, 4), (2, 3, 3)])
def test_gram_matrices_that_do_not_fit_are_an_error(shape):
    with pytest.raises(ValueError, match=r"gram must be \[G, n, n\] and counts \[G\]"):
        herd(torch.zeros(shape), torch.tensor([3]), 2)


@pytest.mark.parametrize(
    ("gram", "counts", "m", "message"),
    [
        (torch.eye(3)[None], torch.tensor([3]), -1, "m=-1: must be an integer of at least 0"),
        (torch.eye(3)[None].long(), torch.tensor([3]), 2, "gram must hold floats and counts integers, not torch.int64"),
        (torch.eye(3)[None], torch.tensor([3.0]), 2, "gram must hold floats and counts integers, not torch.float32"),
    ],
)
def test_numbers_and_types_that_cannot_be_are_named(gram, counts, m, message):
    with pytest.raises(ValueError, match=message):
        herd(gram, counts, m)


def test_the_padding_of_the_gram_matrices_never_reaches_the_picks():
    """Where a class is smaller than the padded n there may be anything, NaN included."""
    rows = unit_rows(np.random.default_rng(0).standard_normal((11, 4)))
    gram = torch.full((2, 37, 37), torch.nan, dtype=torch.float64)
    gram[1, :11, :11] = torch.from_numpy(rows @ rows.T)
    counts = torch.tensor([0, 11])
    for form in (plain, jitted):
        keys = {"tie": TIE} if form is plain else {}
        assert form(gram, counts, 5, max_turns=SHORT, **keys)[1].tolist() == released_loop(rows, 5, SHORT)[0]


def test_what_is_not_a_number_is_picked_within_the_class_and_read_within_the_matrix():
    gram = torch.full((2, 32, 32), torch.nan, dtype=torch.float64)
    for counts in ([32, 20], [40, 32]):  # the second names more images than there are
        picks = jitted(gram, torch.tensor(counts), 4)
        assert (picks < 32).all()
        assert (picks[:, 1:] == -1).all()


def test_the_operator_works_under_fake_tensors_and_follows_its_schema():
    gram = torch.eye(5, dtype=torch.float64).expand(2, 5, 5).contiguous()
    torch.library.opcheck(torch.ops.fastil.herd.default, (gram, torch.tensor([5, 3]), 4, MAX_TURNS, TIE))
