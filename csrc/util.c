/* The few calls that belong to no primitive. All PURE. */
#include <string.h>

#include "include/csvfast.h"

const char *csvf_status_text(int status)
{
    switch (status) {
    case CSVF_OK: return "success";
    case CSVF_ERR_ARGUMENT: return "an argument is missing or outside its documented set";
    case CSVF_ERR_LENGTH: return "a length is too short, too long, or not the multiple it must be";
    case CSVF_ERR_RANGE: return "an address or span lies outside the memory, or a unit number would wrap";
    case CSVF_ERR_ALIGNMENT: return "an address is not on the boundary the call needs";
    case CSVF_ERR_OVERLAP: return "output and input overlap without being equal, or a buffer lies inside the DRAM";
    case CSVF_ERR_KEY: return "the halves K1 and K2 of the XTS key are equal, or an SM2 private key or nonce is out of range";
    case CSVF_ERR_ASID: return "the ASID is out of range, is 0 where a guest is needed, or has no key";
    case CSVF_ERR_BUSY: return "the ASID already has a key";
    case CSVF_ERR_AUTHENTICATION: return "the authentication tag does not match, or the signature is not valid";
    case CSVF_ERR_MEMORY: return "an allocation failed";
    case CSVF_ERR_SYSTEM: return "a system call failed (see errno)";
    case CSVF_ERR_KERNEL: return "no kernel of that name, or this CPU cannot run it";
    case CSVF_ERR_STATE: return "calls in the wrong order: the engine has had a key already";
    case CSVF_ERR_LIMIT: return "the limit on the amount of data under one key or nonce is reached";
    case CSVF_ERR_POINT: return "not an encoding of a point of the SM2 curve, or the point at infinity";
    case CSVF_ERR_FAULT: return "page tables give no translation for the access, or do not allow it";
    default: return "unknown status";
    }
}

const char *csvf_version(void) { return CSVF_VERSION_STRING; }

void csvf_wipe(void *data, size_t length)
{
    if (length == 0)
        return;
    memset(data, 0, length);
    /* The compiler must assume that this reads the bytes, so the memset above is never a dead store. */
    __asm__ __volatile__("" : : "r"(data) : "memory");
}

int csvf_equal(const void *a, const void *b, size_t length)
{
    const volatile uint8_t *x = a, *y = b;
    uint32_t difference = 0;
    for (size_t i = 0; i < length; i++)
        difference |= (uint32_t)(x[i] ^ y[i]);
    return (int)((difference - 1u) >> 31);   /* 0 - 1 wraps; 1..255 minus 1 does not */
}
