/* A CUDA driver with the functions that sandbox/nvrtc calls: it keeps what it is given, and fails when it is told to.
   NVIDIA's own cuda.h declares them, so a wrong prototype does not compile. */
#include <cuda.h>
#include <string.h>
#include <unistd.h>
#define HANDLE(type, n) ((type)(size_t)(n))

int failing, module_fails, contexts, launches, static_shared, parameter_count, attributes[64], threads = 1024;
int encoded, slow;              /* maps; microseconds that a launch takes to look at its arguments */
size_t parameters[128];
unsigned config[10];            /* grid, block, shared, cluster */
unsigned char arguments[4096];  /* one after another */
unsigned char kept[64][4096];    /* the arguments of each launch */
unsigned long long stream;
struct { unsigned long long start, sizes[5], strides[4]; unsigned box[5], steps[5], rank, type, modes[4]; } map;

const int config_bytes = sizeof(CUlaunchConfig), attribute_bytes = sizeof(CUlaunchAttribute), constants[] = {
    CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED,
    CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_INVALID_CONTEXT,
    CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B,
    CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, -1};

CUresult cuInit(unsigned flags) { return flags; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = HANDLE(CUcontext, 100 + device);
    return 0;
}
CUresult cuCtxSetCurrent(CUcontext context) {
    ++contexts;
    return context == HANDLE(CUcontext, 100) ? 0 : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = HANDLE(CUmodule, 200);
    return module_fails ? module_fails : memcmp(image, "\177ELF", 4) ? CUDA_ERROR_INVALID_IMAGE : 0;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = HANDLE(CUfunction, 300);
    return module == HANDLE(CUmodule, 200) && !strcmp(name, "saxpy") ? 0 : CUDA_ERROR_NOT_FOUND;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? threads : static_shared;
    return function == HANDLE(CUfunction, 300) ? 0 : CUDA_ERROR_INVALID_HANDLE;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
    attributes[which] = value;
    return function == HANDLE(CUfunction, 300) ? 0 : CUDA_ERROR_INVALID_HANDLE;
}
CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t *offset, size_t *size) {
    if (index >= (size_t)parameter_count) return CUDA_ERROR_INVALID_VALUE;
    *offset = 0, *size = parameters[index];
    return function == HANDLE(CUfunction, 300) ? 0 : CUDA_ERROR_INVALID_HANDLE;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **values, void **extra) {
    const int result = failing;
    failing = 0;
    if (result || function != HANDLE(CUfunction, 300) || extra) return result ? result : CUDA_ERROR_INVALID_VALUE;
    const unsigned seen[10] = {c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                               c->sharedMemBytes};
    memcpy(config, seen, sizeof seen);
    for (unsigned a = 0; a < c->numAttrs; ++a)
        if (c->attrs[a].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
            memcpy(config + 7, &c->attrs[a].value.clusterDim, 3 * sizeof *config);
    stream = (size_t)c->hStream;
    const int n = __sync_fetch_and_add(&launches, 1) % 64;
    unsigned char *to = kept[n];
    for (int p = 0; p < parameter_count; to += parameters[p++]) {
        if (slow) usleep(slow);
        memcpy(to, values[p], parameters[p]);
    }
    memcpy(arguments, kept[n], sizeof arguments);
    return 0;
}
CUresult cuTensorMapEncodeTiled(
    CUtensorMap *out, CUtensorMapDataType type, cuuint32_t rank, void *start, const cuuint64_t *sizes,
    const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    if ((size_t)out % 64 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
    memset(out, 0x5A, sizeof *out);
    out->opaque[0] = (size_t)start;
    memcpy(out->opaque + 1, sizes, rank * sizeof *sizes), memcpy(out->opaque + 6, strides, (rank - 1) * sizeof *strides);
    ++encoded;
    map.start = (size_t)start, map.rank = rank, map.type = type;
    memcpy(map.sizes, sizes, rank * sizeof *sizes), memcpy(map.strides, strides, (rank - 1) * sizeof *strides);
    memcpy(map.box, box, rank * sizeof *box), memcpy(map.steps, steps, rank * sizeof *steps);
    map.modes[0] = interleave, map.modes[1] = swizzle, map.modes[2] = promotion, map.modes[3] = fill;
    return 0;
}
CUresult cuTensorMapReplaceAddress(CUtensorMap *out, void *start) {
    out->opaque[0] = (size_t)start;
    return (size_t)out % 64 ? CUDA_ERROR_INVALID_VALUE : 0;
}
CUresult cuGetErrorName(CUresult code, const char **name) { *name = "CUDA_ERROR_MADE_UP"; return code == 999; }
CUresult cuGetErrorString(CUresult code, const char **text) { *text = "made up"; return code == 999; }
