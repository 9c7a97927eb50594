/* Stands in for libcuda.so.1, so that Triton's launcher runs without a GPU: records each launch, and runs no kernel.

   What a kernel expects is read from its cubin (.nv.info), as the driver does, and not from Triton. A launch that a GPU
   would refuse is refused. The tests set the variables named stand_in_..., and take what was recorded as JSON. */

#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

/* Multiprocessors by group, of which a cluster lies in one. These give the 15 clusters of 8 and 7 of 16 at once that an
   H100 was measured to hold (bench/measured/); how its groups really are is not known. */
int stand_in_groups[8] = {18, 18, 18, 18, 18, 18, 16, 8};
int stand_in_records = 1;             /* 0: count time, not launches */
int stand_in_error = 0;               /* of every launch */
int stand_in_shared = 227 << 10;      /* bytes that a program may have */
int stand_in_ignores_non_portable = 0; /* as if a launcher had never asked for clusters of more than 8 */

#define MOST_PARAMETERS 64

struct kernel {
  const char *cubin;
  int parameters;
  int sizes[MOST_PARAMETERS]; /* bytes */
  unsigned threads, cluster;  /* that it was compiled for; 0: any */
  unsigned shared;            /* bytes that it may have */
  int non_portable;
};

static char *recorded;
static size_t used, room;

static void record(const char *format, ...) {
  va_list arguments;
  if (room - used < 4096)
    recorded = realloc(recorded, room += 1 << 16);
  va_start(arguments, format);
  used += vsnprintf(recorded + used, room - used, format, arguments);
  va_end(arguments);
}

/* The launches since it was last asked, as a list in JSON. */
const char *stand_in_launches(void) {
  static char *taken;
  free(taken);
  taken = malloc(used + 3);
  sprintf(taken, "[%.*s]", (int)used, used ? recorded : "");
  used = 0;
  return taken;
}

static int clusters_at_once(unsigned size) {
  int found = 0;
  for (int i = 0; i < 8; i++)
    found += stand_in_groups[i] / size;
  return found;
}

/* .nv.info.NAME is a list of (format, attribute, size or value, values if the format is 4); the numbers of the
   attributes are those that `cuobjdump -elf` names. */
enum { KPARAM_INFO = 0x17, REQNTID = 0x10, CTA_PER_CLUSTER = 0x3d };

static void read_information(struct kernel *kernel, const char *name) {
  const char *cubin = kernel->cubin;
  const Elf64_Ehdr *header = (const void *)cubin;
  const Elf64_Shdr *sections = (const void *)(cubin + header->e_shoff);
  const char *names = cubin + sections[header->e_shstrndx].sh_offset;
  char wanted[256];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", name);
  for (int i = 0; i < header->e_shnum; i++) {
    if (strcmp(names + sections[i].sh_name, wanted))
      continue;
    const char *at = cubin + sections[i].sh_offset, *end = at + sections[i].sh_size;
    while (at < end) {
      uint8_t format = at[0], attribute = at[1];
      uint16_t size;
      uint32_t values[3] = {0};
      memcpy(&size, at + 2, 2);
      at += 4;
      if (format != 4)
        continue;
      memcpy(values, at, size < 12 ? size : 12);
      at += size;
      if (attribute == KPARAM_INFO) { /* index, (place, offset), flags with the size */
        int place = values[1] & 0xffff;
        kernel->sizes[place] = values[2] >> 18 & 0x3fff;
        if (place >= kernel->parameters)
          kernel->parameters = place + 1;
      } else if (attribute == REQNTID)
        kernel->threads = values[0];
      else if (attribute == CTA_PER_CLUSTER)
        kernel->cluster = values[0];
    }
  }
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  struct kernel *kernel = calloc(1, sizeof *kernel);
  kernel->cubin = memcmp(image, ELFMAG, SELFMAG) ? NULL : image; /* NULL: PTX, of which nothing is read */
  kernel->shared = 48 << 10;
  *module = (CUmodule)kernel;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  struct kernel *kernel = (struct kernel *)module;
  if (kernel->cubin)
    read_information(kernel, name);
  *function = (CUfunction)kernel;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 128 : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  struct kernel *kernel = (struct kernel *)function;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    kernel->shared = value;
  else if (attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED)
    kernel->non_portable = value && !stand_in_ignores_non_portable;
  else
    return CUDA_ERROR_INVALID_VALUE; /* as a driver that does not know it yet */
  return CUDA_SUCCESS;
}

static CUresult verdict(const CUlaunchConfig *config, const struct kernel *kernel, unsigned cluster, int cooperative) {
  unsigned programs = config->gridDimX * config->gridDimY * config->gridDimZ;
  if (kernel->threads && config->blockDimX != kernel->threads)
    return CUDA_ERROR_INVALID_VALUE;
  if (config->sharedMemBytes > kernel->shared)
    return CUDA_ERROR_INVALID_VALUE;
  if (kernel->cluster && cluster != kernel->cluster)
    return CUDA_ERROR_INVALID_CLUSTER_SIZE;
  if (config->gridDimX % cluster || (cluster > 8 && !kernel->non_portable) || !clusters_at_once(cluster))
    return CUDA_ERROR_INVALID_CLUSTER_SIZE;
  /* A program has a multiprocessor to itself, as all of this project's have. */
  if (cooperative && programs > (unsigned)clusters_at_once(1))
    return CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  struct kernel *kernel = (struct kernel *)function;
  unsigned cluster = 1;
  int cooperative = 0;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE)
      cooperative = config->attrs[i].value.cooperative;
    else if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
      cluster = config->attrs[i].value.clusterDim.x;
  }
  CUresult found = stand_in_error ? stand_in_error : verdict(config, kernel, cluster, cooperative);
  if (!stand_in_records)
    return found;
  record("%s{\"grid\": [%u, %u, %u], \"threads\": [%u, %u, %u], \"shared\": %u, \"stream\": %lu, ", used ? ", " : "",
         config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY, config->blockDimZ,
         config->sharedMemBytes, (unsigned long)config->hStream);
  record("\"cooperative\": %d, \"cluster\": %u, \"non_portable\": %d, \"error\": %d, \"parameters\": [", cooperative, cluster,
         kernel->non_portable, found);
  for (int i = 0; i < kernel->parameters; i++) {
    uint64_t value = 0;
    memcpy(&value, parameters[i], kernel->sizes[i]);
    record("%s%lu", i ? ", " : "", (unsigned long)value);
  }
  record("], \"sizes\": [");
  for (int i = 0; i < kernel->parameters; i++)
    record("%s%d", i ? ", " : "", kernel->sizes[i]);
  record("]}");
  return found;
}

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  struct kernel *kernel = (struct kernel *)function;
  unsigned size = config->attrs[0].value.clusterDim.x;
  *clusters = size > 16 || (size > 8 && !kernel->non_portable) ? 0 : clusters_at_once(size);
  return CUDA_SUCCESS;
}

/* As CUDA 13 words them. */
CUresult cuGetErrorString(CUresult error, const char **text) {
  switch (error) {
  case CUDA_ERROR_INVALID_VALUE:
    *text = "invalid argument";
    break;
  case CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE:
    *text = "too many blocks in cooperative launch";
    break;
  case CUDA_ERROR_INVALID_CLUSTER_SIZE:
    *text = "a kernel launch error has occurred due to cluster misconfiguration";
    break;
  default:
    *text = "unknown error";
  }
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    *value = stand_in_shared;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
    *value = 228 << 10;
    break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
    *value = clusters_at_once(1);
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    *value = 1 << 16;
    break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    *value = 32;
    break;
  default:
    *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int number) {
  *device = number;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer; /* memory of the host is the device's here */
  return CUDA_SUCCESS;
}

/* Triton is linked to these, and a launch needs nothing of them. */
#define NOTHING(name, ...) \
  CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
NOTHING(cuInit, unsigned flags)
NOTHING(cuModuleUnload, CUmodule module)
NOTHING(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache configuration)
NOTHING(cuDevicePrimaryCtxRetain, CUcontext *context, CUdevice device)
NOTHING(cuCtxSetCurrent, CUcontext context)
NOTHING(cuCtxGetDevice, CUdevice *device)
NOTHING(cuCtxGetLimit, size_t *value, CUlimit limit)
NOTHING(cuCtxSetLimit, CUlimit limit, size_t value)
NOTHING(cuStreamIsCapturing, CUstream stream, CUstreamCaptureStatus *status)
