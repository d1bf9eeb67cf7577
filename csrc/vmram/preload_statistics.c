/* The preload library's counters: a file that is whole whenever it is read. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "preload.h"

static int is_running;

static void write_json_text(FILE *file, const char *text)
{
    fputc('"', file);
    for (const unsigned char *c = (const unsigned char *)text; *c; c++)
        if (*c == '"' || *c == '\\')
            fprintf(file, "\\%c", *c);
        else if (*c < 0x20)
            fprintf(file, "\\u%04x", *c);
        else
            fputc(*c, file);
    fputc('"', file);
}

void preload_write_counters(FILE *file, const preload_mapping *about)
{
    csvf_vmram_stats s = {.struct_size = sizeof s};
    (void)!csvf_vmram_get_stats(about->vmram, &s);
    fputs("{\"dram\": ", file);
    write_json_text(file, about->path);
    const struct { const char *name; uint64_t value; } fields[] = {
        {"size", s.size}, {"window_size", s.window_size}, {"resident", s.resident}, {"resident_peak", s.resident_peak},
        {"faults", s.faults}, {"write_faults", s.write_faults}, {"pages_ahead", s.pages_ahead}, {"pages_zero", s.pages_zero},
        {"evictions", s.evictions}, {"evictions_clean", s.evictions_clean}, {"pages_discarded", s.pages_discarded},
        {"bytes_encrypted", s.bytes_encrypted}, {"bytes_decrypted", s.bytes_decrypted},
    };
    for (size_t f = 0; f < sizeof fields / sizeof fields[0]; f++)
        fprintf(file, ", \"%s\": %llu", fields[f].name, (unsigned long long)fields[f].value);
    fprintf(file, ", \"failure\": %d}", s.failure);
}

void preload_write_statistics(void)
{
    const char *path = getenv("CSVFAST_VMRAM_STATS");
    char temporary[PATH_MAX + 16];
    if (!path || !*path || strlen(path) >= PATH_MAX)
        return;
    snprintf(temporary, sizeof temporary, "%s.%d", path, (int)getpid());
    FILE *file = fopen(temporary, "we");
    if (!file)
        return;
    fputs("[", file);
    const char *separator = "";
    for (int i = 0; i < PRELOAD_MAPPINGS_MAX; i++) {
        if (!preload_mappings[i].vmram)
            continue;
        fputs(separator, file);
        preload_write_counters(file, &preload_mappings[i]);
        separator = ",\n ";
    }
    fputs("]\n", file);
    if (fclose(file) || rename(temporary, path))
        unlink(temporary);
}

static void *write_often(void *context)
{
    preload_is_inside = 1;
    for (;;) {
        pthread_mutex_lock(&preload_lock);
        preload_write_statistics();
        pthread_mutex_unlock(&preload_lock);
        usleep(500000);
    }
    return context;
}

void preload_start_statistics(void)
{
    const char *path = getenv("CSVFAST_VMRAM_STATS");
    if (is_running || !path || !*path)
        return;
    is_running = preload_start_thread(write_often, NULL) == 0;
    if (!is_running)
        preload_say("no thread for the statistics: %s is not written while the machine runs", path);
}
