"""Signatures of manifests, judged with the real ssh-keygen."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from circleosd.config import TrustPolicy
from circleosd.errors import Denied, Timeout, Unavailable
from circleosd.paths import only
from circleosd.plugins.manifest import Manifest
from circleosd.plugins.signatures import MAX_LINES, Signatures, UnknownSigner
from circleosd.plugins.trust import Trust, Trusting
from tests.integration.keys import NAMESPACE, new_key, public, sign
from tests.waiting import SECONDS

MANIFEST = b'{"name": "example", "sha256": "00"}\n'


class Host:
    """A configuration directory with alice in trusted-signers, and one key of each kind of signer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.alice, self.mallory = new_key(directory, "alice"), new_key(directory, "mallory")
        self.trust(f"alice@example.org {public(self.alice)}")

    def trust(self, *lines: str) -> None:
        (self.directory / "trusted-signers").write_text("\n".join(lines) + "\n")

    def judge(
        self,
        signature: bytes | None,
        manifest: bytes = MANIFEST,
        *,
        policy: TrustPolicy = "require",
        native: bool = False,
        explicit: bool = False,
    ) -> Trust:
        trusting = Trusting(Signatures([self.directory], os.environ), policy)
        plugin = Manifest("example", plugin_type="native" if native else "wasm")
        return asyncio.run(trusting.judge(plugin, manifest, signature, explicit=explicit, before=None))

    def refusal(self, signature: bytes, manifest: bytes = MANIFEST, *, policy: TrustPolicy = "require") -> Denied:
        with pytest.raises(Denied) as caught:
            self.judge(signature, manifest, policy=policy)
        return caught.value


@pytest.fixture
def signers(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize("name", ["trusted-signers", "revoked-signers"])
def test_lists_of_keys_that_others_may_write_are_not_used_where_one_user_decides_on_them(
    signers: Host, name: str
) -> None:
    directory, file = signers.directory, signers.directory / name
    (directory / "revoked-signers").touch()
    for place, mode in (
        (directory, 0o755),
        (directory / "trusted-signers", 0o644),
        (directory / "revoked-signers", 0o644),
    ):
        place.chmod(mode)
    strict = Signatures([directory], os.environ, only(os.getuid()))
    signature = sign(signers.alice, MANIFEST)
    assert asyncio.run(strict.verify(MANIFEST, signature)).principal == "alice@example.org"
    file.chmod(0o664)
    said = f"^cannot use {file}: it is writable by others than its owner; see: chmod go-w {file}$"
    with pytest.raises(Unavailable, match=said):
        asyncio.run(strict.verify(MANIFEST, signature))
    assert signers.judge(signature).signer == "alice@example.org"


@pytest.mark.parametrize("kind", ["ed25519", "rsa", "ecdsa"])
def test_the_signature_of_a_trusted_signer_is_accepted(signers: Host, kind: str) -> None:
    key = new_key(signers.directory, kind, kind)
    signers.trust(f"bob@example.org {public(key)}")
    trust = signers.judge(sign(key, MANIFEST))
    assert trust.signer == "bob@example.org"
    assert trust.warning is None
    assert "SHA256:" in (trust.key or "")


def test_a_byte_order_mark_is_no_part_of_a_signers_name(signers: Host) -> None:
    signers.trust(f"\ufeffalice@example.org {public(signers.alice)}", f"m@example.org {public(signers.mallory)}")
    assert signers.judge(sign(signers.alice, MANIFEST)).signer == "alice@example.org"
    assert signers.judge(sign(signers.mallory, MANIFEST)).signer == "m@example.org"
    signatures, content = Signatures([], os.environ), (signers.directory / "trusted-signers").read_bytes()
    signer = asyncio.run(signatures.verify(MANIFEST, sign(signers.alice, MANIFEST), content))
    assert signer.principal == "alice@example.org", "as of --signers"


def test_a_manifest_that_was_changed_after_signing_is_refused(signers: Host) -> None:
    error = signers.refusal(sign(signers.alice, MANIFEST), MANIFEST.replace(b"00", b"01"))
    assert "changed after signing" in str(error)


def test_an_unknown_signer_is_refused_with_the_key(signers: Host) -> None:
    error = signers.refusal(sign(signers.mallory, MANIFEST))
    assert isinstance(error, UnknownSigner)
    assert "SHA256:" in str(error)


def test_a_signature_for_another_purpose_is_refused(signers: Host) -> None:
    error = signers.refusal(sign(signers.alice, MANIFEST, "git"))
    assert not isinstance(error, UnknownSigner)
    assert "was made for another purpose: its namespace is not circleosd-plugin" in str(error)


@pytest.mark.parametrize("others", [1, 2])
def test_a_key_may_have_a_line_for_each_purpose(signers: Host, others: int) -> None:
    key = public(signers.alice)
    git = [f'git{number}@example.org namespaces="git" {key}' for number in range(others)]
    signers.trust(*git, "# plugins", f'alice@example.org namespaces="circleosd-plugin" {key}')
    assert signers.judge(sign(signers.alice, MANIFEST)).signer == "alice@example.org"
    signers.trust(*git, f"mallory@example.org {public(signers.mallory)}")
    refused = signers.refusal(sign(signers.alice, MANIFEST))
    assert isinstance(refused, UnknownSigner)
    assert "of git0@example.org, but not for circleosd-plugin" in str(refused)


def test_a_signer_is_not_named_by_whose_key_it_is_not(signers: Host) -> None:
    signers.trust(f"!bob@example.org,*@example.org {public(signers.alice)}")
    assert signers.judge(sign(signers.alice, MANIFEST)).signer == "*@example.org"
    for nobody in ("!bob@example.org", "*@example.org,!*@example.org"):
        signers.trust(f"{nobody} {public(signers.alice)}")
        assert isinstance(signers.refusal(sign(signers.alice, MANIFEST)), UnknownSigner)


def slowed(host: Host, before: str) -> Mapping[str, str]:
    """An environment with an ssh-keygen that runs `before` (sh(1)), in the host's directory, and then the real one."""
    tools = host.directory / "tools"
    tools.mkdir()
    script = tools / "ssh-keygen"
    script.write_text(f'#!/bin/sh\ncd {host.directory}\n{before}\nexec {shutil.which("ssh-keygen")} "$@"\n')
    script.chmod(0o755)
    return {"PATH": f"{tools}:{os.environ['PATH']}"}


def for_other_purposes(host: Host) -> bytes:
    return f'a namespaces="x" {public(host.alice)}\n'.encode() * 1000


def test_a_key_with_endless_lines_for_other_purposes_costs_few_runs_and_no_memory(
    signers: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("circleosd.plugins.signatures.SECONDS", SECONDS)
    environment = slowed(signers, "ls -l /proc/$PPID/fd | grep -c memfd: >> runs")
    signatures = Signatures([signers.directory], environment)
    with pytest.raises(Denied, match="move the line that does before them"):
        asyncio.run(signatures.verify(MANIFEST, sign(signers.alice, MANIFEST), for_other_purposes(signers)))
    files = (signers.directory / "runs").read_text().split()
    assert len(files) == 1 + 2 * MAX_LINES
    assert max(files) == "3"  # the signature, the list and what is left of it


def test_a_verification_has_one_deadline_for_all_its_runs(signers: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circleosd.plugins.signatures.SECONDS", 1.0)
    slow = Signatures([signers.directory], slowed(signers, "sleep 0.2"))
    with pytest.raises(Timeout, match="ssh-keygen did not answer"):
        asyncio.run(slow.verify(MANIFEST, sign(signers.alice, MANIFEST), for_other_purposes(signers)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ('valid-before="20200101"', "was valid only until 2020-01-01"),
        ('valid-after="20990101"', "is not valid until 2099-01-01"),
        ('namespaces="git"', "but not for circleosd-plugin"),
    ],
)
def test_a_key_that_is_not_valid_now_or_not_for_plugins_is_refused(signers: Host, options: str, says: str) -> None:
    signers.trust(f"alice@example.org {options} {public(signers.alice)}")
    error = signers.refusal(sign(signers.alice, MANIFEST))
    assert isinstance(error, UnknownSigner)
    assert says in str(error)


@pytest.mark.parametrize("form", ["list", "krl"])
def test_a_revoked_key_is_refused(signers: Host, form: str) -> None:
    bob = new_key(signers.directory, "bob")
    signers.trust(f"alice@example.org {public(signers.alice)}", f"bob@example.org {public(bob)}")
    revoked = signers.directory / "revoked-signers"
    if form == "krl":
        subprocess.run(["ssh-keygen", "-q", "-k", "-f", revoked, bob.with_name("bob.pub")], check=True)
    else:
        revoked.write_text(public(bob) + "\n")
    error = signers.refusal(sign(bob, MANIFEST))
    assert "revoked" in str(error)
    assert signers.judge(sign(signers.alice, MANIFEST)).signer == "alice@example.org"


@pytest.mark.parametrize(
    "signature",
    [
        b"",
        b"nonsense",
        b"-----BEGIN SSH SIGNATURE-----\nAAAA\n-----END SSH SIGNATURE-----\n",
        b"\0" * 100,
        b"x" * 20000,
    ],
)
def test_what_is_no_signature_is_refused(signers: Host, signature: bytes) -> None:
    error = signers.refusal(signature)
    assert not isinstance(error, UnknownSigner)
    assert "the signature cannot be read" in str(error)


def certified(host: Host, *options: str) -> bytes:
    """The manifest's signature by carol's certificate, which the authority that it trusts made with `options`."""
    authority = new_key(host.directory, "authority")
    carol = new_key(host.directory, "carol")
    host.trust(f"*@example.org cert-authority {public(authority)}")
    certify = ["ssh-keygen", "-q", "-s", str(authority), "-I", "carol", *options, str(carol.with_name("carol.pub"))]
    subprocess.run(certify, check=True)
    signing = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(carol.with_name("carol-cert.pub")), "-n", NAMESPACE]
    done = subprocess.run(signing, input=MANIFEST, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this ssh-keygen signs with certificates only through an agent")
    return done.stdout


def test_a_certificate_of_a_trusted_authority_is_accepted(signers: Host) -> None:
    assert signers.judge(certified(signers, "-n", "carol@example.org")).signer == "carol@example.org"


@pytest.mark.parametrize(
    "options",
    [
        ("-n", "carol@example.org", "-V", "20200101:20200201"),
        ("-n", "carol@example.com"),
        ("-h", "-n", "carol@example.org"),
    ],
)
def test_a_certificate_that_does_not_count_now_is_called_one(signers: Host, options: tuple[str, ...]) -> None:
    refused = signers.refusal(certified(signers, *options))
    assert isinstance(refused, UnknownSigner)
    assert "no cert-authority in trusted-signers vouches for" in str(refused)


def test_an_unsigned_plugin_is_refused_warned_about_or_let_through_as_the_policy_says(signers: Host) -> None:
    with pytest.raises(Denied, match="require"):
        signers.judge(None, policy="require")
    with pytest.raises(Denied, match="require"):
        signers.judge(None, policy="require", explicit=True)
    assert "it is not signed" in (signers.judge(None, policy="warn").warning or "")
    assert signers.judge(None, policy="off") == Trust(None, None, None)


@pytest.mark.parametrize("policy", ["warn", "off"])
def test_native_code_needs_a_signature_or_somebodys_word(signers: Host, policy: TrustPolicy) -> None:
    with pytest.raises(Denied, match="--trust"):
        signers.judge(None, policy=policy, native=True)
    assert signers.judge(None, policy=policy, native=True, explicit=True).warning
    assert signers.judge(sign(signers.alice, MANIFEST), policy=policy, native=True).signer == "alice@example.org"


def test_a_bad_signature_is_refused_also_where_none_is_needed(signers: Host) -> None:
    assert isinstance(signers.refusal(sign(signers.mallory, MANIFEST), policy="warn"), UnknownSigner)
    assert "changed after signing" in str(signers.refusal(sign(signers.alice, b"other"), policy="warn"))


def test_somebodys_word_stands_for_an_unknown_signer_but_not_for_a_changed_manifest(signers: Host) -> None:
    trust = signers.judge(sign(signers.mallory, MANIFEST), policy="warn", explicit=True)
    assert trust.signer is None
    assert "does not name" in (trust.warning or "")
    with pytest.raises(Denied, match="changed after signing"):
        signers.judge(sign(signers.alice, b"other"), policy="warn", explicit=True)


def test_a_host_that_trusts_nobody_yet_still_notices_a_changed_manifest(tmp_path: Path) -> None:
    host = Host(tmp_path)
    (tmp_path / "trusted-signers").unlink()
    assert "trusts no signers" in (host.judge(sign(host.alice, MANIFEST), policy="warn").warning or "")
    assert "changed after signing" in str(host.refusal(sign(host.alice, b"other"), policy="warn"))
    with pytest.raises(Denied, match="trusts no signers"):
        host.judge(sign(host.alice, MANIFEST), policy="require")


def test_the_most_important_directory_with_trusted_signers_counts(signers: Host, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "trusted-signers").write_text(f"mallory@example.org {public(signers.mallory)}\n")
    signatures = Signatures([signers.directory, other, tmp_path / "none"], os.environ)
    signer = asyncio.run(signatures.verify(MANIFEST, sign(signers.mallory, MANIFEST)))
    assert signer.principal == "mallory@example.org"


def test_without_ssh_keygen_nothing_signed_is_loaded(signers: Host) -> None:
    signatures = Signatures([signers.directory], {"PATH": "/nonexistent"})
    with pytest.raises(Unavailable, match=r"cannot run ssh-keygen.*; install the OpenSSH client"):
        asyncio.run(signatures.verify(MANIFEST, sign(signers.alice, MANIFEST)))


@pytest.mark.parametrize("policy", ["warn", "require"])
@pytest.mark.parametrize("named", ["nobody", "mallory", "no file"])
def test_a_revoked_key_is_refused_whomever_trusted_signers_names(
    signers: Host, policy: TrustPolicy, named: str
) -> None:
    (signers.directory / "revoked-signers").write_text(public(signers.alice) + "\n")
    if named == "no file":
        (signers.directory / "trusted-signers").unlink()
    else:
        signers.trust(*([f"mallory@example.org {public(signers.mallory)}"] if named == "mallory" else []))
    with pytest.raises(Denied, match="is revoked"):
        signers.judge(sign(signers.alice, MANIFEST), policy=policy, explicit=True)


def test_a_revoked_key_is_refused_by_an_ssh_keygen_that_says_nothing_of_it(
    signers: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    quiet = tmp_path / "bin" / "ssh-keygen"
    quiet.write_text(f'#!/bin/sh\nexec {shutil.which("ssh-keygen")} "$@" 2>/dev/null\n')
    quiet.chmod(0o755)
    monkeypatch.setenv("PATH", f"{quiet.parent}:{os.environ['PATH']}")
    signature = sign(signers.alice, MANIFEST)
    assert signers.judge(signature).signer == "alice@example.org"
    (signers.directory / "revoked-signers").write_text(public(signers.alice) + "\n")
    assert "the signature by alice@example.org is not accepted" in str(signers.refusal(signature))


def test_a_list_of_revoked_keys_that_cannot_be_read_lets_nobody_pass(signers: Host) -> None:
    (signers.directory / "revoked-signers").write_text("no key\n")
    with pytest.raises(Unavailable, match=r"cannot read .*/revoked-signers: "):
        signers.judge(sign(signers.alice, MANIFEST), policy="warn", explicit=True)


@pytest.mark.parametrize("name", ["revoked-signers", "trusted-signers"])
@pytest.mark.parametrize("target", ["/nonexistent", "x" * 300])
def test_a_list_of_keys_that_is_there_and_leads_nowhere_lets_nobody_pass(signers: Host, name: str, target: str) -> None:
    (signers.directory / name).unlink(missing_ok=True)
    (signers.directory / name).symlink_to(target)
    with pytest.raises(Unavailable, match=f"cannot read {signers.directory}/{name}: "):
        signers.judge(sign(signers.alice, MANIFEST), policy="warn", explicit=True)


def test_a_line_of_trusted_signers_that_cannot_be_used_is_named(signers: Host) -> None:
    signers.trust(f"mallory@example.org {public(signers.mallory)}", public(signers.alice))
    refused = signers.refusal(sign(signers.alice, MANIFEST))
    assert "does not name (its line 2 is not valid, see ssh-keygen(1), ALLOWED SIGNERS: missing key);" in str(refused)
    signers.trust(f"mallory@example.org {public(signers.mallory)}")
    assert "its line" not in str(signers.refusal(sign(signers.alice, MANIFEST)))


def test_why_trusted_signers_cannot_be_read_is_said(signers: Host) -> None:
    (signers.directory / "trusted-signers").unlink()
    (signers.directory / "trusted-signers").mkdir()
    with pytest.raises(Unavailable, match=r"^cannot read .*/trusted-signers: Is a directory$"):
        signers.judge(sign(signers.alice, MANIFEST), policy="warn", explicit=True)


def test_a_list_of_keys_that_cannot_be_looked_for_lets_nobody_pass(signers: Host) -> None:
    loop = signers.directory / "loop"
    loop.symlink_to("loop")
    signatures = Signatures([signers.directory, loop], os.environ)
    with pytest.raises(Unavailable, match="cannot read"):
        asyncio.run(signatures.verify(MANIFEST, sign(signers.alice, MANIFEST)))
