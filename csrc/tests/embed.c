/* What an emulator does with csvfast: nothing but the public header, in code that is C11 and C++11 at once.
 *
 * A machine's RAM belongs to the embedder. The engine is laid over it; guest accesses go through the engine under the guest's ASID,
 * and every other look at the RAM, a device's or the host's, sees ciphertext. Exits 0 if all that holds. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "csvfast.h"

static int passed, failed;

static void check(int ok, const char *what)
{
    if (ok) {
        passed++;
    } else {
        failed++;
        printf("embed: failed: %s\n", what);
    }
}

static void run(uint8_t *ram, size_t size)
{
    /* Guest RAM of this machine starts at 1 GiB. */
    const uint64_t base = (uint64_t)1 << 30;
    csvf_config config;
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.base_address = base;

    csvf_engine *engine = NULL;
    int status = csvf_engine_create_on(&engine, ram, size, &config);
    check(status == CSVF_OK && engine != NULL, "create an engine over the embedder's RAM");
    if (status != CSVF_OK)
        return;

    /* One key per guest. A real embedder takes it from its random number generator. */
    uint8_t key[CSVF_XTS_KEY_BYTES];
    for (size_t i = 0; i < sizeof key; i++)
        key[i] = (uint8_t)(17 * i + 1);
    check(csvf_asid_install(engine, 5, key, sizeof key) == CSVF_OK, "install guest 5's key");
    csvf_wipe(key, sizeof key);

    /* Launch: the loader puts plaintext into RAM; the engine measures and encrypts it where it stands. */
    memset(ram, 0x90, 2 * CSVF_PAGE_BYTES);
    uint8_t expected[CSVF_SM3_BYTES], measured[CSVF_SM3_BYTES];
    csvf_sm3_digest(expected, ram, 2 * CSVF_PAGE_BYTES);
    csvf_sm3 launch;
    csvf_sm3_init(&launch);
    check(csvf_launch_update(engine, &launch, NULL, 5, base, 2 * CSVF_PAGE_BYTES) == CSVF_OK, "launch two pages");
    csvf_sm3_final(&launch, measured);
    check(csvf_equal(expected, measured, sizeof measured), "the launch digest is SM3 of the plaintext");
    check(ram[0] != 0x90 || ram[1] != 0x90 || ram[2] != 0x90, "the RAM holds ciphertext");

    /* Running: loads and stores of the guest, at any address and length. */
    const char secret[] = "the guest's secret";
    char seen[sizeof secret];
    check(csvf_write(engine, 5, base + 4090, secret, sizeof secret) == CSVF_OK, "a guest store across a page boundary");
    check(csvf_read(engine, seen, sizeof seen, 5, base + 4090) == CSVF_OK && !memcmp(seen, secret, sizeof seen),
          "the guest reads what it wrote");
    check(csvf_read(engine, seen, sizeof seen, 0, base + 4090) == CSVF_OK && memcmp(seen, secret, sizeof seen),
          "the host (ASID 0) reads noise");

    /* The guest ends: its key is gone, and with it the memory's meaning. */
    check(csvf_asid_remove(engine, 5) == CSVF_OK, "remove the key");
    check(csvf_read(engine, seen, sizeof seen, 5, base) == CSVF_ERR_ASID, "no access without a key");
    csvf_engine_destroy(engine);
}

int main(void)
{
    const size_t size = 64 * CSVF_PAGE_BYTES;
    uint8_t *ram = (uint8_t *)aligned_alloc(CSVF_PAGE_BYTES, size);
    if (!ram) {
        printf("embed: no memory\n");
        return 1;
    }
    printf("csvfast %s, SM4 kernel %s\n", csvf_version(), csvf_kernel_name(CSVF_PRIMITIVE_SM4));
    run(ram, size);
    free(ram);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
