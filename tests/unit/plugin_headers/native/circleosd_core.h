/*
 * Stands in for circleosd_core.h where a core plugin is compiled for this machine, so that sanitizers watch it.
 *
 * The program reads calls from standard input, each a 32-bit length and as many bytes of payload, and makes each
 * with `handle` and with `text`, on a block of memory that is exactly as long. A reply must lie within the payload, or be
 * an error message. At the end it prints how many calls succeeded and how many failed.
 */
#ifndef CIRCLEOSD_CORE_H
#define CIRCLEOSD_CORE_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int is_error;
    const char *text;
    size_t length;
} circleosd_outcome;

#define circleosd_reply(text, length) ((circleosd_outcome){0, text, length})
#define circleosd_fail(text, length) ((circleosd_outcome){1, text, length})
#define CIRCLEOSD_HANDLER(name) circleosd_outcome circleosd_handler_##name(char *payload, uint32_t length)

CIRCLEOSD_HANDLER(handle);
CIRCLEOSD_HANDLER(text);

static unsigned long outcomes[2];

static void make_call(circleosd_outcome (*handler)(char *, uint32_t), const char *bytes, uint32_t length) {
    char *payload = malloc(length);
    memcpy(payload, bytes, length);
    circleosd_outcome outcome = handler(payload, length);
    if (outcome.is_error ? outcome.length == 0 || outcome.length >= 1024
                         : outcome.text < payload || outcome.text + outcome.length > payload + length) {
        fprintf(stderr, "an outcome of %zu bytes is not where it must be\n", outcome.length);
        exit(1);
    }
    outcomes[outcome.is_error]++;
    free(payload);
}

int main(void) {
    static char bytes[1 << 16];
    uint32_t length;
    while (fread(&length, sizeof length, 1, stdin) == 1) {
        if (length > sizeof bytes || fread(bytes, 1, length, stdin) != length) {
            return 2;
        }
        make_call(circleosd_handler_handle, bytes, length);
        make_call(circleosd_handler_text, bytes, length);
    }
    printf("%lu %lu\n", outcomes[0], outcomes[1]);
    return 0;
}

#endif
