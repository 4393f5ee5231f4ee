"""Builds the two compiled modules of smartkv_ext with one ninja file, so that the kernels are compiled once.

* ``_C.abi3.so``: the ops. It links libtorch through its stable ABI only: one binary runs on every torch >= 2.10.
* ``_core``: a pybind11 module over the torch-free core (build info, CPU features, page layout). pybind11 cannot be
  built against the limited API, so a wheel of this package is an ordinary per-version wheel; ``_C`` in it is abi3.

SMARTKV_CUDA=auto|1|0: CUDA kernels if nvcc is there | required | never. nvcc is called directly, because torch's
CUDAExtension refuses to work on a CPU-only torch. SMARTKV_CUDA_ARCHS="80 90": what they are compiled for; the last also
as PTX, for what comes after it. MAX_JOBS: compilers that run at a time.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = "0.1.0"
CXX_FLAGS = "-O3 -std=c++20 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi"
TORCH_FLAGS = "-DTORCH_TARGET_VERSION=0x020a000000000000 -DPy_LIMITED_API=0x030a0000"
SLOWEST = ("decode_attention.cu", "attention_mass.cu")  # minutes each: started first, or a core idles at the end
NVCC_FLAGS = "-O3 -std=c++20 -Xcompiler -fPIC,-fvisibility=hidden --expt-relaxed-constexpr"


def find_nvcc():
    """Path of nvcc, or None for a CPU-only build."""
    mode = os.environ.get("SMARTKV_CUDA", "auto")
    if mode not in ("auto", "1", "0"):
        raise SystemExit(f"SMARTKV_CUDA must be one of auto, 1, 0; got {mode!r}")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    found = shutil.which("nvcc", path=os.pathsep.join([f"{h}/bin" for h in homes if h] + [os.environ["PATH"]]))
    if mode == "1" and found is None:
        raise SystemExit("SMARTKV_CUDA=1, but nvcc was not found: set CUDA_HOME or put nvcc on the PATH")
    return None if mode == "0" else found


def gencode():
    """Options of nvcc that name the architectures."""
    archs = os.environ.get("SMARTKV_CUDA_ARCHS", "80 90").split()
    if not archs or not all(arch.isdecimal() and int(arch) >= 80 for arch in archs):
        raise SystemExit(f"SMARTKV_CUDA_ARCHS must name architectures from 80 on, such as '80 90'; got {archs}")
    codes = [f"sm_{arch}" for arch in archs]
    codes[-1] = f"[{codes[-1]},compute_{archs[-1]}]"
    return " ".join(f"-gencode arch=compute_{arch},code={code}" for arch, code in zip(archs, codes, strict=True))


def static_runtime(nvcc):
    """libcudart_static.a, wherever this toolkit keeps it."""
    home = Path(nvcc).resolve().parents[1]
    for folder in ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib"):
        if (home / folder / "libcudart_static.a").is_file():
            return home / folder / "libcudart_static.a"
    raise SystemExit(f"{home} has nvcc but no libcudart_static.a: install the development files of the CUDA runtime")


def isolated():
    """Whether this build sees an environment of its own: made by pip, by `python -m build`, or by uv."""
    prefix = Path(sys.prefix)
    hidden = sysconfig.get_path("purelib") not in sys.path
    return hidden or prefix.name.startswith("build-env-") or "builds-v0" in prefix.parts


def install_command(arguments, prefix=sys.prefix, root=ROOT):
    """What builds here with the torch of the environment, for what seems to have been asked for."""
    prefix = Path(prefix)
    if prefix.name.startswith("build-env-"):
        return "python -m build --no-isolation"
    install = ("uv " if "builds-v0" in prefix.parts else "") + "pip install --no-build-isolation"
    if "editable_wheel" in arguments:
        return f"{install} -e ."
    # An archive is unpacked under a name of the installer's: the present folder is none of the person's then.
    unpacked = any(part.startswith(("pip-req-build-", "pip-install-", "sdists-v")) for part in root.parts)
    return f"{install} " + (f"smartkv_ext-{VERSION}.tar.gz" if unpacked else ".")


def torch_dir():
    try:
        import torch
    except ImportError:
        reason = (
            "This is an isolated build: it does not see the packages of your environment, torch among them.\n"
            if isolated()
            else ""
        )
        raise SystemExit(
            "smartkv_ext is compiled against torch >= 2.10, which is not importable here.\n"
            f"{reason}Install torch first, then run: {install_command(sys.argv)}"
        ) from None
    return Path(torch.__file__).parent


class NinjaBuild(build_ext):
    """Writes build.ninja and runs ninja; its dependency files make rebuilds incremental."""

    def run(self):
        import ninja
        import pybind11
        from ninja import ninja_syntax

        torch_dir()  # says what is missing before the last build's files are touched
        # Not build_temp, which pip makes anew for every editable install.
        build_dir = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        with open(build_dir / "build.ninja", "w") as file:
            self.write_rules(
                ninja_syntax.Writer(file, width=10**6),
                f"-isystem {pybind11.get_include()} -ffile-prefix-map={pybind11.get_include()}/=",
            )
        jobs = os.environ.get("MAX_JOBS")
        limit = ["-j", jobs] if jobs else []
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", build_dir, *limit], check=True)
        for extension in self.extensions:
            target = Path(self.output_of(extension))
            target.parent.mkdir(parents=True, exist_ok=True)
            # A new file, not new contents: overwriting a library crashes the processes that have it mapped.
            shutil.copyfile(build_dir / target.name, target.with_suffix(".new"))
            target.with_suffix(".new").replace(target)

    def output_of(self, extension):
        path = Path(self.get_ext_fullpath(extension.name))
        return path.with_name("_C.abi3.so") if extension.name.endswith("._C") else path

    def get_outputs(self):
        return [str(self.output_of(extension)) for extension in self.extensions]

    def write_rules(self, n, pybind11):
        torch, nvcc = torch_dir(), find_nvcc()
        python = " ".join(f"-I{path}" for path in self.include_dirs)
        cxx = os.environ.get("CXX", "g++")
        defines = {
            "SMARTKV_VERSION": f'"{VERSION}"',
            "SMARTKV_CXX_FLAGS": f'"{CXX_FLAGS}"',
            "SMARTKV_CUDA": int(bool(nvcc)),
        }
        info = " ".join(f"-D{name}='{value}'" for name, value in defines.items())
        includes = f"-I{ROOT}/csrc/include -I{ROOT}/csrc/cpu -I{ROOT}/csrc/cuda"
        # __FILE__ stays relative to the repository, so that no path of the build machine gets into a binary.
        prefixes = f"-ffile-prefix-map={ROOT}/= -ffile-prefix-map={torch.parent}/="
        flags = f"{CXX_FLAGS} {includes} {prefixes} {os.environ.get('CXXFLAGS', '')}"
        n.rule("cxx", f"{cxx} {flags} $flags -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        n.rule("ar", "rm -f $out && ar rcs $out $in")
        n.rule("link", f"{cxx} -shared -Wl,--exclude-libs,ALL -o $out $in $libs")
        if nvcc:
            # The log says how many registers each kernel takes: csrc/tests/check_spills.py reads it.
            n.rule(
                "nvcc",
                f"{nvcc} {NVCC_FLAGS} {gencode()} -Xptxas -v {includes} -MMD -MF $out.d -c $in -o $out > $out.log 2>&1"
                " || (cat $out.log && false)",
                depfile="$out.d", deps="gcc",
            )  # fmt: skip

        def objects(pattern, rule="cxx", flags=""):
            built = []
            sources = [s for s in sorted(glob(str(ROOT / pattern))) if nvcc or "/cuda_" not in s]
            sources.sort(key=lambda source: not source.endswith(SLOWEST))
            for source in sources:
                name = os.path.relpath(source, ROOT / "csrc").replace("/", "_") + ".o"
                log = [f"{name}.log"] if rule == "nvcc" else None
                built += n.build(name, rule, source, variables={"flags": flags}, implicit_outputs=log)
            return built

        kernels = objects("csrc/cuda/*.cu", "nvcc") if nvcc else []
        core = n.build("libsmartkv_core.a", "ar", objects("csrc/cpu/*.cpp"))
        cuda = "-DSMARTKV_WITH_CUDA" if nvcc else ""
        torch_flags = f"{TORCH_FLAGS} {cuda} {python} -isystem {torch}/include"
        bindings = objects("csrc/torch/*.cpp", flags=torch_flags)
        # libtorch.so names libtorch_cuda.so where torch has it: kept although nothing in it is needed by name, it
        # puts the weak CUDA stream symbol into scope. Where torch is CPU-only the symbol stays null.
        libs = f"-L{torch}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu"
        if nvcc:
            libs += f" {static_runtime(nvcc)} -lpthread -ldl -lrt"
        n.build("_C.abi3.so", "link", bindings + kernels + core, variables={"libs": libs})
        module = objects("csrc/pybind/*.cpp", flags=f"{info} {python} {pybind11}")
        n.build(Path(self.get_ext_fullpath("smartkv_ext._core")).name, "link", module + core)


setup(
    version=VERSION,
    ext_modules=[
        Extension("smartkv_ext._C", sorted(glob("csrc/torch/*.cpp")), py_limited_api=True),
        Extension("smartkv_ext._core", sorted(glob("csrc/pybind/*.cpp"))),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
