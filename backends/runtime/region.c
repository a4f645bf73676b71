/* Runs a compiled program: one parallel region over TVM's thread pool, in which every task walks the table of steps.
 *
 * A program of several parts runs the table once a part. Groups of tasks take the parts in turn: where there are at least as many
 * parts as tasks, each task computes parts of its own, in an arena of its own that stays in its core's caches, and waits for nobody.
 *
 * Functions of the library, in TVM-FFI's calling convention:
 *   main(arena, inputs..., outputs...)              runs once; outputs are written in place
 *   profile(times, arena, inputs..., outputs...)    the same, and times[i] is the start of step i in ns, times[steps] the end,
 *                                                  of all parts of one group, counted from 0
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

/* What the tasks of a group share. On a line of its own: they spin on it. */
typedef struct {
  _Alignas(GW_ALIGNMENT) uint32_t arrived;
} gw_barrier;

typedef struct {
  int64_t* times;
  uint8_t* arena;
  uint8_t* const* tensors; /* inputs, then outputs */
  gw_barrier* barriers;    /* one a group */
  _Alignas(GW_ALIGNMENT) uint32_t failed;
} gw_run;

/* A task's place in a run: `size` tasks of its group compute one part together, and `groups` groups share the parts. */
typedef struct {
  const gw_run* run;
  gw_barrier* barrier;
  uint8_t *arena, *scratch;
  uint32_t member, size, group, groups, round;
} gw_task;

static int64_t now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Waits until all tasks of the group have called it as often. */
static void wait_for_all(gw_task* task) {
  if (task->size == 1) return;
  const uint32_t all = task->size * ++task->round;
  __atomic_fetch_add(&task->barrier->arrived, 1, __ATOMIC_ACQ_REL);
  for (uint32_t spins = 0; __atomic_load_n(&task->barrier->arrived, __ATOMIC_ACQUIRE) < all; ++spins) {
    if (spins >= GW_SPINS) sched_yield();
  }
}

/* How many parts to compute at the same time: what ends first, where tasks that share one part lose a tenth by waiting for each
 * other; of equals, the most. */
static uint32_t groups_of(uint32_t tasks, uint32_t parts) {
  uint32_t best = 1, best_time = UINT32_MAX;
  for (uint32_t groups = 1; groups <= tasks && groups <= parts && groups <= GW_MOST_GROUPS; ++groups) {
    const uint32_t size = tasks / groups, rounds = (parts + groups - 1) / groups;
    const uint32_t time = rounds * (size == 1 ? 1000 : 1100) / size;
    if (time <= best_time) best = groups, best_time = time;
  }
  return best;
}

static uint8_t* tensor(const gw_task* task, uint32_t index, uint32_t part) {
  return task->run->tensors[index] + part * gw_program.sizes[index];
}

static void* address(const gw_task* task, const gw_place* place, uint32_t part) {
  switch (place->space) {
    case GW_TASK:
      return task->scratch + place->offset;
    case GW_ARENA:
      return task->arena + place->offset;
    case GW_WEIGHTS:
      return (void*)(gw_program.weights + place->offset);
    default: {
      const uint32_t index = (uint32_t)place->offset + (place->space == GW_OUTPUT ? gw_program.input_count : 0);
      const uint64_t staged = gw_program.staged[index];
      return staged == GW_IN_PLACE ? tensor(task, index, part) : task->arena + staged;
    }
  }
}

static int call(const gw_task* task, const gw_step* step, TVMFFIAny* arguments, uint32_t part) {
  TVMFFIAny result;
  uint32_t count = 0;
  memset(&result, 0, sizeof(result));
  for (; count < step->places; ++count) {
    arguments[count].type_index = kTVMFFIOpaquePtr;
    arguments[count].zero_padding = 0;
    arguments[count].v_ptr = address(task, &gw_program.places[step->first_place + count], part);
  }
  for (int index = 0; index < 2; ++index, ++count) {
    arguments[count].type_index = kTVMFFIInt;
    arguments[count].zero_padding = 0;
    arguments[count].v_int64 = index == 0 ? task->member : task->size;
  }
  return step->call(NULL, arguments, (int32_t)count, &result);
}

/* Copies the staged tensors `first` .. `stop` - 1 of a part into the arena, or out of it. */
static void stage(const gw_task* task, uint32_t first, uint32_t stop, uint32_t part, int out) {
  if (task->member != 0) return;
  for (uint32_t index = first; index < stop; ++index) {
    if (gw_program.staged[index] == GW_IN_PLACE) continue;
    uint8_t *theirs = tensor(task, index, part), *ours = task->arena + gw_program.staged[index];
    memcpy(out ? theirs : ours, out ? ours : theirs, gw_program.sizes[index]);
  }
}

/* Runs all steps on one part. A failed task keeps meeting the others at the barriers; its error is still the thread's when it
 * returns. The group of task 0 is the one that is timed: times[i] grows by what step i takes. */
static int run_part(gw_task* task, gw_run* run, TVMFFIAny* arguments, uint32_t part) {
  int64_t* times = task->group == 0 ? run->times : NULL;
  const uint32_t inputs = gw_program.input_count;
  int status = 0;
  int64_t begin = 0;
  stage(task, 0, inputs, part, 0);
  for (uint32_t index = 0; index < gw_program.step_count; ++index) {
    const gw_step* step = &gw_program.steps[index];
    if (step->barrier || times || (index == 0 && gw_program.parts > 1)) wait_for_all(task);
    if (times && task->member == 0) {
      const int64_t time = now();
      if (index > 0) times[index - 1] += time - begin;
      begin = time;
    }
    if (!step->parallel && task->member != 0) continue;
    if (__atomic_load_n(&run->failed, __ATOMIC_RELAXED)) continue;
    if (call(task, step, arguments, part) != 0) {
      __atomic_store_n(&run->failed, 1, __ATOMIC_RELAXED);
      status = -1;
    }
  }
  if (gw_program.parts > 1 || times) wait_for_all(task);
  if (times && task->member == 0 && gw_program.step_count > 0) times[gw_program.step_count - 1] += now() - begin;
  stage(task, inputs, inputs + gw_program.output_count, part, 1);
  return status;
}

static int run_task(int number, TVMParallelGroupEnv* env, void* data) {
  gw_run* run = data;
  const uint32_t tasks = (uint32_t)env->num_task, parts = gw_program.parts, groups = groups_of(tasks, parts);
  const uint32_t group = (uint32_t)number * groups / tasks, first = (group * tasks + groups - 1) / groups;
  const uint32_t next = ((group + 1) * tasks + groups - 1) / groups;
  TVMFFIAny arguments[gw_program.most_places + 2];
  uint8_t stack[gw_program.task_bytes + GW_ALIGNMENT];
  gw_task task = {.run = run, .barrier = &run->barriers[group], .arena = run->arena + group * gw_program.arena_bytes};
  task.scratch = stack + GW_ALIGNMENT - (uintptr_t)stack % GW_ALIGNMENT;
  task.member = (uint32_t)number - first, task.size = next - first, task.group = group, task.groups = groups;
  int status = 0;
  for (uint32_t part = group; part < parts; part += groups) {
    if (run_part(&task, run, arguments, part) != 0) status = -1;
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

/* What steps took, one after another -> when each started; the last entry is the end. */
static void add_up(int64_t* times) {
  int64_t start = 0;
  for (uint32_t index = 0; index <= gw_program.step_count; ++index) {
    const int64_t spent = index < gw_program.step_count ? times[index] : 0;
    times[index] = start;
    start += spent;
  }
}

static int start(const TVMFFIAny* arguments, int32_t count, int64_t* times) {
  const uint32_t tensors = gw_program.input_count + gw_program.output_count, parts = gw_program.parts;
  const uint32_t groups = parts < GW_MOST_GROUPS ? parts : GW_MOST_GROUPS;
  if (count != (int32_t)tensors + 1) return refuse("TypeError", "this program takes an arena, its inputs and its outputs");
  uint8_t* pointers[tensors + 1];
  gw_barrier barriers[groups];
  memset(barriers, 0, sizeof(barriers));
  gw_run run = {.times = times, .tensors = pointers, .barriers = barriers};
  run.arena = memory(&arguments[0], "arena", 0, gw_program.arena_bytes * groups, 0);
  if (!run.arena) return -1;
  for (uint32_t index = 0; index < tensors; ++index) {
    const int output = index >= gw_program.input_count;
    const uint32_t position = output ? index - gw_program.input_count : index;
    pointers[index] = memory(&arguments[index + 1], output ? "output" : "input", position, gw_program.sizes[index] * parts, 1);
    if (!pointers[index]) return -1;
  }
  int status;
  if (times) memset(times, 0, ((uint64_t)gw_program.step_count + 1) * sizeof(int64_t));
  if (gw_program.parallel || parts > 1) {
    status = TVMBackendParallelLaunch(run_task, &run, 0);
  } else {
    TVMParallelGroupEnv alone = {.num_task = 1};
    status = run_task(0, &alone, &run);
  }
  if (times) add_up(times);
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
