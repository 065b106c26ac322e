"""Requests whose parts are more than anyone sends: the documented answer, and no login token is used."""

import asyncio
import threading

import pytest

from sso_service.database.transactions import Database
from sso_service.observability.metrics import Gauges, exposition
from sso_service.permissions import Role
from sso_service.web import operations
from tests.support import administration
from tests.support.client import Client
from tests.support.data import ACCOUNT, JANE, PAGE, TEAM
from tests.support.databases import changing, on_sqlite
from tests.support.sessions import sign_in

pytestmark = pytest.mark.anyio

JSON = ("accept", "application/json")
HTML = ("accept", "text/html")
TEAM_PAGE = f"/client/{ACCOUNT}/t/{TEAM}/settings/team"


async def is_usable(client: Client, token: str) -> bool:
    """True if `token` signs in a fresh browser. Consumes the token."""
    return (await client.another().get(f"{PAGE}?sso={token}")).status == 303


@on_sqlite
@pytest.mark.parametrize("name", [b"%73s", b"%41%41%41", b"%C3%A4=1", b"", b"a"])
async def test_a_login_link_with_over_200_parameters_is_refused(client: Client, api_token: str, name: bytes) -> None:
    token = (await client.issue(api_token)).encode()
    for count in (200, 30_000 // (len(name) + 1)):
        target = b"/x?" + (name + b"&") * count + b"sso=" + token
        answer = await client.request("GET", target, headers=[JSON])
        assert (answer.status, answer.error) == (400, "bad_path")
        page = await client.request("GET", target, headers=[HTML])
        assert (page.status, page.header("set-cookie")) == (400, None)
        assert (page.header("content-type") or "").startswith("text/html")
    # The login token counts as one parameter. The others are kept byte for byte.
    answer = await client.request("GET", b"/x?" + (name + b"&") * 199 + b"sso=" + token)
    assert answer.status == 303
    assert (answer.header("location") or "").encode("latin-1") == b"/x?" + b"&".join([name] * 199)


@on_sqlite
@pytest.mark.parametrize("segment", ["/%41", "/%C3%A4", "/a"])
async def test_a_login_link_with_over_64_segments_is_refused(client: Client, api_token: str, segment: str) -> None:
    token = await client.issue(api_token)
    for count in (65, 30_000 // len(segment)):
        answer = await client.request("GET", f"{segment * count}?sso={token}", headers=[JSON])
        assert (answer.status, answer.error) == (400, "bad_path")
        assert (await client.get(segment * count)).status == 404
    assert (await client.get(f"{segment * 64}?sso={token}")).status == 303


@on_sqlite
async def test_a_spelling_among_many_parameters_does_not_smuggle_a_token(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    for spelling in ("sso", "%73so", "s%73%6f", "%73%73%6F"):
        for query in (f"{'a&' * 5000}{spelling}={token}", f"{spelling}={token}{'&a' * 5000}"):
            for target in (PAGE, "/x"):
                answer = await client.request("GET", f"{target}?{query}", headers=[JSON])
                assert (answer.status, answer.error) == (400, "bad_path")
    assert await is_usable(client, token)


@on_sqlite
async def test_pages_with_too_many_parameters_or_segments_are_not_found(client: Client, api_token: str) -> None:
    await sign_in(client, api_token)
    for query, status in (("a&" * 199, 200), ("a&" * 200, 404), ("a&" * 15_000, 404), ("a=" + "%" * 30_000, 200)):
        assert (await client.get(f"{PAGE}?{query}")).status == status
    assert (await client.get(f"/session?{'a&' * 15_000}")).status == 200


@on_sqlite
async def test_forward_authentication_refuses_uris_with_too_many_parts(client: Client, api_token: str) -> None:
    await sign_in(client, api_token)

    async def statuses(*uris: str) -> set[int]:
        names = ("x-original-uri", "x-forwarded-uri")
        return {(await client.request("GET", "/auth", headers=[(name, uri) for uri in uris])).status for name in names}

    assert await statuses("/a" * 64 + "?" + "&".join("a" * 200)) == {204}
    assert await statuses("/a" * 65) == {403}
    assert await statuses("/a?" + "&".join("a" * 201)) == {403}
    assert await statuses(PAGE, "/a?" + "a&" * 15_000) == {403}
    # Each team among the URIs costs a query of the database, so their number is limited too.
    assert await statuses(*[PAGE] * 16) == {204}
    assert await statuses(*[PAGE] * 17) == {403}
    assert await statuses(*[f"/client/{ACCOUNT}/t/{team}/posts" for team in range(1, 900)]) == {403}
    assert await statuses("/a?b" + ",/a" * 14) == {204}
    assert await statuses("/a?b" + ",/a" * 15) == {403}
    assert await statuses("/a?b" + ",/a" * 8000) == {403}


@on_sqlite
async def test_a_form_that_no_browser_sends_has_no_fields(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    for body in (b"token=" + b"%" * 16_000, b"&".join([b"token=%41"] * 1500), f"token={token}&a=%".encode()):
        answer = await client.request(
            "POST", "/sso/confirm", headers=[("sec-fetch-site", "same-origin"), JSON], body=body
        )
        assert (answer.status, answer.error) == (403, "form_invalid")
    assert await is_usable(client, token)


@on_sqlite
async def test_the_search_of_the_members_is_decoded_once(client: Client, api_token: str, database: Database) -> None:
    await sign_in(client, api_token)
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], ACCOUNT, Role.ADMIN)
    for query in ("search=jane%20DOE", "search=nobody&search=Jane+Doe", "%73earch=jane"):
        page = await client.request("GET", f"{TEAM_PAGE}?{query}", headers=[HTML])
        assert page.status == 200
        assert JANE["email"] in page.text.partition("<table>")[2]


@on_sqlite
async def test_scrapes_at_the_same_time_share_one_result_of_a_thread(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def counted(gauges: Gauges) -> bytes:
        threads.append(threading.get_ident())
        return exposition(gauges)

    monkeypatch.setattr(operations, "exposition", counted)
    monkeypatch.setattr(operations, "SCRAPE_INTERVAL", 0.01)
    answers = await asyncio.gather(*(client.get("/metrics") for _ in range(100)))
    assert {answer.status for answer in answers} == {200}
    assert len(threads) == 1
    # A later scrape gets a later result.
    assert (await client.get("/metrics")).status == 200
    assert len(threads) == 2
    assert threading.get_ident() not in threads
