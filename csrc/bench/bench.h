/* Harness of the C benchmark: what a case is, and how one is timed. Not part of the library. */
#ifndef CSVF_BENCH_H
#define CSVF_BENCH_H

#include <stddef.h>
#include <stdint.h>

#include "../include/csvfast.h"

/* One thing to measure. `run` does the whole buffer once. */
typedef struct bench_case {
    const char *name;       /* fixed: outside scripts compare by it */
    const char *variant;    /* "" or what distinguishes several cases of one name */
    const char *kernel;     /* the kernel in use, or "-" */
    const char *peer;       /* NULL = csvfast itself, else the other library's name */
    size_t buffer;          /* bytes one run covers; 0 = only operations count */
    size_t operations;      /* 0 = report bytes; else operations in one run, and cycles per operation are reported */
    unsigned threads;
    double reference_rate;  /* operations a second of the peer in the same run, to print the ratio; 0 = none */
    void (*run)(void *context);
    void *context;
} bench_case;

typedef struct bench_options {
    double seconds;         /* of one timed run */
    unsigned runs;          /* the median of them counts */
    unsigned threads;       /* 1, or the pool size for the threaded cases */
    int json, ieee;
    const char *filter;     /* substring of the name, or NULL */
    const char *kernel;     /* only this kernel, or NULL */
    size_t big;             /* the size beyond every cache: 64 MiB */
} bench_options;

/* Hz, by a chain of dependent additions: one per cycle on every x86-64. 0 where that is not known to hold. */
double bench_clock(void);

/* Memory, filled, on huge pages where possible; exits on failure. Released at exit. */
uint8_t *bench_memory(size_t length);

/* Does this name pass --filter? Cases that are costly to set up ask first. */
int bench_wanted(const char *name);

/* Times and prints one case. Returns operations (without them, bytes) a second; 0 if options leave the case out. */
double bench_measure(const bench_case *c);

extern bench_options bench_settings;

void bench_own_cases(void);     /* cases.c */
void bench_peer_cases(void);    /* peers.c */
void bench_sm2_cases(void);     /* sm2_cases.c: its own and OpenSSL's, whose rates its ratios need */
void bench_cache_cases(void);   /* cache_cases.c */

typedef struct bench_sm2_rates {
    double sign, verify, encrypt, decrypt;      /* operations a second; 0 = not measured */
} bench_sm2_rates;
bench_sm2_rates bench_sm2_peer(size_t message_length);   /* sm2_peer.c */

/* Stops the program when a call that cannot fail here fails: a benchmark of an error path would be a lie. */
void bench_require(int ok, const char *what);

#endif
