/* Embeds csvfast's engine in a C program: two guests in one DRAM, by the public header alone.
 *
 *   against an installed library:   make                     (pkg-config csvfast; see Makefile)
 *   against a checkout:             make CSRC=../../csrc
 */
#include <csvfast.h>
#include <stdio.h>
#include <string.h>

#define DRAM_BYTES (1u << 20)

static int check(int status, const char *what)
{
    if (status != CSVF_OK)
        fprintf(stderr, "%s: %s\n", what, csvf_status_text(status));
    return status != CSVF_OK;
}

static void show(const char *who, const uint8_t *bytes, size_t length)
{
    printf("%-14s", who);
    for (size_t i = 0; i < length; i++)
        printf("%02x", bytes[i]);
    printf("\n");
}

int main(void)
{
    /* Fixed keys, so that the output is always the same; a real host takes them from its security processor. */
    uint8_t key_1[CSVF_XTS_KEY_BYTES], key_2[CSVF_XTS_KEY_BYTES], seen[18];
    const char secret[18 + 1] = "the guest's secret";
    csvf_engine *engine;
    int failed;

    for (int i = 0; i < 32; i++) {
        key_1[i] = (uint8_t)i;
        key_2[i] = (uint8_t)(101 + 3 * i);
    }
    if (check(csvf_init(), "csvf_init") || check(csvf_engine_create(&engine, DRAM_BYTES, NULL), "csvf_engine_create"))
        return 1;
    printf("csvfast %s, SM4 kernel %s\n", csvf_version(), csvf_kernel_name(CSVF_PRIMITIVE_SM4));

    failed = check(csvf_asid_install(engine, 1, key_1, sizeof key_1), "install 1");
    failed |= check(csvf_asid_install(engine, 2, key_2, sizeof key_2), "install 2");
    failed |= check(csvf_write(engine, 1, 0x3000, secret, 18), "write");
    failed |= check(csvf_read(engine, seen, 18, 1, 0x3000), "read 1");
    printf("%-14s%.18s\n", "guest 1 reads", (const char *)seen);
    failed |= memcmp(seen, secret, 18) != 0;
    failed |= check(csvf_read(engine, seen, 18, 2, 0x3000), "read 2");
    show("guest 2 reads", seen, 18);
    failed |= memcmp(seen, secret, 18) == 0;
    show("host sees", csvf_engine_dram(engine) + 0x3000, 18);

    failed |= check(csvf_asid_remove(engine, 1), "remove");
    failed |= csvf_read(engine, seen, 18, 1, 0x3000) != CSVF_ERR_ASID;
    csvf_engine_destroy(engine);
    csvf_wipe(key_1, sizeof key_1);
    csvf_wipe(key_2, sizeof key_2);
    puts(failed ? "FAILED" : "done");
    return failed;
}
