"""With keys that may be out of date, everything that trusts a signature answers 503 and nothing is consumed."""

import asyncio
import logging
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from sso_service import key_directory, keyring
from sso_service.database import open_database
from sso_service.key_directory import UNLISTABLE_LIMIT, KeyDirectory
from sso_service.observability import logs
from sso_service.permissions import Role
from sso_service.services.node import Node
from sso_service.settings import Settings
from sso_service.web.app import create_app
from tests.support.api import node
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import JANE, JOHN, PAGE
from tests.support.databases import on_sqlite
from tests.support.ledger import number_consumed
from tests.support.metrics import sample_of, samples_in
from tests.support.outages import renamed
from tests.support.pages import MessagePage
from tests.support.redeeming import ref
from tests.support.studio import API_TOKENS, HTML, see, signed_in, submit
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, on_sqlite]

JSON = ("accept", "application/json")
AUTH = ("x-original-uri", PAGE)


@dataclass(frozen=True, slots=True)
class Aging:
    """A node whose key directory's age a test controls, by either of its clocks."""

    node: Node
    client: Client
    monotonic: Clock
    since_boot: Clock

    async def signed_in(self, api_token: str, person: Mapping[str, str] = JANE) -> Client:
        """Return a new browser in which `person` is signed in as an admin."""
        return await signed_in(self.client, self.node.database, api_token, Role.ADMIN, person)


@pytest.fixture
def aging(settings: Settings, keys_dir: Path, clock: Clock) -> Iterator[Aging]:
    monotonic, since_boot = Clock(1000.0), Clock(2000.0)
    keys = KeyDirectory(keys_dir, monotonic=monotonic, since_boot=since_boot)
    service = Node(settings, open_database(settings), keys, clock=clock)
    yield Aging(service, Client(create_app(service)), monotonic, since_boot)
    service.close()


Call = Callable[[], Awaitable[Answer]]


async def requests(aging: Aging, api_token: str, verifier: str) -> dict[str, tuple[Call, int]]:
    """Return requests that trust a signature, each with its status while keys are up to date."""
    client = aging.client
    admin = await aging.signed_in(api_token)
    tokens = [await client.issue(api_token) for _ in range(6)]
    of_john = await client.issue(api_token, JOHN)
    question = MessagePage((await see(admin, f"{PAGE}?sso={of_john}")).text)
    assert question.form == ("post", "/sso/confirm")
    asked, leaving = client.another(), await aging.signed_in(api_token, JOHN)
    asked.cookies = dict(admin.cookies)

    def api(name: str, token: str, secret: str) -> Call:
        return lambda: client.post_json(f"/v1/sso_tokens/{name}", {"token": token}, token=secret)

    def get(browser: Client, target: str, *headers: tuple[str, str]) -> Call:
        return lambda: browser.request("GET", target, headers=headers)

    return {
        "issue": (lambda: client.post_json("/v1/sso_tokens", JANE, token=api_token), 201),
        "issue for a new user": (
            lambda: client.post_json("/v1/sso_tokens", {**JANE, "email": "new@example.com"}, token=api_token),
            201,
        ),
        "verify": (api("verify", tokens[0], verifier), 200),
        "consume": (api("consume", tokens[0], verifier), 200),
        "revoke": (api("revoke", tokens[1], api_token), 200),
        "login": (get(client.another(), f"{PAGE}?sso={tokens[2]}"), 303),
        "login of a signed-in user": (get(admin, f"{PAGE}?sso={tokens[3]}", HTML), 303),
        "login for JSON": (get(client.another(), f"{PAGE}?sso={tokens[4]}", JSON), 303),
        "session": (get(admin, "/session"), 200),
        "auth": (get(admin, "/auth", AUTH), 204),
        "home": (get(admin, "/", HTML), 303),
        "page": (get(admin, PAGE, HTML), 200),
        "page for JSON": (get(admin, PAGE, JSON), 200),
        "settings": (get(admin, API_TOKENS, HTML), 200),
        "change of settings": (lambda: submit(admin, API_TOKENS, [("name", "n"), ("scope", "write:sso")]), 200),
        "confirmation": (lambda: submit(asked, "/sso/confirm", [*question.fields.items()]), 303),
        "sign out everywhere": (lambda: submit(leaving, "/sso/sign-out-everywhere"), 200),
    }


BROWSER_ONLY = {"home", "page", "settings", "change of settings", "confirmation", "sign out everywhere"}


def is_unavailable(answer: Answer) -> bool:
    """True if the response is 503 `unavailable`, in JSON or as a page, and changes no cookie."""
    is_page = (answer.header("content-type") or "").startswith("text/html")
    return (
        answer.status == 503
        and answer.header("retry-after") is not None
        and answer.header("set-cookie") is None
        and answer.header("location") is None
        and (is_page or answer.error == "unavailable")
    )


@pytest.mark.parametrize("by", ["monotonic", "since_boot"])
async def test_nothing_trusts_a_signature_after_a_minute_without_a_listing(
    aging: Aging, keys_dir: Path, api_token: str, verifier: str, clock: Clock, by: str
) -> None:
    calls = await requests(aging, api_token, verifier)
    consumed = number_consumed(aging.node.database)
    started = getattr(aging, by).now
    with renamed(keys_dir):
        getattr(aging, by).now = started + UNLISTABLE_LIMIT - 0.1
        aging.node.keys.refresh()
        assert (await calls["session"][0]()).status == 200
        getattr(aging, by).now = started + UNLISTABLE_LIMIT
        for back in (0, -3600, 7200):  # the wall clock has no influence
            clock.advance(back)
            answers = {name: await call() for name, (call, _) in calls.items()}
            assert [name for name, answer in answers.items() if not is_unavailable(answer)] == []
            pages = {name for name, answer in answers.items() if b"<!doctype html>" in answer.body.lower()}
            assert pages >= BROWSER_ONLY
            assert not any("JSON" in name for name in pages)
            clock.advance(-back)
        assert number_consumed(aging.node.database) == consumed
    aging.node.keys.refresh()
    assert {name: (await call()).status for name, (call, _) in calls.items()} == {
        name: status for name, (_, status) in calls.items()
    }


async def test_without_a_cookie_a_request_is_not_signed_in_whatever_the_keys_are(
    aging: Aging, api_token: str, keys_dir: Path
) -> None:
    admin = await aging.signed_in(api_token)
    aging.monotonic.advance(UNLISTABLE_LIMIT)
    for headers in ([AUTH], [AUTH, HTML]):
        assert (await aging.client.request("GET", "/auth", headers=headers)).status == 401
        assert (await admin.request("GET", "/auth", headers=headers)).status == 503
    assert (await aging.client.get("/session")).status == 401
    for cookie in ("x", "x" * 1000, "", f"{admin.cookies['studio_session']}x"):
        answer = await aging.client.get("/session", cookie=f"studio_session={cookie}")
        assert answer.status == (503 if cookie else 401), cookie


async def test_signing_out_removes_the_cookie_even_with_stale_keys(aging: Aging, api_token: str) -> None:
    for accept, status in ((JSON, 204), (HTML, 200)):
        browser = await aging.signed_in(api_token)
        aging.monotonic.advance(UNLISTABLE_LIMIT)
        origin = ("sec-fetch-site", "same-origin")
        answer = await browser.request("POST", "/logout", headers=[accept, origin])
        assert answer.status == status
        assert "studio_session" not in browser.cookies
        aging.node.keys.refresh()


async def test_logins_that_fail_because_of_stale_keys_are_counted_and_recorded(
    aging: Aging, api_token: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def count() -> float:
        samples = samples_in((await aging.client.get("/metrics")).text)
        return sample_of(samples, "sso_logins_total", {"way": "browser", "outcome": "unavailable"})

    browser = await aging.signed_in(api_token)
    token = await aging.client.issue(api_token)
    before = await count()
    caplog.set_level(logging.INFO, logs.AUDIT_LOGGER)
    caplog.clear()
    aging.monotonic.advance(UNLISTABLE_LIMIT)
    for each in (browser, aging.client.another()):  # with and without a cookie
        assert (await see(each, f"{PAGE}?sso={token}")).status == 503
    assert await count() == before + 2
    assert caplog.text.count("login_refused") == caplog.text.count(ref(token)) == 2


@contextmanager
def emptied(directory: Path) -> Iterator[None]:
    with renamed(directory):
        directory.mkdir()
        yield
        directory.rmdir()


async def test_an_empty_key_directory_is_not_answered_like_a_missing_session(
    aging: Aging, keys_dir: Path, api_token: str, verifier: str, clock: Clock
) -> None:
    """The file system may be unmounted: what is left is an empty directory, which can be listed."""
    calls = await requests(aging, api_token, verifier)
    with emptied(keys_dir):
        aging.node.keys.refresh()
        answers = {name: await call() for name, (call, _) in calls.items()}
        assert [name for name, answer in answers.items() if not is_unavailable(answer)] == []
    aging.node.keys.refresh()
    assert (await calls["session"][0]()).status == 200


async def test_a_read_of_the_keys_that_hangs_counts_as_one_that_fails(
    aging: Aging, api_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = await aging.signed_in(api_token)
    hanging, release = threading.Event(), threading.Event()
    load = keyring.load

    def hang(directory: Path) -> object:
        hanging.set()
        release.wait()
        return load(directory)

    monkeypatch.setattr(key_directory, "load", hang)
    background = asyncio.create_task(aging.node.trust.keep_fresh())
    try:
        await asyncio.to_thread(hanging.wait)
        assert (await browser.get("/session")).status == 200
        aging.monotonic.advance(UNLISTABLE_LIMIT)
        assert (await browser.get("/session")).status == 503
        assert (await browser.request("GET", "/auth", headers=[AUTH])).status == 503
        assert (await aging.client.get("/healthz")).status == 200
        assert (await aging.client.get("/readyz")).json()["problems"].keys() == {"keys"}
        # A listing that took so long is out of date when it returns. The next one is not.
        monkeypatch.setattr(key_directory, "load", load)
        release.set()
        await until(lambda: not aging.node.keys.stale)
        assert (await browser.get("/session")).status == 200
    finally:
        release.set()
        background.cancel()
        with suppress(asyncio.CancelledError):
            await background


# --- revoked keys ----------------------------------------------------------------------------------------------------


async def test_a_restored_backup_of_the_keys_revives_no_session_and_no_link(
    aging: Aging, keys_dir: Path, api_token: str, clock: Clock, tmp_path: Path
) -> None:
    browser = await aging.signed_in(api_token)
    token = await aging.client.issue(api_token)
    shutil.copytree(keys_dir, tmp_path / "backup")
    keyring.revoke_all(keys_dir, now=int(clock()))
    aging.node.keys.refresh()
    shutil.copytree(tmp_path / "backup", keys_dir, dirs_exist_ok=True)
    aging.node.keys.refresh()
    assert (await browser.get("/session")).status == 401
    assert (await aging.client.get(f"{PAGE}?sso={token}")).status == 401
    assert (await aging.client.get(f"{PAGE}?sso={await aging.client.issue(api_token)}")).status == 303
    # The node handles it, so it stays ready. The metric has an alert, because a node that starts now trusts the key.
    assert (await aging.client.get("/readyz")).status == 200
    assert sample_of(samples_in((await aging.client.get("/metrics")).text), "sso_key_files_unusable") == 1


# --- unusable files --------------------------------------------------------------------------------------------------


@contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(bits)
    yield
    path.chmod(before)


async def test_a_key_file_that_cannot_be_used_makes_the_node_not_ready(
    aging: Aging, keys_dir: Path, api_token: str
) -> None:
    async def state() -> tuple[int, str, float]:
        aging.node.keys.refresh()
        answer = await aging.client.get("/readyz")
        problem = answer.json().get("problems", {}).get("keys", "")
        metrics = samples_in((await aging.client.get("/metrics")).text)
        return answer.status, problem, sample_of(metrics, "sso_key_files_unusable")

    browser = await aging.signed_in(api_token)
    assert await state() == (200, "", 0)
    signing = keys_dir / f"{aging.node.keys.ring.entries[0].id}.json"
    with mode(signing, 0o666):
        assert await state() == (
            503,
            f"key files that cannot be used: '{signing.name}' can be written by every user",
            1,
        )
        assert (await browser.get("/session")).status == 200  # it goes on with the keys that it has read
    assert await state() == (200, "", 0)
    for number in range(7):
        (keys_dir / f"junk{number}.json").write_text("junk")
    status, problem, count = await state()
    assert (status, count) == (503, 7)
    assert "'junk4.json' is not JSON, 2 more" in problem
    for number in range(7):
        (keys_dir / f"junk{number}.json").unlink()
    (keys_dir / b"\xff\n\x1b.json".decode("utf-8", "surrogateescape")).symlink_to("/dev/zero")
    assert (await state())[:2] == (
        503,
        r"key files that cannot be used: '\udcff\n\x1b.json' is not a regular file",
    )


async def test_readyz_reports_both_missing_and_unusable_keys(database_url: str, tmp_path: Path, clock: Clock) -> None:
    directory = tmp_path / "no-keys"
    directory.mkdir()
    (directory / "a.json").write_text("{")
    with node(database_url, directory, clock) as client:
        problem = (await client.get("/readyz")).json()["problems"]["keys"]
    assert problem.startswith("no key may sign now; create one")
    assert problem.endswith("; key files that cannot be used: 'a.json' is not JSON")
