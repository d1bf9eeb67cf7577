/* libFuzzer target: XTS calls with fuzzed geometry. Every kernel must give what the portable one gives, decryption must undo encryption,
 * spans and lines must agree with whole units, and refused calls must leave OUT alone. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../include/csvfast.h"

#define CHECK(condition) do { if (!(condition)) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); abort(); } } while (0)

enum { MOST = 1 << 16 };

typedef struct geometry {
    uint8_t key[32];
    uint64_t unit;
    uint32_t unit_size, length;
    uint16_t offset;
    uint8_t standard, in_place, misalign, kernel;
} geometry;

static uint8_t *exact(size_t length) { return malloc(length ? length : 1); }  /* so that ASan sees every byte past the end */

static void one_kernel(const geometry *g, const uint8_t *plain, size_t length, const uint8_t *expected, int expected_status)
{
    csvf_xts xts;
    CHECK(csvf_xts_init(&xts, g->key, g->standard & 1) == CSVF_OK);
    uint8_t *buffer = exact(length + 64), *out = buffer + (g->misalign & 63);
    uint8_t *in = exact(length);
    memset(out, 0xA5, length);
    memcpy(in, plain, length);
    int status;
    if (g->in_place & 1) {
        memcpy(out, plain, length);
        status = csvf_xts_encrypt(&xts, out, out, length, g->unit_size, g->unit);
    } else {
        status = csvf_xts_encrypt(&xts, out, in, length, g->unit_size, g->unit);
    }
    CHECK(status == expected_status);
    if (status != CSVF_OK) {
        for (size_t i = 0; i < length; i++)
            CHECK(out[i] == ((g->in_place & 1) ? plain[i] : 0xA5));
    } else {
        CHECK(memcmp(out, expected, length) == 0);
        CHECK(csvf_xts_decrypt(&xts, in, out, length, g->unit_size, g->unit) == CSVF_OK);
        CHECK(memcmp(in, plain, length) == 0);
    }
    free(in);
    free(buffer);
    csvf_wipe(&xts, sizeof xts);
}

static void spans_and_lines(const geometry *g, const uint8_t *plain, size_t length)
{
    csvf_xts xts;
    size_t pages = length / 4096, blocks = length / 16;
    CHECK(csvf_xts_init(&xts, g->key, g->standard & 1) == CSVF_OK);
    if (blocks) {
        uint8_t *whole = exact(blocks * 16), *part = exact(blocks * 16);
        size_t first = (g->offset % blocks), count = blocks - first;
        CHECK(csvf_xts_encrypt(&xts, whole, plain, blocks * 16, CSVF_XTS_UNIT_MAX, g->unit) == CSVF_OK);
        CHECK(csvf_xts_encrypt_span(&xts, part, plain + 16 * first, 16 * count, g->unit, 16 * first) == CSVF_OK);
        CHECK(memcmp(part, whole + 16 * first, 16 * count) == 0);
        CHECK(csvf_xts_decrypt_span(&xts, part, part, 16 * count, g->unit, 16 * first) == CSVF_OK);
        CHECK(memcmp(part, plain + 16 * first, 16 * count) == 0);
        free(whole);
        free(part);
    }
    uint64_t page = g->unit & 0xFFFFFFFFFFFu;
    if (pages) {
        uint8_t *whole = exact(pages * 4096), *lines = exact(64 * 64);
        uint64_t addresses[64];
        size_t count = 1 + g->misalign % 64;
        CHECK(csvf_xts_encrypt(&xts, whole, plain, pages * 4096, 4096, page) == CSVF_OK);
        for (size_t i = 0; i < count; i++) {
            size_t line = (i * 41 + g->offset) % (pages * 64);
            addresses[i] = page * 4096 + 64 * line;
            memcpy(lines + 64 * i, plain + 64 * line, 64);
        }
        CHECK(csvf_xts_encrypt_lines(&xts, lines, lines, addresses, count) == CSVF_OK);
        for (size_t i = 0; i < count; i++)
            CHECK(memcmp(lines + 64 * i, whole + (addresses[i] - page * 4096), 64) == 0);
        free(whole);
        free(lines);
    }
    csvf_wipe(&xts, sizeof xts);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    geometry g;
    if (size < sizeof g)
        return 0;
    memcpy(&g, data, sizeof g);
    data += sizeof g;
    size -= sizeof g;
    g.key[0] = (uint8_t)(g.key[16] + 1);   /* K1 = K2 is refused elsewhere */
    size_t length = g.length % MOST;
    uint8_t *plain = exact(length), *expected = exact(length);
    for (size_t i = 0; i < length; i++)
        plain[i] = size ? (uint8_t)(data[i % size] + i / size) : (uint8_t)i;

    csvf_xts xts;
    CHECK(csvf_force_kernel(CSVF_PRIMITIVE_SM4, "portable") == CSVF_OK);
    CHECK(csvf_xts_init(&xts, g.key, g.standard & 1) == CSVF_OK);
    int status = csvf_xts_encrypt(&xts, expected, plain, length, g.unit_size, g.unit);
    for (size_t k = 0; k < csvf_kernel_count(CSVF_PRIMITIVE_SM4); k++) {
        const char *name = csvf_kernel_at(CSVF_PRIMITIVE_SM4, k);
        if (!csvf_kernel_available(CSVF_PRIMITIVE_SM4, name))
            continue;
        CHECK(csvf_force_kernel(CSVF_PRIMITIVE_SM4, name) == CSVF_OK);
        one_kernel(&g, plain, length, expected, status);
        spans_and_lines(&g, plain, length);
    }
    csvf_force_kernel(CSVF_PRIMITIVE_SM4, NULL);
    free(plain);
    free(expected);
    return 0;
}
