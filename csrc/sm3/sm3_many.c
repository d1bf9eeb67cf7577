/* first version: single streams */
#include "../include/csvfast.h"
#include "sm3_common.h"
#include "sm3_kernel.h"
void csvf_sm3_many(uint8_t *digests, const uint8_t *const *data, const size_t *lengths, size_t count)
{
    for (size_t i = 0; i < count; i++)
        csvf_sm3_digest(digests + 32 * i, data[i], lengths[i]);
}
int csvf_sm3_blocks(uint8_t *digests, const uint8_t *prefix, size_t prefix_length, const uint8_t *data,
                    size_t block_length, size_t count)
{
    if ((prefix_length && !prefix) || (count && (!data || !digests)))
        return CSVF_ERR_ARGUMENT;
    if (prefix_length > 256 || block_length == 0)
        return CSVF_ERR_LENGTH;
    csvf_sm3 start, s;
    csvf_sm3_init(&start);
    csvf_sm3_update(&start, prefix, prefix_length);
    for (size_t i = 0; i < count; i++) {
        s = start;
        csvf_sm3_update(&s, data + i * block_length, block_length);
        csvf_sm3_final(&s, digests + 32 * i);
    }
    return CSVF_OK;
}
