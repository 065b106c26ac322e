"""The command line, for operators. It talks to database and key directory itself; no running service is needed."""

import getpass
import json
import logging.config
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from secrets import randbits
from typing import Any

import click
import msgspec
from itsdangerous import BadData
from sqlalchemy import Connection, select
from sqlalchemy.exc import DBAPIError

from sso_service import audit, keyring, logs, tokens
from sso_service.audit import Event, EventName
from sso_service.database import administration, copying, migrations
from sso_service.database.directory import NewPerson, Place, provision_all, standing_of_all
from sso_service.database.engine import Database, reason
from sso_service.database.health import health_all
from sso_service.database.ledger import FLOOR_AGE, Purger, Verdict, state_of_all
from sso_service.database.schema import SCHEMA_VERSION
from sso_service.errors import FieldError, OutcomeUnknown, SettingsError, Unavailable
from sso_service.keyring import KeyRing, SigningKey, Tombstone
from sso_service.people import normalise_email
from sso_service.permissions import Role, Scope
from sso_service.settings import Settings, read_settings, unknown_settings

DEMO_ACCOUNT = 123
DEMO_TEAM = 42
DEMO_ADMIN = "admin@example.com"

_EXPECTED = (
    SettingsError,
    Unavailable,
    OutcomeUnknown,
    DBAPIError,
    migrations.SchemaMismatch,
    keyring.KeyRingError,
    administration.NotFound,
    administration.Conflict,
    FieldError,
)


class Id(click.ParamType[int]):
    """A number that an account, a team or an API token can have."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if not re.fullmatch(r"[1-9][0-9]{0,9}", str(value), re.ASCII) or int(value) > 2**32 - 1:
            raise click.ClickException("an id is a number from 1 to 4294967295")
        return int(value)


_ID = Id()


class TryLater(click.ClickException):
    """What may succeed later: EX_TEMPFAIL of sysexits.h."""

    exit_code = 75


class OneLineErrors(click.Group):
    """Turns what an operator can run into, at any depth of sub-commands, into one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OutcomeUnknown as error:
            raise click.ClickException(f"cannot tell whether it was done: {error}") from error
        except _EXPECTED as error:
            failure = TryLater if isinstance(error, keyring.Busy) else click.ClickException
            raise failure(reason(error)) from error


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sso-service")
def main() -> None:
    """One-time login tokens for a web studio. Settings are SSO_* variables; the README lists them."""
    logging.config.dictConfig(logs.config_of_commands())
    os.umask(0o077)  # the database holds addresses, the key directory secrets: nobody else's business on this machine


# --- setting up and serving ------------------------------------------------------------------------------------------


@main.command()
@click.option("--demo", is_flag=True, help="Also make a demo account, and print a new API token and a login link.")
def init(demo: bool) -> None:
    """Create the database and the first signing key, where they are missing."""
    settings = _settings()
    database = Database(settings.database)
    if database.is_sqlite:
        _make_directory(Path(str(settings.database.database)).parent)
    _make_directory(settings.keys_path)
    _upgrade(settings, database)
    entries, _ = keyring.load(settings.keys_path)
    if not isinstance(KeyRing(entries.values()).in_charge(_now()), SigningKey):
        key = keyring.rotate(settings.keys_path, now=_now(), lead=0)
        _record(EventName.KEY_CREATED, key_id=key.id)
        click.echo(f"Signing key {key.id} made in {settings.keys_path}.")
    click.echo(f"Database {database} is ready.")
    if demo:
        _make_demo(settings, database)


@main.command()
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Number of processes.")
@click.option("--uds", type=click.Path(path_type=Path), help="Listen on this unix socket instead of a port.")
@click.option("--fd", type=click.IntRange(0), help="Listen on this open file descriptor instead.")
def serve(workers: int, uds: Path | None, fd: int | None) -> None:
    """Run the service, on SSO_HOST and SSO_PORT or, if systemd passes any, on its sockets."""
    from sso_service.web import listening, server  # noqa: PLC0415 - other commands do not need it, and it takes a while

    if uds is not None and fd is not None:
        raise click.ClickException("give either --uds PATH or --fd N")
    settings = _settings()
    for name in unknown_settings(os.environ):
        click.echo(f"Warning: {name} is not a setting of this service.", err=True)
    embedded = Database(settings.database)
    if embedded.is_sqlite and Path(str(settings.database.database)).parent.is_dir():
        _upgrade(settings, embedded)
    embedded.close()
    with _opened(settings) as (database, connection):
        if problem := health_all(database, connection, [None])[0].problem:
            raise click.ClickException(f"the database {database}: {problem}")
    _ring(settings).signing_key(_now())
    try:
        listeners = listening.listen(settings, uds=uds, fd=fd, environ=os.environ)
    except listening.CannotListen as error:
        raise click.ClickException(str(error)) from error
    server.run(settings, listeners, workers=workers)


# --- accounts, teams, API tokens -------------------------------------------------------------------------------------


@main.group()
def account() -> None:
    """Tenant accounts."""


@account.command("add")
@click.argument("name")
@click.option("--id", "account_id", type=_ID, help="Its number; the next free one if not given.")
@click.option("--portal-url", help="Where error pages lead back to (https).")
def account_add(name: str, account_id: int | None, portal_url: str | None) -> None:
    """Add an account and print its id."""
    if portal_url is not None and not re.fullmatch(
        r"https://[A-Za-z0-9.-]+(:[0-9]+)?([/?#][!-~]{0,1900})?", portal_url
    ):
        raise click.ClickException("the portal URL must be an https URL, in ASCII and of at most 2000 characters")
    with _changing() as connection:
        new = administration.add_account(connection, _name(name), account_id=account_id, portal_url=portal_url)
    _record(EventName.ACCOUNT_ADDED, account_id=new)
    click.echo(new)


@account.command("list")
def account_list() -> None:
    """List accounts with their teams."""
    with _reading() as connection:
        _table(
            ("ID", "NAME", "PORTAL", "TEAMS"),
            [
                (row.id, row.name, row.portal_url or "-", _teams(connection, row.id))
                for row in administration.list_accounts(connection)
            ],
        )


@main.group()
def team() -> None:
    """Teams of an account."""


@team.command("add")
@click.argument("account", type=_ID)
@click.argument("name")
@click.option("--id", "team_id", type=_ID, help="Its number; the next free one if not given.")
def team_add(account: int, name: str, team_id: int | None) -> None:
    """Add a team to an account and print its id."""
    with _changing() as connection:
        new = administration.add_team(connection, account, _name(name), team_id=team_id)
    _record(EventName.TEAM_ADDED, account_id=account)
    click.echo(new)


@main.group()
def api_token() -> None:
    """API tokens of integrations and frontends."""


@api_token.command("create")
@click.option("--account", "account_id", type=_ID, help="The account that it is for.")
@click.option("--platform", is_flag=True, help="For all accounts; may verify and consume only.")
@click.option("--name", required=True)
@click.option("--scope", "scopes", multiple=True, required=True, help="write:sso or verify:sso; can be repeated.")
@click.option("--max-role", help="Sign in nobody whose role is higher: editor, publisher or admin.")
@click.option("--expires-in", "days", type=click.IntRange(1, 3650), help="Days until it expires; never if not given.")
def api_token_create(
    account_id: int | None, platform: bool, name: str, scopes: Sequence[str], max_role: str | None, days: int | None
) -> None:
    """Create an API token and print its secret, which is shown only now."""
    if platform == (account_id is not None):
        raise click.ClickException("give either --account N or --platform")
    if platform and Scope.WRITE_SSO in scopes:
        raise click.ClickException(f"a platform API token cannot have the scope {Scope.WRITE_SSO}")
    now = _now()
    with _changing() as connection:
        token_id, secret = administration.create_api_token(
            connection,
            account_id=account_id,
            name=_name(name),
            scopes=frozenset(_scope(scope) for scope in scopes),
            max_role=None if max_role is None else _role(max_role),
            now=now,
            expires_at=None if days is None else now + days * 86400,
        )
    _record(EventName.API_TOKEN_CREATED, api_token_id=token_id, account_id=account_id)
    click.echo(secret)


@api_token.command("list")
def api_token_list() -> None:
    """List API tokens; a hint is the end of the secret."""
    with _reading() as connection:
        rows = administration.list_api_tokens(connection)
    _table(
        ("ID", "ACCOUNT", "NAME", "HINT", "SCOPES", "MAX ROLE", "CREATED", "LAST USED", "EXPIRES", "REVOKED"),
        [
            (
                row.id,
                "platform" if row.account_id is None else row.account_id,
                row.name,
                f"...{row.hint}",
                row.scopes,
                row.max_role or "-",
                *(_time(at) for at in (row.created_at, row.last_used_at, row.expires_at, row.revoked_at)),
            )
            for row in rows
        ],
    )


@api_token.command("revoke")
@click.argument("token_id", metavar="ID", type=_ID)
def api_token_revoke(token_id: int) -> None:
    """Revoke an API token, from the next request on."""
    settings = _settings()
    with _changing(settings) as connection:
        row = administration.revoke_api_token(connection, token_id, now=_now())
    _record(EventName.API_TOKEN_REVOKED, api_token_id=row.id, account_id=row.account_id)
    click.echo(f"API token {row.id} ({row.name}) is revoked.")
    if Scope.WRITE_SSO in row.scopes.split():
        click.echo(
            f"Login tokens that it got are good for up to {settings.token_ttl} s, and sessions that they opened for "
            f"up to {_duration(settings.session_ttl)}.\nIf it leaked, end them too:\n"
            "  sso-service keys revoke --all      all links and all sessions: everybody has to sign in again\n"
            "  sso-service user sign-out EMAIL    the sessions of one person"
        )


# --- people ----------------------------------------------------------------------------------------------------------


@main.group()
def user() -> None:
    """People: who they are, what they may do."""


@user.command("show")
@click.argument("email")
def user_show(email: str) -> None:
    """Show a user and the accounts that they belong to."""
    with _reading() as connection:
        row = administration.find_user(connection, normalise_email(email))
        belongs = administration.list_memberships(connection, row.id)
    click.echo(f"{row.email}  {row.first_name} {row.last_name}")
    click.echo(f"id {row.id}, created {_time(row.created_at)}")
    if row.disabled_at is not None:
        click.echo(f"disabled since {_time(row.disabled_at)}")
    if row.sessions_from:
        click.echo(f"sessions from before {_time(row.sessions_from)} are ended")
    _table(("ACCOUNT", "NAME", "ROLE"), [(m.account_id, m.account_name, m.role) for m in belongs])


@user.command("set-role")
@click.argument("email")
@click.option("--account", "account_id", type=_ID, required=True)
@click.argument("role")
def user_set_role(email: str, account_id: int, role: str) -> None:
    """Give a member another role, from their next click on."""
    with _changing() as connection:
        user_id = administration.set_role(connection, normalise_email(email), account_id, _role(role))
    _record(EventName.ROLE_CHANGED, user_id=user_id, account_id=account_id, role=role)
    click.echo(f"{email} is {role} in account {account_id}.")


@user.command("remove")
@click.argument("email")
@click.option("--account", "account_id", type=_ID, required=True)
def user_remove(email: str, account_id: int) -> None:
    """Take a user out of an account."""
    with _changing() as connection:
        user_id = administration.remove_member(connection, normalise_email(email), account_id)
    _record(EventName.MEMBER_REMOVED, user_id=user_id, account_id=account_id)
    click.echo(f"{email} is no longer in account {account_id}. A new login through its intranet adds them again.")


@user.command("disable")
@click.argument("email")
def user_disable(email: str) -> None:
    """Lock a user out of everything, from their next click on."""
    with _signing_out() as (connection, now):
        user_id = administration.disable_user(connection, normalise_email(email), now=now)
    _record(EventName.USER_DISABLED, user_id=user_id)
    click.echo(f"{email} is disabled.")


@user.command("enable")
@click.argument("email")
def user_enable(email: str) -> None:
    """Undo disable."""
    with _changing() as connection:
        user_id = administration.enable_user(connection, normalise_email(email))
    _record(EventName.USER_ENABLED, user_id=user_id)
    click.echo(f"{email} is enabled.")


@user.command("sign-out")
@click.argument("email")
def user_sign_out(email: str) -> None:
    """End all sessions of a user."""
    with _signing_out() as (connection, now):
        user_id = administration.sign_out_user(connection, normalise_email(email), now=now)
    _record(EventName.SIGNED_OUT_EVERYWHERE, user_id=user_id)
    click.echo(f"{email} is signed out everywhere.")


# --- keys ------------------------------------------------------------------------------------------------------------


@main.group()
def keys() -> None:
    """Signing keys."""


@keys.command("list")
def keys_list() -> None:
    """List keys, newest first, and what each is good for now."""
    settings, now = _settings(), _now()
    ring = _ring(settings)
    signing = ring.in_charge(now)
    verifying = {key.id for key in ring.verifying_keys(now, _longest_life(settings))}
    _table(
        ("ID", "STATE", "SIGNS FROM"),
        [
            (
                entry.id,
                "revoked"
                if isinstance(entry, Tombstone)
                else "signs"
                if entry is signing
                else "signs later"
                if entry.signs_from > now
                else "verifies"
                if entry.id in verifying
                else "spent",
                _time(entry.signs_from),
            )
            for entry in reversed(ring.entries)
        ],
    )


_JSON = click.option("--json", "as_json", is_flag=True, help="Say it in one line of JSON.")


@keys.command("rotate")
@click.option(
    "--lead",
    type=click.IntRange(0, 86400),
    default=keyring.ROTATION_LEAD,
    show_default=True,
    help="Seconds until the new key signs; every node has to read it before.",
)
@click.option("--prune", "and_prune", is_flag=True, help="Then delete keys that can verify nothing any more.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@_JSON
def keys_rotate(lead: int, and_prune: bool, dry_run: bool, as_json: bool) -> None:
    """Make a new signing key. No login is lost: the old one verifies what it signed until that has expired."""
    settings, now = _settings(), _now()
    with _changing_keys(settings, "rotate", as_json=as_json, dry_run=dry_run) as report:
        if dry_run:
            _ring(settings)
            report.say(
                f"A new key would be made in {settings.keys_path} and sign from {_time(now + lead)}.",
                made=[],
            )
        else:
            report.made([keyring.rotate(settings.keys_path, now=now, lead=lead)])
        if and_prune:
            _prune(report, settings, now, dry_run=dry_run)


@keys.command("revoke")
@click.argument("key_id", metavar="[ID]", required=False)
@click.option("--all", "everything", is_flag=True, help="Every key: also after the database was restored.")
@_JSON
def keys_revoke(key_id: str | None, everything: bool, as_json: bool) -> None:
    """Make all that a key signed worthless, within 5 s: login tokens, sessions, forms."""
    if everything == (key_id is not None):
        raise click.ClickException("give either the id of a key or --all")
    settings, now = _settings(), _now()
    with _changing_keys(settings, "revoke", as_json=as_json) as report:
        if key_id is not None:
            made = keyring.revoke(settings.keys_path, key_id, now=now)
            _record(EventName.KEY_REVOKED, key_id=key_id)
            report.say(f"Key {key_id} is revoked.", revoked=key_id)
        else:
            made = keyring.revoke_all(settings.keys_path, now=now)
            _record(EventName.KEY_REVOKED, key_id="all")
            report.say("All keys are revoked.", revoked="all")
        report.made(made)


@keys.command("prune")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@_JSON
def keys_prune(dry_run: bool, as_json: bool) -> None:
    """Delete keys that can verify nothing any more."""
    settings = _settings()
    with _changing_keys(settings, "prune", as_json=as_json, dry_run=dry_run) as report:
        _prune(report, settings, _now(), dry_run=dry_run)


class _Report:
    """What was done to the keys: in words as it is done, or in one line of JSON at the end."""

    def __init__(self, event: str, *, as_json: bool, dry_run: bool) -> None:
        self._as_json = as_json
        self._fields: dict[str, object] = {"event": f"keys.{event}", "dry_run": dry_run}

    def say(self, words: str, **fields: object) -> None:
        self._fields.update(fields)
        if not self._as_json:
            click.echo(words)

    def made(self, made: Sequence[SigningKey]) -> None:
        self._fields["made"] = [{"id": key.id, "signs_from": key.signs_from} for key in made]
        for key in made:
            _record(EventName.KEY_CREATED, key_id=key.id)
            self.say(f"Key {key.id} signs from {_time(key.signs_from)}.")

    def end(self, **fields: object) -> None:
        if self._as_json:
            click.echo(json.dumps(self._fields | fields))


@contextmanager
def _changing_keys(settings: Settings, event: str, *, as_json: bool, dry_run: bool = False) -> Iterator[_Report]:
    """Reports what is done to the keys. Nobody else may change them meanwhile: then it is exit code 75, try later."""
    report = _Report(event, as_json=as_json, dry_run=dry_run)
    try:
        with nullcontext() if dry_run else keyring.locked(settings.keys_path):
            yield report
    except keyring.KeyRingError as error:
        report.end(error=str(error))
        raise
    report.end()


# --- database --------------------------------------------------------------------------------------------------------


@main.group()
def db() -> None:
    """The database's schema."""


@db.command("upgrade")
def db_upgrade() -> None:
    """Bring the schema to this version."""
    settings = _settings()
    database = Database(settings.database)
    _check_file(database)
    before = _upgrade(settings, database)
    click.echo(f"Schema {before or 'none'} -> {SCHEMA_VERSION}.")


@db.command("current")
def db_current() -> None:
    """Print the schema that the database has."""
    database = Database(_settings().database)
    _check_file(database)
    click.echo(migrations.current(database) or "none")


@db.command("copy")
@click.option("--to", "url", required=True, help="The URL of the new database, which must be empty.")
def db_copy(url: str) -> None:
    """Copy everything into another database, of either kind. Stop the service first."""
    settings = _settings()
    source = Database(settings.database)
    _check_file(source)
    target = Database(msgspec.structs.replace(settings, database_url=url).database)
    if target.is_sqlite:
        _make_directory(Path(str(target.url.database)).parent)
    for name, rows in copying.copy(source, target).items():
        click.echo(f"{name}: {rows}")
    click.echo(
        "Now set SSO_DATABASE_URL to the new database. If the service has been running on the old one meanwhile, what\n"
        "was used there is not known here. Then make all tokens worthless: sso-service keys revoke --all"
    )


@main.command()
def purge() -> None:
    """Delete consumed tokens that have long expired. The service does this by itself. Takes a minute."""
    database = Database(_settings().database)
    _check_file(database)
    migrations.check(database)
    purger = Purger(database)
    done = purger.run()
    if not done.skipped:
        click.echo(f"Waiting {FLOOR_AGE:.0f} s, so that no statement from before can still be running.", err=True)
        time.sleep(FLOOR_AGE)
        done = purger.run()
    if done.skipped:
        raise click.ClickException(f"nothing purged, since {done.skipped}")
    click.echo(f"{done.deleted} deleted." + (" Another purge is at work and does the rest." if done.elsewhere else ""))


@main.command()
@click.argument("token")
def inspect(token: str) -> None:
    """Explain a login token: what it says, who signed it, whether it was used, why it would be refused."""
    settings, now = _settings(), _now()
    click.echo(f"ref        {tokens.ref(token)}")
    try:
        claims = tokens.unsafe_read_claims(token)
    except BadData as error:
        click.echo(f"refused    malformed: {error}")
        return
    ring = _ring(settings)
    key = next((key for key in ring.known_keys() if _signed_by(token, key, settings, now)), None)
    verifies = key is not None and key in ring.verifying_keys(now, settings.token_ttl)
    issued_at = claims.expires_at - settings.token_ttl
    click.echo(f"signed by  {key.id if key else 'no key that is here: anybody could have written what follows'}")
    click.echo(f"user       {claims.user_id}")
    click.echo(f"account    {claims.account_id}")
    click.echo(f"issued     {_time(issued_at)}, {now - issued_at} s ago")
    click.echo(f"expires    {_time(claims.expires_at)}, in {claims.expires_at - now} s")
    click.echo(f"nonce      {claims.nonce:08x}")
    if key is None:
        click.echo("refused    bad signature")
        return
    with _opened(settings) as (database, connection), database.reading(connection):
        state = state_of_all(database, connection, [claims.pack()])[0]
        standing = standing_of_all(database, connection, [Place(claims.user_id, claims.account_id)])[0]
    if standing.user is not None:
        click.echo(f"email      {standing.user.email}")
    click.echo(f"consumed   {'yes' if state is Verdict.CONSUMED else 'no'}")
    if claims.expires_at > now + settings.token_ttl + tokens.CLOCK_ALLOWANCE:
        click.echo("refused    it claims to live longer than tokens do")
    elif now >= claims.expires_at or state is Verdict.EXPIRED:
        click.echo("refused    expired")
    elif not verifies:
        click.echo("refused    its key may not verify any more")
    elif state is Verdict.CONSUMED:
        click.echo("refused    already used")
    elif not standing.has_access:
        click.echo("refused    the user is disabled or not in the account")
    else:
        click.echo("good       it would sign in")


# --- helpers ---------------------------------------------------------------------------------------------------------


def _settings() -> Settings:
    return read_settings(os.environ)


def _record(event: EventName, **fields: Any) -> None:
    try:
        operator = getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        operator = str(os.getuid())
    audit.record(Event(event=event, operator=operator, **fields))


def _now() -> int:
    return int(time.time())


def _ring(settings: Settings) -> KeyRing:
    entries, broken = keyring.load(settings.keys_path)
    for key_id, problem in broken.items():
        click.echo(f"Warning: key {key_id} {problem}; skipped.", err=True)
    return KeyRing(entries.values())


def _longest_life(settings: Settings) -> int:
    return max(settings.token_ttl, settings.session_ttl)


def _prune(report: _Report, settings: Settings, now: int, *, dry_run: bool) -> None:
    pruned = keyring.prune(settings.keys_path, now=now, lifetime=_longest_life(settings), dry_run=dry_run)
    words = [f"Key {entry.id} {'would be ' if dry_run else ''}deleted." for entry in pruned] or ["No key to delete."]
    report.say("\n".join(words), pruned=[entry.id for entry in pruned])
    for entry in () if dry_run else pruned:
        _record(EventName.KEY_DELETED, key_id=entry.id)


def _signed_by(token: str, key: SigningKey, settings: Settings, now: int) -> bool:
    try:
        tokens.read(token, [key.token_key], now=now, lifetime=settings.token_ttl)
    except tokens.ForgedToken:
        return False
    except BadData:
        return True  # expired or overlong: found out only after the signature held
    return True


def _upgrade(settings: Settings, database: Database) -> str | None:
    # An empty ledger knows of no token that was used. What keys from before have signed must not get a second life by
    # it, so there is no new database unless they are dead.
    return migrations.upgrade(database, before_creation=lambda: _revoke_for_new_database(settings))


def _revoke_for_new_database(settings: Settings) -> None:
    if settings.keys_path.is_dir():
        for key in keyring.revoke_all(settings.keys_path, now=_now()):
            click.echo(f"The database is new, so all keys were revoked. Key {key.id} signs from now on.", err=True)


def _check_file(database: Database) -> None:
    # SQLite would make an empty one.
    if database.is_sqlite and not Path(str(database.url.database)).is_file():
        raise click.ClickException(f"there is no database {database}; run: sso-service init")


@contextmanager
def _opened(settings: Settings) -> Iterator[tuple[Database, Connection]]:
    """The database, which must be there with the schema of this version, and a connection; closed at the end."""
    database = Database(settings.database)
    try:
        _check_file(database)
        migrations.check(database)
        with database.connect() as connection:
            yield database, connection
    finally:
        database.close()


@contextmanager
def _reading(settings: Settings | None = None) -> Iterator[Connection]:
    with _opened(settings or _settings()) as (database, connection), database.reading(connection):
        yield connection


@contextmanager
def _changing(settings: Settings | None = None) -> Iterator[Connection]:
    with _opened(settings or _settings()) as (database, connection), database.writing(connection):
        yield connection


@contextmanager
def _signing_out() -> Iterator[tuple[Connection, int]]:
    """Likewise, with the time by which sessions end."""
    with _opened(_settings()) as (database, connection), database.writing(connection):
        # By the database's clock: ours may be ahead, and no node would accept a new session until it has caught up.
        yield connection, connection.execute(select(database.now())).scalar_one()


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"cannot make the directory {path}: {error.strerror}") from error


def _make_demo(settings: Settings, database: Database) -> None:
    now = _now()
    with database.connect() as connection, database.writing(connection):
        if not any(row.id == DEMO_ACCOUNT for row in administration.list_accounts(connection)):
            administration.add_account(connection, "Demo", account_id=DEMO_ACCOUNT)
        if not any(row.id == DEMO_TEAM for row in administration.list_teams(connection, DEMO_ACCOUNT)):
            administration.add_team(connection, DEMO_ACCOUNT, "Demo team", team_id=DEMO_TEAM)
        admin = NewPerson(DEMO_ADMIN, "Demo", "Admin", DEMO_ACCOUNT, now)
        user_id = provision_all(database, connection, [admin])[0].user_id
        administration.set_role(connection, DEMO_ADMIN, DEMO_ACCOUNT, Role.ADMIN)
        administration.revoke_api_tokens_named(connection, DEMO_ACCOUNT, "demo", now=now)
        _, secret = administration.create_api_token(
            connection, account_id=DEMO_ACCOUNT, name="demo", scopes=frozenset(Scope), now=now
        )
    claims = tokens.Claims(now + settings.token_ttl, user_id, DEMO_ACCOUNT, randbits(32))
    token = tokens.sign(claims, _ring(settings).signing_key(now).token_key)
    base = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{settings.port}"
    page = f"{base}/client/{DEMO_ACCOUNT}/t/{DEMO_TEAM}/posts"
    click.echo(
        f"""
Demo account {DEMO_ACCOUNT}, team {DEMO_TEAM}. Its API token, shown only now: {secret}

Get a login token:

  curl -s {base}/v1/sso_tokens -H 'Authorization: Bearer {secret}' \\
    -H 'Content-Type: application/json' \\
    -d '{{"email": "jane.doe@example.com", "first_name": "Jane", "last_name": "Doe"}}'

Sign in with it, in a browser or with curl -i:

  {page}?sso=TOKEN

Or sign in as the demo admin, once, within {settings.token_ttl} s:

  {base}/client/{DEMO_ACCOUNT}/t/{DEMO_TEAM}/settings?sso={token}
"""
    )


def _teams(connection: Connection, account_id: int) -> str:
    return ", ".join(f"{row.id} {row.name}" for row in administration.list_teams(connection, account_id)) or "-"


def _name(value: str) -> str:
    if not 1 <= len(value.strip()) <= 100 or not value.isprintable():
        raise click.ClickException("a name has 1 to 100 printable characters")
    return value.strip()


def _role(value: str) -> Role:
    try:
        return Role(value)
    except ValueError:
        raise click.ClickException(f"there is no role {value}; roles are {', '.join(Role)}") from None


def _scope(value: str) -> Scope:
    try:
        return Scope(value)
    except ValueError:
        raise click.ClickException(f"there is no scope {value}; scopes are {', '.join(Scope)}") from None


def _duration(seconds: int) -> str:
    return f"{seconds // 3600} h" if seconds % 3600 == 0 else f"{seconds} s"


def _time(seconds: int | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    lines = [titles, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
