"""Native plugins from C source, built by gcc."""

from __future__ import annotations

import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tests import PROJECT

_HEAD = """
#define _GNU_SOURCE
#include <circleosd_plugin.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HANDLER(name) \\
    static int32_t name(const circleosd_host *host, const char *payload, size_t length, circleosd_reply *reply)
#define UNUSED (void)host, (void)payload, (void)length, (void)reply
#define SAY(...) \\
    do { char said[256]; int size = snprintf(said, sizeof said, __VA_ARGS__); \\
         host->write(reply, said, (size_t)size); } while (0)
HANDLER(echo) { UNUSED; return host->write(reply, payload, length); }
"""


@cache
def shared_object(source: str, *compiler: str) -> bytes:
    """A shared object of exactly that source and the usual includes, by default from C."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "plugin.so"
        options = ["-shared", "-fPIC", "-O1", "-w", f"-I{PROJECT}/plugins/include", "-", "-o", str(output)]
        subprocess.run([*(compiler or ("gcc", "-xc")), *options], input=(_HEAD + source).encode(), check=True)
        return output.read_bytes()


def native(handlers: str, *names: str, more: str = "") -> bytes:
    """A plugin with the handlers `echo` and `names`; `more` are further members of its structure."""
    table = "".join(f'{{"{name}", {name}}},' for name in ("echo", *names))
    return shared_object(
        f"""{handlers}
static const circleosd_handler handlers[] = {{ {table} }};
static const circleosd_plugin plugin = {{ .abi_version = CIRCLEOSD_ABI_VERSION, .handler_count = {len(names) + 1},
  .name = "example", .handlers = handlers, {more} }};
CIRCLEOSD_EXPORT const circleosd_plugin *plugin_init(void) {{ return &plugin; }}"""
    )
