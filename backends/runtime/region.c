/* Runs a compiled program: one parallel region over TVM's thread pool, in which every task walks the table of steps.
 *
 * Functions of the library, in TVM-FFI's calling convention:
 *   main(arena, inputs..., outputs...)              runs once; outputs are written in place
 *   profile(times, arena, inputs..., outputs...)    the same, and times[i] is the start of step i in ns, times[steps] the end
 *   describe() -> str                               JSON: arena bytes, inputs and outputs, steps
 * Every tensor is dense, on the CPU, and aligned to 64 bytes. One arena serves one run at a time.
 */
#include "region.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <tvm/runtime/c_backend_api.h>

#define GW_ALIGNMENT 64
/* A waiting task spins this often, a few microseconds, before it gives its core away: another process may hold the core it
 * waits for. No pause instruction: hypervisors take a core that pauses in a loop away, for 125 us a time where it was measured. */
#define GW_SPINS 4096

typedef struct {
  int64_t* times;
  uint8_t* arena;
  void** tensors; /* inputs, then outputs */
  /* On lines of their own: every task spins on the first. */
  _Alignas(GW_ALIGNMENT) uint32_t arrived;
  _Alignas(GW_ALIGNMENT) uint32_t failed;
} gw_run;

static int64_t now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Waits until all tasks have called it `round` times. */
static void wait_for_all(gw_run* run, uint32_t tasks, uint32_t round) {
  __atomic_fetch_add(&run->arrived, 1, __ATOMIC_ACQ_REL);
  for (uint32_t spins = 0; __atomic_load_n(&run->arrived, __ATOMIC_ACQUIRE) < tasks * round; ++spins) {
    if (spins >= GW_SPINS) sched_yield();
  }
}

static void* address(const gw_run* run, const gw_place* place, uint8_t* scratch) {
  switch (place->space) {
    case GW_TASK:
      return scratch + place->offset;
    case GW_ARENA:
      return run->arena + place->offset;
    case GW_WEIGHTS:
      return (void*)(gw_program.weights + place->offset);
    case GW_INPUT:
      return run->tensors[place->offset];
    default:
      return run->tensors[gw_program.input_count + place->offset];
  }
}

static int call(const gw_run* run, const gw_step* step, TVMFFIAny* arguments, uint8_t* scratch, int task, int tasks) {
  TVMFFIAny result;
  uint32_t count = 0;
  memset(&result, 0, sizeof(result));
  for (; count < step->places; ++count) {
    arguments[count].type_index = kTVMFFIOpaquePtr;
    arguments[count].zero_padding = 0;
    arguments[count].v_ptr = address(run, &gw_program.places[step->first_place + count], scratch);
  }
  for (int index = 0; index < 2; ++index, ++count) {
    arguments[count].type_index = kTVMFFIInt;
    arguments[count].zero_padding = 0;
    arguments[count].v_int64 = index == 0 ? task : tasks;
  }
  return step->call(NULL, arguments, (int32_t)count, &result);
}

/* A failed task keeps meeting the others at the barriers; its error is still the thread's when it returns. */
static int run_task(int task, TVMParallelGroupEnv* env, void* data) {
  gw_run* run = data;
  const uint32_t tasks = (uint32_t)env->num_task;
  TVMFFIAny arguments[gw_program.most_places + 2];
  uint8_t stack[gw_program.task_bytes + GW_ALIGNMENT];
  uint8_t* scratch = stack + GW_ALIGNMENT - (uintptr_t)stack % GW_ALIGNMENT;
  uint32_t round = 0;
  int status = 0;
  for (uint32_t index = 0; index < gw_program.step_count; ++index) {
    const gw_step* step = &gw_program.steps[index];
    if (tasks > 1 && (step->barrier || run->times)) wait_for_all(run, tasks, ++round);
    if (run->times && task == 0) run->times[index] = now();
    if (!step->parallel && task != 0) continue;
    if (__atomic_load_n(&run->failed, __ATOMIC_RELAXED)) continue;
    if (call(run, step, arguments, scratch, task, (int)tasks) != 0) {
      __atomic_store_n(&run->failed, 1, __ATOMIC_RELAXED);
      status = -1;
    }
  }
  return status;
}

static int refuse(const char* kind, const char* message) {
  TVMFFIErrorSetRaisedFromCStr(kind, message);
  return -1;
}

/* The tensor's memory, or NULL (and an error) where it is no dense aligned CPU tensor of at least `bytes` bytes. */
static void* memory(const TVMFFIAny* argument, const char* role, uint32_t index, uint64_t bytes, int exact) {
  const DLTensor* tensor = NULL;
  char message[160];
  if (argument->type_index == kTVMFFIDLTensorPtr) {
    tensor = argument->v_ptr;
  } else if (argument->type_index == kTVMFFITensor) {
    tensor = (const DLTensor*)(argument->v_obj + 1); /* it follows the object's header */
  }
  if (!tensor || tensor->device.device_type != kDLCPU) {
    snprintf(message, sizeof(message), "%s %u is no CPU tensor", role, index);
    refuse("TypeError", message);
    return NULL;
  }
  uint64_t size = (uint64_t)(tensor->dtype.bits * tensor->dtype.lanes + 7) / 8;
  for (int32_t axis = 0; axis < tensor->ndim; ++axis) size *= (uint64_t)tensor->shape[axis];
  if (exact ? size != bytes : size < bytes) {
    snprintf(message, sizeof(message), "%s %u has %llu bytes; this program needs %llu", role, index, (unsigned long long)size,
             (unsigned long long)bytes);
    refuse("ValueError", message);
    return NULL;
  }
  uint8_t* data = (uint8_t*)tensor->data + tensor->byte_offset;
  if ((uintptr_t)data % GW_ALIGNMENT) {
    snprintf(message, sizeof(message), "%s %u is not aligned to %d bytes", role, index, GW_ALIGNMENT);
    refuse("ValueError", message);
    return NULL;
  }
  return data;
}

static int start(const TVMFFIAny* arguments, int32_t count, int64_t* times) {
  const uint32_t tensors = gw_program.input_count + gw_program.output_count;
  if (count != (int32_t)tensors + 1) return refuse("TypeError", "this program takes an arena, its inputs and its outputs");
  void* pointers[tensors + 1];
  gw_run run = {.times = times, .tensors = pointers};
  run.arena = memory(&arguments[0], "arena", 0, gw_program.arena_bytes, 0);
  if (!run.arena) return -1;
  for (uint32_t index = 0; index < tensors; ++index) {
    const int output = index >= gw_program.input_count;
    const uint32_t position = output ? index - gw_program.input_count : index;
    pointers[index] = memory(&arguments[index + 1], output ? "output" : "input", position, gw_program.sizes[index], 1);
    if (!pointers[index]) return -1;
  }
  int status;
  if (gw_program.parallel) {
    status = TVMBackendParallelLaunch(run_task, &run, 0);
  } else {
    TVMParallelGroupEnv alone = {.num_task = 1};
    status = run_task(0, &alone, &run);
  }
  if (times) times[gw_program.step_count] = now();
  return status;
}

int __tvm_ffi_main(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {
  (void)self, (void)result;
  return start(arguments, count, NULL);
}

int __tvm_ffi_profile(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {
  (void)self, (void)result;
  if (count < 1) return refuse("TypeError", "profile takes a tensor of int64 times first");
  int64_t* times = memory(&arguments[0], "times", 0, ((uint64_t)gw_program.step_count + 1) * sizeof(int64_t), 1);
  return times ? start(arguments + 1, count - 1, times) : -1;
}

int __tvm_ffi_describe(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {
  (void)self, (void)arguments, (void)count;
  const TVMFFIByteArray text = {gw_program.description, strlen(gw_program.description)};
  return TVMFFIStringFromByteArray(&text, result);
}
