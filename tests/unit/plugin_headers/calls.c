/* A core plugin that uses all of circleosd_core.h: `handle` passes its payload to the host, twice over. */
#include <circleosd_core.h>

CIRCLEOSD_HANDLER(handle) {
    uint32_t result = circleosd_host_call(payload, length);
    uint32_t size = result & 0x7fffffff;
    char *answer = circleosd_reserve(2 * size);
    if (answer == NULL) {
        return circleosd_fail("no memory", 9);
    }
    circleosd_host_answer(answer, size);
    circleosd_host_answer(answer + size, size);
    circleosd_log(CIRCLEOSD_WARNING, payload, length);
    return result >> 31 ? circleosd_fail(answer, size) : circleosd_reply(answer, 2 * size);
}
