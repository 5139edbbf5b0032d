/* A core plugin that needs memory more than once in a call. */
#include <circleosd_core.h>

CIRCLEOSD_HANDLER(handle) {
    char *first = circleosd_reserve(length), *second = circleosd_reserve(1 << 20);
    if (first == NULL || second == NULL) {
        return circleosd_fail("no memory", 9);
    }
    __builtin_memcpy(first, payload, length);
    __builtin_memset(second, '?', 1 << 20);
    return circleosd_reply(first, length);
}

CIRCLEOSD_HANDLER(all) {
    (void)payload;
    return circleosd_reserve(UINT32_MAX - length) == NULL ? circleosd_fail("no memory", 9) : 0;
}
