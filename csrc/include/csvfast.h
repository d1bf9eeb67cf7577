/* csvfast: HaiGuang (Hygon) CSV memory encryption and measurement in software.
 *
 * This header is the public C interface and its documentation; only csvfast_vmram.h (Linux) stands beside it. It is plain C11, needs no
 * other header of the project, and works from C++.
 *
 * Laws
 *   Argument order   context first, then OUT, then INOUT, then IN. A length stands right after its array; flags last.
 *   Results          functions that can fail return a csvf_status (0 = CSVF_OK, negative = error) and on failure have
 *                    written nothing to OUT unless the block says otherwise. void functions cannot fail.
 *   Memory           nothing is allocated outside functions named *_create; the caller allocates every other struct.
 *                    Structs are plain memory: no hidden pointers to themselves, may be moved or copied with '='.
 *                    Wipe copies that hold keys with csvf_wipe().
 *   Aliasing         OUT and IN of a transform may be the same pointer (in place) or must not overlap at all; an
 *                    overlap of unequal pointers is refused with CSVF_ERR_OVERLAP.
 *   Alignment        no buffer needs any alignment unless a block says so.
 *   Time             no function lets a secret (key, plaintext, derived value) decide a branch or index memory, except
 *                    functions whose names end in _var, which never see a secret. Lengths, addresses, ASIDs, unit
 *                    numbers and kernel names are public.
 *   Threads          each block says: PURE (safe from any thread at any time), PER-OBJECT (safe while no other thread
 *                    uses the same object), SHARED (many threads may use the same object at once).
 *   Fork             the child of a fork may use and destroy what it inherits; work then runs in the calling thread. Not so
 *                    if another thread was inside a call on the same engine or pool at the moment of the fork: its locks
 *                    and pins stay taken for ever in the child.
 *   Signals          no function may be called from a signal handler but csvf_wipe and csvf_equal, and no thread may be
 *                    cancelled or leave by longjmp inside a call. Worker threads block every signal sent to the process.
 *   Machine          64-bit little-endian CPUs; on others it does not compile. Linux and other systems with mmap and POSIX threads.
 *
 * Standards: SM3 GB/T 32905-2016, SM4 GB/T 32907-2016, modes GB/T 17964-2021 and IEEE 1619-2018, HMAC RFC 2104, GCM NIST SP 800-38D / RFC 8998,
 * KDF GB/T 32918.4-2016 5.4.3 (= ANSI X9.63), SM2 GB/T 32918.1..4-2016 on the curve of GB/T 32918.5-2017.
 */
#ifndef CSVFAST_H
#define CSVFAST_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__) && __GNUC__ >= 4
#  define CSVF_API extern __attribute__((visibility("default")))
#  define CSVF_MUST_CHECK __attribute__((warn_unused_result))
#else
#  define CSVF_API extern
#  define CSVF_MUST_CHECK
#endif

#define CSVF_VERSION_MAJOR 0
#define CSVF_VERSION_MINOR 1
#define CSVF_VERSION_PATCH 0
#define CSVF_VERSION_STRING "0.1.0"

#define CSVF_PAGE_BYTES 4096u     /* one page = one data unit of encrypted memory */
#define CSVF_LINE_BYTES 64u       /* one cache line */
#define CSVF_BLOCK_BYTES 16u      /* one SM4 block */
#define CSVF_XTS_KEY_BYTES 32u    /* K1 (data) then K2 (tweak) */
#define CSVF_SM4_KEY_BYTES 16u
#define CSVF_SM3_BYTES 32u        /* one SM3 digest */
#define CSVF_SM3_BLOCK_BYTES 64u
#define CSVF_XTS_UNIT_MIN 16u
#define CSVF_XTS_UNIT_MAX (16u << 20)

typedef enum csvf_status {
    CSVF_OK = 0,
    CSVF_ERR_ARGUMENT = -1,     /* a NULL pointer, an unknown constant, an argument outside its documented set */
    CSVF_ERR_LENGTH = -2,       /* a length is too short, too long, or not the multiple it must be; a file is too short */
    CSVF_ERR_RANGE = -3,        /* an address or span lies outside the memory, or a unit number would wrap */
    CSVF_ERR_ALIGNMENT = -4,    /* an address is not on the boundary the call needs */
    CSVF_ERR_OVERLAP = -5,      /* OUT and IN overlap without being equal */
    CSVF_ERR_KEY = -6,          /* the XTS key halves K1 and K2 are equal; an SM2 private key is outside 1 .. n - 2 */
    CSVF_ERR_ASID = -7,         /* the ASID is above the engine's limit, is 0 where a guest is needed, or has no key */
    CSVF_ERR_BUSY = -8,         /* the ASID already has a key: remove it first */
    CSVF_ERR_AUTHENTICATION = -9, /* a GCM tag or an SM2 C3 did not match (OUT has been wiped), or an SM2 signature is not valid */
    CSVF_ERR_MEMORY = -10,      /* an allocation failed */
    CSVF_ERR_SYSTEM = -11,      /* a system call failed; errno says how */
    CSVF_ERR_KERNEL = -12,      /* no kernel of that name, or this CPU cannot run it */
    CSVF_ERR_STATE = -13,       /* calls made in the wrong order: the engine has had a key already */
    CSVF_ERR_LIMIT = -14,       /* reserved: too much data under one key or nonce; GCM answers with CSVF_ERR_LENGTH */
    CSVF_ERR_POINT = -15,       /* not an encoding of a point of the SM2 curve, or the point at infinity where none may be */
    CSVF_ERR_FAULT = -16        /* page tables give no translation for the access, or do not allow it */
} csvf_status;

/* One line of English for a status. Never NULL. PURE. */
CSVF_API const char *csvf_status_text(int status);

/* ---- Library and kernels ------------------------------------------------------------------------------------------ */

typedef enum csvf_primitive {
    CSVF_PRIMITIVE_SM4 = 0,       /* all SM4 modes */
    CSVF_PRIMITIVE_SM3 = 1,       /* one SM3 stream */
    CSVF_PRIMITIVE_SM3_MANY = 2,  /* many independent SM3 messages */
    CSVF_PRIMITIVE_GHASH = 3,     /* GCM's universal hash */
    CSVF_PRIMITIVE_SM2 = 4,       /* SM2, one operation at a time */
    CSVF_PRIMITIVE_SM2_MANY = 5,  /* verification of many SM2 signatures */
    CSVF_PRIMITIVE_COUNT = 6
} csvf_primitive;

/* Chooses kernels from the CPU's features and from the environment, once. Every other function calls it when needed; call it
 * first to see the error of a bad environment.
 *   CSVFAST_KERNEL   one kernel name for every primitive that has a kernel of that name, or a comma-separated list of
 *                    primitive=name ("sm4=gfni-avx2,sm3=portable"). A name unknown to every primitive, or one this CPU
 *                    cannot run, is an error: nothing is silently replaced.
 *   CSVFAST_DISABLE  comma-separated CPU features to ignore: avx512, ifma, gfni, vaes, aes, avx2, bmi2, adx, pclmul, sha.
 * Returns: CSVF_OK, or CSVF_ERR_KERNEL (the portable kernels are then in use). PURE. */
CSVF_API int csvf_init(void);

/* "0.1.0". PURE. */
CSVF_API const char *csvf_version(void);

/* Space-separated names of the CPU features found that matter to a kernel ("aes pclmul avx2 bmi2 adx gfni vaes avx512 ifma sha"). PURE. */
CSVF_API const char *csvf_cpu_features(void);

/* "sm4", "sm3", "sm3-many", "ghash", "sm2", "sm2-many"; NULL for an unknown primitive. PURE. */
CSVF_API const char *csvf_primitive_name(int primitive);

/* Number of kernels compiled in for a primitive; 0 for an unknown primitive. PURE. */
CSVF_API size_t csvf_kernel_count(int primitive);

/* Name of a compiled-in kernel, index 0 being the most preferred; NULL past the end. PURE. */
CSVF_API const char *csvf_kernel_at(int primitive, size_t index);

/* 1 if this CPU can run the kernel of that name, else 0. PURE. */
CSVF_API int csvf_kernel_available(int primitive, const char *name);

/* Name of the kernel in use; NULL for an unknown primitive. SHARED. */
CSVF_API const char *csvf_kernel_name(int primitive);

/* Chooses a kernel by name, or by NULL goes back to the choice csvf_init made. Objects initialised earlier keep the
 * kernel they were initialised with; objects initialised later use this one.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT (primitive), CSVF_ERR_KERNEL (name). SHARED (atomic). */
CSVF_API int csvf_force_kernel(int primitive, const char *name);

/* Writes zeros that no compiler removes. PURE. */
CSVF_API void csvf_wipe(void *data, size_t length);

/* 1 if equal, 0 if not, in time that depends on the length only. PURE. */
CSVF_API int csvf_equal(const void *a, const void *b, size_t length);

/* ---- SM3 ---------------------------------------------------------------------------------------------------------- */

typedef struct csvf_sm3 { uint64_t opaque[16]; } csvf_sm3;
typedef struct csvf_hmac_sm3 { uint64_t opaque[48]; } csvf_hmac_sm3;

/* Streaming SM3. init, any number of updates, final; final leaves the object initialised anew. Copy the struct to fork a
 * stream. PER-OBJECT. */
CSVF_API void csvf_sm3_init(csvf_sm3 *sm3);
CSVF_API void csvf_sm3_update(csvf_sm3 *sm3, const void *data, size_t length);
CSVF_API void csvf_sm3_final(csvf_sm3 *sm3, uint8_t digest[32]);

/* SM3 of one buffer. PURE. */
CSVF_API void csvf_sm3_digest(uint8_t digest[32], const void *data, size_t length);

/* SM3 of many independent messages, in vector lanes.
 *   Out: digests   32 * count bytes, not overlapping the input
 *   In:  data      count pointers (one may be NULL where its length is 0)
 *        lengths   count lengths in bytes; they may differ
 * PURE. */
CSVF_API void csvf_sm3_many(uint8_t *digests, const uint8_t *const *data, const size_t *lengths, size_t count);

/* Many independent streams, each continued with bytes of its own, in vector lanes: as csvf_sm3_update for every one of them.
 *   InOut: streams count different streams
 *   In:    data    count pointers (one may be NULL where its length is 0)
 *          lengths count lengths in bytes; the lanes are fullest where they are much alike
 * PER-OBJECT: all of them are used by the calling thread alone. */
CSVF_API void csvf_sm3_update_many(csvf_sm3 *const *streams, const uint8_t *const *data, const size_t *lengths, size_t count);

/* SM3 of count consecutive blocks of block_length bytes, each preceded by the same prefix (the salt of dm-verity version 1):
 * digest i = SM3(prefix || block i).
 *   Out: digests   32 * count bytes, not overlapping the input
 *   In:  prefix    0 to 256 bytes; block_length > 0
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_LENGTH. PURE. */
CSVF_API int csvf_sm3_blocks(uint8_t *digests, const uint8_t *prefix, size_t prefix_length, const uint8_t *data,
                             size_t block_length, size_t count);

/* HMAC-SM3 (RFC 2104). init takes a key of any length; final leaves the object ready for another message under the same
 * key. PER-OBJECT. */
CSVF_API void csvf_hmac_sm3_init(csvf_hmac_sm3 *hmac, const uint8_t *key, size_t key_length);
CSVF_API void csvf_hmac_sm3_update(csvf_hmac_sm3 *hmac, const void *data, size_t length);
CSVF_API void csvf_hmac_sm3_final(csvf_hmac_sm3 *hmac, uint8_t mac[32]);

/* X9.63 key derivation with SM3: OUT = SM3(secret || BE32(1)) || SM3(secret || BE32(2)) || ... cut to out_length.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_LENGTH (out_length over 32 * (2^32 - 1)). PURE. */
CSVF_API CSVF_MUST_CHECK int csvf_sm3_kdf(uint8_t *out, size_t out_length, const uint8_t *secret, size_t secret_length);

/* ---- SM2 ---------------------------------------------------------------------------------------------------------- */
/* Numbers and coordinates are 32-byte big-endian, as in the standard; a public key or point is x || y (64 bytes), a signature r || s
 * (64 bytes). Hygon's little-endian 72-byte fields are the business of the layers above. Private keys, nonces, and everything derived
 * from them are secret; public keys, signatures, digests, identities and lengths are not. */

#define CSVF_SM2_BYTES 32u             /* one scalar or coordinate */
#define CSVF_SM2_POINT_BYTES 64u       /* x || y */
#define CSVF_SM2_SIGNATURE_BYTES 64u   /* r || s */
#define CSVF_SM2_ENCRYPTION_OVERHEAD 97u   /* C1 (04 || x || y) and C3 */
#define CSVF_SM2_ID_MAX 8191u          /* bytes of a user identity: its length in bits is a 16-bit number */

typedef struct csvf_sm2_private { uint64_t opaque[32]; } csvf_sm2_private;
typedef struct csvf_sm2_public { uint64_t opaque[16]; } csvf_sm2_public;
typedef struct csvf_sm2_table csvf_sm2_table;

/* Takes a private key d. Derives (1 + d)^-1 and the public key once.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_KEY (d is not in 1 .. n - 2). PER-OBJECT; afterwards the object is read only.
 * Wipe it with csvf_wipe(). */
CSVF_API CSVF_MUST_CHECK int csvf_sm2_private_init(csvf_sm2_private *private_key, const uint8_t d[32]);

/* A new private key from the operating system's generator. Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_SYSTEM. PER-OBJECT. */
CSVF_API CSVF_MUST_CHECK int csvf_sm2_private_generate(csvf_sm2_private *private_key);

/* The private key's 32 bytes: a secret, for storing it. PURE. */
CSVF_API void csvf_sm2_private_bytes(uint8_t d[32], const csvf_sm2_private *private_key);

/* The public key that belongs to it. PURE. */
CSVF_API void csvf_sm2_private_public(csvf_sm2_public *public_key, const csvf_sm2_private *private_key);

/* Takes a public key in one of the encodings of GB/T 32918.1 4.2.8: x || y (64 bytes), 04 || x || y, 06 or 07 || x || y (hybrid, the
 * parity is checked), 02 or 03 || x (compressed). Coordinates must be below p, the point on the curve and not infinity.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_LENGTH, CSVF_ERR_POINT. PER-OBJECT; afterwards the object is read only. */
CSVF_API CSVF_MUST_CHECK int csvf_sm2_public_init(csvf_sm2_public *public_key, const uint8_t *encoded, size_t length);

/* x || y. PURE. */
CSVF_API void csvf_sm2_public_bytes(uint8_t point[64], const csvf_sm2_public *public_key);

/* Z = SM3(ENTL || id || a || b || xG || yG || xP || yP), GB/T 32918.2 5.5.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_LENGTH (id over CSVF_SM2_ID_MAX). PURE. */
CSVF_API CSVF_MUST_CHECK int csvf_sm2_z(uint8_t z[32], const csvf_sm2_public *public_key, const uint8_t *id, size_t id_length);

/* e = SM3(Z || message), what is signed. Returns: as csvf_sm2_z. PURE. */
CSVF_API CSVF_MUST_CHECK int csvf_sm2_digest(uint8_t digest[32], const csvf_sm2_public *public_key, const uint8_t *id,
                                             size_t id_length, const void *message, size_t length);

/* Signs e. The nonce is derived from the private key, e, and 32 bytes of the operating system's generator together, so that it is
 * unpredictable if either the generator is good or the key secret, and never repeats for different e.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_SYSTEM (no randomness). SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_sm2_sign_digest(uint8_t signature[64], const csvf_sm2_private *private_key,
                                                  const uint8_t digest[32]);

/* Signs SM3(Z || message). Returns: as above, and CSVF_ERR_LENGTH (id). SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_sm2_sign(uint8_t signature[64], const csvf_sm2_private *private_key, const uint8_t *id,
                                           size_t id_length, const void *message, size_t length);

/* Signs e with the caller's nonce, for known-answer tests only: a nonce used twice or guessed gives the private key away.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_KEY (nonce outside 1 .. n - 1, or r = 0, r + k = n or s = 0: choose another). SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_sm2_sign_digest_with_nonce(uint8_t signature[64], const csvf_sm2_private *private_key,
                                                             const uint8_t digest[32], const uint8_t nonce[32]);

/* Multiples of a public key, computed once, that make each later verification with it several times faster. For keys that verify
 * often: roots, intermediate certificates, chips that report again and again.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_MEMORY. PURE; the table is read only. */
CSVF_API CSVF_MUST_CHECK int csvf_sm2_table_create(csvf_sm2_table **table, const csvf_sm2_public *public_key);
CSVF_API void csvf_sm2_table_destroy(csvf_sm2_table *table);   /* NULL is allowed. No call may be using it. */
CSVF_API size_t csvf_sm2_table_bytes(void);                    /* memory one table takes. PURE. */

/* Verifies a signature over e. `table` is that key's table or NULL.
 * Returns: CSVF_OK (valid), CSVF_ERR_AUTHENTICATION (not valid: r or s outside 1 .. n - 1, r + s = n, or the equation fails),
 * CSVF_ERR_ARGUMENT (NULL, or a table of another key). SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_sm2_verify_digest_var(const csvf_sm2_public *public_key, const csvf_sm2_table *table,
                                                        const uint8_t signature[64], const uint8_t digest[32]);
CSVF_API CSVF_MUST_CHECK int csvf_sm2_verify_var(const csvf_sm2_public *public_key, const csvf_sm2_table *table,
                                                 const uint8_t signature[64], const uint8_t *id, size_t id_length,
                                                 const void *message, size_t length);

/* One signature of many. */
typedef struct csvf_sm2_check {
    const csvf_sm2_public *public_key;
    const csvf_sm2_table *table;   /* that key's table, or NULL */
    const uint8_t *signature;      /* 64 bytes */
    const uint8_t *digest;         /* e, 32 bytes */
} csvf_sm2_check;

/* Verifies many signatures, each on its own merit: a bad one spoils no other. Keys, with tables and without, may be mixed. Eight
 * of a kind (with table, without) fill the lanes of the AVX-512 kernel. Nothing is allocated, so no table is made on the way: for a key
 * with more than some 60 signatures to verify (10 where they come one at a time) making its table first takes less time in all.
 *   Out: valid   count bytes, 1 = valid, 0 = not; all 0 on an error
 * Returns: CSVF_OK (look at valid), CSVF_ERR_ARGUMENT. SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_sm2_verify_many_var(uint8_t *valid, const csvf_sm2_check *checks, size_t count);

/* Public-key encryption, C1 || C3 || C2 with C1 = 04 || x || y, coordinates padded on the left to 32 bytes (GB/T 32918.4 6).
 *   Out: ciphertext   length + CSVF_SM2_ENCRYPTION_OVERHEAD bytes, not overlapping the plaintext
 *   In:  length       1 .. 2^32 - 1
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_LENGTH, CSVF_ERR_OVERLAP, CSVF_ERR_SYSTEM (no randomness). SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_sm2_encrypt(uint8_t *ciphertext, const csvf_sm2_public *public_key,
                                              const uint8_t *plaintext, size_t length);

/* The same with the caller's nonce, for known-answer tests only. Returns: as above, and CSVF_ERR_KEY (nonce outside 1 .. n - 1, or
 * one that gives an all-zero key stream). SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_sm2_encrypt_with_nonce(uint8_t *ciphertext, const csvf_sm2_public *public_key,
                                                         const uint8_t *plaintext, size_t length, const uint8_t nonce[32]);

/*   Out: plaintext   length - CSVF_SM2_ENCRYPTION_OVERHEAD bytes, not overlapping the ciphertext; wiped on failure
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_LENGTH, CSVF_ERR_OVERLAP, CSVF_ERR_POINT (C1), CSVF_ERR_AUTHENTICATION (C3, or an
 * all-zero key stream). SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_sm2_decrypt(uint8_t *plaintext, const csvf_sm2_private *private_key,
                                              const uint8_t *ciphertext, size_t length);

/* Key agreement (GB/T 32918.3 6.1). Both sides end with the same key; comparing confirmations tells them so.
 *   Out: key             key_length bytes, a secret; wiped on failure
 *        confirmation    S_B then S_A (32 bytes each: what the responder sends, what the initiator sends); NULL = not wanted
 *   In:  initiator       1 for user A of the standard, 0 for user B
 *        z, peer_z       csvf_sm2_z of one's own and of the peer's long-term key
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_LENGTH (key_length 0 or over 2^32 - 1), CSVF_ERR_POINT (the shared point is infinity).
 * SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_sm2_agree(uint8_t *key, size_t key_length, uint8_t *confirmation, int initiator,
                                            const csvf_sm2_private *private_key, const csvf_sm2_private *ephemeral,
                                            const uint8_t z[32], const csvf_sm2_public *peer,
                                            const csvf_sm2_public *peer_ephemeral, const uint8_t peer_z[32]);

/* ---- SM4: CTR and GCM --------------------------------------------------------------------------------------------- */

typedef struct csvf_sm4_ctr { uint64_t opaque[160]; } csvf_sm4_ctr;
typedef struct csvf_sm4_gcm { uint64_t opaque[320]; } csvf_sm4_gcm;

/* SM4-CTR, 128-bit big-endian counter that wraps. Streaming: a call may end inside a block and the next one goes on there.
 * Encryption and decryption are the same call. PER-OBJECT.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_OVERLAP. */
CSVF_API CSVF_MUST_CHECK int csvf_sm4_ctr_init(csvf_sm4_ctr *ctr, const uint8_t key[16], const uint8_t counter[16]);
CSVF_API CSVF_MUST_CHECK int csvf_sm4_ctr_crypt(csvf_sm4_ctr *ctr, uint8_t *out, const uint8_t *in, size_t length);

/* SM4-GCM. init takes the key once; one-shot calls leave the object reusable. Nonce 1 or more bytes (12 recommended), tag 12..16 (or 4, 8)
 * bytes. At most 2^36 - 32 bytes of data a call, and less than 2^61 of nonce and of AAD (else CSVF_ERR_LENGTH). The tag, nonce and
 * AAD may not overlap OUT, nor on encryption the tag any input. Decryption verifies before it releases: on a wrong tag OUT is
 * wiped and CSVF_ERR_AUTHENTICATION returned. A nonce must never be used twice under one key; nothing here can notice.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_LENGTH, CSVF_ERR_OVERLAP, CSVF_ERR_AUTHENTICATION.
 * init: PER-OBJECT. encrypt, decrypt: SHARED (the object is read only). */
CSVF_API CSVF_MUST_CHECK int csvf_sm4_gcm_init(csvf_sm4_gcm *gcm, const uint8_t key[16]);
CSVF_API CSVF_MUST_CHECK int csvf_sm4_gcm_encrypt(const csvf_sm4_gcm *gcm, uint8_t *out, uint8_t *tag, size_t tag_length,
                                                  const uint8_t *nonce, size_t nonce_length, const uint8_t *aad,
                                                  size_t aad_length, const uint8_t *in, size_t length);
CSVF_API CSVF_MUST_CHECK int csvf_sm4_gcm_decrypt(const csvf_sm4_gcm *gcm, uint8_t *out, const uint8_t *tag,
                                                  size_t tag_length, const uint8_t *nonce, size_t nonce_length,
                                                  const uint8_t *aad, size_t aad_length, const uint8_t *in,
                                                  size_t length);

/* ---- SM4-XTS ------------------------------------------------------------------------------------------------------ */

/* How the tweak is multiplied by alpha from block to block. The first block of a unit is the same in both. */
typedef enum csvf_standard {
    CSVF_STANDARD_GB = 0,   /* GB/T 17964-2021: bits numbered as in GHASH; the default of SM4-XTS in OpenSSL */
    CSVF_STANDARD_IEEE = 1  /* IEEE 1619-2018: as in AES-XTS */
} csvf_standard;

typedef struct csvf_xts { uint64_t opaque[400]; } csvf_xts;

/* Expands K1 || K2 once, for both directions.
 *   In: key   32 bytes; the halves must differ
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_KEY. PER-OBJECT; afterwards the object is read only. */
CSVF_API CSVF_MUST_CHECK int csvf_xts_init(csvf_xts *xts, const uint8_t key[32], int standard);

/* Encrypts or decrypts consecutive data units. The buffer is cut into units of unit_size bytes numbered first_unit,
 * first_unit + 1, ...; the last unit may be shorter but not under 16 bytes. Units whose length is no multiple of 16 use
 * ciphertext stealing. The tweak input of unit i is i as a 16-byte little-endian number.
 *   Out: out         length bytes
 *   In:  in          length bytes
 *        length      0 is allowed and does nothing
 *        unit_size   CSVF_XTS_UNIT_MIN .. CSVF_XTS_UNIT_MAX
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_LENGTH, CSVF_ERR_RANGE (unit number wraps), CSVF_ERR_OVERLAP. SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_xts_encrypt(const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length,
                                              size_t unit_size, uint64_t first_unit);
CSVF_API CSVF_MUST_CHECK int csvf_xts_decrypt(const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length,
                                              size_t unit_size, uint64_t first_unit);

/* One data unit of 16 bytes to CSVF_XTS_UNIT_MAX under a tweak input given as 16 raw bytes (the "IV" of other libraries), which may
 * not overlap OUT.
 * Returns: as csvf_xts_encrypt. SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_xts_encrypt_unit(const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length,
                                                   const uint8_t tweak[16]);
CSVF_API CSVF_MUST_CHECK int csvf_xts_decrypt_unit(const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length,
                                                   const uint8_t tweak[16]);

/* Whole blocks from anywhere inside one data unit, without the blocks before them.
 *   In: length   a multiple of 16
 *       unit     number of the data unit
 *       offset   byte offset of the first block inside the unit, a multiple of 16; offset + length <= CSVF_XTS_UNIT_MAX
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_LENGTH, CSVF_ERR_ALIGNMENT, CSVF_ERR_RANGE, CSVF_ERR_OVERLAP. SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_xts_encrypt_span(const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length,
                                                   uint64_t unit, size_t offset);
CSVF_API CSVF_MUST_CHECK int csvf_xts_decrypt_span(const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length,
                                                   uint64_t unit, size_t offset);

/* Many scattered 64-byte lines of 4096-byte units in one call. Line i stands at in + 64 i and goes to out + 64 i; its
 * place in memory is the byte address addresses[i] (a multiple of 64): unit = address / 4096. OUT may not overlap the addresses.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_ALIGNMENT, CSVF_ERR_OVERLAP. SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_xts_encrypt_lines(const csvf_xts *xts, uint8_t *out, const uint8_t *in,
                                                    const uint64_t *addresses, size_t count);
CSVF_API CSVF_MUST_CHECK int csvf_xts_decrypt_lines(const csvf_xts *xts, uint8_t *out, const uint8_t *in,
                                                    const uint64_t *addresses, size_t count);

/* ---- Engine: encrypted DRAM with one key per ASID ----------------------------------------------------------------- */

/* What the tweak of a block is made of. */
typedef enum csvf_tweak_model {
    CSVF_TWEAK_XTS = 0,   /* SM4-XTS, data unit = page, unit number = page frame number (default) */
    CSVF_TWEAK_LINE = 1   /* one tweak per 64-byte line shared by its four blocks, T = SM4(K2, LE64(address >> 6) || 0^8):
                             reproduces the leak published for real parts (inferred construction), for experiments */
} csvf_tweak_model;

typedef struct csvf_config {
    size_t struct_size;     /* sizeof(csvf_config): lets the struct grow without breaking callers */
    uint64_t base_address;  /* system physical address of the first byte; a multiple of 4096. Default 0 */
    uint32_t asid_max;      /* highest ASID, 1 .. 65535. 0 = 509 */
    int standard;           /* csvf_standard */
    int tweak_model;        /* csvf_tweak_model */
    uint32_t threads;       /* threads of a bulk call, the caller counted, at most 1024. 0 or 1 = everything runs in the calling thread */
} csvf_config;

typedef struct csvf_engine csvf_engine;

/* Bytes count where they really go through SM4: an access to part of a 16-byte block counts the whole block, an unaligned write counts
 * its edge blocks (a short one all its blocks) as decrypted too, launch calls count as encryption. Refused calls count nothing. */
typedef struct csvf_stats {
    size_t struct_size;             /* in: sizeof(csvf_stats) */
    uint64_t bytes_encrypted;       /* through SM4, under a guest's ASID */
    uint64_t bytes_decrypted;
    uint64_t bytes_host;            /* moved unencrypted by calls of ASID 0; access through csvf_engine_dram is not seen */
    uint64_t read_modify_writes;    /* edge blocks read, merged and written again by unaligned writes */
    uint64_t tweak_hits;            /* tweaks of single pages (line model: single lines) found in the tweak cache; bulk calls make */
    uint64_t tweak_misses;          /* theirs together and count in neither */
    uint64_t keys_installed;        /* since creation */
    uint64_t keys_removed;
    uint32_t asids_active;          /* ASIDs with a key now */
} csvf_stats;

/* Makes an engine over memory it allocates (zeroed, page aligned, huge pages where the system gives them).
 *   Out: engine   *engine is set on success, NULL on failure
 *   In:  size     bytes of DRAM, a multiple of 4096, at least 4096; base_address + size must stay below 2^64
 *        config   NULL = defaults. One of a newer version (a longer struct) is accepted if what this one does not know is zero
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_LENGTH, CSVF_ERR_ALIGNMENT, CSVF_ERR_MEMORY, CSVF_ERR_SYSTEM. PURE. */
CSVF_API CSVF_MUST_CHECK int csvf_engine_create(csvf_engine **engine, size_t size, const csvf_config *config);

/* The same over memory the caller owns and keeps alive until csvf_engine_destroy (gem5's backing store, a QEMU RAM file,
 * Unicorn's mem_map_ptr). dram must be aligned to 64 bytes. What stands in it is kept. */
CSVF_API CSVF_MUST_CHECK int csvf_engine_create_on(csvf_engine **engine, void *dram, size_t size,
                                                   const csvf_config *config);

/* The same over a shared mapping of a file from offset (a multiple of 4096) on; the file must already be offset + size long. The
 * descriptor may be closed afterwards. Should somebody cut the file later, or the file system run full while a hole is filled, the
 * access raises SIGBUS, as for every shared mapping: allocate the file (posix_fallocate) and keep others off it. */
CSVF_API CSVF_MUST_CHECK int csvf_engine_create_file(csvf_engine **engine, int fd, uint64_t offset, size_t size,
                                                     const csvf_config *config);

/* Wipes every key, ends worker threads, unmaps what the engine mapped. NULL is allowed. The DRAM keeps its ciphertext when the
 * caller or a file owns it. No other call on the engine may be running. */
CSVF_API void csvf_engine_destroy(csvf_engine *engine);

/* The DRAM as the host sees it: ciphertext of every guest, plaintext of ASID 0. Valid until destroy. NULL or 0 for a NULL engine. PURE. */
CSVF_API uint8_t *csvf_engine_dram(csvf_engine *engine);
CSVF_API size_t csvf_engine_size(const csvf_engine *engine);
CSVF_API uint64_t csvf_engine_base(const csvf_engine *engine);

/* Writes a file-backed engine's DRAM to its file (msync); does nothing for the others. SHARED.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_SYSTEM. */
CSVF_API CSVF_MUST_CHECK int csvf_engine_sync(csvf_engine *engine);

/* Installs a key. The engine keeps only its expanded form. The ASID's generation rises by one.
 *   In: asid   1 .. asid_max (0 is the host and never encrypted)
 *       key    K1 || K2
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_LENGTH (key_length is not 32), CSVF_ERR_KEY, CSVF_ERR_ASID, CSVF_ERR_BUSY (it
 * has a key, or one is being installed or removed right now). SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_asid_install(csvf_engine *engine, uint32_t asid, const uint8_t *key,
                                               size_t key_length);

/* Removes and wipes a key, its cached tweaks too; waits for accesses under way with it. After the return no thread can use the
 * key. Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_ASID. SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_asid_remove(csvf_engine *engine, uint32_t asid);

/* Out: *generation = how many keys this ASID has had (0 = none yet); *installed = 1 if it has one now. Either may be NULL.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_ASID. SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_asid_state(const csvf_engine *engine, uint64_t *generation, int *installed,
                                             uint32_t asid);

/* Memory access as the guest `asid` (C-bit set); asid 0 is the host and moves bytes as they are. Addresses are system physical
 * bytes. Reading what another ASID wrote gives noise and CSVF_OK, as on the hardware.
 *
 * SHARED: any number of threads may call these on one engine. Accesses of different threads under one ASID to different bytes are
 * each done in full, also when the bytes share a 16-byte block (encrypt_in_place and launch take whole blocks: theirs must be
 * nobody else's meanwhile). When threads write the same bytes at once without agreement, or under different ASIDs the same block,
 * those blocks end as one of the values or as noise, never anything else.
 *
 *   write, read   any address, any length; edge blocks of writes are read, merged and encrypted again
 *   write_pages,  whole pages from page frame pfn on; with threads > 1 in the config large runs use the workers
 *   read_pages
 *   write_line,   one 64-byte line at an address that is a multiple of 64
 *   read_line
 *   encrypt_in_place   [address, address + length) holds plaintext put there by ASID 0; becomes that guest's memory.
 *                      16-byte aligned (LAUNCH_UPDATE_DATA's rule)
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_LENGTH, CSVF_ERR_RANGE, CSVF_ERR_ALIGNMENT, CSVF_ERR_ASID, CSVF_ERR_OVERLAP (the
 * caller's buffer lies inside the DRAM). */
CSVF_API CSVF_MUST_CHECK int csvf_write(csvf_engine *engine, uint32_t asid, uint64_t address, const void *data,
                                        size_t length);
CSVF_API CSVF_MUST_CHECK int csvf_read(csvf_engine *engine, void *data, size_t length, uint32_t asid, uint64_t address);
CSVF_API CSVF_MUST_CHECK int csvf_write_pages(csvf_engine *engine, uint32_t asid, uint64_t pfn, const void *data,
                                              size_t count);
CSVF_API CSVF_MUST_CHECK int csvf_read_pages(csvf_engine *engine, void *data, size_t count, uint32_t asid, uint64_t pfn);
CSVF_API CSVF_MUST_CHECK int csvf_write_line(csvf_engine *engine, uint32_t asid, uint64_t address,
                                             const uint8_t data[64]);
CSVF_API CSVF_MUST_CHECK int csvf_read_line(csvf_engine *engine, uint8_t data[64], uint32_t asid, uint64_t address);
CSVF_API CSVF_MUST_CHECK int csvf_encrypt_in_place(csvf_engine *engine, uint32_t asid, uint64_t address, size_t length);

/* Launch: measures the plaintext in DRAM and encrypts it in place in the same pass (chunks that stay in cache).
 *   Out/InOut: linear    csvf_sm3 that continues over the plaintext in address order (the launch digest of section 6); NULL = not wanted
 *              digests   32 bytes per page: SM3 of each plaintext page, the leaves of the page tree; NULL = not wanted. Needs
 *                        page-aligned address and length.
 *   In: address, length  multiples of 16
 * Returns: as csvf_encrypt_in_place. SHARED, but `linear` is the caller's. */
CSVF_API CSVF_MUST_CHECK int csvf_launch_update(csvf_engine *engine, csvf_sm3 *linear, uint8_t *digests, uint32_t asid,
                                                uint64_t address, size_t length);

/* Out: *stats, a sum that is exact when no other call is running. Returns: CSVF_OK, CSVF_ERR_ARGUMENT. SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_engine_stats(const csvf_engine *engine, csvf_stats *stats);

/* ---- Watching, repeating and keeping an engine ----------------------------------------------------------------------- */

typedef enum csvf_event_kind {
    CSVF_EVENT_INSTALL = 1, /* a key was installed for the ASID */
    CSVF_EVENT_REMOVE = 2,  /* the ASID's key was removed */
    CSVF_EVENT_READ = 3,    /* csvf_read and its kin, fills of a cache */
    CSVF_EVENT_WRITE = 4,   /* csvf_write and its kin, write-backs of a cache */
    CSVF_EVENT_LAUNCH = 5   /* csvf_launch_update, csvf_encrypt_in_place */
} csvf_event_kind;

/* What happened. Later versions may append fields: look at an event by its pointer, and do not copy it with '='. */
typedef struct csvf_event {
    uint64_t address;       /* system physical; 0 for keys */
    uint64_t length;        /* bytes, never 0; 0 for keys */
    uint64_t generation;    /* of the key, for CSVF_EVENT_INSTALL and CSVF_EVENT_REMOVE; else 0 */
    uint32_t asid;          /* 0 = the host */
    int kind;               /* csvf_event_kind */
    int is_encrypted;       /* 1 if the bytes went through SM4: every access but the host's */
} csvf_event;

typedef void (*csvf_observer)(void *context, const csvf_event *event);

/* Calls `observer` after each call that succeeded, in the thread that made it and before it returns; refused calls and those of no
 * bytes are not told. The data are not shown: an observer that wants them reads them. It may call the engine (which is observed, too),
 * but neither destroy it nor set an observer, and with several threads it is called from several at once. csvf_engine_dram's memory
 * and csvf_vmram's windows are not watched. NULL ends it. Without an observer a call costs one comparison more.
 * No other call on the engine may be running.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT. */
CSVF_API CSVF_MUST_CHECK int csvf_engine_set_observer(csvf_engine *engine, csvf_observer observer, void *context);

/* Installs a key that the engine makes and nobody ever sees: 32 bytes of the system's generator; in deterministic mode those of
 * csvf_engine_set_deterministic_insecure.
 * Returns: as csvf_asid_install, and CSVF_ERR_SYSTEM (no randomness). SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_asid_generate(csvf_engine *engine, uint32_t asid);

/* INSECURE, for experiments that must give the same bytes each time: from now on csvf_asid_generate derives every key from the seed, and
 * whoever knows or guesses the seed reads every guest. Key of an ASID's generation g (the first key is g = 1) =
 *     csvf_sm3_kdf(SM3(seed) || "csvfast insecure deterministic key" || asid, 4 bytes || g, 8 bytes; little-endian), 32 bytes.
 * There is no way back. No other call on the engine may be running.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_STATE (the engine has had a key, or a seed). */
CSVF_API CSVF_MUST_CHECK int csvf_engine_set_deterministic_insecure(csvf_engine *engine, const void *seed, size_t length);

/* 1 if keys are derived from a seed, 0 if not or for NULL. SHARED. */
CSVF_API int csvf_engine_is_deterministic(const csvf_engine *engine);

/* Writes the engine's state to a file, pipe or socket, from its position on: DRAM as the host sees it (pages of zeros left out) and the
 * ASIDs' generations. Keys are never written, statistics, observer and seed neither. The end is an SM3 of everything, or its HMAC
 * under the caller's `key`: without it a checkpoint is as easy to change as DRAM. The format is in docs/embedding.md.
 * No other call on the engine may be running, and nobody may write to its DRAM. On failure a part may have been written.
 *   In: key   NULL (key_length 0) = a plain digest
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_SYSTEM (write). */
CSVF_API CSVF_MUST_CHECK int csvf_engine_checkpoint(const csvf_engine *engine, int fd, const uint8_t *key, size_t key_length);

/* Reads what csvf_engine_checkpoint wrote into an engine that has had no key, of the same size, base address, standard and tweak
 * model. Afterwards no ASID has a key: install them again. An ASID that had one comes back one generation earlier, so that it is then
 * in the generation it was in, and csvf_asid_generate under the same deterministic seed makes the same key.
 * No other call on the engine may be running. On failure the generations are untouched, and the DRAM is too if nothing of it was read;
 * else it is all zeros.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT (no checkpoint, another version, sealed with a key and none given or the other way round, another
 * engine's shape), CSVF_ERR_RANGE (its pages or ASIDs do not fit), CSVF_ERR_LENGTH (it ends early), CSVF_ERR_AUTHENTICATION (the digest
 * does not match), CSVF_ERR_STATE (the engine has had a key), CSVF_ERR_MEMORY, CSVF_ERR_SYSTEM (read). */
CSVF_API CSVF_MUST_CHECK int csvf_engine_restore(csvf_engine *engine, int fd, const uint8_t *key, size_t key_length);

/* ---- Caches: what one CPU core keeps of the encrypted DRAM in plaintext -------------------------------------------- */
/* One object models a core: an ASID-tagged TLB, one to three levels of write-back cache, and the data fabric's write buffer, over an
 * engine's DRAM. Lines hold plaintext; SM4 runs only when a line comes from DRAM or goes there. Every level is inclusive: what is in
 * one is in all below it, and what leaves a lower one leaves those above.
 *
 * Tags. A line is found by its physical address and its context: (ASID, C-bit 1) is that guest's, and everything with C-bit 0, whoever
 * asks, is one context (ASID 0), or guest and host could not share a buffer. Nothing keeps contexts coherent: one physical line may be
 * cached under several tags, and what the host, another guest or a device does to it is not seen under this tag before
 * csvf_cache_flush or csvf_cache_write_back. The tag names the ASID, not the key: a line outlives csvf_asid_remove, and the
 * ASID's next guest hits it. That is why the firmware's rule before an ASID is used again is WBINVD on every core, then DF_FLUSH; left
 * out, the leak is there to see. csvf_read, csvf_write and launch calls are agents beside the core: they look into no cache.
 *
 * Modelled cycles are sums of the config's parameters, not measurements. Two objects are two machines' caches, not two coherent cores.
 * What is published and what is inferred: docs/cache-model.md. */

#define CSVF_CACHE_LEVELS 3u
#define CSVF_CACHE_WAYS_MAX 64u
#define CSVF_FABRIC_LINES_MAX 64u

typedef enum csvf_replacement {
    CSVF_REPLACE_LRU = 0,       /* the way used longest ago */
    CSVF_REPLACE_FIFO = 1,      /* the way filled longest ago */
    CSVF_REPLACE_TREE = 2,      /* binary tree of bits that point away from the last use; ways must be a power of two */
    CSVF_REPLACE_RANDOM = 3     /* xorshift64 (13, 7, 17) from the config's seed: equal runs are equal */
} csvf_replacement;

typedef enum csvf_fill {
    CSVF_FILL_LINE = 0,     /* a miss decrypts its line */
    CSVF_FILL_PAGE = 1      /* a miss decrypts its page; the other lines go to the last level, unless they are there */
} csvf_fill;

typedef struct csvf_cache_level {
    uint64_t size;          /* bytes; 0 = no such level, nor any after it. size / (64 * ways) must be a power of two */
    uint32_t ways;          /* 1 .. CSVF_CACHE_WAYS_MAX */
    int replacement;        /* csvf_replacement */
    uint32_t cycles;        /* of an access that this level serves */
    uint32_t reserved;      /* 0 */
} csvf_cache_level;

typedef struct csvf_cache_config {
    size_t struct_size;     /* sizeof(csvf_cache_config): lets the struct grow without breaking callers */
    csvf_cache_level levels[CSVF_CACHE_LEVELS];     /* nearest first; at least one */
    uint32_t tlb_entries;   /* 0 = no TLB: every virtual access walks. tlb_entries / tlb_ways must be a power of two */
    uint32_t tlb_ways;
    int tlb_replacement;    /* csvf_replacement */
    int fill;               /* csvf_fill */
    uint32_t fabric_lines;  /* write-backs that wait, in order and in plaintext, on their way to the engine; 0 = none wait */
    uint32_t c_bit;         /* position of the C-bit in page-table entries, 32 .. 51 */
    uint32_t memory_cycles;         /* of an access that DRAM serves */
    uint32_t encryption_cycles;     /* more, if the line is encrypted */
    uint32_t write_back_cycles;     /* that a write-back holds the core up */
    uint32_t reserved;      /* 0 */
    uint64_t seed;          /* of random replacement */
} csvf_cache_config;

typedef struct csvf_cache csvf_cache;

/* Counts of one ASID. Each line that an access touches counts once: hits of all levels and misses together are reads, writes and
 * walk_reads. Write-backs and encryption count for the ASID whose line it is (0 for every line with C-bit 0). */
typedef struct csvf_cache_stats {
    size_t struct_size;         /* in: sizeof(csvf_cache_stats) */
    uint64_t reads, writes;     /* lines touched by accesses */
    uint64_t walk_reads;        /* page-table entries read by walks */
    uint64_t hits[CSVF_CACHE_LEVELS];
    uint64_t misses;            /* served by DRAM */
    uint64_t write_backs;       /* dirty lines that left the last level */
    uint64_t lines_lost;        /* write-backs that found no key at the engine: gone, never written as plaintext */
    uint64_t bytes_decrypted;   /* through SM4 by fills */
    uint64_t bytes_encrypted;   /* through SM4 by write-backs, when they reach DRAM */
    uint64_t tlb_hits, tlb_misses;
    uint64_t faults;            /* translations refused */
    uint64_t cycles;            /* modelled */
    uint64_t encryption_cycles; /* of them, what encryption_cycles added */
} csvf_cache_stats;

/* Fills in the model's defaults, sizes of the first Zen generation on which Hygon's Dhyana is built: 32 KiB 8-way, 512 KiB 8-way, 8 MiB
 * 16-way, all LRU, TLB of 1536 entries 12-way, line fills, 16 lines in the fabric, C-bit 47. In: config->struct_size. PER-OBJECT.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT. */
CSVF_API CSVF_MUST_CHECK int csvf_cache_defaults(csvf_cache_config *config);

/* Makes the caches of a core, empty, over an engine that must outlive them.
 *   Out: cache    *cache is set on success, NULL on failure
 *   In:  config   NULL = csvf_cache_defaults. A longer struct of a newer version is accepted if what this one does not know is zero
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_LENGTH (a size that gives no power of two of sets; an engine of 2^52 bytes or more),
 * CSVF_ERR_MEMORY. SHARED as to the engine: cores of one engine may run in different threads. */
CSVF_API CSVF_MUST_CHECK int csvf_cache_create(csvf_cache **cache, csvf_engine *engine, const csvf_cache_config *config);

/* Wipes what the caches hold and drops it, as cutting the power does: nothing is written back. NULL is allowed. PER-OBJECT. */
CSVF_API void csvf_cache_destroy(csvf_cache *cache);

/* Access through the caches at a system physical address. PER-OBJECT, like everything that takes a csvf_cache.
 *   In: asid    0 is the host, whose c_bit must be 0 (its own memory encryption, SME, is not modelled)
 *       c_bit   1 = the guest's encrypted memory, 0 = shared, unencrypted memory
 * A hit asks for no key. Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_RANGE, CSVF_ERR_OVERLAP (data lies inside the DRAM), CSVF_ERR_ASID
 * (asid above the engine's limit, 0 with the C-bit, or a miss without a key: the lines before that one have been transferred). */
CSVF_API CSVF_MUST_CHECK int csvf_cache_read(csvf_cache *cache, void *data, size_t length, uint32_t asid, uint64_t address,
                                             int c_bit);
CSVF_API CSVF_MUST_CHECK int csvf_cache_write(csvf_cache *cache, uint32_t asid, uint64_t address, const void *data,
                                              size_t length, int c_bit);

/* CLFLUSH over [address, address + length): writes back and drops the lines that have exactly this tag. The same lines under other tags
 * stay. A written-back line waits in the fabric like any other; whoever reads that line through this core finds it.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_RANGE, CSVF_ERR_ASID. */
CSVF_API CSVF_MUST_CHECK int csvf_cache_flush(csvf_cache *cache, uint32_t asid, uint64_t address, size_t length, int c_bit);

/* WBINVD: writes back every dirty line of every context, to the fabric, and drops all lines. The TLB stays. */
CSVF_API void csvf_cache_write_back(csvf_cache *cache);

/* DF_FLUSH: what waits in the fabric goes to DRAM, encrypted under the key that each line's ASID has at this moment. */
CSVF_API void csvf_cache_fabric_flush(csvf_cache *cache);

/* Out: *lines = lines cached for an ASID (0: those with C-bit 0), *dirty = those of them not written back, *waiting = its lines in the
 * fabric. Each may be NULL. Looks at every line: for tests and displays.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_ASID. */
CSVF_API CSVF_MUST_CHECK int csvf_cache_contents(const csvf_cache *cache, uint64_t *lines, uint64_t *dirty, uint64_t *waiting,
                                                 uint32_t asid);

/* Out: *stats. Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_ASID (above the engine's limit). */
CSVF_API CSVF_MUST_CHECK int csvf_cache_statistics(const csvf_cache *cache, csvf_cache_stats *stats, uint32_t asid);

/* ---- Address translation: guest page tables with the C-bit, nested page tables, TLB -------------------------------- */

#define CSVF_NO_TABLE UINT64_MAX    /* this stage maps every address to itself; without guest tables a guest's C-bit counts as set */

/* What an access needs. Reading is always asked. */
#define CSVF_ACCESS_READ 0u
#define CSVF_ACCESS_WRITE 1u
#define CSVF_ACCESS_EXECUTE 2u
#define CSVF_ACCESS_USER 4u         /* from user mode */

typedef enum csvf_stage {
    CSVF_STAGE_NONE = 0,
    CSVF_STAGE_GUEST = 1,
    CSVF_STAGE_NESTED = 2
} csvf_stage;

typedef struct csvf_translation {
    uint64_t address;       /* system physical; in a fault the address that could not be translated, at its stage */
    int c_bit;
    uint32_t allowed;       /* CSVF_ACCESS_* that the tables allow */
    int fault_stage;        /* csvf_stage; CSVF_STAGE_NONE without a fault */
    int fault_level;        /* 4 .. 1: the table whose entry refused; 0 = the address is not canonical or too large */
} csvf_translation;

/* Gives an ASID its page tables: four levels as on x86-64 (4 KiB, 2 MiB and 1 GiB pages; entry bits present, writable, user, large, no-execute).
 * guest_root is a guest physical address (its C-bit is ignored: a guest's tables are always read as encrypted, the host's never),
 * nested_root a system physical one whose tables are the host's. Either may be CSVF_NO_TABLE. As loading CR3 under another ASID
 * does, this flushes nothing: translations made before are used until they are invalidated or evicted. Accessed and dirty bits are not set.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_ASID, CSVF_ERR_ALIGNMENT (a root's low twelve bits). */
CSVF_API CSVF_MUST_CHECK int csvf_cache_set_tables(csvf_cache *cache, uint32_t asid, uint64_t guest_root, uint64_t nested_root);

/* Translates as an access would, through TLB and walk. In: access   CSVF_ACCESS_* flags
 *   Out: *translation   also for CSVF_ERR_FAULT, where it says what refused
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_ASID, CSVF_ERR_FAULT, CSVF_ERR_RANGE (a table lies outside the memory). */
CSVF_API CSVF_MUST_CHECK int csvf_cache_translate(csvf_cache *cache, csvf_translation *translation, uint32_t asid,
                                                  uint64_t address, uint32_t access);

/* Access at a virtual address. Returns: as csvf_cache_translate and csvf_cache_read; what lies on pages before the refused one has been
 * transferred. */
CSVF_API CSVF_MUST_CHECK int csvf_cache_read_virtual(csvf_cache *cache, void *data, size_t length, uint32_t asid,
                                                     uint64_t address, uint32_t access);
CSVF_API CSVF_MUST_CHECK int csvf_cache_write_virtual(csvf_cache *cache, uint32_t asid, uint64_t address, const void *data,
                                                      size_t length, uint32_t access);

/* INVLPGA: drops the translation of the page at a virtual address under an ASID. Flush by ASID (TLB_CONTROL), and of everything.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_ASID. */
CSVF_API CSVF_MUST_CHECK int csvf_tlb_invalidate_page(csvf_cache *cache, uint32_t asid, uint64_t address);
CSVF_API CSVF_MUST_CHECK int csvf_tlb_flush_asid(csvf_cache *cache, uint32_t asid);
CSVF_API void csvf_tlb_flush(csvf_cache *cache);

/* One access of a memory trace. */
typedef struct csvf_trace_access {
    uint64_t address;
    uint32_t length;        /* bytes, at least 1 */
    uint32_t access;        /* CSVF_ACCESS_* flags */
} csvf_trace_access;

/* Runs a trace: tags, replacement, fills, write-backs and counts as for real accesses, but no bytes are moved to or from the caller; a write
 * makes its lines dirty and leaves their bytes. In: is_virtual   1 = through TLB and tables, 0 = physical addresses with c_bit
 *   Out: *done   accesses done in full; less than count only on failure. May be NULL
 * Returns: as the single accesses, and CSVF_ERR_LENGTH (an access of 0 bytes). */
CSVF_API CSVF_MUST_CHECK int csvf_cache_run(csvf_cache *cache, size_t *done, uint32_t asid, const csvf_trace_access *accesses,
                                            size_t count, int is_virtual, int c_bit);

/* ---- Worker threads without an engine ----------------------------------------------------------------------------- */

typedef struct csvf_pool csvf_pool;

/* threads 1 .. 1024, the calling thread counted. *pool is NULL on failure. Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_MEMORY, CSVF_ERR_SYSTEM. */
CSVF_API CSVF_MUST_CHECK int csvf_pool_create(csvf_pool **pool, uint32_t threads);
/* Ends the workers. NULL is allowed. No call may be using the pool. */
CSVF_API void csvf_pool_destroy(csvf_pool *pool);

/* csvf_xts_encrypt / _decrypt and csvf_sm3_blocks with the work split over the pool's threads. NULL pool = calling thread only.
 * One call at a time uses a pool; a second one waits. Returns: as the plain calls. SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_pool_xts_encrypt(csvf_pool *pool, const csvf_xts *xts, uint8_t *out, const uint8_t *in,
                                                   size_t length, size_t unit_size, uint64_t first_unit);
CSVF_API CSVF_MUST_CHECK int csvf_pool_xts_decrypt(csvf_pool *pool, const csvf_xts *xts, uint8_t *out, const uint8_t *in,
                                                   size_t length, size_t unit_size, uint64_t first_unit);
CSVF_API CSVF_MUST_CHECK int csvf_pool_sm3_blocks(csvf_pool *pool, uint8_t *digests, const uint8_t *prefix,
                                                  size_t prefix_length, const uint8_t *data, size_t block_length,
                                                  size_t count);

#ifdef __cplusplus
}
#endif
#endif /* CSVFAST_H */
