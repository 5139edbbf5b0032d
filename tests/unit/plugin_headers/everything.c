/* A component that uses all of circleosd_component.h: `handle` makes the host call that its payload names. */
#include <circleosd_component.h>

CIRCLEOSD_DESCRIBE("uses everything")

static circleosd_text join(circleosd_text left, circleosd_text right) {
    char *bytes = (char *)circleosd_alloc(left.length + right.length);
    __builtin_memcpy(bytes, left.bytes, left.length);
    __builtin_memcpy(bytes + left.length, right.bytes, right.length);
    return (circleosd_text){bytes, left.length + right.length};
}

static circleosd_text digits(uint64_t number) {
    char *bytes = (char *)circleosd_alloc(20);
    size_t at = 20;
    do {
        bytes[--at] = (char)('0' + number % 10);
        number /= 10;
    } while (number != 0);
    return (circleosd_text){bytes + at, 20 - at};
}

static bool is(circleosd_text left, circleosd_text right) {
    return left.length == right.length && __builtin_memcmp(left.bytes, right.bytes, left.length) == 0;
}

/* Without a libc, and __builtin_memcmp is a call of it. */
#ifdef __cplusplus
extern "C"
#endif
int memcmp(const void *left, const void *right, size_t length) {
    const unsigned char *a = (const unsigned char *)left;
    const unsigned char *b = (const unsigned char *)right;
    for (size_t i = 0; i < length; i++) {
        if (a[i] != b[i]) {
            return a[i] - b[i];
        }
    }
    return 0;
}

static circleosd_text of_service(circleosd_service service) {
    circleosd_text text = join(join(service.name, CIRCLEOSD_TEXT("/")), service.state);
    return join(join(text, CIRCLEOSD_TEXT("/")), join(service.description, CIRCLEOSD_TEXT(";")));
}

static circleosd_text of_texts(circleosd_texts texts) {
    circleosd_text all = CIRCLEOSD_TEXT("");
    for (size_t i = 0; i < texts.count; i++) {
        all = join(join(all, texts.items[i]), CIRCLEOSD_TEXT(";"));
    }
    return all;
}

#define ANSWER(result, text) return (result).is_error ? circleosd_fail((result).error) : circleosd_reply(text)

CIRCLEOSD_HANDLER(handle) {
    if (is(payload, CIRCLEOSD_TEXT("kv.get"))) {
        circleosd_value value = circleosd_kv_get(CIRCLEOSD_TEXT("key"));
        ANSWER(value, value.present ? join(CIRCLEOSD_TEXT("="), value.text) : CIRCLEOSD_TEXT("absent"));
    }
    if (is(payload, CIRCLEOSD_TEXT("kv.set"))) {
        circleosd_done done = circleosd_kv_set(CIRCLEOSD_TEXT("key"), CIRCLEOSD_TEXT("value"));
        ANSWER(done, CIRCLEOSD_TEXT("done"));
    }
    if (is(payload, CIRCLEOSD_TEXT("kv.delete"))) {
        circleosd_truth truth = circleosd_kv_delete(CIRCLEOSD_TEXT("key"));
        ANSWER(truth, truth.yes ? CIRCLEOSD_TEXT("yes") : CIRCLEOSD_TEXT("no"));
    }
    if (is(payload, CIRCLEOSD_TEXT("kv.keys"))) {
        circleosd_list list = circleosd_kv_keys(CIRCLEOSD_TEXT("prefix"));
        ANSWER(list, of_texts(list.texts));
    }
    if (is(payload, CIRCLEOSD_TEXT("config.get"))) {
        circleosd_value value = circleosd_config_get(CIRCLEOSD_TEXT("key"));
        ANSWER(value, value.present ? join(CIRCLEOSD_TEXT("="), value.text) : CIRCLEOSD_TEXT("absent"));
    }
    if (is(payload, CIRCLEOSD_TEXT("config.keys"))) {
        circleosd_list list = circleosd_config_keys();
        ANSWER(list, of_texts(list.texts));
    }
    if (is(payload, CIRCLEOSD_TEXT("clock.now"))) {
        circleosd_number number = circleosd_clock_now();
        ANSWER(number, digits(number.number));
    }
    if (is(payload, CIRCLEOSD_TEXT("clock.monotonic"))) {
        circleosd_number number = circleosd_clock_monotonic();
        ANSWER(number, digits(number.number));
    }
    if (is(payload, CIRCLEOSD_TEXT("services.list"))) {
        circleosd_services services = circleosd_services_list();
        circleosd_text all = CIRCLEOSD_TEXT("");
        for (size_t i = 0; !services.is_error && i < services.count; i++) {
            all = join(all, of_service(services.items[i]));
        }
        ANSWER(services, all);
    }
    if (is(payload, CIRCLEOSD_TEXT("services.status"))) {
        circleosd_status status = circleosd_services_status(CIRCLEOSD_TEXT("name"));
        ANSWER(status, of_service(status.service));
    }
    if (is(payload, CIRCLEOSD_TEXT("services.restart"))) {
        circleosd_done done = circleosd_services_restart(CIRCLEOSD_TEXT("name"));
        ANSWER(done, CIRCLEOSD_TEXT("done"));
    }
    if (is(payload, CIRCLEOSD_TEXT("events.emit"))) {
        circleosd_done done = circleosd_events_emit(CIRCLEOSD_TEXT("topic"), CIRCLEOSD_TEXT("payload"));
        ANSWER(done, CIRCLEOSD_TEXT("done"));
    }
    return circleosd_fail(join(CIRCLEOSD_TEXT("unknown: "), payload));
}

CIRCLEOSD_INIT {
    circleosd_log(CIRCLEOSD_WARNING, CIRCLEOSD_TEXT("init ran"));
    return circleosd_reply(CIRCLEOSD_TEXT(""));
}

CIRCLEOSD_ON_EVENT {
    circleosd_log(CIRCLEOSD_ERROR, join(join(topic, CIRCLEOSD_TEXT(": ")), payload));
    return payload.length > 0 ? circleosd_reply(payload) : circleosd_fail(CIRCLEOSD_TEXT("an empty event"));
}
