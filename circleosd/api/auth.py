"""Contracts of auth-service: users, logins, sessions."""

from typing import Annotated, Literal, TypedDict

from circleosd.api.common import EVERYWHERE
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
        "a user name: an ASCII letter or _, then ASCII letters, digits, _ or -, at most 31 characters",
    ),
]
# 8 is NIST SP 800-63B's least for a password a person chose; 1024 bounds the work of one hash.
NewPassword = Annotated[str, Doc("the new password"), Length(8, 1024), Mark.SECRET, Mark.NEW]
Password = Annotated[str, Doc("the password"), Length(1, 1024), Mark.SECRET]
RoleName = Literal["none", "viewer", "operator", "admin"]
ROLE = Doc("what the user may do, in addition to rules")
# If it is missing, the dispatcher takes the caller's own name (`own`).
OwnName = Annotated[UserName | None, Doc("the user's name; default: yourself")]
UID = Doc("the Unix uid that identifies this user without a login")
UIDS = Between(1, 4294967294)  # no more: (uid_t) -1 means "none", user_namespaces(7)
Uid = Annotated[int | None, UID, UIDS, Mark.OPTION]
SessionId = Annotated[str | None, Doc("a session id; default: all sessions"), Pattern("[0-9a-f]{12}", "a session id")]
# Verbs are those of the contracts, objects names of services, plugins and users; `*` and `?` as in fnmatch(3).
VerbGlob = Annotated[
    str,
    Doc("an action such as service:restart; may be a glob"),
    Pattern(r"[a-z*?]{1,32}:[a-z_*?]{1,32}|\*", "an action such as service:restart, or a glob of such actions"),
]
ObjectGlob = Annotated[
    str,
    Doc("the name of a service, plugin or user; may be a glob"),
    Pattern(r"[a-zA-Z0-9_.@:/\\+*?-]{1,256}", "the name of a service, plugin or user, or a glob of such names"),
]
Deny = Annotated[bool, Doc("deny the action instead; overrides whatever allows it"), Mark.OPTION]


class User(TypedDict):
    """A user. Times in seconds since the epoch."""

    name: str
    role: str
    uid: int | None
    disabled: bool
    created: float
    last_login: float | None


class Rule(TypedDict):
    """A rule about what a user may do, or with `deny` may not do; see circleosd/policy.py for its meaning."""

    verb: str
    object: str
    deny: bool


class UserDetail(User):
    """A user in detail. `locked_until`: logins before this time are refused, at least from some uids."""

    password: bool
    sessions: int
    locked_until: float | None
    rules: list[Rule]


class Login(TypedDict):
    """A new session. The token is shown this once; only its hash is kept."""

    user: str
    role: str
    token: str
    expires: float


class Session(TypedDict):
    """A valid session, opened by a process of `uid`."""

    id: str
    user: str
    uid: int
    created: float
    last_used: float
    expires: float


class Identity(TypedDict):
    """Who a caller is. `role` is None for a caller without a role."""

    user: str | None
    role: str | None
    uid: int
    session: str | None
    expires: float | None
    grants: list[Rule]


class Answer(TypedDict):
    """Whether a user may do something; `why` says what decides, `rule` is the rule that decides, if one does."""

    allowed: bool
    why: str
    rule: Rule | None


@contract
class Create(Request, action="create", access=Access.ADMIN, reply=User, effect=Effect.STATE, object="name"):
    """Create a user who logs in with a password, or whom a uid identifies."""

    name: UserName
    password: Annotated[NewPassword | None, Doc("the password, optional with --uid"), Mark.SECRET, Mark.NEW] = None
    role: Annotated[RoleName, ROLE, Mark.OPTION] = "viewer"
    uid: Uid = None


@contract
class LoginUser(Request, action="login", access=Access.ANYONE, reply=Login, effect=Effect.STATE, object="name"):
    """Log in as a user; later commands then act as that user."""

    name: UserName
    password: Password
    lifetime: Annotated[
        float | None,
        Doc("seconds until the session ends, to end it earlier than usual"),
        Between(1, 1e9),
        Mark.OPTION,
    ] = None


@contract
class Logout(Request, action="logout", access=Access.ANYONE, reply=None, effect=Effect.STATE):
    """End your session."""


@contract
class WhoAmI(Request, action="whoami", access=Access.ANYONE, reply=Identity):
    """Show who you are to CircleOSD and what you may do."""


@contract
class Verify(Request, action="verify", access=Access.ANYONE, reply=Identity):
    """Show which user a session token or a uid belongs to; the services use this to identify their callers."""

    uid: Annotated[
        int | None, Doc("the uid that presented the token, instead of your own"), Between(0, 4294967294), Mark.HIDDEN
    ] = None
    presented: Annotated[
        str | None, Doc("the token that was presented, instead of your own"), Length(1, 256), Mark.SECRET, Mark.HIDDEN
    ] = None


@contract
class ListUsers(Request, action="list", access=Access.VIEWER, reply=list[User], rows="name"):
    """List the users."""


@contract
class Show(Request, action="show", access=Access.VIEWER, reply=UserDetail, object="name", own=True):
    """Show a user in detail, including the user's rules."""

    name: OwnName = None


@contract
class Passwd(Request, action="passwd", access=Access.ADMIN, reply=None, effect=Effect.STATE, object="name", own=True):
    """Change a password and end the user's other sessions."""

    password: NewPassword
    name: OwnName = None
    old: Annotated[Password | None, Doc("the current password, to change your own"), Mark.SECRET] = None


@contract
class SetRole(Request, action="role", access=Access.ADMIN, reply=User, effect=Effect.STATE, object="name"):
    """Change a user's role."""

    name: UserName
    role: Annotated[RoleName, ROLE]


@contract
class SetUid(Request, action="uid", access=Access.ADMIN, reply=User, effect=Effect.STATE, object="name"):
    """Bind a user to a Unix uid, replacing any previous one."""

    name: UserName
    uid: Annotated[int, UID, UIDS]


@contract
class Disable(Request, action="disable", access=Access.ADMIN, reply=User, effect=Effect.STATE, object="name"):
    """Take away all rights of a user until enabled again, and end the user's sessions."""

    name: UserName


@contract
class Enable(Request, action="enable", access=Access.ADMIN, reply=User, effect=Effect.STATE, object="name"):
    """Restore the rights of a disabled user, and end a lockout after failed logins."""

    name: UserName


@contract
class Delete(Request, action="delete", access=Access.ADMIN, reply=User, effect=Effect.STATE, object="name"):
    """Delete a user with all rules and sessions; the record of what the user did is kept."""

    name: UserName


@contract
class Sessions(Request, action="sessions", access=Access.ADMIN, reply=list[Session], object="name", own=True):
    """List a user's sessions."""

    name: Annotated[UserName | None, Doc("the user's name; default: yourself, or all if you are not a user")] = None


@contract
class Revoke(Request, action="revoke", access=Access.ADMIN, reply=list[Session], effect=Effect.STATE, object="name",
             own=True):  # fmt: skip
    """End one or all sessions of a user; takes effect in every service within a second."""

    name: OwnName = None
    session: SessionId = None


@contract
class AddGrant(Request, action="grant", access=Access.ADMIN, reply=list[Rule], effect=Effect.STATE, object="name"):
    """Allow or deny a user an action on some objects."""

    name: UserName
    verb: VerbGlob
    object: ObjectGlob
    deny: Deny = False


@contract
class RemoveGrant(Request, action="ungrant", access=Access.ADMIN, reply=list[Rule], effect=Effect.STATE, object="name"):
    """Remove a rule that was added with grant."""

    name: UserName
    verb: VerbGlob
    object: ObjectGlob
    deny: Deny = False


@contract
class Can(Request, action="can", access=Access.ADMIN, reply=Answer, object="name", own=True):
    """Show whether a user may do something, and what decides."""

    name: UserName
    verb: Annotated[
        str, Doc("an action such as service:restart"), Pattern("[a-z]+:[a-z_]+", "an action such as service:restart")
    ]
    object: Annotated[str | None, Doc("the name of a service, plugin or user"), Length(1, 256)] = None


CONTRACTS: tuple[type[Request], ...] = (
    Create, LoginUser, Logout, WhoAmI, Verify, ListUsers, Show, Passwd, SetRole, SetUid, Disable, Enable, Delete,
    Sessions, Revoke, AddGrant, RemoveGrant, Can, *EVERYWHERE,
)  # fmt: skip
