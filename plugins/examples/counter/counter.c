/* Counts, and remembers: a number for each key, in the host's kv store, under that key. Component, no libc. */
#include <circleosd_component.h>

CIRCLEOSD_DESCRIBE("Counts up one number for each key and keeps it")

/* The decimal digits of `number`; 20 are enough for 64 bits. */
static circleosd_text to_text(uint64_t number) {
    char *digits = circleosd_alloc(20);
    char *end = digits + 20;
    char *at = end;
    do {
        *--at = (char)('0' + number % 10);
        number /= 10;
    } while (number != 0);
    return (circleosd_text){at, (size_t)(end - at)};
}

/* False when `text` is not what to_text writes. */
static bool to_number(circleosd_text text, uint64_t *number) {
    *number = 0;
    for (size_t i = 0; i < text.length; i++) {
        unsigned digit = (unsigned char)text.bytes[i] - '0';
        if (digit > 9 || *number > (UINT64_MAX - digit) / 10) {
            return false;
        }
        *number = *number * 10 + digit;
    }
    return text.length > 0;
}

static circleosd_text join(circleosd_text left, circleosd_text right) {
    char *bytes = circleosd_alloc(left.length + right.length);
    __builtin_memcpy(bytes, left.bytes, left.length);
    __builtin_memcpy(bytes + left.length, right.bytes, right.length);
    return (circleosd_text){bytes, left.length + right.length};
}

/* The count of `key`, 0 if it has none. False, with `error` set, when it cannot be read. */
static bool read_count(circleosd_text key, uint64_t *count, circleosd_text *error) {
    *count = 0;
    if (key.length == 0) {
        *error = CIRCLEOSD_TEXT("expected the name of a counter");
        return false;
    }
    circleosd_value stored = circleosd_kv_get(key);
    if (stored.is_error) {
        *error = stored.error;
        return false;
    }
    if (stored.present && !to_number(stored.text, count)) {
        *error = join(CIRCLEOSD_TEXT("no number is stored for "), key);
        return false;
    }
    return true;
}

/* Counts `payload` up by one and answers with the new count. */
CIRCLEOSD_HANDLER(handle) {
    uint64_t count;
    circleosd_text error;
    if (!read_count(payload, &count, &error)) {
        return circleosd_fail(error);
    }
    if (count == UINT64_MAX) {
        return circleosd_fail(join(CIRCLEOSD_TEXT("cannot count further: "), payload));
    }
    circleosd_text next = to_text(count + 1);
    circleosd_done stored = circleosd_kv_set(payload, next);
    if (stored.is_error) {
        return circleosd_fail(stored.error);
    }
    circleosd_log(CIRCLEOSD_DEBUG, join(join(payload, CIRCLEOSD_TEXT(" is now ")), next));
    return circleosd_reply(next);
}

/* The count of `payload`. */
CIRCLEOSD_HANDLER(peek) {
    uint64_t count;
    circleosd_text error;
    if (!read_count(payload, &count, &error)) {
        return circleosd_fail(error);
    }
    return circleosd_reply(to_text(count));
}

/* Forgets `payload` and answers with the count it had. */
CIRCLEOSD_HANDLER(reset) {
    uint64_t count;
    circleosd_text error;
    if (!read_count(payload, &count, &error)) {
        return circleosd_fail(error);
    }
    circleosd_truth gone = circleosd_kv_delete(payload);
    if (gone.is_error) {
        return circleosd_fail(gone.error);
    }
    return circleosd_reply(to_text(count));
}

/* The counters whose names begin with `payload`, "name count" on a line each. */
CIRCLEOSD_HANDLER(counters) {
    circleosd_list keys = circleosd_kv_keys(payload);
    if (keys.is_error) {
        return circleosd_fail(keys.error);
    }
    /* A line is the name, a space, at most 20 digits and the line's end. */
    size_t room = 0;
    for (size_t i = 0; i < keys.texts.count; i++) {
        room += keys.texts.items[i].length + 22;
    }
    char *lines = circleosd_alloc(room);
    size_t length = 0;
    for (size_t i = 0; i < keys.texts.count; i++) {
        circleosd_text key = keys.texts.items[i];
        uint64_t count;
        circleosd_text error;
        if (!read_count(key, &count, &error)) {
            return circleosd_fail(error);
        }
        circleosd_text digits = to_text(count);
        __builtin_memcpy(lines + length, key.bytes, key.length);
        length += key.length;
        lines[length++] = ' ';
        __builtin_memcpy(lines + length, digits.bytes, digits.length);
        length += digits.length;
        lines[length++] = '\n';
    }
    return circleosd_reply((circleosd_text){lines, length});
}
