"""What makes `ssh` reach a sandbox: a block for `ssh_config` in which `msb` is the proxy and tells the host key. Pure but for `PATH`."""

from __future__ import annotations

import os
import re
import shutil

from . import _locate
from .errors import InvalidConfigError
from .models import SshConfig, SshHost

_ALIAS = re.compile(r"[A-Za-z0-9._-]+\Z")
_PLAIN = re.compile(r"[A-Za-z0-9/._=:%+@-]*\Z")


def ssh_config(host: SshHost, alias: str | None = None) -> SshConfig:
    """The block, in which `HostName` is the alias itself; raises `InvalidConfigError` for an alias that is no name of a host."""
    alias = f"msb-{host.sandbox}" if alias is None else alias
    if not _ALIAS.match(alias):
        raise InvalidConfigError(f"{alias!r} is no name of a host")
    surroundings = _locate.Surroundings.of_process()
    variables = [(name, surroundings.variable(name)) for name in ("MSB_HOME", "MSB_HOST")]
    named = [quoted(f"{name}={value}") for name, value in variables if value is not None]
    command = " ".join((["/usr/bin/env", *named] if named else []) + [quoted(_program(surroundings))])
    config = (
        f"# {alias} {host.host_key}\n"
        f"Host {alias}\n"
        f"    HostName {alias}\n"
        f"    User {host.user}\n"
        f"    ProxyCommand {command} ssh serve --stdio {host.sandbox}\n"
        f"    KnownHostsCommand {command} ssh config --known-hosts --alias {alias} {host.sandbox}\n"
        "    StrictHostKeyChecking yes\n"
        "    UserKnownHostsFile none\n"
        "    HostKeyAlgorithms ssh-ed25519\n"
    )
    return SshConfig(alias, config, f"{alias} {host.host_key}", host)


def _program(surroundings: _locate.Surroundings) -> str:
    """The `msb` beside the `msbd` that would be started, else the one in `PATH`."""
    path = surroundings.variable("MSB_PATH")
    beside = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "msb") if path else None
    if beside is not None and os.path.isfile(beside):
        return os.path.abspath(beside)
    return shutil.which("msb", path=surroundings.environment.get("PATH", "")) or "msb"


def quoted(word: str) -> str:
    """A word for the shell that runs a ProxyCommand; `%` begins ssh's own sequences."""
    word = word.replace("%", "%%")
    if _PLAIN.match(word):
        return word
    return '"' + re.sub(r'([\\"$`])', r"\\\1", word) + '"'
