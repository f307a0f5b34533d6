"""Compiles copy.cu to copy.ptx with NVRTC: a page of PTX that every driver since CUDA 12.0 compiles for its GPU.

python compile.py COPY.CU COPY.PTX; needs the package nvidia-cuda-nvrtc-cu12. No GPU is needed.
"""

import ctypes
import glob
import os
import sys
import zlib

import nvidia.cuda_nvrtc

ARCH = b"--gpu-architecture=compute_80"


def main(source: str, target: str) -> None:
    directory = next(iter(nvidia.cuda_nvrtc.__path__))
    nvrtc = ctypes.CDLL(glob.glob(os.path.join(directory, "lib", "libnvrtc.so.*"))[0])
    with open(source, "rb") as file:
        text = file.read()
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"copy.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 1)(ARCH)
    status = nvrtc.nvrtcCompileProgram(program, 1, options)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    # Twelve point oh knows PTX 8.0 and nothing here is newer.
    compiled = ptx.value.decode().replace(".version 8.7", ".version 8.0")
    with open(target, "w") as file:
        file.write(f"// Made from copy.cu by compile.py; CRC-32 {zlib.crc32(text):08x}\n{compiled}")


if __name__ == "__main__":
    main(*sys.argv[1:])
