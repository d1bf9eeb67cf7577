/* SM4-XTS (GB/T 17964-2021, IEEE 1619-2018) over any SM4 kernel: data units, ciphertext stealing, spans, scattered lines.
 *
 * Unit tweaks are encrypted many at a time, because one block alone costs a kernel as much as a whole vector group. Long runs
 * of blocks go to the kernel as they are; everything shorter is collected through scratch on the stack until a call
 * is wide. Tweaks T and half-made blocks are secret: the scratch is wiped. */
#include "sm4_xts.h"

#include <string.h>

#include "../declassify.h"
#include "sm4_buffers.h"

enum {
    BLOCK = 16,
    PAGE_BLOCKS = 256,
    LINE_BLOCKS = 4,
    UNIT_BATCH = 128,  /* unit tweaks encrypted in one call */
    LONG_RUN = 64,     /* from this many blocks on a run is worth a call of its own */
    CHUNK = 512,       /* blocks of scratch when short runs are collected */
    LINE_BATCH = 256,  /* lines of which the page tweaks are encrypted in one call */
};

static const csvf_sm4_schedule *schedule_of(const csvf__xts *x, int decrypt)
{
    return decrypt ? &x->decrypt : &x->encrypt;
}

/* The tweak input of a unit: its number in 16 little-endian bytes. */
static inline void put_unit(uint8_t out[BLOCK], uint64_t unit)
{
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    unit = __builtin_bswap64(unit);
#endif
    const uint64_t halves[2] = { unit, 0 };
    memcpy(out, halves, BLOCK);
}

int csvf_xts_init(csvf_xts *xts, const uint8_t key[32], int standard)
{
    if (!xts || !key || (standard != CSVF_STANDARD_GB && standard != CSVF_STANDARD_IEEE))
        return CSVF_ERR_ARGUMENT;
    const int equal = csvf_equal(key, key + CSVF_SM4_KEY_BYTES, CSVF_SM4_KEY_BYTES);
    csvf__declassify(&equal, sizeof equal);
    if (equal)
        return CSVF_ERR_KEY;
    csvf__xts *x = (csvf__xts *)xts;
    x->kernel = csvf__sm4();
    x->standard = standard;
    x->kernel->expand(&x->encrypt, &x->decrypt, key);
    x->kernel->expand(&x->tweak, NULL, key + CSVF_SM4_KEY_BYTES);
    return CSVF_OK;
}

/* ---- Tweaks of units ---------------------------------------------------------------------------------------------- */

void csvf__xts_unit_tweaks(const csvf_xts *xts, uint8_t *out, const uint64_t *units, size_t count)
{
    const csvf__xts *x = csvf__xts_of(xts);
    for (size_t i = 0; i < count; i++)
        put_unit(out + BLOCK * i, units[i]);
    x->kernel->ecb(&x->tweak, out, out, count);
}

void csvf__xts_unit_tweaks_run(const csvf_xts *xts, uint8_t *out, uint64_t first_unit, size_t count)
{
    const csvf__xts *x = csvf__xts_of(xts);
    for (size_t i = 0; i < count; i++)
        put_unit(out + BLOCK * i, first_unit + i);
    x->kernel->ecb(&x->tweak, out, out, count);
}

/* ---- Whole blocks ------------------------------------------------------------------------------------------------- */

void csvf__xts_span(const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t blocks, const uint8_t tweak[16],
                    size_t first, int decrypt)
{
    const csvf__xts *x = csvf__xts_of(xts);
    const csvf_sm4_schedule *schedule = schedule_of(x, decrypt);
    const uint32_t power = (uint32_t)first;
    if (blocks >= LONG_RUN && first == 0) {
        x->kernel->xts(schedule, x->standard, out, in, tweak, blocks, 1);
        return;
    }
    if (blocks >= LONG_RUN) {
        uint8_t start[BLOCK];
        x->kernel->tweaks(x->standard, start, tweak, &power, 1, 1);
        x->kernel->xts(schedule, x->standard, out, in, start, blocks, 1);
        csvf_wipe(start, sizeof start);
        return;
    }
    if (blocks == 0)
        return;
    uint8_t tweaks[BLOCK * LONG_RUN];
    x->kernel->tweaks(x->standard, tweaks, tweak, &power, blocks, 1);
    x->kernel->xex(schedule, out, in, tweaks, blocks);
    csvf_wipe(tweaks, BLOCK * blocks);
}

/* Consecutive units of unit_blocks whole blocks each, given the tweaks T_0 of all. */
static void whole_units(const csvf__xts *x, uint8_t *out, const uint8_t *in, const uint8_t *first_tweaks, size_t unit_blocks,
                        size_t units, int decrypt)
{
    const csvf_sm4_schedule *schedule = schedule_of(x, decrypt);
    if (unit_blocks >= LONG_RUN) {
        x->kernel->xts(schedule, x->standard, out, in, first_tweaks, unit_blocks, units);
        return;
    }
    if (unit_blocks == 1) {
        x->kernel->xex(schedule, out, in, first_tweaks, units);
        return;
    }
    uint8_t tweaks[BLOCK * CHUNK];
    const size_t batch = CHUNK / unit_blocks;
    size_t most = 0;
    while (units) {
        const size_t count = units < batch ? units : batch, blocks = count * unit_blocks;
        x->kernel->tweaks(x->standard, tweaks, first_tweaks, NULL, unit_blocks, count);
        x->kernel->xex(schedule, out, in, tweaks, blocks);
        most = blocks > most ? blocks : most;
        out += BLOCK * blocks;
        in += BLOCK * blocks;
        first_tweaks += BLOCK * count;
        units -= count;
    }
    csvf_wipe(tweaks, BLOCK * most);
}

void csvf__xts_pages(const csvf_xts *xts, uint8_t *out, const uint8_t *in, uint64_t first_unit, size_t pages, int decrypt)
{
    const csvf__xts *x = csvf__xts_of(xts);
    const csvf_sm4_schedule *schedule = schedule_of(x, decrypt);
    uint8_t tweaks[BLOCK * UNIT_BATCH];
    const size_t most = pages < UNIT_BATCH ? pages : UNIT_BATCH;
    while (pages) {
        const size_t count = pages < UNIT_BATCH ? pages : UNIT_BATCH;
        csvf__xts_unit_tweaks_run(xts, tweaks, first_unit, count);
        x->kernel->xts(schedule, x->standard, out, in, tweaks, PAGE_BLOCKS, count);
        out += CSVF_PAGE_BYTES * count;
        in += CSVF_PAGE_BYTES * count;
        first_unit += count;
        pages -= count;
    }
    csvf_wipe(tweaks, BLOCK * most);
}

/* ---- Ciphertext stealing ------------------------------------------------------------------------------------------ */

/* The blocks before the last whole one, of units that do not start on a multiple of 16: collected so that calls are wide. */
static void leading_blocks(const csvf__xts *x, uint8_t *out, const uint8_t *in, const uint8_t *first_tweaks, size_t unit_size,
                           size_t unit_blocks, size_t units, int decrypt)
{
    const csvf_sm4_schedule *schedule = schedule_of(x, decrypt);
    const size_t bytes = BLOCK * unit_blocks;
    if (unit_blocks == 0)
        return;
    if (unit_blocks >= LONG_RUN) {
        for (size_t u = 0; u < units; u++)
            x->kernel->xts(schedule, x->standard, out + unit_size * u, in + unit_size * u, first_tweaks + BLOCK * u,
                           unit_blocks, 1);
        return;
    }
    uint8_t tweaks[BLOCK * CHUNK], data[BLOCK * CHUNK];
    const size_t batch = CHUNK / unit_blocks;
    size_t most = 0;
    while (units) {
        const size_t count = units < batch ? units : batch;
        for (size_t u = 0; u < count; u++)
            memcpy(data + bytes * u, in + unit_size * u, bytes);
        x->kernel->tweaks(x->standard, tweaks, first_tweaks, NULL, unit_blocks, count);
        x->kernel->xex(schedule, data, data, tweaks, count * unit_blocks);
        for (size_t u = 0; u < count; u++)
            memcpy(out + unit_size * u, data + bytes * u, bytes);
        most = count * bytes > most ? count * bytes : most;
        out += unit_size * count;
        in += unit_size * count;
        first_tweaks += BLOCK * count;
        units -= count;
    }
    csvf_wipe(tweaks, most);
    csvf_wipe(data, most);
}

/* Up to UNIT_BATCH consecutive units whose size is no multiple of 16, given their T_0. With n whole blocks and a rest of m bytes,
 * X = E(P[n-1]) under T[n-1]; block n-1 of the output is E(P[n] || X[m..]) under T[n], the rest is X[..m]. Decryption is the
 * same with the two tweaks exchanged. */
static void stealing_units(const csvf__xts *x, uint8_t *out, const uint8_t *in, const uint8_t *first_tweaks, size_t unit_size,
                           size_t units, int decrypt)
{
    const size_t whole = unit_size / BLOCK, rest = unit_size % BLOCK, last = BLOCK * (whole - 1);
    const csvf_sm4_schedule *schedule = schedule_of(x, decrypt);
    uint8_t pairs[2 * BLOCK * UNIT_BATCH], early[BLOCK * UNIT_BATCH], late[BLOCK * UNIT_BATCH], data[BLOCK * UNIT_BATCH];
    uint32_t powers[UNIT_BATCH];

    leading_blocks(x, out, in, first_tweaks, unit_size, whole - 1, units, decrypt);
    for (size_t u = 0; u < units; u++)
        powers[u] = (uint32_t)(whole - 1);
    x->kernel->tweaks(x->standard, pairs, first_tweaks, powers, 2, units);
    for (size_t u = 0; u < units; u++) {
        memcpy(early + BLOCK * u, pairs + BLOCK * (2 * u + (decrypt ? 1 : 0)), BLOCK);
        memcpy(late + BLOCK * u, pairs + BLOCK * (2 * u + (decrypt ? 0 : 1)), BLOCK);
        memcpy(data + BLOCK * u, in + unit_size * u + last, BLOCK);
    }
    x->kernel->xex(schedule, data, data, early, units);
    uint8_t stolen[BLOCK];
    for (size_t u = 0; u < units; u++) {
        memcpy(stolen, data + BLOCK * u, rest);
        memcpy(data + BLOCK * u, in + unit_size * u + last + BLOCK, rest);
        memcpy(out + unit_size * u + last + BLOCK, stolen, rest);
    }
    x->kernel->xex(schedule, data, data, late, units);
    for (size_t u = 0; u < units; u++)
        memcpy(out + unit_size * u + last, data + BLOCK * u, BLOCK);
    csvf_wipe(pairs, 2 * BLOCK * units);
    csvf_wipe(early, BLOCK * units);
    csvf_wipe(late, BLOCK * units);
    csvf_wipe(data, BLOCK * units);
    csvf_wipe(stolen, rest);
}

/* Up to UNIT_BATCH consecutive units of any size, given their T_0. */
static void some_units(const csvf__xts *x, uint8_t *out, const uint8_t *in, const uint8_t *first_tweaks, size_t unit_size,
                       size_t units, int decrypt)
{
    if (unit_size % BLOCK)
        stealing_units(x, out, in, first_tweaks, unit_size, units, decrypt);
    else
        whole_units(x, out, in, first_tweaks, unit_size / BLOCK, units, decrypt);
}

/* ---- Public calls ------------------------------------------------------------------------------------------------- */

static int crypt_units(const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length, size_t unit_size, uint64_t first_unit,
                       int decrypt)
{
    if (!xts || (length && (!out || !in)))
        return CSVF_ERR_ARGUMENT;
    if (unit_size < CSVF_XTS_UNIT_MIN || unit_size > CSVF_XTS_UNIT_MAX)
        return CSVF_ERR_LENGTH;
    if (length == 0)
        return CSVF_OK;
    size_t units = length / unit_size;
    const size_t short_unit = length % unit_size;
    if (short_unit && short_unit < CSVF_XTS_UNIT_MIN)
        return CSVF_ERR_LENGTH;
    if (units + (short_unit != 0) - 1 > UINT64_MAX - first_unit)
        return CSVF_ERR_RANGE;
    if (csvf__overlap(out, in, length))
        return CSVF_ERR_OVERLAP;

    const csvf__xts *x = csvf__xts_of(xts);
    uint8_t tweaks[BLOCK * UNIT_BATCH];
    size_t most = 1;
    while (units) {
        const size_t count = units < UNIT_BATCH ? units : UNIT_BATCH;
        csvf__xts_unit_tweaks_run(xts, tweaks, first_unit, count);
        some_units(x, out, in, tweaks, unit_size, count, decrypt);
        most = count > most ? count : most;
        out += unit_size * count;
        in += unit_size * count;
        first_unit += count;
        units -= count;
    }
    if (short_unit) {
        csvf__xts_unit_tweaks_run(xts, tweaks, first_unit, 1);
        some_units(x, out, in, tweaks, short_unit, 1, decrypt);
    }
    csvf_wipe(tweaks, BLOCK * most);
    return CSVF_OK;
}

int csvf_xts_encrypt(const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length, size_t unit_size, uint64_t first_unit)
{
    return crypt_units(xts, out, in, length, unit_size, first_unit, 0);
}

int csvf_xts_decrypt(const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length, size_t unit_size, uint64_t first_unit)
{
    return crypt_units(xts, out, in, length, unit_size, first_unit, 1);
}

static int crypt_unit(const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length, const uint8_t tweak[16], int decrypt)
{
    if (!xts || !out || !in || !tweak)
        return CSVF_ERR_ARGUMENT;
    if (length < CSVF_XTS_UNIT_MIN || length > CSVF_XTS_UNIT_MAX)
        return CSVF_ERR_LENGTH;
    if (csvf__overlap(out, in, length) || csvf__share_bytes(out, length, tweak, BLOCK))
        return CSVF_ERR_OVERLAP;
    const csvf__xts *x = csvf__xts_of(xts);
    uint8_t first_tweak[BLOCK];
    x->kernel->ecb(&x->tweak, first_tweak, tweak, 1);
    some_units(x, out, in, first_tweak, length, 1, decrypt);
    csvf_wipe(first_tweak, sizeof first_tweak);
    return CSVF_OK;
}

int csvf_xts_encrypt_unit(const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length, const uint8_t tweak[16])
{
    return crypt_unit(xts, out, in, length, tweak, 0);
}

int csvf_xts_decrypt_unit(const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length, const uint8_t tweak[16])
{
    return crypt_unit(xts, out, in, length, tweak, 1);
}

static int crypt_span(const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length, uint64_t unit, size_t offset,
                      int decrypt)
{
    if (!xts || (length && (!out || !in)))
        return CSVF_ERR_ARGUMENT;
    if (length % BLOCK)
        return CSVF_ERR_LENGTH;
    if (offset % BLOCK)
        return CSVF_ERR_ALIGNMENT;
    if (length > CSVF_XTS_UNIT_MAX || offset > CSVF_XTS_UNIT_MAX - length)
        return CSVF_ERR_RANGE;
    if (csvf__overlap(out, in, length))
        return CSVF_ERR_OVERLAP;
    if (length == 0)
        return CSVF_OK;
    uint8_t first_tweak[BLOCK];
    csvf__xts_unit_tweaks_run(xts, first_tweak, unit, 1);
    csvf__xts_span(xts, out, in, length / BLOCK, first_tweak, offset / BLOCK, decrypt);
    csvf_wipe(first_tweak, sizeof first_tweak);
    return CSVF_OK;
}

int csvf_xts_encrypt_span(const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length, uint64_t unit, size_t offset)
{
    return crypt_span(xts, out, in, length, unit, offset, 0);
}

int csvf_xts_decrypt_span(const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length, uint64_t unit, size_t offset)
{
    return crypt_span(xts, out, in, length, unit, offset, 1);
}

/* Lines from the first tweaks of their pages, by a kernel that has no call for that. */
static void lines_of_blocks(const csvf__xts *x, uint8_t *out, const uint8_t *in, const uint8_t *bases, const uint32_t *powers,
                            size_t count, int decrypt)
{
    uint8_t tweaks[BLOCK * LINE_BLOCKS * LINE_BATCH];
    x->kernel->tweaks(x->standard, tweaks, bases, powers, LINE_BLOCKS, count);
    x->kernel->xex(schedule_of(x, decrypt), out, in, tweaks, LINE_BLOCKS * count);
    csvf_wipe(tweaks, CSVF_LINE_BYTES * count);
}

/* Up to LINE_BATCH lines. Neighbours in the list that lie in one page share the encryption of its tweak. */
static void some_lines(const csvf_xts *xts, uint8_t *out, const uint8_t *in, const uint64_t *addresses, size_t count, int decrypt)
{
    const csvf__xts *x = csvf__xts_of(xts);
    uint8_t bases[BLOCK * LINE_BATCH], page_tweaks[BLOCK * LINE_BATCH];
    uint32_t powers[LINE_BATCH];
    uint16_t page_of[LINE_BATCH];
    size_t distinct = 0;
    uint64_t before = UINT64_MAX;   /* no page has this number */
    for (size_t i = 0; i < count; i++) {
        const uint64_t page = addresses[i] / CSVF_PAGE_BYTES;
        distinct += page != before;
        before = page;
        put_unit(page_tweaks + BLOCK * (distinct - 1), page);
        page_of[i] = (uint16_t)(distinct - 1);
        powers[i] = (uint32_t)(addresses[i] % CSVF_PAGE_BYTES / BLOCK);
    }
    x->kernel->ecb(&x->tweak, page_tweaks, page_tweaks, distinct);
    const uint8_t *each = page_tweaks;
    if (distinct != count) {
        for (size_t i = 0; i < count; i++)
            memcpy(bases + BLOCK * i, page_tweaks + BLOCK * page_of[i], BLOCK);
        each = bases;
    }
    if (x->kernel->lines)
        x->kernel->lines(schedule_of(x, decrypt), x->standard, out, in, each, powers, count);
    else
        lines_of_blocks(x, out, in, each, powers, count, decrypt);
    csvf_wipe(bases, each == bases ? BLOCK * count : 0);
    csvf_wipe(page_tweaks, BLOCK * distinct);
}

static int crypt_lines(const csvf_xts *xts, uint8_t *out, const uint8_t *in, const uint64_t *addresses, size_t count, int decrypt)
{
    if (!xts || (count && (!out || !in || !addresses)) || count > SIZE_MAX / CSVF_LINE_BYTES)
        return CSVF_ERR_ARGUMENT;
    uint64_t all = 0;
    for (size_t i = 0; i < count; i++)
        all |= addresses[i];
    if (all % CSVF_LINE_BYTES)
        return CSVF_ERR_ALIGNMENT;
    if (csvf__overlap(out, in, CSVF_LINE_BYTES * count) ||
        csvf__share_bytes(out, CSVF_LINE_BYTES * count, addresses, count * sizeof *addresses))
        return CSVF_ERR_OVERLAP;
    while (count) {
        const size_t batch = count < LINE_BATCH ? count : LINE_BATCH;
        some_lines(xts, out, in, addresses, batch, decrypt);
        out += CSVF_LINE_BYTES * batch;
        in += CSVF_LINE_BYTES * batch;
        addresses += batch;
        count -= batch;
    }
    return CSVF_OK;
}

int csvf_xts_encrypt_lines(const csvf_xts *xts, uint8_t *out, const uint8_t *in, const uint64_t *addresses, size_t count)
{
    return crypt_lines(xts, out, in, addresses, count, 0);
}

int csvf_xts_decrypt_lines(const csvf_xts *xts, uint8_t *out, const uint8_t *in, const uint64_t *addresses, size_t count)
{
    return crypt_lines(xts, out, in, addresses, count, 1);
}
