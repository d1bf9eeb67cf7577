/* A layer's three SHA-256 states: FIPS 180-4's vectors, RFC 4231's for HMAC, pieces of every length, buffers at guard pages. */
#include "test.h"

#include "../cpu.h"
#include "../sha256/sha256_layer.h"

static uint8_t message[4096], other[4096];

typedef struct digests {
    uint8_t sealed[32], mac[32], clear[32];
} digests;

static digests whole(const char *key, const uint8_t *sealed, const uint8_t *clear, size_t length, size_t step)
{
    csvf_sha256_layer layer;
    digests found;
    csvf__sha256_layer_init(&layer, (const uint8_t *)key, strlen(key));
    for (size_t at = 0; at < length; at += step)
        csvf__sha256_layer_update(&layer, sealed + at, clear ? clear + at : NULL, length - at < step ? length - at : step);
    csvf__sha256_layer_digests(&layer, found.sealed, found.mac, found.clear);
    return found;
}

static void standard_vectors(void)
{
    static const struct {
        const char *text, *digest;
    } fips[] = {
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
    };
    for (size_t i = 0; i < sizeof fips / sizeof fips[0]; i++) {
        uint8_t want[32];
        const size_t length = strlen(fips[i].text);
        test_hex(want, sizeof want, fips[i].digest);
        const digests found = whole("key", (const uint8_t *)fips[i].text, (const uint8_t *)fips[i].text, length, 1000);
        CHECK_BYTES(found.sealed, want, 32);
        CHECK_BYTES(found.clear, want, 32);
    }
    uint8_t want[32];
    test_hex(want, sizeof want, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    const char *const text = "what do ya want for nothing?";
    CHECK_BYTES(whole("Jefe", (const uint8_t *)text, NULL, strlen(text), 1000).mac, want, 32);
}

/* Two states and three, in one piece and in many: the same. */
static void pieces(void)
{
    static const size_t steps[] = {1, 3, 63, 64, 65, 128, 1000};
    for (size_t length = 0; length < 400; length += 1 + length / 17) {
        const digests once = whole("key", message, other, length, 4096), swapped = whole("key", other, NULL, length, 4096);
        CHECK_BYTES(once.clear, swapped.sealed, 32);
        for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
            test_case("%zu bytes by %zu", length, steps[i]);
            const digests three = whole("key", message, other, length, steps[i]), two = whole("key", message, NULL, length, steps[i]);
            CHECK_BYTES(&three, &once, sizeof once);
            CHECK_BYTES(two.sealed, once.sealed, 32);
            CHECK_BYTES(two.mac, once.mac, 32);
        }
    }
}

/* Asking for digests changes nothing. */
static void digests_in_between(void)
{
    csvf_sha256_layer layer;
    digests early, late;
    csvf__sha256_layer_init(&layer, message, 64);
    csvf__sha256_layer_update(&layer, message, other, 100);
    csvf__sha256_layer_digests(&layer, early.sealed, early.mac, early.clear);
    csvf__sha256_layer_update(&layer, message + 100, other + 100, 100);
    csvf__sha256_layer_digests(&layer, late.sealed, late.mac, late.clear);
    CHECK_BYTES(late.sealed, whole("key", message, NULL, 200, 4096).sealed, 32);
    CHECK(memcmp(early.mac, late.mac, 32) != 0);
}

/* One block after the other by the definition (FIPS 180-4, 6.2), for what no vector covers. */
static void by_definition(uint8_t digest[32], const uint8_t *data, size_t length)
{
    static uint8_t padded[5000];
    uint32_t h[8], k[64];
    const size_t blocks = (length + 9 + 63) / 64;
    size_t count = 0;
    /* Fractions of square roots of the first 8 primes, and of cube roots of the first 64: by search, so that no table can be wrong. */
    for (unsigned n = 2; count < 64; n++) {
        int prime = 1;
        for (unsigned d = 2; d * d <= n; d++)
            prime &= n % d != 0;
        if (!prime)
            continue;
        unsigned __int128 low = 0, high = (unsigned __int128)1 << 36;
        while (high - low > 1) {
            const unsigned __int128 middle = (low + high) / 2;
            const int above = middle > (unsigned __int128)8 << 32 || middle * middle * middle > (unsigned __int128)n << 96;
            *(above ? &high : &low) = middle;
        }
        k[count] = (uint32_t)low;
        for (low = 0, high = (unsigned __int128)1 << 40; high - low > 1;) {
            const unsigned __int128 middle = (low + high) / 2;
            *(middle * middle > (unsigned __int128)n << 64 ? &high : &low) = middle;
        }
        if (count < 8)
            h[count] = (uint32_t)low;
        count++;
    }
    memset(padded, 0, sizeof padded);
    if (length)
        memcpy(padded, data, length);
    padded[length] = 0x80;
    for (size_t i = 0; i < 8; i++)
        padded[64 * blocks - 1 - i] = (uint8_t)((uint64_t)length * 8 >> 8 * i);
#define ROTATE(x, n) ((x) >> (n) | (x) << (32 - (n)))
    for (size_t block = 0; block < blocks; block++) {
        uint32_t w[64], v[8];
        for (size_t i = 0; i < 16; i++)
            w[i] = (uint32_t)padded[64 * block + 4 * i] << 24 | (uint32_t)padded[64 * block + 4 * i + 1] << 16 |
                   (uint32_t)padded[64 * block + 4 * i + 2] << 8 | padded[64 * block + 4 * i + 3];
        for (size_t i = 16; i < 64; i++)
            w[i] = (ROTATE(w[i - 2], 17) ^ ROTATE(w[i - 2], 19) ^ w[i - 2] >> 10) + w[i - 7] +
                   (ROTATE(w[i - 15], 7) ^ ROTATE(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 16];
        memcpy(v, h, sizeof v);
        for (size_t i = 0; i < 64; i++) {
            const uint32_t t1 = v[7] + (ROTATE(v[4], 6) ^ ROTATE(v[4], 11) ^ ROTATE(v[4], 25)) + ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
            const uint32_t t2 = (ROTATE(v[0], 2) ^ ROTATE(v[0], 13) ^ ROTATE(v[0], 22)) + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
            memmove(v + 1, v, 7 * sizeof *v);
            v[4] += t1;
            v[0] = t1 + t2;
        }
        for (size_t i = 0; i < 8; i++)
            h[i] += v[i];
    }
    for (size_t i = 0; i < 32; i++)
        digest[i] = (uint8_t)(h[i / 4] >> (24 - 8 * (i % 4)));
}

static void mac_by_definition(uint8_t mac[32], const uint8_t *key, size_t key_length, const uint8_t *data, size_t length)
{
    static uint8_t inner[64 + sizeof message];
    uint8_t outer[96] = {0};
    memset(inner, 0, 64);
    memcpy(inner, key, key_length);
    memcpy(outer, key, key_length);
    for (size_t i = 0; i < 64; i++)
        inner[i] ^= 0x36, outer[i] ^= 0x5c;
    if (length)
        memcpy(inner + 64, data, length);
    by_definition(outer + 64, inner, 64 + length);
    by_definition(mac, outer, 96);
}

/* Every length of message and key, at every alignment, up to the page that cannot be read and from just behind one. */
static void edges(void)
{
    const test_guarded first = test_guard(1024), second = test_guard(1024);
    for (size_t length = 0; length <= 300; length++) {
        const size_t key_length = 1 + length % 64;
        uint8_t want[32];
        digests found[3];
        for (int place = 0; place < 3; place++) {
            uint8_t *const sealed = place == 0 ? first.end - length : place == 1 ? first.first : first.first + 1 + length % 17;
            uint8_t *const clear = place == 0 ? second.end - length : place == 1 ? second.first : second.first + 3 + length % 13;
            csvf_sha256_layer layer;
            test_case("%zu bytes, place %d", length, place);
            memcpy(sealed, message, length);
            memcpy(clear, other, length);
            csvf__sha256_layer_init(&layer, message + 7, key_length);
            csvf__sha256_layer_update(&layer, sealed, clear, length);
            csvf__sha256_layer_digests(&layer, found[place].sealed, found[place].mac, found[place].clear);
            by_definition(want, message, length);
            CHECK_BYTES(found[place].sealed, want, 32);
            by_definition(want, other, length);
            CHECK_BYTES(found[place].clear, want, 32);
            mac_by_definition(want, message + 7, key_length, message, length);
            CHECK_BYTES(found[place].mac, want, 32);
        }
    }
    test_unguard(first);
    test_unguard(second);
}

/* The count of bits goes beyond 32 bits. */
static void long_messages(void)
{
    uint8_t want[32], mac[32], clear[32], sealed[32];
    csvf_sha256_layer layer;
    test_hex(want, sizeof want, "bf6084769b780af4396e058ef0eaf9ca59366db146ca86ebfcaf58cbf7a35669");
    csvf__sha256_layer_init(&layer, (const uint8_t *)"key", 3);
    memset(message, 'a', sizeof message);
    for (size_t i = 0; i < ((size_t)1 << 29) / sizeof message; i++)
        csvf__sha256_layer_update(&layer, message, NULL, sizeof message);
    csvf__sha256_layer_update(&layer, message, NULL, 1);
    csvf__sha256_layer_digests(&layer, sealed, mac, clear);
    CHECK_BYTES(sealed, want, 32);
    test_hex(want, sizeof want, "c6bedc7f82721bdc3fd50c917388fcd80d0750d9e85f543ec3cbe48746d86086");
    CHECK_BYTES(mac, want, 32);
}

static void asks_the_cpu(void) { CHECK(csvf__sha256_layer_usable() == ((csvf__cpu() & CSVF_CPU_SHA) != 0)); }

int main(void)
{
    RUN(asks_the_cpu);
    if (!csvf__sha256_layer_usable())
        return test_report();
    test_fill(message, sizeof message, 1);
    test_fill(other, sizeof other, 2);
    RUN(standard_vectors);
    RUN(pieces);
    RUN(digests_in_between);
    RUN(edges);
    RUN(long_messages);
    return test_report();
}
