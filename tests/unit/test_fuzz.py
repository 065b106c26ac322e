"""The targets of the fuzzer, on their seeds and for as long as a test may take. `scripts/fuzz` goes on from there."""

import json
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.tools.fuzz import altered, keys, redirects, tokens

TARGETS = {"tokens": tokens, "keys": keys, "redirects": redirects}

odd = st.none() | st.booleans() | st.integers(-1, 2**33) | st.floats() | st.text(max_size=50) | st.just("C" * 43)
"""What may stand in a key file."""
key_files = st.one_of(
    st.binary(),
    st.dictionaries(st.sampled_from([*keys.ODD, "revoked_at"]) | st.text(max_size=9), odd | st.lists(odd)).map(
        lambda fields: json.dumps(keys.ODD | fields).encode()
    ),
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
def test_what_each_target_promises_holds_for_its_seeds(target: ModuleType) -> None:
    for seed in target.SEEDS:
        target.check(seed)


@given(st.binary(max_size=80))
def test_the_reader_of_tokens_agrees_with_one_that_shares_nothing_with_it(data: bytes) -> None:
    tokens.check(data)


@given(key_files)
def test_a_key_file_is_a_key_a_tombstone_or_broken_as_its_description_says(data: bytes) -> None:
    keys.check(data)


@given(links)
def test_a_link_loses_nothing_but_its_token_and_leads_where_it_said(data: bytes) -> None:
    redirects.check(data)


@pytest.mark.slow
def test_none_of_100_000_tokens_altered_in_ten_ways_is_accepted() -> None:
    refused = altered.refused(100_000, "4868")  # the same ones on every run
    assert refused.total() == 100_000
    assert refused.keys() == {alteration.__name__ for alteration in altered.ALTERATIONS}
    assert min(refused.values()) > 9_000
