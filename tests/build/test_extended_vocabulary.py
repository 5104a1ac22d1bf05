"""The extended vocabulary: the compiled module and its Python twin agree, and both are as claimed."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseq import _host_python, host

needs_module = pytest.mark.skipif(host._implementation is _host_python, reason="the compiled module is not built")
# Few characters, so that tokens meet: the empty token, a zero byte, one, two, three and four bytes of UTF-8, and
# words of which one begins another, on both sides of 8 bytes.
TOKENS = st.one_of(
    st.text(st.sampled_from(["a", "\0", "é", "中", "😀"]), max_size=3),
    st.sampled_from(["abcdefg", "abcdefgh", "abcdefghi", "abcdefgh\0"]),
    st.text(max_size=4),
)
ROWS = st.lists(st.one_of(st.lists(TOKENS, max_size=12), st.lists(TOKENS, max_size=3).map(tuple)), max_size=4)
WORDS = st.lists(TOKENS, min_size=1, max_size=12, unique=True)


def python(vocabulary: host.ExtendedVocabulary) -> host.ExtendedVocabulary:
    """The same without the compiled module."""
    twin = copy.copy(vocabulary)
    twin._encoder = _host_python.ExtendedVocabulary(twin.words, twin.unk)
    return twin


def plain(encoded: Any) -> list[Any]:
    return [(part.dtype, part.tolist()) if isinstance(part, np.ndarray) else part for part in encoded]


@needs_module
@settings(max_examples=80, deadline=None)
@given(WORDS, ROWS, st.data())
def test_both_implementations_agree(words: list[str], rows: list[list[str]], data: st.DataObject) -> None:
    vocabulary = host.ExtendedVocabulary(words, data.draw(st.integers(0, len(words) - 1)), padding=-5)
    sources = vocabulary.encode_sources(rows)
    assert plain(sources) == plain(python(vocabulary).encode_sources(rows))
    targets = data.draw(st.lists(st.lists(TOKENS, max_size=5), min_size=len(rows), max_size=len(rows)))
    for oov in (sources.oov, rows):  # also lists with words twice, or of the vocabulary
        encoded = vocabulary.encode_targets(targets, oov)
        assert plain(encoded) == plain(python(vocabulary).encode_targets(targets, oov))


@settings(max_examples=60, deadline=None)
@given(WORDS, ROWS)
def test_ids_stand_for_their_tokens(words: list[str], rows: list[list[str]]) -> None:
    vocabulary = host.ExtendedVocabulary(words, 0)
    sources = vocabulary.encode_sources(rows)
    targets = vocabulary.encode_targets(rows, sources.oov)
    assert sources.extended.shape == (len(rows), max(map(len, rows), default=0))
    for i, row in enumerate(rows):
        known = [*words, *sources.oov[i]]
        assert len(set(known)) == len(known)
        assert [known[j] for j in sources.extended[i, : len(row)]] == list(row)
        assert sources.lengths[i] == targets.lengths[i] == len(row)
        assert set(sources.extended[i, len(row) :]) <= {-1}
        assert set(targets.extended[i, len(row) :]) <= {-100}
        assert set(sources.ids[i, len(row) :]) <= {0}
        # What the source has, its own words included, is never unknown in the target.
        assert targets.extended[i, : len(row)].tolist() == sources.extended[i, : len(row)].tolist()


@pytest.fixture(params=["compiled", "python"])
def vocabulary(request: pytest.FixtureRequest) -> host.ExtendedVocabulary:
    if request.param == "compiled" and host._implementation is _host_python:
        pytest.skip("the compiled module is not built")
    found = host.ExtendedVocabulary(["<pad>", "<unk>", "the", "cat"])
    return found if request.param == "compiled" else python(found)


def test_by_example(vocabulary: host.ExtendedVocabulary) -> None:
    sources = vocabulary.encode_sources([["the", "ocelot", "saw", "the", "ocelot"], ["saw"], []])
    assert sources.ids.tolist() == [[2, 1, 1, 2, 1], [1, 0, 0, 0, 0], [0] * 5]
    assert sources.extended.tolist() == [[2, 4, 5, 2, 4], [4, -1, -1, -1, -1], [-1] * 5]
    assert sources.oov == [["ocelot", "saw"], ["saw"], []]
    targets = vocabulary.encode_targets([["cat", "saw"], ["ocelot"], []], sources.oov)
    assert targets.ids.tolist() == [[3, 1], [1, 0], [0, 0]]
    assert targets.extended.tolist() == [[3, 5], [1, -100], [-100, -100]]  # no ocelot in the second source: unknown
    assert targets.lengths.tolist() == [2, 1, 0]
    assert len(pickle.loads(pickle.dumps(vocabulary))) == 4


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([["a"], ["b", "c\ud83d"]], ValueError, r"sources\[1\]\[1\]: got 'c\\ud83d', wanted no surrogate"),
        ([["\ud83d", "\ude00"]], ValueError, r"sources\[0\]\[0\]: .* surrogate"),
        ([["a", 3]], TypeError, r"sources\[0\]\[1\]: got int, wanted str"),
        ([["a", b"b"]], TypeError, r"sources\[0\]\[1\]: got bytes, wanted str"),
        (["the"], TypeError, r"sources\[0\]: got str, wanted a list of tokens"),
        ([None], TypeError, r"sources\[0\]: got NoneType"),
        ("the", TypeError, r"sources: got str, wanted a list of lists"),
        (None, TypeError, r"sources: got NoneType"),
    ],
)
def test_bad_tokens(vocabulary: host.ExtendedVocabulary, rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vocabulary.encode_sources(rows)
    if isinstance(rows, list):
        with pytest.raises(error, match=message.replace("sources", "targets")):
            vocabulary.encode_targets(rows, rows)
        with pytest.raises(error, match=message.replace("sources", "oov")):
            vocabulary.encode_targets([["a"]] * len(rows), rows)


def test_bad_arguments(vocabulary: host.ExtendedVocabulary) -> None:
    with pytest.raises(ValueError, match=r"oov: got 1 lists, wanted one for each of the 2 targets"):
        vocabulary.encode_targets([["a"], ["b"]], [[]])
    with pytest.raises(ValueError, match=r"words: 'b' is there twice, at 1 and 3"):
        host.ExtendedVocabulary(["a", "b", "c", "b"])
    with pytest.raises(ValueError, match=r"words.*got '\\udc00'"):
        host.ExtendedVocabulary(["a", "\udc00"])
    with pytest.raises(ValueError, match=r"unk: got 2, wanted 0 to 1"):
        host.ExtendedVocabulary(["a", "b"], unk=2)


def test_strings_of_another_class(vocabulary: host.ExtendedVocabulary) -> None:
    """What counts is their text, whatever the class says of its length."""

    class Odd(str):
        def __len__(self) -> int:
            return 10**9

    sources = vocabulary.encode_sources([["the", Odd("é中"), "the"], [Odd("cat")]])
    assert sources.extended.tolist() == [[2, 4, 2], [3, -1, -1]]
    assert sources.oov == [["é中"], []]


def test_threads_share_a_vocabulary(vocabulary: host.ExtendedVocabulary) -> None:
    rng = np.random.default_rng(0)
    batches = [[[f"w{i}" for i in rng.integers(0, 300, 40)] for _ in range(20)] for _ in range(8)]
    alone = [plain(vocabulary.encode_sources(batch)) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert [plain(found) for found in pool.map(vocabulary.encode_sources, batches)] == alone
