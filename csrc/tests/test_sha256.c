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
    return test_report();
}
