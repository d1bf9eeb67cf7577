#define _POSIX_C_SOURCE 200809L
/* A trace of everything that happens in an engine, by its observer, while a guest works through a core's caches; the same bytes at every run,
 * since the keys come from a seed. Then the state is kept in a file and comes back in another engine. */
#include <csvfast.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

enum { DRAM_BYTES = 1 << 20 };

static const char seed[] = "experiment 17";     /* INSECURE: whoever knows the seed has the keys */

static void need(int status, const char *what)
{
    if (status != CSVF_OK) {
        fprintf(stderr, "%s: %s\n", what, csvf_status_text(status));
        exit(1);
    }
}

static void print_event(void *file, const csvf_event *event)
{
    static const char *const names[] = {"?", "install", "remove", "read", "write", "launch"};
    const char *name = names[event->kind >= CSVF_EVENT_INSTALL && event->kind <= CSVF_EVENT_LAUNCH ? event->kind : 0];
    if (event->kind == CSVF_EVENT_INSTALL || event->kind == CSVF_EVENT_REMOVE)
        fprintf(file, "%-8sasid %" PRIu32 " generation %" PRIu64 "\n", name, event->asid, event->generation);
    else
        fprintf(file, "%-8sasid %" PRIu32 " %#08" PRIx64 " +%" PRIu64 "%s\n", name, event->asid, event->address, event->length,
                event->is_encrypted ? " encrypted" : "");
}

static csvf_engine *make_engine(void)
{
    csvf_engine *engine;
    need(csvf_engine_create(&engine, DRAM_BYTES, NULL), "csvf_engine_create");
    need(csvf_engine_set_deterministic_insecure(engine, seed, sizeof seed - 1), "seed");
    return engine;
}

int main(void)
{
    csvf_cache *cache;
    char greeting[16] = "hello, guest", back[16];
    need(csvf_init(), "csvf_init");
    csvf_engine *engine = make_engine();
    need(csvf_engine_set_observer(engine, print_event, stdout), "observer");
    need(csvf_asid_generate(engine, 1), "key");
    need(csvf_write(engine, 0, 0x2000, greeting, sizeof greeting), "host's write");
    need(csvf_encrypt_in_place(engine, 1, 0x2000, 4096), "launch");

    need(csvf_cache_create(&cache, engine, NULL), "cache");
    need(csvf_cache_read(cache, back, sizeof back, 1, 0x2000, 1), "fill");      /* one line comes from DRAM */
    need(csvf_cache_write(cache, 1, 0x2008, "caches", 6, 1), "hit");            /* nothing is seen at the DRAM */
    csvf_cache_write_back(cache);                                               /* WBINVD: the line goes there */
    csvf_cache_fabric_flush(cache);
    csvf_cache_destroy(cache);

    /* Elsewhere: the memory comes back, the keys do not; from the seed the same one is made again. */
    FILE *file = tmpfile();
    if (!file) {
        perror("tmpfile");
        return 1;
    }
    need(csvf_engine_checkpoint(engine, fileno(file), NULL, 0), "checkpoint");
    csvf_engine *other = make_engine();
    rewind(file);
    need(csvf_engine_restore(other, fileno(file), NULL, 0), "restore");
    fclose(file);
    need(csvf_asid_generate(other, 1), "the same key");
    need(csvf_read(other, back, sizeof back, 1, 0x2000), "read");
    printf("restored: %.16s\n", back);
    csvf_engine_destroy(other);
    csvf_engine_destroy(engine);
    return 0;
}
