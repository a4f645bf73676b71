/* The tables of a compiled program, which `region.c` walks. The compiler writes them as C beside the kernels' machine code. */
#ifndef GW_REGION_H_
#define GW_REGION_H_

#include <stdint.h>
#include <tvm/ffi/c_api.h>

enum gw_space { GW_ARENA, GW_TASK, GW_WEIGHTS, GW_INPUT, GW_OUTPUT };

/* A tensor whose parts all begin at an aligned address: kernels read or write it where it is. */
#define GW_IN_PLACE UINT64_MAX

/* Parts that run at the same time, at most; the caller's arena holds so many. */
#define GW_MOST_GROUPS 64

/* A buffer: byte `offset` of the arena, of the task's scratch or of the weights, or the input or output of that number. */
typedef struct {
  uint32_t space;
  uint64_t offset;
} gw_place;

/* One call of a kernel phase with `places` raw pointers, the task's number and the number of tasks. */
typedef struct {
  TVMFFISafeCallType call;
  uint32_t first_place, places;
  uint8_t parallel; /* every task calls it for its share; else task 0 alone */
  uint8_t barrier;  /* all tasks wait for one another before it */
} gw_step;

typedef struct {
  const gw_step* steps;
  const gw_place* places;
  uint32_t step_count, most_places;
  uint8_t parallel; /* any step is */
  uint64_t arena_bytes, task_bytes; /* arena_bytes: of one part */
  const uint8_t* weights;
  uint32_t input_count, output_count;
  const uint64_t* sizes; /* bytes of each input, then of each output, in one part */
  const uint64_t* staged; /* where each lies in the arena of its part; GW_IN_PLACE: in the caller's memory */
  uint32_t parts; /* the steps run once a part; part i of every input and output follows part i - 1 */
  const char* description; /* JSON */
} gw_region;

extern const gw_region gw_program;

#endif
