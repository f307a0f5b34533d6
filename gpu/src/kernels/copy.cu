// Many small copies in one launch: between pages of KV tensors and a staging buffer in device memory (gather,
// scatter), or between pages and mapped host memory (zero copy). A warp takes a piece at a time; 16 bytes a thread, four
// in flight, past the first-level cache: every byte is touched once.

struct Piece {
    unsigned long long source;
    unsigned long long target;
    unsigned long long bytes;
};

extern "C" __global__ void __launch_bounds__(512, 1) kvring_copy(const Piece *pieces, unsigned int count) {
    const unsigned int lane = threadIdx.x & 31;
    const unsigned int warps = (gridDim.x * blockDim.x) >> 5;
    for (unsigned int i = (blockIdx.x * blockDim.x + threadIdx.x) >> 5; i < count; i += warps) {
        const Piece piece = pieces[i];
        const unsigned long long odd = piece.source | piece.target | piece.bytes;
        if ((odd & 15) == 0) {
            const unsigned long long items = piece.bytes >> 4;
            unsigned long long at = lane;
            for (; at + 96 < items; at += 128) {
                unsigned int v[4][4];
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                                 : "=r"(v[k][0]), "=r"(v[k][1]), "=r"(v[k][2]), "=r"(v[k][3])
                                 : "l"(piece.source + ((at + 32 * k) << 4)));
                }
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    asm volatile("st.global.cg.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(piece.target + ((at + 32 * k) << 4)),
                                 "r"(v[k][0]), "r"(v[k][1]), "r"(v[k][2]), "r"(v[k][3])
                                 : "memory");
                }
            }
#pragma unroll 1
            for (; at < items; at += 32) {
                unsigned int v[4];
                asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                             : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                             : "l"(piece.source + (at << 4)));
                asm volatile("st.global.cg.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(piece.target + (at << 4)), "r"(v[0]),
                             "r"(v[1]), "r"(v[2]), "r"(v[3])
                             : "memory");
            }
        } else if ((odd & 3) == 0) {
#pragma unroll 1
            for (unsigned long long at = lane << 2; at < piece.bytes; at += 128)
                *(volatile unsigned int *)(piece.target + at) = *(const volatile unsigned int *)(piece.source + at);
        } else {
#pragma unroll 1
            for (unsigned long long at = lane; at < piece.bytes; at += 32)
                *(volatile unsigned char *)(piece.target + at) = *(const volatile unsigned char *)(piece.source + at);
        }
    }
}
