"""The actions of auth-service."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence

from circleosd.api import auth as api
from circleosd.auth import passwords, rules, store
from circleosd.auth.callers import Callers
from circleosd.auth.logins import Logins
from circleosd.auth.passwords import Passwords
from circleosd.auth.sessions import NO_SESSION, Sessions
from circleosd.auth.store import Account
from circleosd.config import AuthSettings
from circleosd.database import Database, Transaction
from circleosd.delegation import require_within
from circleosd.errors import BadRequest, Conflict, Denied, Exists, Limit, NotFound
from circleosd.fair import Fair
from circleosd.handlers import Act, Handlers
from circleosd.policy import Caller, Grant, Peer

RESERVED = ("root", "nobody")  # and names that start with circleosd: all of these would be mistaken for something else
MAX_RULES = 200  # per user; all of them are sent with every verification and checked at every decision
SESSIONS_SHOWN = 1000


class AuthService(Handlers):
    """Users, logins, sessions and rules."""

    def __init__(self, database: Database, settings: AuthSettings, sessions: Sessions, callers: Callers) -> None:
        self._database = database
        self._settings = settings
        self._sessions = sessions
        self._callers = callers
        self._passwords = Passwords(settings)
        self._logins = Logins(settings)
        self._listing = Fair(1)  # there may be many users, and every identification waits for this thread

    async def close(self) -> None:
        await self._sessions.flush()

    # who asks

    async def verify(self, request: api.Verify, act: Act) -> api.Identity:
        peer = act.caller.peer
        uid = peer.uid if request.uid is None else request.uid
        if uid != peer.uid and not (act.caller.privileged or self._callers.is_ours(peer.uid)):
            raise Denied("only CircleOSD's own services may ask about another uid")
        return self._identity(*await self._callers.looked_up(Caller(Peer(uid, -1, -1)), request.presented or act.token))

    async def whoami(self, request: api.WhoAmI, act: Act) -> api.Identity:
        token, uid = act.token, act.caller.peer.uid
        session = await self._database.read(lambda db: self._sessions.find(db, token, uid)) if token else None
        if act.caller.user is None and (name := await self._database.read(lambda db: store.disabled_of_uid(db, uid))):
            step = f"an admin can enable the user: circlectl user enable {name}"
            act.message = f"the user {name} (uid {uid}) is disabled; {step}"
        return self._identity(act.caller, session)

    def _identity(self, caller: Caller, session: store.Session | None) -> api.Identity:
        return api.Identity(
            user=caller.user,
            role=caller.role,
            uid=caller.peer.uid,
            session=caller.session,
            expires=self._sessions.expiry(session) if session else None,
            grants=store.rules(caller.grants),
        )

    # users

    async def create(self, request: api.Create, act: Act) -> api.User:
        name = request.name
        if name.lower() in RESERVED or name.lower().startswith("circleosd"):
            raise BadRequest(f"the name {name} is reserved; choose another")
        if request.password is None and request.uid is None:
            raise BadRequest("a user needs a password or a uid")
        self._require_free(request.uid)
        require_within(act.caller, store.role_of(request.role), ())  # before the slow hash, and again after it
        if request.password is not None:
            passwords.check(request.password, name)
        uid = act.caller.bounded
        hashed = await self._passwords.hash(request.password, uid) if request.password is not None else None

        def work(tx: Transaction) -> api.User:
            self._callers.renew(tx, act)
            require_within(act.caller, store.role_of(request.role), ())
            store.insert_user(tx, name, hashed, request.role, request.uid, time.time())
            user = store.shown(self._find(tx, name))
            act.commit(tx, after={"role": user["role"], "uid": user["uid"]})
            return user

        def taken(db: sqlite3.Connection) -> str:
            like = store.name_like(db, name)
            if like is None:
                return f"a user with the uid {request.uid} already exists"
            case = "" if like == name else "; names that differ only in case count as one"
            return f"the user {like} already exists{case}"

        try:
            return await self._database.write(work)
        except sqlite3.IntegrityError:
            raise Exists(await self._database.read(taken)) from None

    async def list(self, request: api.ListUsers, act: Act) -> Sequence[api.User]:
        async with self._listing.turn(act.caller.bounded):
            return await self._database.read(store.users)

    async def show(self, request: api.Show, act: Act) -> api.UserDetail:
        name, now = _named(act), time.time()

        def work(db: sqlite3.Connection) -> api.UserDetail:
            account = self._find(db, name)
            open_sessions = store.sessions(db, name, SESSIONS_SHOWN)
            return api.UserDetail(
                **store.shown(account),
                password=account.password is not None,
                sessions=sum(self._sessions.in_force(session, now) for session in open_sessions),
                locked_until=self._logins.locked_until(db, account, now),
                rules=store.rules(store.grants(db, name)),
            )

        return await self._database.read(work)

    async def passwd(self, request: api.Passwd, act: Act) -> None:
        name, caller = _named(act), act.caller
        confirmed = name == caller.user and not caller.privileged
        present = await self._confirm(name, caller, request.old) if confirmed else None
        passwords.check(request.password, name)
        hashed = await self._passwords.hash(request.password, caller.bounded)

        def work(tx: Transaction) -> int:
            account = self._target(tx, act, name)
            if confirmed and account.password != present:
                raise Conflict(f"the password of {name} was changed in the meantime")
            store.set_password(tx, name, hashed)
            if confirmed:
                self._logins.succeeded(tx, self._logins.keys(name, caller, account), time.time())
            else:
                self._logins.forgive(tx, account)
            ended = store.close_sessions(tx, name, but=caller.session)
            act.commit(tx, after={"sessions_ended": len(ended)})
            return len(ended)

        ended = await self._database.write(work)
        if ended:
            act.message = f"the other sessions of {name} have ended: {ended}"

    async def _confirm(self, name: str, caller: Caller, old: str | None) -> str | None:
        """Users who change their own password must know it: a session may have been left open. Raises `Denied`.

        Returns the stored form of the confirmed password.
        """
        account = await self._database.read(lambda db: store.account(db, name))
        if account is None or account.password is None:
            return None
        if old is None:
            raise Denied("changing your own password takes the current one; omit the name: circlectl user passwd")
        await self._check_password(name, caller, account, old)
        return account.password

    async def role(self, request: api.SetRole, act: Act) -> api.User:
        def work(tx: Transaction) -> api.User:
            before = self._target(tx, act, request.name)
            require_within(act.caller, store.role_of(request.role), ())
            store.set_role(tx, request.name, request.role)
            act.commit(tx, before={"role": store.role_text(before.role)}, after={"role": request.role})
            return store.shown(self._find(tx, request.name))

        return await self._database.write(work)

    async def uid(self, request: api.SetUid, act: Act) -> api.User:
        self._require_free(request.uid)

        def work(tx: Transaction) -> api.User:
            before = self._target(tx, act, request.name)
            store.set_uid(tx, request.name, request.uid)
            act.commit(tx, before={"uid": before.uid}, after={"uid": request.uid})
            return store.shown(self._find(tx, request.name))

        try:
            return await self._database.write(work)
        except sqlite3.IntegrityError:
            raise Exists(f"a user with the uid {request.uid} already exists") from None

    def _require_free(self, uid: int | None) -> None:
        """Raises `BadRequest` for a uid that is CircleOSD's own."""
        if uid is not None and self._callers.is_ours(uid):
            raise BadRequest(f"uid {uid} belongs to CircleOSD itself; it needs no user")

    async def _set_disabled(self, request: api.Disable | api.Enable, act: Act) -> api.User:
        """Handler of `disable` and `enable`."""
        name, disabled = request.name, isinstance(request, api.Disable)

        def work(tx: Transaction) -> api.User:
            before = self._target(tx, act, name)
            store.set_disabled(tx, name, disabled)
            ended = store.close_sessions(tx, name) if disabled else []
            if not disabled:
                self._logins.forgive(tx, before)
            after = {"disabled": disabled, "sessions_ended": len(ended)} if disabled else {"disabled": disabled}
            act.commit(tx, before={"disabled": before.disabled}, after=after)
            return store.shown(self._find(tx, name))

        return await self._database.write(work)

    disable = enable = _set_disabled

    async def delete(self, request: api.Delete, act: Act) -> api.User:
        def work(tx: Transaction) -> api.User:
            account = self._target(tx, act, request.name)
            given = [str(grant) for grant in store.grants(tx, request.name)]
            store.delete_user(tx, request.name)
            act.commit(tx, before={"role": store.role_text(account.role), "uid": account.uid, "rules": given})
            return store.shown(account)

        return await self._database.write(work)

    # logins and sessions

    async def login(self, request: api.LoginUser, act: Act) -> api.Login:
        account = await self._database.read(lambda db: store.account(db, request.name))
        if account is None:  # an unknown name may be a password, typed at the wrong prompt: do not record it
            act.object, act.params = None, {}
        await self._check_password(request.name, act.caller, account, request.password)
        assert account is not None
        if account.disabled:
            name = account.name
            raise Denied(f"the user {name} is disabled; an admin can enable the user: circlectl user enable {name}")
        stored = account.password
        assert stored is not None
        outdated, uid = self._passwords.outdated(stored), act.caller.bounded
        rehashed = await self._passwords.hash(request.password, uid) if outdated else None
        lifetime = min(request.lifetime or self._settings.session_lifetime, self._settings.session_lifetime)
        keys = self._logins.keys(request.name, act.caller, account)

        def work(tx: Transaction) -> api.Login:
            now = time.time()
            known = store.account(tx, account.name)
            if known is None or known.disabled or known.password != stored:
                raise Conflict(f"the user {account.name} was changed in the meantime; log in again")
            self._logins.succeeded(tx, keys, now)
            if rehashed is not None:
                store.set_password(tx, account.name, rehashed)
            expires = now + lifetime
            self._sessions.make_room(tx, known.name, now)
            token, session = store.open_session(tx, known, act.caller.peer.uid, now, expires)
            act.commit(tx, after={"session": session, "expires": expires})
            return api.Login(user=known.name, role=store.role_text(known.role), token=token, expires=expires)

        return await self._database.write(work)

    async def _check_password(self, name: str, caller: Caller, account: Account | None, password: str) -> None:
        """Return if this is the password. Raises `Denied`, which counts as a failure, and `Limit` during a wait."""
        keys = self._logins.keys(name, caller, account)
        found = await self._database.read(lambda db: [store.failures(db, *key) for key in keys])
        with self._logins.attempt(keys, found, time.time()):
            stored = account.password if account else None
            right = await self._passwords.verify(stored, password, caller.bounded)
            if keys:
                await self._database.write(lambda tx: self._logins.tell(tx, keys, time.time(), right=right))
        if not right:
            raise Denied("wrong user name or password; an admin can set a new password: circlectl user passwd NAME")

    async def logout(self, request: api.Logout, act: Act) -> None:
        user, session = act.caller.user, act.caller.session
        if user is None or session is None:
            raise Conflict("no session to end: no token was sent")

        def work(tx: Transaction) -> None:
            if not store.close_sessions(tx, user, only=session):  # it has ended since the token was looked up
                raise Denied(NO_SESSION)
            act.commit(tx, before={"session": session})

        act.object = user
        await self._database.write(work)

    async def sessions(self, request: api.Sessions, act: Act) -> Sequence[api.Session]:
        """Handler of `sessions`; without a name, and for a caller who is not a user, of all users."""
        found = await self._database.read(lambda db: store.sessions(db, act.object, SESSIONS_SHOWN))
        if act.object is not None and not found:
            await self._database.read(lambda db: self._find(db, _named(act)))
        now = time.time()
        return [self._shown(session) for session in found if self._sessions.in_force(session, now)]

    async def revoke(self, request: api.Revoke, act: Act) -> Sequence[api.Session]:
        name = _named(act)

        def work(tx: Transaction) -> Sequence[api.Session]:
            self._target(tx, act, name)
            ended = [self._shown(session) for session in store.close_sessions(tx, name, only=request.session)]
            if not ended:
                one = f" {request.session}" if request.session is not None else ""
                raise NotFound(f"{name} has no session{one}; see: circlectl user sessions {name}")
            act.commit(tx, before={"sessions": [session["id"] for session in ended]})
            return ended

        return await self._database.write(work)

    def _shown(self, session: store.Session) -> api.Session:
        return api.Session(
            id=session.id,
            user=session.user,
            uid=session.uid,
            created=session.created,
            last_used=self._sessions.used(session),
            expires=self._sessions.expiry(session),
        )

    # rules

    async def grant(self, request: api.AddGrant, act: Act) -> Sequence[api.Rule]:
        given = Grant(request.verb, request.object, request.deny)
        rules.require_known(given)

        def work(tx: Transaction) -> Sequence[api.Rule]:
            self._target(tx, act, request.name)
            require_within(act.caller, None, (given,))
            if len(store.grants(tx, request.name)) >= MAX_RULES:
                raise Limit(f"a user may have at most {MAX_RULES} rules; use globs to need fewer")
            store.add_grant(tx, request.name, given)
            act.commit(tx, after={"rule": str(given)})
            return store.rules(store.grants(tx, request.name))

        try:
            return await self._database.write(work)
        except sqlite3.IntegrityError:
            raise Exists(f"{request.name} already has this rule: {given}") from None

    async def ungrant(self, request: api.RemoveGrant, act: Act) -> Sequence[api.Rule]:
        given = Grant(request.verb, request.object, request.deny)

        def work(tx: Transaction) -> Sequence[api.Rule]:
            self._target(tx, act, request.name)
            if given.deny:  # removing a denial gives rights
                require_within(act.caller, None, (given._replace(deny=False),))
            if not store.remove_grant(tx, request.name, given):
                raise NotFound(f"{request.name} has no such rule: {given}; see: circlectl user show {request.name}")
            act.commit(tx, before={"rule": str(given)})
            return store.rules(store.grants(tx, request.name))

        return await self._database.write(work)

    async def can(self, request: api.Can, act: Act) -> api.Answer:
        contract = rules.action(request.verb)
        account, grants = await self._database.read(
            lambda db: (self._find(db, request.name), store.grants(db, request.name))
        )
        return rules.answer(account, grants, contract, request.verb, request.object)

    # the user that an act is about

    def _find(self, db: sqlite3.Connection | Transaction, name: str) -> Account:
        account = store.account(db, name)
        if account is None:
            raise NotFound(f"no user {name}; see: circlectl user list")
        return account

    def _target(self, tx: Transaction, act: Act, name: str) -> Account:
        """The user that is acted on; the caller is looked up again.

        Raises `NotFound`, and `Denied` if that user may do more than the caller.
        """
        self._callers.renew(tx, act)
        account = self._find(tx, name)
        if name != act.caller.user:
            require_within(act.caller, account.role, store.grants(tx, name))
        return account


def _named(act: Act) -> str:
    """The user named in the request, or the caller. Raises `BadRequest` if there is neither."""
    if act.object is None:
        raise BadRequest(f"{act.contract.action} needs the parameter name: you are not a CircleOSD user")
    return act.object
