"""The soak: a service, logins at half of its capacity, and after a calm phase hostile connections beside them."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import msgspec
from sqlalchemy import insert, literal, select

from scripts.tools.bench import machine
from scripts.tools.bench.servers import ROOT, Server, serving
from scripts.tools.bench.stores import SQLITE, Store, postgresql_server, store
from scripts.tools.proof.hostile import attack
from scripts.tools.proof.hostile.kinds import PAGE, Insider
from scripts.tools.proof.hostile.logins import Logins, Plan
from scripts.tools.proof.hostile.verdict import OPEN, Attack, Phase, Result, percentile
from sso_service import keyring
from sso_service.database import accounts, database_at
from sso_service.database.schema import memberships, users
from sso_service.people import search_text
from sso_service.permissions import Role, Scope

_PEOPLE = 20_000
"""Users of the attacked account, and members of the hostile one."""
_ADMINS = 8
_HOSTILE_ACCOUNT, _HOSTILE_TEAM = 124, 50
_LOAD = 0.5
"""Rate of the logins as a part of the capacity."""
_CALM = 0.25
"""Part of the time without hostile connections."""
_MEASURING = 5.0
"""Seconds of a load as fast as possible, at most: first to warm up, then to measure the capacity."""
_OPENING = 15.0
"""Seconds in which the hostile connections open, at most."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters: the kind of database, the seconds of both phases together, and the hostile connections.

    Each connection acts about every `pace` seconds.
    """

    database: str
    seconds: float
    connections: int
    pace: float


@dataclass(frozen=True, slots=True)
class _Service:
    """The service under test, with its log, and an API token of the attacked account."""

    server: Server
    log: Path
    api_token: str
    directory: Path


def soak(options: Options, directory: Path) -> Result:
    """Run a soak in `directory`, where the log of the service remains.

    Raises `NotPossible` without two cores, and `psutil.Error` if the service ends.
    """
    cores = machine.divide_cores()
    with ExitStack() as stack:
        server = None if options.database == SQLITE else stack.enter_context(postgresql_server())
        made = stack.enter_context(store(options.database, directory, server, people=_PEOPLE))
        insider_token = _add_hostile_account(made)
        keys, log = directory / "keys", directory / "log"
        keys.mkdir(exist_ok=True)
        keyring.rotate(keys, now=int(time.time()), lead=0)
        environment = {"SSO_HOME": str(directory), "SSO_DATABASE_URL": made.url}
        running = stack.enter_context(serving(["sso_service", "serve"], environment, log, cores.server))
        service = _Service(running, log, made.secret, directory)
        insider = Insider(insider_token, [_sign_in(running.port, insider_token, n) for n in range(_ADMINS)])

        measuring = min(_MEASURING, options.seconds / 4)
        _log_in(service, rate=0, seconds=measuring)
        fastest, _ = _log_in(service, rate=0, seconds=measuring)
        capacity = len(fastest.times) / fastest.seconds
        rate = capacity * _LOAD
        print(f"{capacity:.0f} logins a second at most, from now on {rate:.0f}", flush=True)
        calm = _phase(service, "calm", rate=rate, seconds=options.seconds * _CALM)
        with _attacking(service, options, insider) as attacks:
            before = attacks()
            hostile = _phase(service, "hostile", rate=rate, seconds=options.seconds * (1 - _CALM))
            during = attacks()[len(before) - 1 :]
    return Result(
        machine=machine.describe(),
        database=options.database,
        capacity=capacity,
        rate=rate,
        connections=options.connections,
        pace=options.pace,
        calm=calm,
        hostile=hostile,
        attack=during[-1],
        open=[attack.open for attack in during],
    )


def _add_hostile_account(made: Store) -> str:
    """Add an account with as many members as the attacked one, of whom a few are admins. Return an API token of it."""
    now = int(time.time())
    database = database_at(made.sqlalchemy_url)
    with database.connect() as connection, database.writing(connection):
        accounts.add_account(connection, "Hostile", account_id=_HOSTILE_ACCOUNT)
        accounts.add_team(connection, _HOSTILE_ACCOUNT, "Team", team_id=_HOSTILE_TEAM)
        _, secret = accounts.create_api_token(
            connection, account_id=_HOSTILE_ACCOUNT, name="hostile", scopes=frozenset(Scope), now=now
        )
        people = [(_address(number), f"First{number}", f"Last{number}") for number in range(_PEOPLE)]
        rows = [
            {"email": email, "first_name": first, "last_name": last, "search": search_text(email, first, last)}
            for email, first, last in people
        ]
        connection.execute(insert(users).values(created_at=now), rows)
        admins = [_address(number) for number in range(_ADMINS)]
        for role, members in (
            (Role.ADMIN, users.c.email.in_(admins)),
            (Role.EDITOR, users.c.email.like("%@hostile.example") & users.c.email.not_in(admins)),
        ):
            found = select(users.c.id, literal(_HOSTILE_ACCOUNT), literal(str(role))).where(members)
            connection.execute(insert(memberships).from_select(["user_id", "account_id", "role"], found))
    database.close()
    made.settle()
    return secret


def _address(number: int) -> str:
    return f"m{number}@hostile.example"


def _sign_in(port: int, api_token: str, number: int) -> str:
    """Return the session cookie of a member of the hostile account."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    person = {"email": _address(number), "first_name": "a", "last_name": "b"}
    connection.request("POST", "/v1/sso_tokens", json.dumps(person), {"Authorization": f"Bearer {api_token}"})
    token = json.load(connection.getresponse())["token"]
    connection.request("GET", f"/?sso={token}", headers={"Accept": "text/html"})
    cookie = connection.getresponse().headers["Set-Cookie"].partition(";")[0]
    connection.close()
    return cookie


def _log_in(service: _Service, *, rate: float, seconds: float) -> tuple[Logins, list[tuple[float, int]]]:
    """Run the load. Return its results, and the service's memory (MB) and descriptors in each second."""
    plan = Plan(
        port=service.server.port,
        api_token=service.api_token,
        people=_PEOPLE,
        page=PAGE,
        rate=rate,
        seconds=seconds,
    )
    samples = []
    with _started("logins", plan, service.directory / "logins.json") as (process, output):
        while True:
            samples.append((service.server.memory().rss_mb, service.server.descriptors()))
            with suppress(subprocess.TimeoutExpired):
                process.wait(1)
                break
        if process.returncode:
            raise RuntimeError("the load has failed")
        return msgspec.json.decode(output.read_bytes(), type=Logins), samples


def _phase(service: _Service, name: str, *, rate: float, seconds: float) -> Phase:
    """Run the load at this rate, and return everything that a phase is judged by."""
    print(f"{name}: {seconds:.0f} s", flush=True)
    server, log_size = service.server, service.log.stat().st_size
    cpu, waited = server.cpu_seconds(), server.waited_seconds()
    done, samples = _log_in(service, rate=rate, seconds=seconds)
    cpu, waited = server.cpu_seconds() - cpu, server.waited_seconds() - waited
    with service.log.open("rb") as log:
        log.seek(log_size)
        tracebacks = sum(b"Traceback (most recent call last)" in line for line in log)
        log_size = log.tell() - log_size
    return Phase(
        seconds=done.seconds,
        logins=len(done.times),
        failed=done.failed,
        p50_ms=percentile(done.times, 50) * 1000,
        p99_ms=percentile(done.times, 99) * 1000,
        slowest_ms=max(done.times, default=0.0) * 1000,
        memory_mb=[memory for memory, _ in samples],
        descriptors=[descriptors for _, descriptors in samples],
        cpu=cpu / done.seconds,
        waited=waited / done.seconds,
        load_cpu=done.cpu / done.seconds,
        log_bytes=log_size,
        tracebacks=tracebacks,
    )


@contextmanager
def _attacking(service: _Service, options: Options, insider: Insider) -> Iterator[Callable[[], list[Attack]]]:
    """Attack until the end of the block, which begins when nearly all connections are open.

    Yields a function that returns the state of the attack in each second so far.
    """
    plan = attack.Plan(port=service.server.port, connections=options.connections, pace=options.pace, insider=insider)
    with _started("attack", plan, service.directory / "attack.jsonl") as (process, output):

        def attacks() -> list[Attack]:
            if process.poll() is not None:
                raise RuntimeError("the attack has failed")
            lines = output.read_bytes().splitlines(keepends=True)
            return [msgspec.json.decode(line, type=Attack) for line in lines if line.endswith(b"\n")]

        deadline = time.monotonic() + _OPENING  # if it does not accept as many until then, the result shows it
        while time.monotonic() < deadline and not any(a.open >= OPEN * options.connections for a in attacks()[-1:]):
            time.sleep(0.2)
        yield attacks


@contextmanager
def _started(module: str, plan: msgspec.Struct, output: Path) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """Run a module of this package with `plan` until the end of the block, with its output in a file."""
    command = [sys.executable, "-m", f"{__package__}.{module}", msgspec.json.encode(plan).decode()]
    with output.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file)
    try:
        yield process, output
    finally:
        process.kill()
        process.wait()
