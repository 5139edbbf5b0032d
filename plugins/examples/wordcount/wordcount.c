/*
 * Counts words: standard input in, one line "count word" for each different word out, the most frequent first. An
 * ordinary program for wasi-libc; as a plugin, the payload is its input and what it prints is the reply.
 *
 * A word is a run of letters, digits and everything beyond ASCII, with apostrophes inside it; A to Z count as a to z.
 * The variable TOP, when there is one, is how many lines to print: the host sets it from the plugin's "config".
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct {
    const char *start; /* NULL: a free place in the table */
    size_t length;
    size_t count;
} word;

/* An open-addressing table, a power of two in size and at most half full. */
static word *table;
static size_t capacity;
static size_t used;

static _Noreturn void fail(const char *message) {
    (void)!write(STDERR_FILENO, message, strlen(message));
    (void)!write(STDERR_FILENO, "\n", 1);
    exit(1);
}

static char *read_input(size_t *length) {
    size_t room = 1 << 16;
    char *text = malloc(room);
    *length = 0;
    while (true) {
        if (text == NULL) {
            fail("cannot read the text: it does not fit into memory");
        }
        ssize_t got = read(STDIN_FILENO, text + *length, room - *length);
        if (got < 0) {
            fail("cannot read the text");
        }
        if (got == 0) {
            return text;
        }
        *length += (size_t)got;
        if (*length == room) {
            room *= 2;
            char *larger = realloc(text, room);
            text = larger;
        }
    }
}

static bool in_word(unsigned char byte) {
    return byte >= 0x80 || (byte >= '0' && byte <= '9') || (byte >= 'a' && byte <= 'z');
}

static word *find(word *in, size_t size, const char *start, size_t length) {
    uint32_t hash = 2166136261u; /* FNV-1a */
    for (size_t i = 0; i < length; i++) {
        hash = (hash ^ (unsigned char)start[i]) * 16777619u;
    }
    size_t place = hash & (size - 1);
    while (in[place].start != NULL &&
           (in[place].length != length || memcmp(in[place].start, start, length) != 0)) {
        place = (place + 1) & (size - 1);
    }
    return &in[place];
}

static void grow(void) {
    size_t size = capacity == 0 ? 256 : capacity * 2;
    word *larger = calloc(size, sizeof *larger);
    if (larger == NULL) {
        fail("cannot count the words: they do not fit into memory");
    }
    for (size_t i = 0; i < capacity; i++) {
        if (table[i].start != NULL) {
            *find(larger, size, table[i].start, table[i].length) = table[i];
        }
    }
    free(table);
    table = larger;
    capacity = size;
}

static void count(const char *start, size_t length) {
    if (used * 2 >= capacity) {
        grow();
    }
    word *found = find(table, capacity, start, length);
    if (found->start == NULL) {
        *found = (word){.start = start, .length = length};
        used++;
    }
    found->count++;
}

static void count_all(char *text, size_t length) {
    for (size_t i = 0; i < length; i++) {
        if (text[i] >= 'A' && text[i] <= 'Z') {
            text[i] = (char)(text[i] + ('a' - 'A'));
        }
    }
    size_t at = 0;
    while (at < length) {
        if (!in_word((unsigned char)text[at])) {
            at++;
            continue;
        }
        size_t start = at;
        while (at < length && (in_word((unsigned char)text[at]) ||
                               (text[at] == '\'' && at + 1 < length && in_word((unsigned char)text[at + 1])))) {
            at++;
        }
        count(text + start, at - start);
    }
}

/* By count, the highest first; then by the bytes of the word. */
static int in_order(const void *left, const void *right) {
    const word *a = left;
    const word *b = right;
    if (a->count != b->count) {
        return a->count > b->count ? -1 : 1;
    }
    size_t shorter = a->length < b->length ? a->length : b->length;
    int order = memcmp(a->start, b->start, shorter);
    return order != 0 ? order : (a->length > b->length) - (a->length < b->length);
}

static void put(const char *bytes, size_t length) {
    static char buffer[1 << 14];
    static size_t filled;
    bool flush = bytes == NULL;
    while (length > 0 || flush) {
        if (filled == sizeof buffer || flush) {
            for (size_t sent = 0; sent < filled;) {
                ssize_t wrote = write(STDOUT_FILENO, buffer + sent, filled - sent);
                if (wrote < 0) {
                    fail("cannot write the counts");
                }
                sent += (size_t)wrote;
            }
            filled = 0;
            flush = false;
        }
        size_t piece = length < sizeof buffer - filled ? length : sizeof buffer - filled;
        if (piece > 0) {
            memcpy(buffer + filled, bytes, piece);
            filled += piece;
            bytes += piece;
            length -= piece;
        }
    }
}

static void print(const word *one) {
    char digits[20];
    size_t at = sizeof digits;
    for (size_t number = one->count; number != 0; number /= 10) {
        digits[--at] = (char)('0' + number % 10);
    }
    put(digits + at, sizeof digits - at);
    put(" ", 1);
    put(one->start, one->length);
    put("\n", 1);
}

int main(void) {
    size_t lines = SIZE_MAX;
    const char *top = getenv("TOP");
    if (top != NULL) {
        char *end;
        lines = strtoul(top, &end, 10);
        if (*top < '0' || *top > '9' || *end != '\0') {
            fail("expected a number of lines in TOP");
        }
    }
    size_t length;
    char *text = read_input(&length);
    count_all(text, length);

    size_t kept = 0;
    for (size_t i = 0; i < capacity; i++) {
        if (table[i].start != NULL) {
            table[kept++] = table[i];
        }
    }
    if (kept > 1) {
        qsort(table, kept, sizeof *table, in_order);
    }
    for (size_t i = 0; i < kept && i < lines; i++) {
        print(&table[i]);
    }
    put(NULL, 0);
    return 0;
}
