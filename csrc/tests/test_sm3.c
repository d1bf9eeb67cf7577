/* SM3: every kernel forced by name against the standard's vectors, OpenSSL's digests and a plain implementation of the
 * standard's text; the drivers with every lane count, every prefix and mixed lengths; HMAC and the key derivation. */
#include "test.h"

#include "../include/csvfast.h"

/* ---- The standard read aloud (GB/T 32905-2016, 5.2 and 5.3): slow, independent of the library ---- */

static uint32_t rotl(uint32_t x, unsigned n) { return n % 32 ? x << n % 32 | x >> (32 - n % 32) : x; }

static void plain_block(uint32_t v[8], const uint8_t *b)
{
    uint32_t w[68], a = v[0], bb = v[1], c = v[2], d = v[3], e = v[4], f = v[5], g = v[6], h = v[7];
    for (int j = 0; j < 68; j++) {
        if (j < 16) {
            w[j] = (uint32_t)b[4 * j] << 24 | (uint32_t)b[4 * j + 1] << 16 | (uint32_t)b[4 * j + 2] << 8 | b[4 * j + 3];
        } else {
            const uint32_t x = w[j - 16] ^ w[j - 9] ^ rotl(w[j - 3], 15);
            w[j] = x ^ rotl(x, 15) ^ rotl(x, 23) ^ rotl(w[j - 13], 7) ^ w[j - 6];
        }
    }
    for (unsigned j = 0; j < 64; j++) {
        const uint32_t t = j < 16 ? 0x79cc4519 : 0x7a879d8a;
        const uint32_t ff = j < 16 ? a ^ bb ^ c : (a & bb) | (a & c) | (bb & c);
        const uint32_t gg = j < 16 ? e ^ f ^ g : (e & f) | (~e & g);
        const uint32_t ss1 = rotl(rotl(a, 12) + e + rotl(t, j), 7), ss2 = ss1 ^ rotl(a, 12);
        const uint32_t tt1 = ff + d + ss2 + (w[j] ^ w[j + 4]), tt2 = gg + h + ss1 + w[j];
        d = c, c = rotl(bb, 9), bb = a, a = tt1;
        h = g, g = rotl(f, 19), f = e, e = tt2 ^ rotl(tt2, 9) ^ rotl(tt2, 17);
    }
    v[0] ^= a, v[1] ^= bb, v[2] ^= c, v[3] ^= d, v[4] ^= e, v[5] ^= f, v[6] ^= g, v[7] ^= h;
}

static void plain_sm3(uint8_t digest[32], const uint8_t *data, size_t length)
{
    uint32_t v[8] = {0x7380166f, 0x4914b2b9, 0x172442d7, 0xda8a0600, 0xa96f30bc, 0x163138aa, 0xe38dee4d, 0xb0fb0e4e};
    uint8_t block[64];
    size_t at = 0;
    for (; length - at >= 64; at += 64)
        plain_block(v, data + at);
    size_t used = length - at;
    memset(block, 0, sizeof block);
    if (used)
        memcpy(block, data + at, used);
    block[used] = 0x80;
    if (used >= 56) {
        plain_block(v, block);
        memset(block, 0, sizeof block);
    }
    for (int i = 0; i < 8; i++)
        block[56 + i] = (uint8_t)((uint64_t)length * 8 >> (56 - 8 * i));
    plain_block(v, block);
    for (int i = 0; i < 32; i++)
        digest[i] = (uint8_t)(v[i / 4] >> (24 - 8 * (i % 4)));
}

/* ---- Running a test once for every kernel this CPU has ---- */

#define FOR_EACH_KERNEL(primitive, name)                                                                               \
    for (size_t kernel_ = 0, left_ = 1; left_; csvf_force_kernel(primitive, NULL), left_ = 0)                          \
        for (const char *name; (name = csvf_kernel_at(primitive, kernel_)); kernel_++)                                 \
            if (csvf_kernel_available(primitive, name) && use_kernel(primitive, name))

static int use_kernel(int primitive, const char *name)
{
    test_case("%s", name);
    CHECK_STATUS(csvf_force_kernel(primitive, name), CSVF_OK);
    return 1;
}

static void check_hex(const uint8_t digest[32], const char *hex)
{
    uint8_t want[32];
    CHECK(test_hex(want, sizeof want, hex) == 32);
    CHECK_BYTES(digest, want, 32);
}

/* 0, 1, .. 250, 0, 1, ..: the ramp of tests/vectors/sm3.json */
static void fill_ramp(uint8_t *out, size_t length)
{
    for (size_t i = 0; i < length; i++)
        out[i] = (uint8_t)(i % 251);
}

/* ---- One stream ---- */

static void every_kernel_is_listed(void)
{
    CHECK(csvf_kernel_available(CSVF_PRIMITIVE_SM3, "portable"));
    CHECK(csvf_kernel_available(CSVF_PRIMITIVE_SM3_MANY, "portable"));
#if defined(__x86_64__)
    CHECK(csvf_kernel_count(CSVF_PRIMITIVE_SM3) == 2);
    CHECK(csvf_kernel_count(CSVF_PRIMITIVE_SM3_MANY) == 3);
    CHECK(csvf_kernel_at(CSVF_PRIMITIVE_SM3, 0) && !strcmp(csvf_kernel_at(CSVF_PRIMITIVE_SM3, 0), "avx2"));
#endif
}

static void standard_vectors(void)
{
    FOR_EACH_KERNEL(CSVF_PRIMITIVE_SM3, name) {
        uint8_t digest[32], text[64];
        csvf_sm3_digest(digest, NULL, 0);
        check_hex(digest, "1ab21d8355cfa17f8e61194831e81a8f22bec8c728fefb747ed035eb5082aa2b");
        csvf_sm3_digest(digest, "abc", 3);
        check_hex(digest, "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0");
        for (size_t i = 0; i < sizeof text; i++)
            text[i] = "abcd"[i % 4];
        csvf_sm3_digest(digest, text, sizeof text);
        check_hex(digest, "debe9ff92275b8a138604889c18e5a4d6fdb70e5387e5765293dcba39c0c5732");
        /* a million times 'a', in pieces of 999 (OpenSSL 3.0) */
        uint8_t as[999];
        memset(as, 'a', sizeof as);
        csvf_sm3 sm3;
        csvf_sm3_init(&sm3);
        size_t left = 1000000;
        for (; left; left -= left < sizeof as ? left : sizeof as)
            csvf_sm3_update(&sm3, as, left < sizeof as ? left : sizeof as);
        csvf_sm3_final(&sm3, digest);
        check_hex(digest, "c8aaf89429554029e231941a2acc0ad61ff2a5acd8fadd25847a3a732b3b02c3");
    }
}

/* Lengths 0..600 ending at one guard page and starting at another; the digest of all digests is OpenSSL's. */
static void lengths_at_guard_pages(void)
{
    test_guarded low = test_guard(4096), high = test_guard(4096);
    FOR_EACH_KERNEL(CSVF_PRIMITIVE_SM3, name) {
        csvf_sm3 all;
        uint8_t digest[32], again[32], want[32];
        csvf_sm3_init(&all);
        for (size_t length = 0; length <= 600; length++) {
            test_case("%s, %zu bytes", name, length);
            uint8_t *end = high.end - length;
            fill_ramp(low.first, length);
            fill_ramp(end, length);
            csvf_sm3_digest(digest, end, length);
            csvf_sm3_digest(again, low.first, length);
            plain_sm3(want, end, length);
            CHECK_BYTES(digest, want, 32);
            CHECK_BYTES(again, want, 32);
            csvf_sm3_update(&all, digest, sizeof digest);
        }
        csvf_sm3_final(&all, digest);
        check_hex(digest, "987db3e5014a630378edaa345fd18e849cb27a6bafb75b3c6f767352067d71a9");
    }
    test_unguard(low);
    test_unguard(high);
}

static void split_updates(void)
{
    uint8_t data[300], want[32], digest[32];
    fill_ramp(data, sizeof data);
    plain_sm3(want, data, sizeof data);
    FOR_EACH_KERNEL(CSVF_PRIMITIVE_SM3, name) {
        csvf_sm3 sm3;
        csvf_sm3_init(&sm3);
        for (size_t i = 0; i <= sizeof data; i++)
            for (size_t j = i; j <= sizeof data; j += 1 + j % 7) {
                csvf_sm3_update(&sm3, data, i);
                csvf_sm3_update(&sm3, data + i, j - i);
                csvf_sm3_update(&sm3, NULL, 0);
                csvf_sm3_update(&sm3, data + j, sizeof data - j);
                csvf_sm3_final(&sm3, digest); /* and starts anew */
                CHECK_BYTES(digest, want, 32);
            }
        for (size_t i = 0; i < sizeof data; i++)
            csvf_sm3_update(&sm3, data + i, 1);
        csvf_sm3_final(&sm3, digest);
        CHECK_BYTES(digest, want, 32);
    }
}

/* A copy is a fork; a forced kernel leaves live streams alone; final leaves none of the message behind. */
static void streams_are_plain_memory(void)
{
    uint8_t data[200], want[32], digest[32];
    test_fill(data, sizeof data, 1);
    csvf_sm3 sm3, copy;
    csvf_sm3_init(&sm3);
    csvf_sm3_update(&sm3, data, 100);
    copy = sm3;
    CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_SM3, "portable"), CSVF_OK);
    csvf_sm3_update(&sm3, data + 100, 100);
    csvf_sm3_final(&sm3, digest);
    plain_sm3(want, data, 200);
    CHECK_BYTES(digest, want, 32);
    CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_SM3, NULL), CSVF_OK);
    csvf_sm3_update(&copy, data + 7, 3);
    memmove(data + 100, data + 7, 3);
    plain_sm3(want, data, 103);
    csvf_sm3_final(&copy, digest);
    CHECK_BYTES(digest, want, 32);
    int found = 0;
    for (size_t i = 0; i + 8 <= sizeof copy; i++)
        found |= !memcmp((const uint8_t *)&copy + i, data + 64, 8);
    CHECK(!found);
}

/* ---- Many ---- */

enum { MOST = 300, ROOM = 9000 };
static uint8_t messages[MOST][ROOM], digests[MOST][32], wanted[MOST][32];

static void check_many(const size_t *lengths, size_t count)
{
    const uint8_t *data[MOST] = {NULL};
    memset(digests, 0xee, sizeof digests);
    for (size_t i = 0; i < count; i++) {
        data[i] = lengths[i] ? messages[i] + ROOM - lengths[i] : NULL;
        plain_sm3(wanted[i], data[i], lengths[i]);
    }
    csvf_sm3_many(digests[0], data, lengths, count);
    CHECK_BYTES(digests, wanted, 32 * count);
    if (count < MOST)
        for (int i = 0; i < 32; i++)
            CHECK(digests[count][i] == 0xee);
}

static void many_of_every_count(void)
{
    size_t lengths[MOST];
    FOR_EACH_KERNEL(CSVF_PRIMITIVE_SM3_MANY, name) {
        for (size_t count = 0; count <= 70; count++) {
            test_case("%s, %zu messages", name, count);
            for (size_t i = 0; i < count; i++)
                lengths[i] = 200;
            check_many(lengths, count);
            for (size_t i = 0; i < count; i++)
                lengths[i] = (count * 37 + i * 61) % 400;
            check_many(lengths, count);
        }
        for (size_t length = 0; length <= 600; length++) {
            test_case("%s, all messages %zu bytes", name, length);
            for (size_t i = 0; i < 33; i++)
                lengths[i] = length;
            check_many(lengths, 33);
        }
    }
}

static void many_of_random_lengths(void)
{
    size_t lengths[MOST];
    uint64_t seed = 7;
    FOR_EACH_KERNEL(CSVF_PRIMITIVE_SM3_MANY, name)
        for (int run = 0; run < 120; run++) {
            const size_t count = test_random(&seed) % (run % 4 ? 60 : MOST + 1);
            const uint64_t most = (uint64_t[]){ROOM, 130, 1000, 4097}[run % 4];
            test_case("%s, run %d, %zu messages", name, run, count);
            for (size_t i = 0; i < count; i++) {
                lengths[i] = test_random(&seed) % most;
                if (run % 5 == 0 && i % 16 == 3)
                    lengths[i] = ROOM - i;
                if (run % 7 == 0 && i % 3)
                    lengths[i] &= ~(size_t)63;
            }
            check_many(lengths, count);
        }
}

/* Streams that are continued in any company, with pieces of any length, some of them empty; each piece ends at an unreadable page. */
static void update_many_of_random_lengths(void)
{
    enum { STREAMS = 70 };
    static csvf_sm3 streams[STREAMS];
    static size_t done[STREAMS];
    uint64_t seed = 11;
    test_guarded g = test_guard(4096);
    test_fill(g.first, 4096, 9);
    FOR_EACH_KERNEL(CSVF_PRIMITIVE_SM3_MANY, name)
        for (int run = 0; run < 12; run++) {
            test_case("%s, run %d", name, run);
            for (size_t i = 0; i < STREAMS; i++) {
                csvf_sm3_init(&streams[i]);
                done[i] = 0;
            }
            for (int round = 0; round < 8; round++) {
                csvf_sm3 *chosen[STREAMS];
                const uint8_t *data[STREAMS];
                size_t lengths[STREAMS], count = 0;
                const uint64_t density = test_random(&seed) % 9;
                for (size_t i = 0; i < STREAMS; i++) {
                    if (test_random(&seed) % 8 >= density)
                        continue;
                    const size_t most = (size_t[]){1, 64, 130, 1000}[test_random(&seed) % 4];
                    lengths[count] = test_random(&seed) % (most + 1);
                    data[count] = lengths[count] ? g.end - lengths[count] : NULL;
                    memcpy(messages[i] + done[i], g.end - lengths[count], lengths[count]);
                    done[i] += lengths[count];
                    chosen[count++] = &streams[i];
                }
                csvf_sm3_update_many(chosen, data, lengths, count);
            }
            for (size_t i = 0; i < STREAMS; i++) {
                plain_sm3(wanted[i], messages[i], done[i]);
                csvf_sm3_final(&streams[i], digests[i]);
            }
            CHECK_BYTES(digests, wanted, 32 * STREAMS);
        }
    test_unguard(g);
}

/* Each message ends where an unreadable page begins: no lane may look past its own. */
static void many_at_guard_pages(void)
{
    enum { COUNT = 37 };
    test_guarded pages[COUNT];
    const uint8_t *data[COUNT];
    size_t lengths[COUNT];
    for (size_t i = 0; i < COUNT; i++) {
        pages[i] = test_guard(1000);
        test_fill(pages[i].first, 4096, i);
    }
    FOR_EACH_KERNEL(CSVF_PRIMITIVE_SM3_MANY, name)
        for (size_t base = 0; base < 130; base++) {
            test_case("%s, base %zu", name, base);
            for (size_t i = 0; i < COUNT; i++) {
                lengths[i] = base + (base % 2 ? i * 17 : 0);
                data[i] = base % 3 ? pages[i].end - lengths[i] : pages[i].first;
                plain_sm3(wanted[i], data[i], lengths[i]);
            }
            csvf_sm3_many(digests[0], data, lengths, COUNT);
            CHECK_BYTES(digests, wanted, 32 * COUNT);
        }
    for (size_t i = 0; i < COUNT; i++)
        test_unguard(pages[i]);
}

static void check_blocks(const uint8_t *prefix, size_t prefix_length, const uint8_t *data, size_t block_length, size_t count)
{
    uint8_t whole[256 + ROOM];
    memset(digests, 0xee, sizeof digests);
    for (size_t i = 0; i < count; i++) {
        memcpy(whole, prefix, prefix_length);
        memcpy(whole + prefix_length, data + i * block_length, block_length);
        plain_sm3(wanted[i], whole, prefix_length + block_length);
    }
    CHECK_STATUS(csvf_sm3_blocks(digests[0], prefix_length ? prefix : NULL, prefix_length, data, block_length, count), CSVF_OK);
    CHECK_BYTES(digests, wanted, 32 * count);
    for (int i = 0; i < 32; i++)
        CHECK(digests[count][i] == 0xee);
}

static void blocks_with_prefixes(void)
{
    static const size_t block_lengths[] = {1, 31, 32, 55, 56, 63, 64, 65, 127, 200, 512, 4096};
    uint8_t prefix[256];
    test_fill(prefix, sizeof prefix, 3);
    test_guarded g = test_guard(71 * 4096);
    test_fill(g.first, (size_t)(g.end - g.first), 4);
    FOR_EACH_KERNEL(CSVF_PRIMITIVE_SM3_MANY, name) {
        for (size_t length = 0; length <= 256; length++) {
            test_case("%s, prefix of %zu", name, length);
            check_blocks(prefix, length, g.end - 21 * 331, 331, 21); /* the input ends at the guard page */
            check_blocks(prefix, length, g.first, 1 + length, 5);
        }
        for (size_t i = 0; i < sizeof block_lengths / sizeof *block_lengths; i++)
            for (size_t length = 0; length <= 96; length += 8) {
                test_case("%s, prefix of %zu, blocks of %zu", name, length, block_lengths[i]);
                check_blocks(prefix, length, g.end - 19 * block_lengths[i], block_lengths[i], 19);
            }
        for (size_t count = 0; count <= 70; count++) {
            test_case("%s, %zu blocks", name, count);
            check_blocks(prefix, 32, g.first, 128, count);
            check_blocks(prefix, 0, g.end - count * 128, 128, count);
        }
        check_blocks(prefix, 32, g.first, 4096, 70);
        check_blocks(prefix, 0, g.first, 4096, 70);
    }
    test_unguard(g);
}

static void blocks_refuse(void)
{
    uint8_t byte = 0, out[32] = {0};
    const uint8_t zero[32] = {0};
    CHECK_STATUS(csvf_sm3_blocks(out, &byte, 257, &byte, 1, 1), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_sm3_blocks(out, &byte, 1, &byte, 0, 1), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_sm3_blocks(out, &byte, 1, &byte, SIZE_MAX / 2, 3), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_sm3_blocks(out, NULL, 1, &byte, 1, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm3_blocks(out, NULL, 0, NULL, 1, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm3_blocks(NULL, NULL, 0, &byte, 1, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm3_blocks(NULL, NULL, 0, NULL, 1, 0), CSVF_OK);
    CHECK_BYTES(out, zero, 32);
}

/* ---- HMAC and key derivation ---- */

static void hmac_vectors(void)
{
    FOR_EACH_KERNEL(CSVF_PRIMITIVE_SM3, name) {
        const uint8_t zero[16] = {0};
        uint8_t data[600], mac[32], again[32];
        csvf_hmac_sm3 hmac;
        csvf_hmac_sm3_init(&hmac, zero, 16);
        csvf_hmac_sm3_update(&hmac, zero, 4);
        csvf_hmac_sm3_final(&hmac, mac);
        check_hex(mac, "5f08f19a7d6d8aceb7a6955b1533173cdd342039d4f76a117fe1aaaab7b27fec"); /* csv-rs */
        csvf_hmac_sm3_update(&hmac, zero, 1); /* ready for another message, copies included */
        csvf_hmac_sm3 copy = hmac;
        csvf_hmac_sm3_update(&hmac, zero, 3);
        csvf_hmac_sm3_final(&hmac, again);
        CHECK_BYTES(again, mac, 32);
        csvf_hmac_sm3_update(&copy, zero, 3);
        csvf_hmac_sm3_final(&copy, again);
        CHECK_BYTES(again, mac, 32);

        /* keys of 0..199 bytes, messages three times as long; the digest of all MACs is OpenSSL's (Python's hmac) */
        fill_ramp(data, sizeof data);
        csvf_sm3 all;
        csvf_sm3_init(&all);
        for (size_t length = 0; length < 200; length++) {
            csvf_hmac_sm3_init(&hmac, length ? data : NULL, length);
            csvf_hmac_sm3_update(&hmac, data, length);
            csvf_hmac_sm3_update(&hmac, data + length, 2 * length);
            csvf_hmac_sm3_final(&hmac, mac);
            csvf_sm3_update(&all, mac, sizeof mac);
        }
        csvf_sm3_final(&all, mac);
        check_hex(mac, "b0562af6b392a258caabd3d8592ff90d310f9abc9afc1043f0f906eecfb82289");
    }
}

static void kdf_vectors(void)
{
    uint8_t secret[64], data[200], out[232], digest[32];
    FOR_EACH_KERNEL(CSVF_PRIMITIVE_SM3, name) {
        /* GB/T 32918.5 annex C: t = KDF(x2 || y2, 19) turns the message into C2 */
        CHECK(test_hex(secret, 64, "335e18d751e51f040e27d468138b7ab1dc86ad7f981d7d416222fd6ab3ed230d"
                                   "ab743ebcfb22d64f7b6ab791f70658f25b48fa93e54064fdbfbed3f0bd847ac9") == 64);
        uint8_t want[19];
        CHECK(test_hex(want, 19, "21886ca989ca9c7d58087307ca93092d651efa") == 19);
        CHECK_STATUS(csvf_sm3_kdf(out, 19, secret, 64), CSVF_OK);
        for (int i = 0; i < 19; i++)
            out[i] ^= (uint8_t)"encryption standard"[i];
        CHECK_BYTES(out, want, 19);

        /* lengths 0..199 of both; nothing is written past the end */
        fill_ramp(data, sizeof data);
        csvf_sm3 all;
        csvf_sm3_init(&all);
        for (size_t length = 0; length < 200; length++) {
            memset(out, 0xee, sizeof out);
            CHECK_STATUS(csvf_sm3_kdf(out, length, data, length), CSVF_OK);
            for (size_t i = 0; i < 32; i++)
                CHECK(out[length + i] == 0xee);
            csvf_sm3_update(&all, out, length);
        }
        csvf_sm3_final(&all, digest);
        check_hex(digest, "3bfdbb8478fadcf38489d7794948d5b229fa7db4b7f6b1a68bedd311a62f50b6");

        /* csv-rs: Derive(0^16, "csv-master-secret", 0^16, 16), a KDF over its own output */
        uint8_t input[16 + 17 + 1 + 16 + 32] = {0};
        memcpy(input + 16, "csv-master-secret", 17);
        CHECK_STATUS(csvf_sm3_kdf(input + 50, 32, input, 50), CSVF_OK);
        CHECK_STATUS(csvf_sm3_kdf(out, 16, input, sizeof input), CSVF_OK);
        CHECK(test_hex(want, 16, "19e8d550e3a799b2917bc59146aaadae") == 16);
        CHECK_BYTES(out, want, 16);
    }
    CHECK_STATUS(csvf_sm3_kdf(out, (size_t)32 * UINT32_MAX + 1, data, 1), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_sm3_kdf(NULL, 1, data, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm3_kdf(out, 1, NULL, 1), CSVF_ERR_ARGUMENT);
}

int main(void)
{
    test_fill(messages, sizeof messages, 2);
    RUN(every_kernel_is_listed);
    RUN(standard_vectors);
    RUN(lengths_at_guard_pages);
    RUN(split_updates);
    RUN(streams_are_plain_memory);
    RUN(many_of_every_count);
    RUN(many_of_random_lengths);
    RUN(update_many_of_random_lengths);
    RUN(many_at_guard_pages);
    RUN(blocks_with_prefixes);
    RUN(blocks_refuse);
    RUN(hmac_vectors);
    RUN(kdf_vectors);
    return test_report();
}
