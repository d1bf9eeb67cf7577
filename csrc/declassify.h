/* Tells the constant-time checkers that a value derived from secrets is public from here on: whether two key halves are equal,
 * whether a tag matched. Nothing else is ever declassified. Compiles to nothing outside the checkers' builds
 * (MemorySanitizer, or -DCSVF_CHECKMEM for valgrind). */
#ifndef CSVF_DECLASSIFY_H
#define CSVF_DECLASSIFY_H

#if defined(__has_feature)
#  if __has_feature(memory_sanitizer)
#    include <sanitizer/msan_interface.h>
#    define csvf__declassify(pointer, length) __msan_unpoison((pointer), (length))
#  endif
#endif
#if !defined(csvf__declassify) && defined(CSVF_CHECKMEM)
#  include <valgrind/memcheck.h>
#  define csvf__declassify(pointer, length) ((void)VALGRIND_MAKE_MEM_DEFINED((pointer), (length)))
#endif
#if !defined(csvf__declassify)
#  define csvf__declassify(pointer, length) ((void)(pointer), (void)(length))
#endif

#endif
