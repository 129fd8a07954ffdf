// heddle: attention for long-context inference.
#pragma once

#include "heddle/advise.h"
#include "heddle/attention.h"
#include "heddle/backend.h"
#include "heddle/cache.h"
#include "heddle/decode.h"
#include "heddle/error.h"
#include "heddle/quantize.h"
#include "heddle/sampling.h"
#include "heddle/select.h"
#include "heddle/tensor.h"
