/* The tables of a program compiled for an NVIDIA GPU, which `region_cuda.c` launches. The compiler writes them as C. */
#ifndef GW_REGION_CUDA_H_
#define GW_REGION_CUDA_H_

#include "region.h"

/* One kernel launch: `places` pointers, then `hidden` null pointers. */
typedef struct {
  const char* symbol; /* of the function inside its image */
  uint32_t image;
  uint32_t grid[3], block[3];
  uint32_t shared; /* bytes of dynamic shared memory */
  uint32_t first_place, places, hidden;
} gw_launch;

typedef struct {
  const gw_launch* launches;
  const gw_place* places;
  uint32_t launch_count;
  const uint8_t* const* images; /* cubins */
  uint32_t image_count;
  uint32_t capability; /* 90 for sm_90 */
  uint32_t overlap;    /* whether every kernel starts by waiting for the one before (`cuda/overlap.py`) */
  uint64_t arena_bytes, weight_bytes;
  const uint8_t* weights;
  uint32_t input_count, output_count;
  const uint64_t* sizes;   /* bytes of each input, then of each output */
  const char* description; /* JSON */
} gw_cuda_region;

extern const gw_cuda_region gw_cuda_program;

#endif
