"""Why torch cannot use a GPU that this machine has.

torch.cuda.is_available() is false for many reasons and names none, so a run would train on the CPU, a hundred times
slower. Linux shows the GPUs of a machine also where torch does not see them: as files in /dev if their driver is
loaded and this process may have them, and on the PCI bus in any case.

Which driver CUDA needs: https://docs.nvidia.com/deploy/cuda-compatibility. Which GPUs the builds of torch 2.11 to 2.14
have code for: https://github.com/pytorch/pytorch/blob/main/RELEASE.md.
"""

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from config.errors import first_line

ON_CPU = "to train on the CPU, set CUDA_VISIBLE_DEVICES= (empty)"
LEAST_DRIVER = {13: 580, 12: 525}  # major version of the driver that CUDA of this major version needs
BUILDS = {13: "cu130", 12: "cu126"}  # of torch, for CUDA of this major version
OLDEST_GPU = (7, 5)  # compute capability that cu130 has code for; cu126 has 5.0 to 9.0
VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
# Results of cuInit, by NVIDIA's cuda.h, and their remedies.
RESULTS = {
    100: ("the driver finds no GPU", "look at `nvidia-smi` and `dmesg`, and at CUDA_VISIBLE_DEVICES"),
    802: ("the links between the GPUs are not set up", "start nvidia-fabricmanager, in the version of the driver"),
    803: ("the driver was updated, but an older one is still loaded", "reboot"),
    804: ("the library of the driver does not fit the loaded driver and this GPU", "use an image for this driver"),
}


@dataclass
class Obstacle:
    """Why a GPU is not used, and the remedy. `fatal`: the process was given a GPU, or asked for one, and must end."""

    problem: str
    remedy: str
    fatal: bool


def find_obstacle(local_rank: int, root: Path = Path("/")) -> Obstacle | None:
    """Why torch cannot use the GPUs, or all of them; None if it can, or if there are none.

    `root` is the directory that holds dev, proc and sys.
    """
    given, on_bus = gpu_files(root), gpus_on_bus(root)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and (visible.strip() in ("", "NoDevFiles") or visible.strip().startswith("-1")):
        hidden = f"CUDA_VISIBLE_DEVICES is {visible.strip() or 'empty'}, so the GPUs of this machine are not used"
        return Obstacle(hidden, "unset it to use them", fatal=False) if given else None
    if torch.cuda.is_available():
        return _of_visible_gpu(visible, local_rank, driver_version(root))
    if given and torch.version.hip is None and given[0].name != "kfd":
        return _of_nvidia(visible, given, root)
    if visible:
        return Obstacle(
            f"CUDA_VISIBLE_DEVICES {visible}: torch finds no GPU in this machine", f"unset it; {ON_CPU}", fatal=True
        )
    if given:
        return _of_amd(given[0])
    if "NVIDIA" in on_bus:
        cause = "this container may not use it" if driver_version(root) else "its driver is not loaded"
        remedy = "start the container with GPUs (docker run --gpus all), or install the driver"
        return Obstacle(f"this machine has an NVIDIA GPU, but {cause}, so the CPU is used", remedy, fatal=False)
    others = [vendor for vendor in on_bus if vendor != "NVIDIA"]
    if others:
        remedy = "an AMD GPU needs the driver amdgpu and a build of torch for ROCm; Intel GPUs are not supported"
        return Obstacle(f"torch cannot use the {others[0]} GPU of this machine, so the CPU is used", remedy, False)
    return None


def gpu_files(root: Path = Path("/")) -> list[Path]:
    """The files of the GPUs that this process was given: of NVIDIA, or else of WSL, or else of AMD."""
    found = [path for path in (root / "dev").glob("nvidia[0-9]*") if path.name[6:].isdecimal()]
    if not found and (root / "usr/lib/wsl/lib/libcuda.so.1").exists():
        found = list((root / "dev").glob("dxg"))
    return sorted(found) or list((root / "dev").glob("kfd"))


def gpus_on_bus(root: Path = Path("/")) -> dict[str, int]:
    """The number of GPUs on the PCI bus by vendor, without the graphics of an Intel processor."""
    found: dict[str, int] = {}
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        # Classes: display controllers, and processing accelerators. An Intel processor has its graphics at 00:02.0.
        if (
            vendor not in VENDORS
            or kind[:4] not in ("0x03", "0x12")
            or (vendor == "0x8086" and "00:02.0" in device.name)
        ):
            continue
        found[VENDORS[vendor]] = found.get(VENDORS[vendor], 0) + 1
    return found


def driver_version(root: Path = Path("/")) -> str:
    """The version of the loaded NVIDIA driver, such as 535.104.05, or ""."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    version = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return version[0] if version else ""


def ask_driver() -> tuple[int, int] | None:
    """The CUDA version that the NVIDIA driver supports, as 12020 for 12.2, and the result of cuInit, 0 if all is well.

    None if its library cannot be loaded.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        library.cuDriverGetVersion(ctypes.byref(version))
        return version.value, int(library.cuInit(0))
    except (OSError, AttributeError):
        return None


def build_for(driver: str) -> str:
    """The command that installs a build of torch for this version of the driver; or which driver to install."""
    number = int(driver.partition(".")[0] or 0)
    major = next((cuda for cuda, least in LEAST_DRIVER.items() if number >= least), 0)
    if not major:
        return f"install driver {LEAST_DRIVER[13]} or newer, then {_install(BUILDS[13])}"
    return _install(BUILDS[major])


def _install(build: str) -> str:
    release = torch.__version__.partition("+")[0]
    return f"pip install torch=={release} --index-url https://download.pytorch.org/whl/{build}"


def _of_nvidia(visible: str | None, given: list[Path], root: Path) -> Obstacle:
    """Why torch does not see an NVIDIA GPU that this process was given."""

    def fatal(problem: str, remedy: str) -> Obstacle:
        return Obstacle(problem, f"{remedy}; {ON_CPU}", fatal=True)

    driver = driver_version(root)
    if torch.version.cuda is None:
        problem = f"torch {torch.__version__} was built without CUDA, and cannot use the NVIDIA GPU of this machine"
        return fatal(problem, build_for(driver) if driver else _install(BUILDS[12]))
    controls = [root / "dev" / name for name in ("nvidiactl", "nvidia-uvm")]
    for path in [*(control for control in controls if control.exists()), *given]:
        if not os.access(path, os.R_OK | os.W_OK):
            group = path.stat().st_gid
            return fatal(
                f"{path}: this user has no permission to use the NVIDIA GPU",
                f"join its group (number {group}; usermod -aG), or correct its mode (chmod 666)",
            )
    answer = ask_driver()
    if answer is None:
        remedy = "install it; in a container, use the NVIDIA container toolkit (docker run --gpus all)"
        return fatal("libcuda.so.1 of the NVIDIA driver cannot be loaded, so torch cannot use the GPU", remedy)
    version, result = answer
    if version // 1000 < int(torch.version.cuda.partition(".")[0]):
        supported = f"{version // 1000}.{version % 1000 // 10}"
        return fatal(
            f"the NVIDIA driver {driver} supports CUDA {supported}, but torch {torch.__version__} is for CUDA "
            f"{torch.version.cuda}, so it cannot use the GPU",
            f"{build_for(driver or _driver_of(version))}, or install driver {_needed_driver()} or newer",
        )
    if visible and result in (0, 100):
        return fatal(
            f"CUDA_VISIBLE_DEVICES {visible}: this machine has no such GPU (it has {len(given)})",
            "name GPUs that `nvidia-smi -L` lists, or unset it",
        )
    problem, remedy = RESULTS.get(result, ("", "look at `nvidia-smi` and `dmesg`"))
    if not problem:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except Exception as error:  # torch says why
            problem = first_line(error)
    return fatal(f"torch cannot use the NVIDIA GPU (cuInit {result}): {problem}", remedy)


def _of_amd(file: Path) -> Obstacle:
    """Why torch does not see an AMD GPU, whose `file` there is. Processors with graphics have it, too."""
    problem = f"torch {torch.__version__} cannot use the AMD GPU of this machine"
    if torch.version.hip is None:
        remedy = "a build of torch for ROCm can: https://pytorch.org/get-started"
        return Obstacle(f"{problem}, so the CPU is used", remedy, fatal=False)
    if not os.access(file, os.R_OK | os.W_OK):
        return Obstacle(
            f"{problem}: no permission for {file}", f"join the groups render and video; {ON_CPU}", fatal=True
        )
    return Obstacle(problem, f"look at `rocminfo`, and whether ROCm supports this GPU; {ON_CPU}", fatal=True)


def _of_visible_gpu(visible: str | None, local_rank: int, driver: str) -> Obstacle | None:
    """Torch sees a GPU. The obstacle is that it does not see all, or has no code for that of this rank."""
    count = torch.cuda.device_count()
    names = [name.strip() for name in (visible or "").split(",") if name.strip()]
    names = names[: names.index("-1")] if "-1" in names else names
    if len(names) > count and "MIG-" not in names[0]:  # a process can use one MIG instance only
        return Obstacle(
            f"CUDA_VISIBLE_DEVICES {visible}: it names {len(names)} GPUs, and CUDA finds {count} of them",
            "name GPUs that `nvidia-smi -L` lists, each once",
            fatal=True,
        )
    if torch.version.hip:
        return None
    properties = torch.cuda.get_device_properties(local_rank % count)
    capability = (properties.major, properties.minor)
    codes = torch.cuda.get_arch_list()
    if not codes or has_code(capability, codes):
        return None
    has = ", ".join(code.partition("_")[2] for code in codes)
    remedy = _install(BUILDS[12 if capability < OLDEST_GPU else 13])
    if capability >= OLDEST_GPU and driver and int(driver.partition(".")[0]) < LEAST_DRIVER[13]:
        remedy = build_for("")
    return Obstacle(
        f"{properties.name} has compute capability {capability[0]}.{capability[1]}, and torch {torch.__version__} has "
        f"no code for it (it has: {has})",
        f"{remedy}, or hide this GPU with CUDA_VISIBLE_DEVICES",
        fatal=True,
    )


def has_code(capability: tuple[int, int], codes: list[str]) -> bool:
    """Whether a GPU can run one of torch's `codes`: sm_80 runs on 8.0 and 8.6, compute_80 also on any newer GPU."""
    for code in codes:
        kind, _, digits = code.partition("_")
        digits = digits.rstrip("af")
        built = (int(digits[:-1]), int(digits[-1]))
        if kind == "compute" and capability >= built:
            return True
        if kind == "sm" and capability[0] == built[0] and capability >= built:
            return True
    return False


def _driver_of(version: int) -> str:
    """The oldest driver that supports a CUDA version as 12020, for a kernel that does not say its driver."""
    return str(LEAST_DRIVER.get(version // 1000, 0))


def _needed_driver() -> int:
    return LEAST_DRIVER.get(int((torch.version.cuda or "13").partition(".")[0]), LEAST_DRIVER[13])
