"""Contracts of auth-service: users, logins, sessions."""

from typing import Annotated, Literal, TypedDict

from circleosd.api.common import Health, History
from circleosd.api.contract import Between, Doc, Effect, Length, Mark, Pattern, Request, contract
from circleosd.policy import Access

SERVICE = "auth-service"
GROUP = "user"

UserName = Annotated[
    str,
    Doc("the user's name"),
    # systemd's strict rule, systemd.io/USER_NAMES
    Pattern(
        r"[a-zA-Z_][a-zA-Z0-9_-]{0,30}",
        "a user name: a letter or _ first, then letters, digits, _ or -, at most 31 in all",
    ),
]
# 8 is NIST SP 800-63B's least for a password a person chose; 1024 bounds the work of one hash.
NewPassword = Annotated[str, Doc("the password"), Length(8, 1024), Mark.SECRET]
Password = Annotated[str, Doc("the password"), Length(1, 1024), Mark.SECRET]
RoleName = Annotated[Literal["viewer", "operator", "admin"], Doc("what the user may do everywhere"), Mark.OPTION]
# 4294967294 is the last uid: (uid_t) -1 means "none", user_namespaces(7).
Uid = Annotated[int | None, Doc("the Unix uid that is this user without a login"), Mark.OPTION]


class User(TypedDict):
    """A user. Times in seconds since the epoch."""

    name: str
    role: str
    uid: int | None
    created: float
    last_login: float | None


class Login(TypedDict):
    """A new session. The token is shown this once; only its hash is kept."""

    user: str
    role: str
    token: str
    expires: float


class Identity(TypedDict):
    """Who a caller is."""

    user: str | None
    role: str | None
    uid: int
    session: str | None
    expires: float | None
    grants: list[list[str]]


@contract
class Create(Request, action="create", access=Access.ADMIN, reply=User, effect=Effect.STATE, object="name"):
    """Create a user, who can then log in."""

    name: UserName
    password: NewPassword
    role: RoleName = "viewer"
    uid: Annotated[int | None, Doc("the Unix uid that is this user without a login"), Between(1, 4294967294),
                   Mark.OPTION] = None  # fmt: skip


@contract
class LoginUser(Request, action="login", access=Access.ANYONE, reply=Login, effect=Effect.STATE, object="name"):
    """Log in as a user; later commands then act as that user."""

    name: UserName
    password: Password


@contract
class Verify(Request, action="verify", access=Access.ANYONE, reply=Identity):
    """Tell which user a session token names, or the uid without one; the services ask this about their callers."""

    uid: Annotated[int | None, Doc("the uid that presented the token, instead of one's own"), Mark.HIDDEN] = None


@contract
class WhoAmI(Request, action="whoami", access=Access.ANYONE, reply=Identity):
    """Show who you are to CircleOSD, and what you may do."""


@contract
class Logout(Request, action="logout", access=Access.ANYONE, reply=None, effect=Effect.STATE):
    """End your session."""


@contract
class ListUsers(Request, action="list", access=Access.VIEWER, reply=list[User]):
    """List the users."""


CONTRACTS: tuple[type[Request], ...] = (Create, LoginUser, Verify, WhoAmI, Logout, ListUsers, Health, History)
