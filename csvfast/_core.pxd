"""C declarations of csvfast.h, for this binding and for other Cython code that links libcsvfast.

The header is the reference; `csvfast.get_include()` says where it is.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "csvfast.h" nogil:
    enum:
        CSVF_PAGE_BYTES
        CSVF_LINE_BYTES
        CSVF_BLOCK_BYTES
        CSVF_XTS_KEY_BYTES
        CSVF_SM4_KEY_BYTES
        CSVF_SM3_BYTES
        CSVF_SM3_BLOCK_BYTES
        CSVF_SM2_BYTES
        CSVF_SM2_POINT_BYTES
        CSVF_SM2_SIGNATURE_BYTES
        CSVF_SM2_ENCRYPTION_OVERHEAD
        CSVF_SM2_ID_MAX
        CSVF_XTS_UNIT_MIN
        CSVF_XTS_UNIT_MAX

        CSVF_OK
        CSVF_ERR_ARGUMENT
        CSVF_ERR_LENGTH
        CSVF_ERR_RANGE
        CSVF_ERR_ALIGNMENT
        CSVF_ERR_OVERLAP
        CSVF_ERR_KEY
        CSVF_ERR_ASID
        CSVF_ERR_BUSY
        CSVF_ERR_AUTHENTICATION
        CSVF_ERR_MEMORY
        CSVF_ERR_SYSTEM
        CSVF_ERR_KERNEL
        CSVF_ERR_STATE
        CSVF_ERR_LIMIT
        CSVF_ERR_POINT
        CSVF_ERR_FAULT

        CSVF_PRIMITIVE_COUNT
        CSVF_STANDARD_GB
        CSVF_STANDARD_IEEE
        CSVF_TWEAK_XTS
        CSVF_TWEAK_LINE

        CSVF_CACHE_LEVELS
        CSVF_CACHE_WAYS_MAX
        CSVF_FABRIC_LINES_MAX
        CSVF_REPLACE_LRU
        CSVF_REPLACE_FIFO
        CSVF_REPLACE_TREE
        CSVF_REPLACE_RANDOM
        CSVF_FILL_LINE
        CSVF_FILL_PAGE
        CSVF_ACCESS_READ
        CSVF_ACCESS_WRITE
        CSVF_ACCESS_EXECUTE
        CSVF_ACCESS_USER
        CSVF_STAGE_NONE
        CSVF_STAGE_GUEST
        CSVF_STAGE_NESTED

    const char *csvf_status_text(int status)
    int csvf_init()
    const char *csvf_version()
    const char *csvf_cpu_features()
    const char *csvf_primitive_name(int primitive)
    size_t csvf_kernel_count(int primitive)
    const char *csvf_kernel_at(int primitive, size_t index)
    int csvf_kernel_available(int primitive, const char *name)
    const char *csvf_kernel_name(int primitive)
    int csvf_force_kernel(int primitive, const char *name)
    void csvf_wipe(void *data, size_t length)
    int csvf_equal(const void *a, const void *b, size_t length)

    ctypedef struct csvf_sm3:
        pass
    ctypedef struct csvf_hmac_sm3:
        pass
    void csvf_sm3_init(csvf_sm3 *sm3)
    void csvf_sm3_update(csvf_sm3 *sm3, const void *data, size_t length)
    void csvf_sm3_final(csvf_sm3 *sm3, uint8_t *digest)
    void csvf_sm3_digest(uint8_t *digest, const void *data, size_t length)
    void csvf_sm3_many(uint8_t *digests, const uint8_t *const *data, const size_t *lengths, size_t count)
    void csvf_sm3_update_many(csvf_sm3 *const *streams, const uint8_t *const *data, const size_t *lengths, size_t count)
    int csvf_sm3_blocks(uint8_t *digests, const uint8_t *prefix, size_t prefix_length, const uint8_t *data,
                        size_t block_length, size_t count)
    void csvf_hmac_sm3_init(csvf_hmac_sm3 *hmac, const uint8_t *key, size_t key_length)
    void csvf_hmac_sm3_update(csvf_hmac_sm3 *hmac, const void *data, size_t length)
    void csvf_hmac_sm3_final(csvf_hmac_sm3 *hmac, uint8_t *mac)
    int csvf_sm3_kdf(uint8_t *out, size_t out_length, const uint8_t *secret, size_t secret_length)

    ctypedef struct csvf_sm2_private:
        pass
    ctypedef struct csvf_sm2_public:
        pass
    ctypedef struct csvf_sm2_table:
        pass
    ctypedef struct csvf_sm2_check:
        const csvf_sm2_public *public_key
        const csvf_sm2_table *table
        const uint8_t *signature
        const uint8_t *digest
    int csvf_sm2_private_init(csvf_sm2_private *private_key, const uint8_t *d)
    int csvf_sm2_private_generate(csvf_sm2_private *private_key)
    void csvf_sm2_private_bytes(uint8_t *d, const csvf_sm2_private *private_key)
    void csvf_sm2_private_public(csvf_sm2_public *public_key, const csvf_sm2_private *private_key)
    int csvf_sm2_public_init(csvf_sm2_public *public_key, const uint8_t *encoded, size_t length)
    void csvf_sm2_public_bytes(uint8_t *point, const csvf_sm2_public *public_key)
    int csvf_sm2_z(uint8_t *z, const csvf_sm2_public *public_key, const uint8_t *id, size_t id_length)
    int csvf_sm2_digest(uint8_t *digest, const csvf_sm2_public *public_key, const uint8_t *id, size_t id_length,
                        const void *message, size_t length)
    int csvf_sm2_sign_digest(uint8_t *signature, const csvf_sm2_private *private_key, const uint8_t *digest)
    int csvf_sm2_sign(uint8_t *signature, const csvf_sm2_private *private_key, const uint8_t *id, size_t id_length,
                      const void *message, size_t length)
    int csvf_sm2_sign_digest_with_nonce(uint8_t *signature, const csvf_sm2_private *private_key, const uint8_t *digest,
                                        const uint8_t *nonce)
    int csvf_sm2_table_create(csvf_sm2_table **table, const csvf_sm2_public *public_key)
    void csvf_sm2_table_destroy(csvf_sm2_table *table)
    size_t csvf_sm2_table_bytes()
    int csvf_sm2_verify_digest_var(const csvf_sm2_public *public_key, const csvf_sm2_table *table,
                                   const uint8_t *signature, const uint8_t *digest)
    int csvf_sm2_verify_var(const csvf_sm2_public *public_key, const csvf_sm2_table *table, const uint8_t *signature,
                            const uint8_t *id, size_t id_length, const void *message, size_t length)
    int csvf_sm2_verify_many_var(uint8_t *valid, const csvf_sm2_check *checks, size_t count)
    int csvf_sm2_encrypt(uint8_t *ciphertext, const csvf_sm2_public *public_key, const uint8_t *plaintext, size_t length)
    int csvf_sm2_encrypt_with_nonce(uint8_t *ciphertext, const csvf_sm2_public *public_key, const uint8_t *plaintext,
                                    size_t length, const uint8_t *nonce)
    int csvf_sm2_decrypt(uint8_t *plaintext, const csvf_sm2_private *private_key, const uint8_t *ciphertext,
                         size_t length)
    int csvf_sm2_agree(uint8_t *key, size_t key_length, uint8_t *confirmation, int initiator,
                       const csvf_sm2_private *private_key, const csvf_sm2_private *ephemeral, const uint8_t *z,
                       const csvf_sm2_public *peer, const csvf_sm2_public *peer_ephemeral, const uint8_t *peer_z)

    ctypedef struct csvf_sm4_ctr:
        pass
    ctypedef struct csvf_sm4_gcm:
        pass
    int csvf_sm4_ctr_init(csvf_sm4_ctr *ctr, const uint8_t *key, const uint8_t *counter)
    int csvf_sm4_ctr_crypt(csvf_sm4_ctr *ctr, uint8_t *out, const uint8_t *data, size_t length)
    int csvf_sm4_gcm_init(csvf_sm4_gcm *gcm, const uint8_t *key)
    int csvf_sm4_gcm_encrypt(const csvf_sm4_gcm *gcm, uint8_t *out, uint8_t *tag, size_t tag_length,
                             const uint8_t *nonce, size_t nonce_length, const uint8_t *aad, size_t aad_length,
                             const uint8_t *data, size_t length)
    int csvf_sm4_gcm_decrypt(const csvf_sm4_gcm *gcm, uint8_t *out, const uint8_t *tag, size_t tag_length,
                             const uint8_t *nonce, size_t nonce_length, const uint8_t *aad, size_t aad_length,
                             const uint8_t *data, size_t length)

    ctypedef struct csvf_xts:
        pass
    int csvf_xts_init(csvf_xts *xts, const uint8_t *key, int standard)
    int csvf_xts_encrypt(const csvf_xts *xts, uint8_t *out, const uint8_t *data, size_t length, size_t unit_size,
                         uint64_t first_unit)
    int csvf_xts_decrypt(const csvf_xts *xts, uint8_t *out, const uint8_t *data, size_t length, size_t unit_size,
                         uint64_t first_unit)
    int csvf_xts_encrypt_unit(const csvf_xts *xts, uint8_t *out, const uint8_t *data, size_t length,
                              const uint8_t *tweak)
    int csvf_xts_decrypt_unit(const csvf_xts *xts, uint8_t *out, const uint8_t *data, size_t length,
                              const uint8_t *tweak)
    int csvf_xts_encrypt_span(const csvf_xts *xts, uint8_t *out, const uint8_t *data, size_t length, uint64_t unit,
                              size_t offset)
    int csvf_xts_decrypt_span(const csvf_xts *xts, uint8_t *out, const uint8_t *data, size_t length, uint64_t unit,
                              size_t offset)
    int csvf_xts_encrypt_lines(const csvf_xts *xts, uint8_t *out, const uint8_t *data, const uint64_t *addresses,
                               size_t count)
    int csvf_xts_decrypt_lines(const csvf_xts *xts, uint8_t *out, const uint8_t *data, const uint64_t *addresses,
                               size_t count)

    ctypedef struct csvf_config:
        size_t struct_size
        uint64_t base_address
        uint32_t asid_max
        int standard
        int tweak_model
        uint32_t threads
    ctypedef struct csvf_engine:
        pass
    ctypedef struct csvf_stats:
        size_t struct_size
        uint64_t bytes_encrypted
        uint64_t bytes_decrypted
        uint64_t bytes_host
        uint64_t read_modify_writes
        uint64_t tweak_hits
        uint64_t tweak_misses
        uint64_t keys_installed
        uint64_t keys_removed
        uint32_t asids_active
    int csvf_engine_create(csvf_engine **engine, size_t size, const csvf_config *config)
    int csvf_engine_create_on(csvf_engine **engine, void *dram, size_t size, const csvf_config *config)
    int csvf_engine_create_file(csvf_engine **engine, int fd, uint64_t offset, size_t size, const csvf_config *config)
    void csvf_engine_destroy(csvf_engine *engine)
    uint8_t *csvf_engine_dram(csvf_engine *engine)
    size_t csvf_engine_size(const csvf_engine *engine)
    uint64_t csvf_engine_base(const csvf_engine *engine)
    int csvf_engine_sync(csvf_engine *engine)
    int csvf_asid_install(csvf_engine *engine, uint32_t asid, const uint8_t *key, size_t key_length)
    int csvf_asid_remove(csvf_engine *engine, uint32_t asid)
    int csvf_asid_state(const csvf_engine *engine, uint64_t *generation, int *installed, uint32_t asid)
    int csvf_write(csvf_engine *engine, uint32_t asid, uint64_t address, const void *data, size_t length)
    int csvf_read(csvf_engine *engine, void *data, size_t length, uint32_t asid, uint64_t address)
    int csvf_write_pages(csvf_engine *engine, uint32_t asid, uint64_t pfn, const void *data, size_t count)
    int csvf_read_pages(csvf_engine *engine, void *data, size_t count, uint32_t asid, uint64_t pfn)
    int csvf_write_line(csvf_engine *engine, uint32_t asid, uint64_t address, const uint8_t *data)
    int csvf_read_line(csvf_engine *engine, uint8_t *data, uint32_t asid, uint64_t address)
    int csvf_encrypt_in_place(csvf_engine *engine, uint32_t asid, uint64_t address, size_t length)
    int csvf_launch_update(csvf_engine *engine, csvf_sm3 *linear, uint8_t *digests, uint32_t asid, uint64_t address,
                           size_t length)
    int csvf_engine_stats(const csvf_engine *engine, csvf_stats *stats)

    enum:
        CSVF_EVENT_INSTALL
        CSVF_EVENT_REMOVE
        CSVF_EVENT_READ
        CSVF_EVENT_WRITE
        CSVF_EVENT_LAUNCH
    ctypedef struct csvf_event:
        uint64_t address
        uint64_t length
        uint64_t generation
        uint32_t asid
        int kind
        int is_encrypted
    ctypedef void (*csvf_observer)(void *context, const csvf_event *event) noexcept nogil
    int csvf_engine_set_observer(csvf_engine *engine, csvf_observer observer, void *context)
    int csvf_asid_generate(csvf_engine *engine, uint32_t asid)
    int csvf_engine_set_deterministic_insecure(csvf_engine *engine, const void *seed, size_t length)
    int csvf_engine_is_deterministic(const csvf_engine *engine)
    int csvf_engine_checkpoint(const csvf_engine *engine, int fd, const uint8_t *key, size_t key_length)
    int csvf_engine_restore(csvf_engine *engine, int fd, const uint8_t *key, size_t key_length)

    const uint64_t CSVF_NO_TABLE
    ctypedef struct csvf_cache_level:
        uint64_t size
        uint32_t ways
        int replacement
        uint32_t cycles
    ctypedef struct csvf_cache_config:
        size_t struct_size
        csvf_cache_level levels[3]
        uint32_t tlb_entries
        uint32_t tlb_ways
        int tlb_replacement
        int fill
        uint32_t fabric_lines
        uint32_t c_bit
        uint32_t memory_cycles
        uint32_t encryption_cycles
        uint32_t write_back_cycles
        uint64_t seed
    ctypedef struct csvf_cache:
        pass
    ctypedef struct csvf_cache_stats:
        size_t struct_size
        uint64_t reads
        uint64_t writes
        uint64_t walk_reads
        uint64_t hits[3]
        uint64_t misses
        uint64_t write_backs
        uint64_t lines_lost
        uint64_t bytes_decrypted
        uint64_t bytes_encrypted
        uint64_t tlb_hits
        uint64_t tlb_misses
        uint64_t faults
        uint64_t cycles
        uint64_t encryption_cycles
    ctypedef struct csvf_translation:
        uint64_t address
        int c_bit
        uint32_t allowed
        int fault_stage
        int fault_level
    ctypedef struct csvf_trace_access:
        uint64_t address
        uint32_t length
        uint32_t access
    int csvf_cache_defaults(csvf_cache_config *config)
    int csvf_cache_create(csvf_cache **cache, csvf_engine *engine, const csvf_cache_config *config)
    void csvf_cache_destroy(csvf_cache *cache)
    int csvf_cache_read(csvf_cache *cache, void *data, size_t length, uint32_t asid, uint64_t address, int c_bit)
    int csvf_cache_write(csvf_cache *cache, uint32_t asid, uint64_t address, const void *data, size_t length, int c_bit)
    int csvf_cache_flush(csvf_cache *cache, uint32_t asid, uint64_t address, size_t length, int c_bit)
    void csvf_cache_write_back(csvf_cache *cache)
    void csvf_cache_fabric_flush(csvf_cache *cache)
    int csvf_cache_contents(const csvf_cache *cache, uint64_t *lines, uint64_t *dirty, uint64_t *waiting, uint32_t asid)
    int csvf_cache_statistics(const csvf_cache *cache, csvf_cache_stats *stats, uint32_t asid)
    int csvf_cache_set_tables(csvf_cache *cache, uint32_t asid, uint64_t guest_root, uint64_t nested_root)
    int csvf_cache_translate(csvf_cache *cache, csvf_translation *translation, uint32_t asid, uint64_t address,
                             uint32_t access)
    int csvf_cache_read_virtual(csvf_cache *cache, void *data, size_t length, uint32_t asid, uint64_t address,
                                uint32_t access)
    int csvf_cache_write_virtual(csvf_cache *cache, uint32_t asid, uint64_t address, const void *data, size_t length,
                                 uint32_t access)
    int csvf_tlb_invalidate_page(csvf_cache *cache, uint32_t asid, uint64_t address)
    int csvf_tlb_flush_asid(csvf_cache *cache, uint32_t asid)
    void csvf_tlb_flush(csvf_cache *cache)
    int csvf_cache_run(csvf_cache *cache, size_t *done, uint32_t asid, const csvf_trace_access *accesses, size_t count,
                       int is_virtual, int c_bit)

    ctypedef struct csvf_pool:
        pass
    int csvf_pool_create(csvf_pool **pool, uint32_t threads)
    void csvf_pool_destroy(csvf_pool *pool)
    int csvf_pool_xts_encrypt(csvf_pool *pool, const csvf_xts *xts, uint8_t *out, const uint8_t *data, size_t length,
                              size_t unit_size, uint64_t first_unit)
    int csvf_pool_xts_decrypt(csvf_pool *pool, const csvf_xts *xts, uint8_t *out, const uint8_t *data, size_t length,
                              size_t unit_size, uint64_t first_unit)
    int csvf_pool_sm3_blocks(csvf_pool *pool, uint8_t *digests, const uint8_t *prefix, size_t prefix_length,
                             const uint8_t *data, size_t block_length, size_t count)
