/*
 * circleosd_component.h: the world of wit/circleosd.wit for components in C or C++, without a libc and without generated
 * bindings. It follows the component model's canonical ABI (CanonicalABI.md): the memory layout of text, lists and
 * results, and the exports that `wasm-tools component new` needs to turn a core module into a component.
 *
 *     #include <circleosd_component.h>
 *
 *     CIRCLEOSD_DESCRIBE("returns its payload")
 *
 *     CIRCLEOSD_HANDLER(handle) {
 *         return circleosd_reply(payload);
 *     }
 *
 * Include it in exactly one file of the plugin. Only the interfaces that are used become imports. The plugin's own
 * world (a .wit file) must declare every function that the plugin exports.
 *
 * Memory: texts from the host and memory from circleosd_alloc are valid until the current call ends, and are freed
 * then. To keep data longer, in a shared instance, use a static array.
 */
#ifndef CIRCLEOSD_COMPONENT_H
#define CIRCLEOSD_COMPONENT_H

#if defined(__wasi__) || defined(__EMSCRIPTEN__)
#error "compile with --target=wasm32: this header uses the memory that the heap of a C library would use"
#endif

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* UTF-8, not NUL-terminated. */
typedef struct {
    const char *bytes;
    size_t length;
} circleosd_text;

typedef struct {
    const circleosd_text *items;
    size_t count;
} circleosd_texts;

#define CIRCLEOSD_TEXT(literal) ((circleosd_text){"" literal, sizeof(literal) - 1})

typedef enum { CIRCLEOSD_DEBUG, CIRCLEOSD_INFO, CIRCLEOSD_WARNING, CIRCLEOSD_ERROR } circleosd_level;

/* ---- memory ---- */

extern char __heap_base;

#define CIRCLEOSD_PAGE 65536u

static uintptr_t circleosd_heap;

/* Returns `size` bytes, aligned to 8, valid until the end of the call. Traps when the plugin's memory limit is reached. */
static inline void *circleosd_alloc(size_t size) {
    uintptr_t start = circleosd_heap != 0 ? circleosd_heap : ((uintptr_t)&__heap_base + 7) & ~(uintptr_t)7;
    uint64_t end = ((uint64_t)start + size + 7) & ~UINT64_C(7);
    uint64_t have = (uint64_t)__builtin_wasm_memory_size(0) * CIRCLEOSD_PAGE;
    if (end > have) {
        if (end > UINT32_MAX) {
            __builtin_trap();
        }
        uint32_t pages = (uint32_t)((end - have + CIRCLEOSD_PAGE - 1) / CIRCLEOSD_PAGE);
        if (__builtin_wasm_memory_grow(0, pages) == (size_t)-1) {
            __builtin_trap();
        }
    }
    circleosd_heap = (uintptr_t)end;
    return (void *)start;
}

/* The host calls this to allocate memory for texts that it passes. No type in the world needs an alignment above 8. */
__attribute__((export_name("cabi_realloc"))) void *circleosd_realloc(void *old, size_t old_size, size_t align,
                                                                     size_t size) {
    (void)align;
    if (size <= old_size) {
        return old_size != 0 ? old : circleosd_alloc(0);
    }
    char *memory = (char *)circleosd_alloc(size);
    if (old_size != 0) {
        __builtin_memcpy(memory, old, old_size);
    }
    return memory;
}

static inline void circleosd_free_all(void) { circleosd_heap = 0; }

/* ---- what the plugin exports ---- */

/* result<string, string>, and result<_, string> with an empty text. */
typedef struct {
    bool is_error;
    circleosd_text text;
} circleosd_result;

_Static_assert(sizeof(circleosd_text) == 8 && sizeof(circleosd_result) == 12, "compile with --target=wasm32");

static inline circleosd_result circleosd_reply(circleosd_text text) { return (circleosd_result){false, text}; }
static inline circleosd_result circleosd_fail(circleosd_text message) { return (circleosd_result){true, message}; }

#define CIRCLEOSD_EXPORT(name) __attribute__((export_name(name)))

#define CIRCLEOSD_FREE_AFTER(identifier, export)                                                   \
    CIRCLEOSD_EXPORT("cabi_post_" export) void circleosd_post_##identifier(void *result) {         \
        (void)result;                                                                              \
        circleosd_free_all();                                                                      \
    }

/*
 * A function `(payload: string) -> result<string, string>`: CIRCLEOSD_HANDLER(handle) { … } with
 * `circleosd_text payload`; it returns circleosd_reply(…) or circleosd_fail(…). CIRCLEOSD_HANDLER_AS is for exported
 * names that are not C identifiers.
 */
#define CIRCLEOSD_HANDLER(name) CIRCLEOSD_HANDLER_AS(name, #name)
#define CIRCLEOSD_HANDLER_AS(identifier, export)                                                   \
    static circleosd_result circleosd_handler_##identifier(circleosd_text payload);                \
    CIRCLEOSD_EXPORT(export)                                                                       \
    const circleosd_result *circleosd_export_##identifier(const char *bytes, size_t length) {      \
        static circleosd_result result;                                                            \
        result = circleosd_handler_##identifier((circleosd_text){bytes, length});                  \
        return &result;                                                                            \
    }                                                                                              \
    CIRCLEOSD_FREE_AFTER(identifier, export)                                                       \
    static circleosd_result circleosd_handler_##identifier(circleosd_text payload)

/* `describe`, with a literal: CIRCLEOSD_DESCRIBE("counts") */
#define CIRCLEOSD_DESCRIBE(literal)                                                                \
    CIRCLEOSD_EXPORT("describe") const circleosd_text *circleosd_export_describe(void) {           \
        static const circleosd_text text = {"" literal, sizeof(literal) - 1};                      \
        return &text;                                                                              \
    }

/* `init`: CIRCLEOSD_INIT { … return circleosd_reply(CIRCLEOSD_TEXT("")); } */
#define CIRCLEOSD_INIT                                                                             \
    static circleosd_result circleosd_on_init(void);                                               \
    CIRCLEOSD_EXPORT("init") const circleosd_result *circleosd_export_init(void) {                 \
        static circleosd_result result;                                                            \
        result = circleosd_on_init();                                                              \
        return &result;                                                                            \
    }                                                                                              \
    CIRCLEOSD_FREE_AFTER(init, "init")                                                             \
    static circleosd_result circleosd_on_init(void)

/* `on-event`: CIRCLEOSD_ON_EVENT { … } with `circleosd_text topic` and `circleosd_text payload` */
#define CIRCLEOSD_ON_EVENT                                                                         \
    static circleosd_result circleosd_on_event(circleosd_text topic, circleosd_text payload);      \
    CIRCLEOSD_EXPORT("on-event")                                                                   \
    const circleosd_result *circleosd_export_on_event(const char *topic, size_t topic_length,      \
                                                      const char *payload, size_t payload_length) { \
        static circleosd_result result;                                                            \
        result = circleosd_on_event((circleosd_text){topic, topic_length},                         \
                                    (circleosd_text){payload, payload_length});                    \
        return &result;                                                                            \
    }                                                                                              \
    CIRCLEOSD_FREE_AFTER(on_event, "on-event")                                                     \
    static circleosd_result circleosd_on_event(circleosd_text topic, circleosd_text payload)

/* ---- what the host offers ---- */

/* Every result of a host function starts with a flag for an error; if it is set, `error` is "code: sentence". */
typedef struct {
    bool is_error;
    circleosd_text error;
} circleosd_done;

/* `present` is false if there is no such key. */
typedef struct {
    bool is_error;
    union {
        circleosd_text error;
        struct {
            bool present;
            circleosd_text text;
        };
    };
} circleosd_value;

typedef struct {
    bool is_error;
    union {
        circleosd_text error;
        bool yes;
    };
} circleosd_truth;

typedef struct {
    bool is_error;
    union {
        circleosd_text error;
        circleosd_texts texts;
    };
} circleosd_list;

typedef struct {
    bool is_error;
    union {
        circleosd_text error;
        uint64_t number;
    };
} circleosd_number;

typedef struct {
    circleosd_text name;
    circleosd_text state;
    circleosd_text description;
} circleosd_service;

typedef struct {
    bool is_error;
    union {
        circleosd_text error;
        circleosd_service service;
    };
} circleosd_status;

typedef struct {
    bool is_error;
    union {
        circleosd_text error;
        struct {
            const circleosd_service *items;
            size_t count;
        };
    };
} circleosd_services;

#define CIRCLEOSD_IMPORT(interface, name)                                                          \
    __attribute__((import_module("circleosd:plugin/" interface "@0.1.0"), import_name(name)))

CIRCLEOSD_IMPORT("log", "write") void circleosd_import_log(circleosd_level, const char *, size_t);
CIRCLEOSD_IMPORT("kv", "get") void circleosd_import_kv_get(const char *, size_t, circleosd_value *);
CIRCLEOSD_IMPORT("kv", "set")
void circleosd_import_kv_set(const char *, size_t, const char *, size_t, circleosd_done *);
CIRCLEOSD_IMPORT("kv", "delete") void circleosd_import_kv_delete(const char *, size_t, circleosd_truth *);
CIRCLEOSD_IMPORT("kv", "keys") void circleosd_import_kv_keys(const char *, size_t, circleosd_list *);
CIRCLEOSD_IMPORT("config", "get") void circleosd_import_config_get(const char *, size_t, circleosd_value *);
CIRCLEOSD_IMPORT("config", "keys") void circleosd_import_config_keys(circleosd_list *);
CIRCLEOSD_IMPORT("clock", "now") void circleosd_import_clock_now(circleosd_number *);
CIRCLEOSD_IMPORT("clock", "monotonic") void circleosd_import_clock_monotonic(circleosd_number *);
CIRCLEOSD_IMPORT("services", "list") void circleosd_import_services_list(circleosd_services *);
CIRCLEOSD_IMPORT("services", "status")
void circleosd_import_services_status(const char *, size_t, circleosd_status *);
CIRCLEOSD_IMPORT("services", "restart")
void circleosd_import_services_restart(const char *, size_t, circleosd_done *);
CIRCLEOSD_IMPORT("events", "emit")
void circleosd_import_events_emit(const char *, size_t, const char *, size_t, circleosd_done *);

static inline void circleosd_log(circleosd_level level, circleosd_text message) {
    circleosd_import_log(level, message.bytes, message.length);
}

static inline circleosd_value circleosd_kv_get(circleosd_text key) {
    circleosd_value result;
    circleosd_import_kv_get(key.bytes, key.length, &result);
    return result;
}

static inline circleosd_done circleosd_kv_set(circleosd_text key, circleosd_text value) {
    circleosd_done result;
    circleosd_import_kv_set(key.bytes, key.length, value.bytes, value.length, &result);
    return result;
}

static inline circleosd_truth circleosd_kv_delete(circleosd_text key) {
    circleosd_truth result;
    circleosd_import_kv_delete(key.bytes, key.length, &result);
    return result;
}

static inline circleosd_list circleosd_kv_keys(circleosd_text prefix) {
    circleosd_list result;
    circleosd_import_kv_keys(prefix.bytes, prefix.length, &result);
    return result;
}

static inline circleosd_value circleosd_config_get(circleosd_text key) {
    circleosd_value result;
    circleosd_import_config_get(key.bytes, key.length, &result);
    return result;
}

static inline circleosd_list circleosd_config_keys(void) {
    circleosd_list result;
    circleosd_import_config_keys(&result);
    return result;
}

static inline circleosd_number circleosd_clock_now(void) {
    circleosd_number result;
    circleosd_import_clock_now(&result);
    return result;
}

static inline circleosd_number circleosd_clock_monotonic(void) {
    circleosd_number result;
    circleosd_import_clock_monotonic(&result);
    return result;
}

static inline circleosd_services circleosd_services_list(void) {
    circleosd_services result;
    circleosd_import_services_list(&result);
    return result;
}

static inline circleosd_status circleosd_services_status(circleosd_text name) {
    circleosd_status result;
    circleosd_import_services_status(name.bytes, name.length, &result);
    return result;
}

static inline circleosd_done circleosd_services_restart(circleosd_text name) {
    circleosd_done result;
    circleosd_import_services_restart(name.bytes, name.length, &result);
    return result;
}

static inline circleosd_done circleosd_events_emit(circleosd_text topic, circleosd_text payload) {
    circleosd_done result;
    circleosd_import_events_emit(topic.bytes, topic.length, payload.bytes, payload.length, &result);
    return result;
}

#endif
