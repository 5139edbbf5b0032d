/*
 * circleosd_plugin.h: the C interface of native CircleOSD plugins, version 1.
 *
 * A plugin is a shared object with one exported function, plugin_init (or the function
 * named by "entry" in the manifest), which returns a pointer to a static
 * circleosd_plugin. It runs in its own worker process, never in the manager.
 * For exact layouts and rules, see ABI.md, "native".
 *
 *     #include <circleosd_plugin.h>
 *
 *     static int hello(const circleosd_host *host, const char *payload, size_t length,
 *                      circleosd_reply *reply) {
 *         host->write(reply, "hello, ", 7);
 *         host->write(reply, payload, length);
 *         return 0;
 *     }
 *
 *     static const circleosd_handler handlers[] = { { "handle", hello } };
 *
 *     static const circleosd_plugin plugin = {
 *         .abi_version = CIRCLEOSD_ABI_VERSION,
 *         .handler_count = 1,
 *         .name = "hello",
 *         .description = "greets",
 *         .handlers = handlers,
 *     };
 *
 *     CIRCLEOSD_EXPORT const circleosd_plugin *plugin_init(void) { return &plugin; }
 *
 *     cc -shared -fPIC -O2 -fvisibility=hidden -I include -o hello.so hello.c
 */
#ifndef CIRCLEOSD_PLUGIN_H
#define CIRCLEOSD_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
#define CIRCLEOSD_EXPORT extern "C" __attribute__((visibility("default")))
extern "C" {
#else
#define CIRCLEOSD_EXPORT __attribute__((visibility("default")))
#endif

#define CIRCLEOSD_ABI_VERSION 1u

/* Levels of circleosd_host.log. */
#define CIRCLEOSD_DEBUG 0
#define CIRCLEOSD_INFO 1
#define CIRCLEOSD_WARNING 2
#define CIRCLEOSD_ERROR 3

/* Collects the reply of one call. Opaque to the plugin. */
typedef struct circleosd_reply circleosd_reply;

/*
 * The functions of the host. Valid from the call it is passed to until the process ends.
 * They may be called only while a function of the plugin is running, and only from the
 * thread on which the host called that function.
 */
typedef struct circleosd_host {
    uint32_t abi_version; /* CIRCLEOSD_ABI_VERSION of the host */
    uint32_t size;        /* sizeof(circleosd_host) of the host; a later version may be longer */

    /* Writes one log message of UTF-8 text. */
    void (*log)(int32_t level, const char *text, size_t length);

    /*
     * Appends UTF-8 text to the reply; the host copies it. Returns 0, or -1 when the
     * reply would exceed the plugin's output limit: then nothing more is taken, and the
     * call fails with "limit" whatever it returns.
     */
    int32_t (*write)(circleosd_reply *reply, const char *text, size_t length);

    /*
     * One call of a host interface: a JSON request in, a JSON value out (ABI.md, "host
     * calls"). Returns 0, or 1 when the host refused; then *answer is the error message.
     * The answer belongs to the host, ends with a NUL byte that *answer_length does not
     * count, and stays valid until the next call of this function.
     */
    int32_t (*call)(const char *request, size_t length, const char **answer, size_t *answer_length);
} circleosd_host;

/*
 * A handler. payload is UTF-8 text, payload[length] is a NUL byte, and both are valid
 * only during the call. Returns 0: the call succeeded with what was written to reply.
 * Any other value: the call failed, and what was written is the error message.
 */
typedef int32_t (*circleosd_handler_fn)(const circleosd_host *host, const char *payload, size_t length,
                                        circleosd_reply *reply);

typedef struct circleosd_handler {
    const char *name; /* 1 to 128 bytes of UTF-8, unique within the plugin */
    circleosd_handler_fn function;
} circleosd_handler;

typedef struct circleosd_plugin {
    uint32_t abi_version;   /* CIRCLEOSD_ABI_VERSION */
    uint32_t handler_count; /* 1 to 256 */
    const char *name;                  /* not read by the host, which goes by the manifest */
    const char *description;           /* one sentence, or NULL */
    const circleosd_handler *handlers; /* handler_count of them */
    circleosd_handler_fn init;         /* called once after loading, with an empty payload, or NULL */
} circleosd_plugin;

#ifdef __cplusplus
}
#endif

#endif
