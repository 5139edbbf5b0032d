/*
 * circleosd_core.h: the core ABI (ABI.md, "core") for plugins in C or C++, without a libc.
 *
 * Include it in exactly one file of the plugin. It exports `circleosd_abi` and `circleosd_buffer`, which the host needs
 * besides handlers, and declares the functions of the host.
 *
 *     #include <circleosd_core.h>
 *
 *     CIRCLEOSD_HANDLER(handle) {
 *         return circleosd_reply(payload, length);
 *     }
 *
 *     clang --target=wasm32 -O2 -ffreestanding -mbulk-memory -nostdlib -I include \
 *           -Wl,--no-entry -Wl,--export=circleosd_abi -o echo.wasm echo.c
 *
 * Memory: static data and the stack come first, then the payload. `circleosd_payload_end` is the first address
 * after the payload; `circleosd_reserve` allocates memory there, which is valid until the handler returns.
 */
#ifndef CIRCLEOSD_CORE_H
#define CIRCLEOSD_CORE_H

#if defined(__wasi__) || defined(__EMSCRIPTEN__)
#error "compile with --target=wasm32: this header uses the memory that the heap of a C library would use"
#endif

#include <stddef.h>
#include <stdint.h>

#define CIRCLEOSD_DEBUG 0
#define CIRCLEOSD_INFO 1
#define CIRCLEOSD_WARNING 2
#define CIRCLEOSD_ERROR 3

/* The version of the ABI. */
#ifdef __cplusplus
extern "C"
#endif
__attribute__((used)) const uint32_t circleosd_abi = 1;

/* The first address after static data and stack; the linker defines it. */
extern char __heap_base;

#define CIRCLEOSD_PAGE 65536u

static uint32_t circleosd_buffer_size;
static uint32_t circleosd_reserved; /* bytes after the payload, during this call */

/* Makes memory usable from address 0 up to `end`. Returns 0, or -1 when the plugin's limit is reached. */
static inline int circleosd_grow(uint64_t end) {
    uint64_t have = (uint64_t)__builtin_wasm_memory_size(0) * CIRCLEOSD_PAGE;
    if (end <= have) {
        return 0;
    }
    if (end > UINT32_MAX) {
        return -1;
    }
    uint32_t pages = (uint32_t)((end - have + CIRCLEOSD_PAGE - 1) / CIRCLEOSD_PAGE);
    return __builtin_wasm_memory_grow(0, pages) == (size_t)-1 ? -1 : 0;
}

__attribute__((export_name("circleosd_buffer"))) char *circleosd_buffer(uint32_t length) {
    if (circleosd_grow((uint64_t)(uintptr_t)&__heap_base + length) != 0) {
        return NULL;
    }
    if (length > circleosd_buffer_size) {
        circleosd_buffer_size = length;
    }
    return &__heap_base;
}

/* The first address after the longest payload so far, a multiple of 16. */
static inline char *circleosd_payload_end(void) {
    return (char *)(((uintptr_t)&__heap_base + circleosd_buffer_size + 15) & ~(uintptr_t)15);
}

/* `size` further bytes after the payload, valid during this call; NULL when the plugin's memory limit is reached. */
static inline char *circleosd_reserve(uint32_t size) {
    char *start = circleosd_payload_end() + circleosd_reserved;
    uint64_t end = ((uint64_t)(uintptr_t)start + size + 15) & ~UINT64_C(15);
    if (circleosd_grow(end) != 0) {
        return NULL;
    }
    circleosd_reserved += (uint32_t)(end - (uintptr_t)start);
    return start;
}

/* What a handler returns: a reply or its own error message. The text may be anywhere, even in the payload. */
static inline uint64_t circleosd_reply(const char *text, size_t length) {
    return (uint64_t)(uintptr_t)text << 32 | length;
}

static inline uint64_t circleosd_fail(const char *message, size_t length) {
    return (uint64_t)(uintptr_t)message << 32 | UINT64_C(1) << 31 | length;
}

/* Defines and exports a handler: CIRCLEOSD_HANDLER(name) { … }, with `char *payload` and `uint32_t length`. */
#define CIRCLEOSD_HANDLER(name)                                                                    \
    static uint64_t circleosd_handler_##name(char *payload, uint32_t length);                      \
    __attribute__((export_name(#name))) uint64_t circleosd_export_##name(uint32_t length) {        \
        circleosd_reserved = 0;                                                                    \
        return circleosd_handler_##name(&__heap_base, length);                                     \
    }                                                                                              \
    static uint64_t circleosd_handler_##name(char *payload, uint32_t length)

#define CIRCLEOSD_IMPORT(name) __attribute__((import_module("circleosd"), import_name(name)))

/* Writes one log message of UTF-8 text. */
CIRCLEOSD_IMPORT("log") void circleosd_log(int32_t level, const char *text, size_t length);

/*
 * One call of a host interface: a JSON request (ABI.md, "host calls"). The result has bit 31 set for an error; bits
 * 30 to 0 are the length of the answer, which circleosd_host_answer copies.
 */
CIRCLEOSD_IMPORT("host_call") uint32_t circleosd_host_call(const char *request, size_t length);
CIRCLEOSD_IMPORT("host_answer") uint32_t circleosd_host_answer(char *to, size_t length);

#endif
