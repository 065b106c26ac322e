"""The fuzz targets, run on their seeds and on a few generated inputs. `scripts/fuzz` runs them for longer."""

import json
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.tools.fuzz import altered, keys, redirects, tokens

TARGETS = {"tokens": tokens, "keys": keys, "redirects": redirects}

odd_values = st.none() | st.booleans() | st.integers(-1, 2**33) | st.floats() | st.text(max_size=50) | st.just("C" * 43)
"""Values of the fields of a key file, mostly invalid."""
key_files = st.one_of(
    st.binary(),
    st.dictionaries(
        st.sampled_from([*keys.ODD, "revoked_at"]) | st.text(max_size=9), odd_values | st.lists(odd_values)
    ).map(lambda fields: json.dumps(keys.ODD | fields).encode()),
)
fragments = st.sampled_from(
    [
        *rb"/ // \ . .. ; : @ % %2e %2F %5c %c2%85 client CLIENT %63lient 123 t 42 posts evil.example http: ".split(),
        *rb"? & = sso %73so s%73%6f ss%6F sso=a sso= SSO + %20 %00 # caf%C3%A9".split(),
        "é\u202e".encode(),
        b"\t",
        b"\n",
        b"\0",
        b"\xff",
    ]
)
links = st.binary() | st.lists(fragments | st.binary(max_size=2), max_size=20).map(lambda parts: b"/" + b"".join(parts))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_each_fuzz_target_passes_on_its_seeds(target: ModuleType) -> None:
    for seed in target.SEEDS:
        target.check(seed)


@given(st.binary(max_size=80))
def test_token_parsing_agrees_with_an_independent_parser(data: bytes) -> None:
    tokens.check(data)


@given(key_files)
def test_key_files_are_read_as_specified(data: bytes) -> None:
    keys.check(data)


@given(links)
def test_a_redirect_removes_only_the_token_from_a_login_link(data: bytes) -> None:
    redirects.check(data)


@pytest.mark.slow
def test_100_000_altered_tokens_are_refused() -> None:
    refused = altered.refused(100_000, "4868")  # a fixed seed: the same tokens in every run
    assert refused.total() == 100_000
    assert refused.keys() == {alteration.__name__ for alteration in altered.ALTERATIONS}
    assert min(refused.values()) > 9_000
