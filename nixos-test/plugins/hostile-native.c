/*
 * What a native plugin might do to its host, for the scenario: each handler tries one thing and replies with what it
 * achieved, or does not live to reply.
 */
#include <circleosd_plugin.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int32_t say(const circleosd_host *host, circleosd_reply *reply, const char *text) {
    return host->write(reply, text, strlen(text));
}

static int32_t ok(const circleosd_host *host, const char *payload, size_t length, circleosd_reply *reply) {
    return host->write(reply, payload, length);
}

static int32_t crash(const circleosd_host *host, const char *payload, size_t length, circleosd_reply *reply) {
    (void)host, (void)payload, (void)length, (void)reply;
    return *(volatile int32_t *)8;
}

static int32_t hang(const circleosd_host *host, const char *payload, size_t length, circleosd_reply *reply) {
    (void)host, (void)payload, (void)length, (void)reply;
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, NULL); /* not even an alarm ends this */
    while (pause() != 0) /* it never returns 0 */
        continue;
    return 0;
}

static int32_t eat(const circleosd_host *host, const char *payload, size_t length, circleosd_reply *reply) {
    (void)payload, (void)length;
    size_t eaten = 0;
    for (char *piece; eaten < 4096 && (piece = malloc(1 << 20)) != NULL; eaten++)
        memset(piece, 1, 1 << 20);
    char text[64];
    snprintf(text, sizeof text, "%zu MiB", eaten);
    return say(host, reply, text);
}

/* Every path of the payload, one a line, that could be opened for writing or created. */
static int32_t scribble(const circleosd_host *host, const char *payload, size_t length, circleosd_reply *reply) {
    char *paths = strndup(payload, length), *rest = NULL;
    for (char *path = strtok_r(paths, "\n", &rest); path != NULL; path = strtok_r(NULL, "\n", &rest)) {
        int file = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
        if (file >= 0) {
            close(file);
            say(host, reply, path);
            say(host, reply, "\n");
        }
    }
    free(paths);
    return 0;
}

/* What of processes and networking is there: nothing should be. */
static int32_t escape(const circleosd_host *host, const char *payload, size_t length, circleosd_reply *reply) {
    (void)payload, (void)length;
    pid_t child = fork();
    if (child == 0)
        _exit(0);
    say(host, reply, child < 0 ? "fork refused\n" : "fork\n");
    execl("/bin/true", "true", (char *)NULL);
    say(host, reply, "exec refused\n");
    int network = socket(AF_INET, SOCK_STREAM, 0);
    say(host, reply, network < 0 ? "socket refused\n" : "socket\n");
    return 0;
}

static const circleosd_handler handlers[] = {
    {"ok", ok}, {"crash", crash}, {"hang", hang}, {"eat", eat}, {"scribble", scribble}, {"escape", escape},
};

static const circleosd_plugin plugin = {
    .abi_version = CIRCLEOSD_ABI_VERSION,
    .handler_count = sizeof handlers / sizeof *handlers,
    .name = "hostile-native",
    .description = "Misbehaves",
    .handlers = handlers,
};

CIRCLEOSD_EXPORT const circleosd_plugin *plugin_init(void) { return &plugin; }
