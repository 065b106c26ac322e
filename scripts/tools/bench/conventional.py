"""A conventional service for comparison, as a good team would build it: FastAPI, async ORM sessions, a row per token.

It has the tables and the durability of the product, and an additional table of tokens. Its models map only the tables
that it needs. Issuing inserts a row and a login updates it, each in its own transaction. The primary key is the SHA-256
of the token, so both need only one index.
"""

import hashlib
import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.responses import HTMLResponse
from itsdangerous import BadData, URLSafeTimedSerializer
from pydantic import BaseModel, EmailStr, Field
from sqlalchemy import BigInteger, ForeignKey, Integer, LargeBinary, and_, event, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

LIFETIME = 300
SESSION_LIFETIME = 43200
COOKIE = "studio_session"
SECTIONS = {
    "editor": {"posts", "ideas"},
    "publisher": {"posts", "ideas", "areas", "topics", "templates"},
    "admin": {"posts", "ideas", "areas", "topics", "templates", "settings"},
}

_Id = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    """Base class of all models."""


class Account(Base):
    __tablename__ = "accounts"
    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    name: Mapped[str]
    portal_url: Mapped[str | None]


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)
    first_name: Mapped[str]
    last_name: Mapped[str]
    created_at: Mapped[int] = mapped_column(BigInteger)
    disabled_at: Mapped[int | None] = mapped_column(BigInteger)


class Membership(Base):
    __tablename__ = "memberships"
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), primary_key=True)
    account_id: Mapped[int] = mapped_column(ForeignKey("accounts.id"), primary_key=True)
    role: Mapped[str]


class ApiToken(Base):
    __tablename__ = "api_tokens"
    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    account_id: Mapped[int] = mapped_column(ForeignKey("accounts.id"))
    digest: Mapped[str] = mapped_column(unique=True)
    scopes: Mapped[str]
    expires_at: Mapped[int | None] = mapped_column(BigInteger)
    revoked_at: Mapped[int | None] = mapped_column(BigInteger)


class LoginToken(Base):
    __tablename__ = "login_tokens"
    token_hash: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    account_id: Mapped[int] = mapped_column(ForeignKey("accounts.id"))
    expires_at: Mapped[int] = mapped_column(BigInteger)
    consumed_at: Mapped[int | None] = mapped_column(BigInteger)


class PersonIn(BaseModel):
    """The body of a request that issues a token."""

    email: EmailStr
    first_name: str = Field(min_length=1, max_length=100)
    last_name: str = Field(min_length=1, max_length=100)


class TokenOut(BaseModel):
    """The response to it."""

    token: str
    user_created: bool


class UserOut(BaseModel):
    """The signed-in user."""

    id: int
    email: str
    first_name: str
    last_name: str


class SessionOut(BaseModel):
    """The session: user, account and role."""

    user: UserOut
    account_id: int
    role: str


def token_hash(token: str) -> bytes:
    """Return the stored form of a token."""
    return hashlib.sha256(token.encode()).digest()


def serializer(secret: str) -> URLSafeTimedSerializer:
    """Return the signer of session cookies."""
    return URLSafeTimedSerializer(secret, salt="session", signer_kwargs={"digest_method": hashlib.sha256})


def make_engine(url: str) -> AsyncEngine:
    """Return the engine for `sqlite+aiosqlite:` or `postgresql+asyncpg:`. These pool sizes were the fastest here."""
    if not url.startswith("sqlite"):
        return create_async_engine(url, pool_size=8, max_overflow=0)
    engine = create_async_engine(url, pool_size=4, max_overflow=0, connect_args={"timeout": 30})

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return engine


def create_app() -> FastAPI:
    """Return the application, for the database in `BENCH_DATABASE_URL`, with cookies signed by `BENCH_SECRET`."""
    engine = make_engine(os.environ["BENCH_DATABASE_URL"])
    new_session = async_sessionmaker(engine, expire_on_commit=False)
    cookies = serializer(os.environ["BENCH_SECRET"])

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.dispose()

    app = FastAPI(lifespan=lifespan)

    async def database() -> AsyncIterator[AsyncSession]:
        async with new_session() as session:
            yield session

    Session = Annotated[AsyncSession, Depends(database)]

    async def api_token(session: Session, authorization: Annotated[str, Header()] = "") -> ApiToken:
        scheme, _, secret = authorization.partition(" ")
        digest = hashlib.sha256(secret.encode()).hexdigest()
        found = await session.scalar(select(ApiToken).where(ApiToken.digest == digest))
        now = time.time()
        if (
            scheme.lower() != "bearer"
            or found is None
            or found.revoked_at is not None
            or (found.expires_at is not None and found.expires_at <= now)
        ):
            raise HTTPException(401, "Missing or invalid API token.", {"WWW-Authenticate": "Bearer"})
        if "write:sso" not in found.scopes.split():
            raise HTTPException(403, "The API token lacks the scope write:sso.")
        return found

    async def find(session: AsyncSession, email: str, account_id: int) -> tuple[User | None, Membership | None]:
        found = await session.execute(
            select(User, Membership)
            .outerjoin(Membership, and_(Membership.user_id == User.id, Membership.account_id == account_id))
            .where(User.email == email)
        )
        row = found.one_or_none()
        return (row[0], row[1]) if row else (None, None)

    async def provision(session: AsyncSession, person: PersonIn, account_id: int) -> tuple[User, bool]:
        email = person.email.lower()
        user, membership = await find(session, email, account_id)
        created = False
        if user is None:
            user = User(
                email=email, first_name=person.first_name, last_name=person.last_name, created_at=int(time.time())
            )
            session.add(user)
            await session.flush()
            created = True
        if membership is None:
            session.add(Membership(user_id=user.id, account_id=account_id, role="editor"))
        return user, created

    @app.post("/v1/sso_tokens", status_code=201)
    async def issue(person: PersonIn, caller: Annotated[ApiToken, Depends(api_token)], session: Session) -> TokenOut:
        account_id = caller.account_id
        token = secrets.token_urlsafe(32)

        async def write() -> bool:
            user, created = await provision(session, person, account_id)
            if user.disabled_at is not None:
                raise HTTPException(403, "This user is disabled.")
            session.add(
                LoginToken(
                    token_hash=token_hash(token),
                    user_id=user.id,
                    account_id=account_id,
                    expires_at=int(time.time()) + LIFETIME,
                )
            )
            await session.commit()
            return created

        try:
            created = await write()
        except IntegrityError:  # a concurrent request has created this user or membership
            await session.rollback()
            created = await write()
        return TokenOut(token=token, user_created=created)

    async def signed_in(request: Request, session: Session) -> SessionOut:
        try:
            user_id, account_id = cookies.loads(request.cookies.get(COOKIE, ""), max_age=SESSION_LIFETIME)
        except BadData:
            raise HTTPException(401, "Not signed in.") from None
        found = await session.execute(
            select(User, Membership.role)
            .join(Membership, Membership.user_id == User.id)
            .where(User.id == user_id, Membership.account_id == account_id, User.disabled_at.is_(None))
        )
        row = found.one_or_none()
        if row is None:
            raise HTTPException(401, "Not signed in.")
        user, role = row
        return SessionOut(
            user=UserOut(id=user.id, email=user.email, first_name=user.first_name, last_name=user.last_name),
            account_id=account_id,
            role=role,
        )

    @app.get("/session")
    async def show_session(found: Annotated[SessionOut, Depends(signed_in)]) -> SessionOut:
        return found

    @app.get("/auth", status_code=204)
    async def auth(
        found: Annotated[SessionOut, Depends(signed_in)], x_original_uri: Annotated[str, Header()]
    ) -> Response:
        match x_original_uri.partition("?")[0].split("/"):
            case ["", "client", account, "t", _, section, *_] if (
                account == str(found.account_id) and section in SECTIONS[found.role]
            ):
                return Response(
                    status_code=204,
                    headers={
                        "X-Studio-User": str(found.user.id),
                        "X-Studio-Email": found.user.email,
                        "X-Studio-Account": str(found.account_id),
                        "X-Studio-Role": found.role,
                    },
                )
        raise HTTPException(403, "You may not see this.")

    @app.get("/{path:path}")
    async def login(path: str, sso: str, session: Session) -> Response:
        now = int(time.time())
        used = await session.execute(
            update(LoginToken)
            .where(
                LoginToken.token_hash == token_hash(sso), LoginToken.consumed_at.is_(None), LoginToken.expires_at > now
            )
            .values(consumed_at=now)
            .returning(LoginToken.user_id, LoginToken.account_id)
            .execution_options(synchronize_session=False)
        )
        row = used.one_or_none()
        if row is None:
            return HTMLResponse("<!doctype html><title>Sign in</title><p>This login link is not valid.</p>", 401)
        user_id, account_id = row
        role = await session.scalar(
            select(Membership.role)
            .join(User, User.id == Membership.user_id)
            .where(Membership.user_id == user_id, Membership.account_id == account_id, User.disabled_at.is_(None))
        )
        if role is None:
            await session.rollback()
            return HTMLResponse("<!doctype html><title>Sign in</title><p>You have no access here.</p>", 403)
        await session.commit()
        response = Response(
            status_code=303,
            headers={"Location": f"/{path}", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"},
        )
        response.set_cookie(
            COOKIE, cookies.dumps([user_id, account_id]), max_age=SESSION_LIFETIME, httponly=True, samesite="lax"
        )
        return response

    return app
