/*
 * Picks one value out of a JSON document (RFC 8259). Core ABI, no libc.
 *
 * The payload's first line is a path, the rest is the document:
 *
 *     .users[0].name
 *     {"users": [{"name": "Zoë"}]}
 *
 * A path is `.` for the whole document, or any number of `.name`, `["any name"]` and `[index]`. `handle` answers
 * with the value exactly as the document has it, so that no digit of a number is lost: "Zoë". `text` answers with
 * a string's text: Zoë. Of members with the same name the last one counts.
 *
 * The whole document is checked before anything is picked. Every error says where: line and character, from 1.
 */
#include <circleosd_core.h>
#include <stdbool.h>

/* Arrays and objects within each other; the parser calls itself that deep. */
#define MAX_DEPTH 256

/* Of a name that an error message quotes. */
#define MAX_QUOTED 80

/* Text that is read from `at` on, up to `end`. */
typedef struct {
    const char *at;
    const char *end;
} text;

/* A message under construction; what does not fit is left out. */
static char message[1024];
static size_t message_length;

static void say_bytes(const char *bytes, size_t length) {
    for (size_t i = 0; i < length && message_length < sizeof message; i++) {
        message[message_length++] = bytes[i];
    }
}

static void say(const char *words) {
    size_t length = 0;
    while (words[length] != '\0') {
        length++;
    }
    say_bytes(words, length);
}

static void say_number(uint64_t number) {
    char digits[20];
    size_t at = sizeof digits;
    do {
        digits[--at] = (char)('0' + number % 10);
        number /= 10;
    } while (number != 0);
    say_bytes(digits + at, sizeof digits - at);
}

static bool continues(char byte) {
    return ((unsigned char)byte & 0xc0) == 0x80;
}

/* Part of the payload, cut between two characters when it is long. */
static void say_quoted(const char *start, const char *end) {
    const char *cut = end;
    if (end - start > MAX_QUOTED) {
        cut = start + MAX_QUOTED;
        while (cut > start && continues(*cut)) {
            cut--;
        }
    }
    say_bytes(start, (size_t)(cut - start));
    if (cut != end) {
        say("…");
    }
}

/* What was found instead of what should be there. */
static void say_found(const char *at, const char *end) {
    say(", found ");
    if (at >= end) {
        say("the end");
    } else if ((unsigned char)*at < 0x20 || *at == 0x7f) {
        say("the control character ");
        say_number((unsigned char)*at);
    } else {
        const char *next = at + 1;
        while (next < end && next - at < 4 && continues(*next)) {
            next++;
        }
        say_bytes(at, (size_t)(next - at));
    }
}

/* "line 2, character 5: " for the place `at` in what begins at `start`. */
static void say_place(const char *start, const char *at) {
    uint32_t line = 1;
    uint32_t character = 1;
    for (; start < at; start++) {
        if (*start == '\n') {
            line++;
            character = 1;
        } else if (!continues(*start)) {
            character++;
        }
    }
    say("line ");
    say_number(line);
    say(", character ");
    say_number(character);
    say(": ");
}

/* The document while it is checked. The first thing that is wrong is kept, with its place. */
typedef struct {
    text rest;
    const char *wrong;
    const char *reason;
} parser;

static bool refuse(parser *p, const char *at, const char *reason) {
    p->wrong = at;
    p->reason = reason;
    return false;
}

static void skip_space(text *t) {
    while (t->at < t->end && (*t->at == ' ' || *t->at == '\t' || *t->at == '\n' || *t->at == '\r')) {
        t->at++;
    }
}

static bool next_is(const text *t, char byte) {
    return t->at < t->end && *t->at == byte;
}

static bool is_digit(const text *t) {
    return t->at < t->end && *t->at >= '0' && *t->at <= '9';
}

/* The value of a hexadecimal digit, or -1. */
static int hex(char digit) {
    if (digit >= '0' && digit <= '9') {
        return digit - '0';
    }
    digit |= 0x20;
    return digit >= 'a' && digit <= 'f' ? digit - 'a' + 10 : -1;
}

/* A string, quotes and all. */
static bool check_string(parser *p) {
    text *t = &p->rest;
    if (!next_is(t, '"')) {
        return refuse(p, t->at, "expected a string");
    }
    t->at++;
    while (t->at < t->end && *t->at != '"') {
        if ((unsigned char)*t->at < 0x20) {
            return refuse(p, t->at, "expected an escape such as \\n for a control character");
        }
        if (*t->at++ != '\\') {
            continue;
        }
        if (t->at == t->end) {
            break;
        }
        char escape = *t->at;
        if (escape == 'u') {
            for (int i = 0; i < 4; i++) {
                t->at++;
                if (t->at == t->end || hex(*t->at) < 0) {
                    return refuse(p, t->at, "expected four hexadecimal digits after \\u");
                }
            }
        } else if (escape != '"' && escape != '\\' && escape != '/' && escape != 'b' && escape != 'f' &&
                   escape != 'n' && escape != 'r' && escape != 't') {
            return refuse(p, t->at, "expected one of \" \\ / b f n r t u after a backslash");
        }
        t->at++;
    }
    if (t->at == t->end) {
        return refuse(p, t->at, "expected the string's closing quote");
    }
    t->at++;
    return true;
}

static bool check_digits(parser *p) {
    if (!is_digit(&p->rest)) {
        return refuse(p, p->rest.at, "expected a digit");
    }
    while (is_digit(&p->rest)) {
        p->rest.at++;
    }
    return true;
}

static bool check_number(parser *p) {
    text *t = &p->rest;
    if (next_is(t, '-')) {
        t->at++;
    }
    if (next_is(t, '0')) {
        t->at++;
        if (is_digit(t)) {
            return refuse(p, t->at, "expected no digit after a leading zero");
        }
    } else if (!check_digits(p)) {
        return false;
    }
    if (next_is(t, '.')) {
        t->at++;
        if (!check_digits(p)) {
            return false;
        }
    }
    if (next_is(t, 'e') || next_is(t, 'E')) {
        t->at++;
        if (next_is(t, '+') || next_is(t, '-')) {
            t->at++;
        }
        return check_digits(p);
    }
    return true;
}

static bool check_word(parser *p, const char *word) {
    const char *start = p->rest.at;
    for (; *word != '\0'; word++) {
        if (!next_is(&p->rest, *word)) {
            return refuse(p, start, "expected a value");
        }
        p->rest.at++;
    }
    return true;
}

static bool check_value(parser *p, int depth);

/* An array, or an object when `named`; `end` closes it. */
static bool check_members(parser *p, int depth, char end, bool named) {
    text *t = &p->rest;
    if (depth == MAX_DEPTH) {
        return refuse(p, t->at, "expected no more than 256 arrays and objects within each other");
    }
    t->at++;
    skip_space(t);
    if (next_is(t, end)) {
        t->at++;
        return true;
    }
    while (true) {
        if (named) {
            if (!check_string(p)) {
                return false;
            }
            skip_space(t);
            if (!next_is(t, ':')) {
                return refuse(p, t->at, "expected : after the member's name");
            }
            t->at++;
            skip_space(t);
        }
        if (!check_value(p, depth + 1)) {
            return false;
        }
        skip_space(t);
        if (next_is(t, end)) {
            t->at++;
            return true;
        }
        if (!next_is(t, ',')) {
            return refuse(p, t->at, named ? "expected , or }" : "expected , or ]");
        }
        t->at++;
        skip_space(t);
    }
}

/* Any value, without the space around it; afterwards p->rest begins behind it. */
static bool check_value(parser *p, int depth) {
    text *t = &p->rest;
    if (t->at == t->end) {
        return refuse(p, t->at, "expected a value");
    }
    switch (*t->at) {
    case '{':
        return check_members(p, depth, '}', true);
    case '[':
        return check_members(p, depth, ']', false);
    case '"':
        return check_string(p);
    case 't':
        return check_word(p, "true");
    case 'f':
        return check_word(p, "false");
    case 'n':
        return check_word(p, "null");
    default:
        if (*t->at == '-' || is_digit(t)) {
            return check_number(p);
        }
        return refuse(p, t->at, "expected a value");
    }
}

/* The text of a string, byte by byte in UTF-8, with its escapes resolved. */
typedef struct {
    text rest; /* of what was between the quotes, already checked */
    unsigned char pending[4];
    int have;
} reader;

static uint32_t read_unit(const char *digits) {
    uint32_t unit = 0;
    for (int i = 0; i < 4; i++) {
        unit = unit << 4 | (uint32_t)hex(digits[i]);
    }
    return unit;
}

/* The code point of the \u escape whose digits are next; half a surrogate pair becomes U+FFFD. */
static uint32_t read_escape(text *t) {
    uint32_t unit = read_unit(t->at);
    t->at += 4;
    if (unit < 0xd800 || unit > 0xdfff) {
        return unit;
    }
    if (unit < 0xdc00 && t->end - t->at >= 6 && t->at[0] == '\\' && t->at[1] == 'u') {
        uint32_t low = read_unit(t->at + 2);
        if (low >= 0xdc00 && low <= 0xdfff) {
            t->at += 6;
            return 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
        }
    }
    return 0xfffd;
}

/* Keeps the bytes of a code point, the last one first. */
static void keep(reader *r, uint32_t point) {
    if (point < 0x80) {
        r->pending[r->have++] = (unsigned char)point;
        return;
    }
    uint32_t first = 0x3f;
    uint32_t mark = 0x80;
    while (point > first) {
        r->pending[r->have++] = (unsigned char)(0x80 | (point & 0x3f));
        point >>= 6;
        first >>= 1;
        mark = mark >> 1 | 0x80;
    }
    r->pending[r->have++] = (unsigned char)(mark | point);
}

/* The next byte, or -1 at the end. */
static int read_byte(reader *r) {
    if (r->have > 0) {
        return r->pending[--r->have];
    }
    text *t = &r->rest;
    if (t->at == t->end) {
        return -1;
    }
    if (*t->at != '\\') {
        return (unsigned char)*t->at++;
    }
    t->at++;
    switch (*t->at++) {
    case 'b':
        return '\b';
    case 'f':
        return '\f';
    case 'n':
        return '\n';
    case 'r':
        return '\r';
    case 't':
        return '\t';
    case 'u':
        keep(r, read_escape(t));
        return r->pending[--r->have];
    default:
        return (unsigned char)t->at[-1];
    }
}

/* One step of a path. */
typedef struct {
    const char *start; /* where the step begins */
    text name;    /* or the digits of an index */
    bool escaped; /* `name` was quoted and may have escapes */
    bool indexed;
    uint64_t index;
} step;

static bool same_name(text member, const step *wanted) {
    reader left = {.rest = member};
    reader right = {.rest = wanted->name};
    while (true) {
        int byte = read_byte(&left);
        int other = wanted->escaped               ? read_byte(&right)
                    : right.rest.at == right.rest.end ? -1
                                                      : (unsigned char)*right.rest.at++;
        if (byte != other) {
            return false;
        }
        if (byte < 0) {
            return true;
        }
    }
}

static bool path_error(const char *path, const char *end, const char *at, const char *reason) {
    uint32_t character = 1;
    for (const char *before = path; before < at; before++) {
        character += !continues(*before);
    }
    say("path, character ");
    say_number(character);
    say(": ");
    say(reason);
    say_found(at, end);
    return false;
}

/* `path` is the whole path, for messages; `rest` begins with the step. */
static bool read_step(text path, text *rest, step *out) {
    *out = (step){.start = rest->at};
    if (next_is(rest, '.')) {
        const char *start = ++rest->at;
        while (rest->at < rest->end && *rest->at != '.' && *rest->at != '[') {
            rest->at++;
        }
        if (rest->at == start) {
            return path_error(path.at, path.end, start, "expected a name after the dot");
        }
        out->name = (text){start, rest->at};
        return true;
    }
    if (!next_is(rest, '[')) {
        return path_error(path.at, path.end, rest->at, "expected . or [");
    }
    rest->at++;
    if (next_is(rest, '"')) {
        parser quoted = {.rest = *rest};
        if (!check_string(&quoted)) {
            return path_error(path.at, path.end, quoted.wrong, quoted.reason);
        }
        out->name = (text){rest->at + 1, quoted.rest.at - 1};
        out->escaped = true;
        rest->at = quoted.rest.at;
    } else {
        if (!is_digit(rest)) {
            return path_error(path.at, path.end, rest->at, "expected an index or a name in quotes");
        }
        const char *start = rest->at;
        out->indexed = true;
        while (is_digit(rest)) {
            if (out->index <= UINT32_MAX) {
                out->index = out->index * 10 + (uint64_t)(*rest->at - '0');
            }
            rest->at++;
        }
        out->name = (text){start, rest->at};
    }
    if (!next_is(rest, ']')) {
        return path_error(path.at, path.end, rest->at, "expected ]");
    }
    rest->at++;
    return true;
}

static const char *kind_of(const text *value) {
    switch (*value->at) {
    case '{':
        return "an object";
    case '[':
        return "an array";
    case '"':
        return "a string";
    case 't':
    case 'f':
        return "a boolean";
    case 'n':
        return "null";
    default:
        return "a number";
    }
}

/* Where a step begins, as the part of the path before it. */
static void say_before(text path, const step *wanted) {
    if (wanted->start == path.at) {
        say(".");
    } else {
        say_quoted(path.at, wanted->start);
    }
}

/* Goes from `value` to the member or element that `wanted` names. The document is known to be correct. */
static bool descend(text document, text path, const step *wanted, text *value) {
    char open = wanted->indexed ? '[' : '{';
    const char *inside = value->at;
    if (*inside != open) {
        say_place(document.at, inside);
        say_before(path, wanted);
        say(" is ");
        say(kind_of(value));
        say(wanted->indexed ? ", not an array" : ", not an object");
        return false;
    }
    parser p = {.rest = {inside + 1, value->end}};
    uint64_t count = 0;
    bool found = false;
    skip_space(&p.rest);
    while (!next_is(&p.rest, ']') && !next_is(&p.rest, '}')) {
        bool match = count == wanted->index;
        if (!wanted->indexed) {
            const char *name = p.rest.at + 1;
            check_string(&p);
            match = same_name((text){name, p.rest.at - 1}, wanted);
            skip_space(&p.rest);
            p.rest.at++;
            skip_space(&p.rest);
        }
        const char *start = p.rest.at;
        check_value(&p, 0);
        if (match) {
            *value = (text){start, p.rest.at};
            found = true;
        }
        skip_space(&p.rest);
        if (next_is(&p.rest, ',')) {
            p.rest.at++;
            skip_space(&p.rest);
        }
        count++;
    }
    if (found) {
        return true;
    }
    say_place(document.at, inside);
    say_before(path, wanted);
    if (wanted->indexed) {
        say(" has ");
        say_number(count);
        say(count == 1 ? " element, none with the index " : " elements, none with the index ");
    } else {
        say(" has no member ");
    }
    say_quoted(wanted->name.at, wanted->name.end);
    return false;
}

/* Finds the value in the payload. On failure, the message is complete. */
static bool pick(const char *payload, size_t length, text *value) {
    const char *end = payload + length;
    const char *line = payload;
    message_length = 0;
    while (line < end && *line != '\n') {
        line++;
    }
    if (line == end) {
        say("expected a path, a line break and a JSON document");
        return false;
    }
    text path = {payload, line};
    if (path.end > path.at && path.end[-1] == '\r') {
        path.end--;
    }
    text document = {line + 1, end};

    text rest = path;
    step next;
    bool whole = path.end - path.at == 1 && *path.at == '.';
    if (whole) {
        rest.at = rest.end;
    } else if (rest.at == rest.end) {
        return path_error(path.at, path.end, path.at, "expected . or [");
    }
    while (rest.at < rest.end) {
        if (!read_step(path, &rest, &next)) {
            return false;
        }
    }

    parser p = {.rest = document};
    skip_space(&p.rest);
    *value = p.rest;
    bool correct = check_value(&p, 0);
    if (correct) {
        value->end = p.rest.at;
        skip_space(&p.rest);
        if (p.rest.at != p.rest.end) {
            correct = refuse(&p, p.rest.at, "expected nothing after the value");
        }
    }
    if (!correct) {
        say_place(document.at, p.wrong);
        say(p.reason);
        say_found(p.wrong, document.end);
        return false;
    }

    rest.at = whole ? rest.end : path.at;
    while (rest.at < rest.end) {
        if (!read_step(path, &rest, &next) || !descend(document, path, &next, value)) {
            return false;
        }
    }
    return true;
}

CIRCLEOSD_HANDLER(handle) {
    text value;
    if (!pick(payload, length, &value)) {
        return circleosd_fail(message, message_length);
    }
    return circleosd_reply(value.at, (size_t)(value.end - value.at));
}

CIRCLEOSD_HANDLER(text) {
    text value;
    if (!pick(payload, length, &value)) {
        return circleosd_fail(message, message_length);
    }
    if (*value.at != '"') {
        return circleosd_reply(value.at, (size_t)(value.end - value.at));
    }
    /* A string is never shorter than its text, so that the text can take its place. */
    reader r = {.rest = {value.at + 1, value.end - 1}};
    char *start = payload + (value.at - payload);
    char *to = start;
    for (int byte = read_byte(&r); byte >= 0; byte = read_byte(&r)) {
        *to++ = (char)byte;
    }
    return circleosd_reply(start, (size_t)(to - start));
}
