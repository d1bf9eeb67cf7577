/* libFuzzer target: a program of engine calls against a model. The model keeps, for every block, who wrote it last and what they wrote;
 * the owner must read its bytes back, everyone else must read exactly what decrypting the raw bytes under their key gives, and refused
 * calls must change nothing. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../include/csvfast.h"

#define CHECK(condition) do { if (!(condition)) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); abort(); } } while (0)

enum { PAGES = 6, SIZE = PAGES * 4096, ASIDS = 4 };

typedef struct model {
    uint8_t owner[SIZE / 16];      /* ASID that wrote the block with the key it has now; 0xFF = stale key */
    uint8_t plain[SIZE];
    csvf_xts key[ASIDS];
    uint8_t installed[ASIDS];
    uint64_t generation[ASIDS];
    uint64_t base;
    int standard, is_line_model;
} model;

/* What ASID `asid` must see in [offset, offset + length), computed from the raw bytes without the engine. */
static void expected_view(const model *m, const uint8_t *dram, uint8_t *view, uint32_t asid, size_t offset, size_t length)
{
    uint8_t page[4096];
    for (size_t done = 0; done < length;) {
        size_t at = offset + done, in_page = at % 4096, take = 4096 - in_page;
        if (take > length - done)
            take = length - done;
        const uint8_t *raw = dram + (at - in_page);
        if (asid == 0)
            memcpy(page, raw, 4096);
        else if (m->is_line_model)
            for (size_t block = 0; block < 4096; block += 16) {
                uint8_t tweak[16] = {0};
                for (int byte = 0; byte < 8; byte++)
                    tweak[byte] = (uint8_t)((m->base + (at - in_page) + block) / 64 >> 8 * byte);
                CHECK(csvf_xts_decrypt_unit(&m->key[asid], page + block, raw + block, 16, tweak) == CSVF_OK);
            }
        else
            CHECK(csvf_xts_decrypt(&m->key[asid], page, raw, 4096, 4096, (m->base + at) / 4096) == CSVF_OK);
        memcpy(view + done, page + in_page, take);
        done += take;
    }
}

static void wrote(model *m, const uint8_t *dram, uint32_t asid, size_t offset, const uint8_t *data, size_t length)
{
    uint8_t view[16];
    for (size_t i = 0; i < length;) {
        size_t at = offset + i, block = at / 16, in_block = at % 16, take = 16 - in_block;
        if (take > length - i)
            take = length - i;
        if (m->owner[block] != asid && take < 16) {   /* the rest of the block becomes whatever this ASID saw there */
            expected_view(m, dram, view, asid, block * 16, 16);
            memcpy(m->plain + block * 16, view, 16);
        }
        memcpy(m->plain + at, data + i, take);
        m->owner[block] = (uint8_t)asid;
        i += take;
    }
}

static uint64_t take(const uint8_t **data, size_t *size, size_t bytes)
{
    uint64_t value = 0;
    for (size_t i = 0; i < bytes && *size; i++, (*data)++, (*size)--)
        value |= (uint64_t)**data << (8 * i);
    return value;
}

static void check_all(const model *m, csvf_engine *engine)
{
    static uint8_t seen[SIZE], view[SIZE];
    for (uint32_t asid = 0; asid < ASIDS; asid++) {
        if (asid && !m->installed[asid])
            continue;
        CHECK(csvf_read(engine, seen, SIZE, asid, m->base) == CSVF_OK);
        expected_view(m, csvf_engine_dram(engine), view, asid, 0, SIZE);
        CHECK(memcmp(seen, view, SIZE) == 0);
        for (size_t block = 0; block < SIZE / 16; block++)
            if (m->owner[block] == asid)
                CHECK(memcmp(seen + 16 * block, m->plain + 16 * block, 16) == 0);
    }
}

static void step(model *m, csvf_engine *engine, uint8_t operation, const uint8_t **data, size_t *size)
{
    static uint8_t bytes[SIZE + 64], seen[SIZE + 64], before[SIZE];
    uint32_t asid = (uint32_t)take(data, size, 1) % (ASIDS + 1);
    uint64_t address = m->base + take(data, size, 2) % (SIZE + 48) - 16;
    size_t length = (size_t)take(data, size, 2) % (operation & 8 ? 80 : SIZE);
    uint8_t fill = (uint8_t)take(data, size, 1);
    int can = asid == 0 || (asid < ASIDS && m->installed[asid]);
    int inside = address >= m->base && address - m->base <= SIZE && length <= SIZE - (address - m->base);
    size_t offset = (size_t)(address - m->base);
    for (size_t i = 0; i < length; i++)
        bytes[i] = (uint8_t)(fill + i * 7 + i / 256);
    memcpy(before, csvf_engine_dram(engine), SIZE);
    uint8_t key[32];
    int status;
    switch (operation % 16 == 13 ? 8 : operation % 8) {
    case 0:
        memset(key, fill, 32);
        key[31] = (uint8_t)(fill + (length & 1));
        status = csvf_asid_install(engine, asid, key, 32);
        if (asid == 0 || asid >= ASIDS) { CHECK(status == CSVF_ERR_ASID); break; }
        if (m->installed[asid]) { CHECK(status != CSVF_OK); break; }
        if (!(length & 1)) { CHECK(status == CSVF_ERR_KEY); break; }
        CHECK(status == CSVF_OK && csvf_xts_init(&m->key[asid], key, m->standard) == CSVF_OK);
        m->installed[asid] = 1;
        m->generation[asid]++;
        break;
    case 1:
        status = csvf_asid_remove(engine, asid);
        CHECK((status == CSVF_OK) == (asid > 0 && asid < ASIDS && m->installed[asid]));
        if (status == CSVF_OK) {
            m->installed[asid] = 0;
            for (size_t i = 0; i < SIZE / 16; i++)
                if (m->owner[i] == asid)
                    m->owner[i] = 0xFF;
        }
        break;
    case 2: case 3:
        status = csvf_write(engine, asid, address, bytes, length);
        CHECK((status == CSVF_OK) == (can && inside));
        if (status == CSVF_OK) {
            uint8_t *now = csvf_engine_dram(engine);
            for (size_t i = 0; i < SIZE; i++)   /* blocks outside the write stay as they were */
                if (i / 16 < offset / 16 || i >= ((offset + length + 15) & ~(size_t)15))
                    CHECK(now[i] == before[i]);
            wrote(m, before, asid, offset, bytes, length);
        }
        break;
    case 4:
        memset(seen, 0x5A, length);
        status = csvf_read(engine, seen, length, asid, address);
        CHECK((status == CSVF_OK) == (can && inside));
        if (status == CSVF_OK) {
            expected_view(m, before, bytes, asid, offset, length);
            CHECK(memcmp(seen, bytes, length) == 0);
        } else {
            for (size_t i = 0; i < length; i++)
                CHECK(seen[i] == 0x5A);
        }
        break;
    case 5: {
        uint64_t pfn = address / 4096;
        size_t count = length / 4096;
        inside = pfn >= m->base / 4096 && pfn - m->base / 4096 <= PAGES && count <= PAGES - (pfn - m->base / 4096);
        status = csvf_write_pages(engine, asid, pfn, bytes, count);
        CHECK((status == CSVF_OK) == (can && inside));
        if (status == CSVF_OK)
            wrote(m, before, asid, (size_t)(pfn * 4096 - m->base), bytes, count * 4096);
        break;
    }
    case 8: {
        uint64_t pfn = address / 4096;
        size_t count = length / 64;    /* 8 selects short lengths */
        inside = pfn >= m->base / 4096 && pfn - m->base / 4096 <= PAGES && count <= PAGES - (pfn - m->base / 4096);
        memset(seen, 0x5A, sizeof seen);
        status = csvf_read_pages(engine, seen, count, asid, pfn);
        CHECK((status == CSVF_OK) == (can && inside));
        if (status == CSVF_OK) {
            expected_view(m, before, bytes, asid, (size_t)(pfn * 4096 - m->base), count * 4096);
            CHECK(memcmp(seen, bytes, count * 4096) == 0);
        }
        CHECK(seen[status == CSVF_OK ? count * 4096 : 0] == 0x5A);
        break;
    }
    case 6:
        inside = address >= m->base && address - m->base <= SIZE - 64;
        for (size_t i = length; i < 64; i++)
            bytes[i] = fill;
        status = csvf_write_line(engine, asid, address, bytes);
        CHECK((status == CSVF_OK) == (can && inside && address % 64 == 0));
        if (status == CSVF_OK) {
            wrote(m, before, asid, offset, bytes, 64);
            CHECK(csvf_read_line(engine, seen, asid, address) == CSVF_OK && memcmp(seen, bytes, 64) == 0);
        }
        break;
    default: {
        csvf_sm3 sm3;
        uint8_t digest[32], expected[32], pages[PAGES * 32];
        const int linear = fill & 1, tree = fill & 2;
        size_t unit = tree ? 4096 : 16;
        if (fill & 4) {     /* mostly aligned, or hardly any call would pass */
            address -= address % unit, length -= length % unit;
            inside = address >= m->base && address - m->base <= SIZE && length <= SIZE - (address - m->base);
            offset = (size_t)(address - m->base);
        }
        csvf_sm3_init(&sm3);
        status = csvf_launch_update(engine, linear ? &sm3 : NULL, tree ? pages : NULL, asid, address, length);
        CHECK((status == CSVF_OK) == (can && asid != 0 && inside && address % unit == 0 && length % unit == 0));
        if (status == CSVF_OK) {
            csvf_sm3_final(&sm3, digest);
            csvf_sm3_digest(expected, before + offset, linear ? length : 0);
            CHECK(memcmp(digest, expected, 32) == 0);
            for (size_t i = 0; tree && i < length / 4096; i++) {
                csvf_sm3_digest(expected, before + offset + 4096 * i, 4096);
                CHECK(memcmp(pages + 32 * i, expected, 32) == 0);
            }
            wrote(m, before, asid, offset, before + offset, length);
        }
    }
    }
    if (status != CSVF_OK)
        CHECK(memcmp(before, csvf_engine_dram(engine), SIZE) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static model m;
    csvf_config config = {.struct_size = sizeof config, .asid_max = ASIDS - 1};
    csvf_engine *engine = NULL;
    memset(&m, 0, sizeof m);
    config.base_address = m.base = take(&data, &size, 1) * 4096;
    const unsigned settings = (unsigned)take(&data, &size, 1);
    config.threads = settings % 8 == 0 ? 2 : 1;
    config.standard = m.standard = settings >> 3 & 1;
    config.tweak_model = m.is_line_model = settings >> 4 & 1;
    CHECK(csvf_engine_create(&engine, SIZE, &config) == CSVF_OK);
    for (int steps = 0; size && steps < 24; steps++)
        step(&m, engine, (uint8_t)take(&data, &size, 1), &data, &size);
    check_all(&m, engine);
    csvf_engine_destroy(engine);
    csvf_wipe(&m, sizeof m);
    return 0;
}
