#pragma once

// Symbols of a shared build are hidden unless marked; a static build needs no marks.
#if defined(HEDDLE_SHARED) && defined(__GNUC__)
#define HEDDLE_API __attribute__((visibility("default")))
#else
#define HEDDLE_API
#endif
