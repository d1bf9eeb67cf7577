/* What a host can do to a guest's memory without its key, and what it cannot: it looks, flips a bit, moves a block, plays back what
 * stood there before. SM4-XTS hides content and binds it to its place; it does not notice changes. */
#include <csvfast.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DRAM_BYTES = 1 << 20, HERE = 0x3000, THERE = 0x5000, LENGTH = 32 };

static void need(int status, const char *what)
{
    if (status != CSVF_OK) {
        fprintf(stderr, "%s: %s\n", what, csvf_status_text(status));
        exit(1);
    }
}

static void show(const char *what, const uint8_t *bytes)
{
    printf("%-34s", what);
    for (int i = 0; i < LENGTH; i++)
        putchar(bytes[i] >= 32 && bytes[i] < 127 ? bytes[i] : '.');
    putchar('\n');
}

/* How many of the two blocks are still what the guest wrote. */
static int blocks_left(const uint8_t *seen, const char *written)
{
    return (memcmp(seen, written, 16) == 0) + (memcmp(seen + 16, written + 16, 16) == 0);
}

int main(void)
{
    const char balance[LENGTH + 1] = "account=alice000balance=00000100";
    const char spent[LENGTH + 1] = "account=alice000balance=00000000";
    uint8_t seen[LENGTH], before[LENGTH];
    csvf_engine *engine;
    int failed = 0;

    need(csvf_init(), "csvf_init");
    need(csvf_engine_create(&engine, DRAM_BYTES, NULL), "csvf_engine_create");
    need(csvf_asid_generate(engine, 1), "csvf_asid_generate");
    uint8_t *dram = csvf_engine_dram(engine);

    need(csvf_write(engine, 1, HERE, balance, LENGTH), "write");
    show("guest wrote", (const uint8_t *)balance);
    show("host looks", dram + HERE);
    failed |= blocks_left(dram + HERE, balance) != 0;

    memcpy(before, dram + HERE, LENGTH);
    dram[HERE + 30] ^= 1;
    need(csvf_read(engine, seen, LENGTH, 1, HERE), "read");
    show("host flipped a bit; guest reads", seen);      /* that block is noise, all 16 bytes of it */
    failed |= blocks_left(seen, balance) != 1;

    memcpy(dram + HERE, before, LENGTH);
    memcpy(dram + THERE, before, LENGTH);
    need(csvf_read(engine, seen, LENGTH, 1, THERE), "read");
    show("host copied it elsewhere", seen);             /* the tweak is the address: noise */
    failed |= blocks_left(seen, balance) != 0;

    need(csvf_write(engine, 1, HERE, spent, LENGTH), "write");
    memcpy(dram + HERE, before, LENGTH);
    need(csvf_read(engine, seen, LENGTH, 1, HERE), "read");
    show("host played back the old bytes", seen);       /* nothing notices: the weakness of encryption without integrity */
    failed |= blocks_left(seen, balance) != 2;

    need(csvf_asid_remove(engine, 1), "remove");
    need(csvf_asid_generate(engine, 1), "generate");
    need(csvf_read(engine, seen, LENGTH, 1, HERE), "read");
    show("the ASID's next guest reads", seen);
    failed |= blocks_left(seen, balance) != 0;

    csvf_engine_destroy(engine);
    puts(failed ? "FAILED" : "done");
    return failed;
}
