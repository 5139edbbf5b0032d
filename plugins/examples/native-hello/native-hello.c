/*
 * A native plugin: greets, and tells what a WebAssembly plugin could not find out. Written against
 * circleosd_plugin.h; nothing of it runs outside the plugin's own worker process.
 */
#include <circleosd_plugin.h>
#include <stdio.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>

static int32_t hello(const circleosd_host *host, const char *payload, size_t length, circleosd_reply *reply) {
    if (memchr(payload, '\n', length) != NULL) {
        static const char error[] = "expected one name, found several lines";
        host->write(reply, error, sizeof error - 1);
        return 1;
    }
    if (length == 0) {
        payload = "world";
        length = 5;
    }
    host->write(reply, "hello, ", 7);
    host->write(reply, payload, length);
    host->write(reply, "!", 1);
    return 0;
}

static int32_t where(const circleosd_host *host, const char *payload, size_t length, circleosd_reply *reply) {
    (void)payload;
    (void)length;
    struct utsname system;
    if (uname(&system) != 0) {
        static const char error[] = "cannot ask for the kernel's name";
        host->write(reply, error, sizeof error - 1);
        return 1;
    }
    char line[512];
    int size = snprintf(line, sizeof line, "process %ld, user %ld, %s %s on %s", (long)getpid(), (long)getuid(),
                        system.sysname, system.release, system.machine);
    host->log(CIRCLEOSD_INFO, "told where it runs", 18);
    host->write(reply, line, (size_t)size);
    return 0;
}

static const circleosd_handler handlers[] = {
    {"handle", hello},
    {"where", where},
};

static const circleosd_plugin plugin = {
    .abi_version = CIRCLEOSD_ABI_VERSION,
    .handler_count = sizeof handlers / sizeof *handlers,
    .name = "native-hello",
    .description = "Greets, and tells where it runs",
    .handlers = handlers,
};

CIRCLEOSD_EXPORT const circleosd_plugin *plugin_init(void) { return &plugin; }
