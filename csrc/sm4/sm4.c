/* The SM4 kernels that are compiled in, most preferred first. */
#include "sm4_kernel.h"

const csvf_sm4_kernel *const csvf__sm4_kernels[] = {
#if defined(__x86_64__)
    &csvf__sm4_gfni_avx512,
    &csvf__sm4_gfni_avx2,
    &csvf__sm4_aesni_avx2,
#endif
    &csvf__sm4_portable,
    NULL
};
