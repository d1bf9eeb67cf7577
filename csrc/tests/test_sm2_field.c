/* The portable SM2 kernel's arithmetic at its limits. */
#define _GNU_SOURCE 1
#define csvf__sm2_portable tested_portable
#include "../sm2/sm2_portable.c"
#undef csvf__sm2_portable

#include "sm2_field_cases.h"

int main(void) { return run_field_cases(); }
