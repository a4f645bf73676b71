/* Runs a model of one float32 input in ONNX Runtime's C library, one thread, a number of times: something to count on a machine
 * without Python, such as an emulated one.
 *
 *   aarch64-linux-gnu-gcc -O2 -o run_onnxruntime run_onnxruntime.c -ldl
 *   run_onnxruntime libonnxruntime.so MODEL.onnx RUNS INPUT OUTPUT DIM...
 *
 * The declarations are those of onnxruntime_c_api.h, whose table of functions only grows at its end.
 */
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef void* status;
enum { WARNING = 2, FLOAT = 1, ARENA = 1, VERSION = 1, MOST_DIMS = 8 };

typedef struct {
  void* create_status[2];
  const char* (*message)(status);
  status (*create_env)(int, const char*, void**);
  void* telemetry[3];
  status (*create_session)(void*, const char*, void*, void**);
  void* create_session_from_array;
  status (*run)(void*, void*, const char* const*, void* const*, size_t, const char* const*, size_t, void**);
  status (*create_session_options)(void**);
  void* options[13];
  status (*set_intra_op_threads)(void*, int);
  void* until_tensors[24];
  status (*create_tensor)(void*, void*, size_t, const int64_t*, size_t, int, void**);
  void* until_memory[19];
  status (*create_cpu_memory)(int, int, void**);
} api;

typedef struct {
  const api* (*get)(uint32_t);
} base;

static const api* ort;

static void check(status failed) {
  if (failed) {
    fprintf(stderr, "%s\n", ort->message(failed));
    exit(1);
  }
}

int main(int argc, char** argv) {
  if (argc < 7 || argc - 6 > MOST_DIMS) {
    fprintf(stderr, "usage: %s libonnxruntime.so MODEL.onnx RUNS INPUT OUTPUT DIM...\n", argv[0]);
    return 2;
  }
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  ort = ((const base* (*)(void))dlsym(library, "OrtGetApiBase"))()->get(VERSION);
  void *env, *options, *session, *memory, *input, *output = NULL;
  check(ort->create_env(WARNING, "count", &env));
  check(ort->create_session_options(&options));
  check(ort->set_intra_op_threads(options, 1));
  check(ort->create_session(env, argv[2], options, &session));
  int64_t shape[MOST_DIMS], count = 1;
  for (int i = 6; i < argc; ++i) count *= shape[i - 6] = atoll(argv[i]);
  float* x = malloc(count * sizeof *x);
  for (int64_t i = 0; i < count; ++i) x[i] = (float)(i * 2654435761u % 1000) / 250 - 2;
  check(ort->create_cpu_memory(ARENA, 0, &memory));
  check(ort->create_tensor(memory, x, count * sizeof *x, shape, argc - 6, FLOAT, &input));
  const char *from = argv[4], *to = argv[5];
  for (int run = atoi(argv[3]); run > 0; --run) check(ort->run(session, NULL, &from, &input, 1, &to, 1, &output));
  return 0;
}
