#pragma once

// One wheel serves every x86-64: a function so marked is compiled three times and chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__)
#define FASTRPE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTRPE_CLONES
#endif
