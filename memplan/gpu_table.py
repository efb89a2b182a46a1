"""The GPUs memplan knows: what each driver reports as memory, and the peaks its maker prints.

Memory is what a run can have: the driver's total (`nvidia-smi`'s memory.total, `rocm-smi`'s VRAM total),
not the number on the box. FLOPs are dense tensor peaks with fp32 accumulation, which is how training
multiplies: half of what is printed for sparse matrices, and on GeForce half of the fp16-accumulate figure.

A new GPU is one row; a test checks every row.
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.units import MIB

CHECKED = "2026-11-22"


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One GPU model. `None` means that no source was found, never zero."""

    name: str
    memory_bytes: int
    """Total memory as its driver reports it."""
    products: tuple[str, ...] = ()
    """Names its driver gives it, without the maker's."""
    aliases: tuple[str, ...] = ()
    group: str = ""
    """A shorter name that several rows share, and that is therefore ambiguous (`a100`)."""
    nominal_gb: int | None = None
    """The memory on the box, in the seller's GB."""
    bandwidth_bytes_per_s: float | None = None
    bf16_flops: float | None = None
    """Dense bf16 tensor operations per second; None where the hardware has none."""
    fp16_flops: float | None = None
    fp32_flops: float | None = None
    """Operations per second outside the tensor cores (fp32 training without TF32)."""
    tdp_watts: int | None = None
    compute_capability: str | None = None
    """CUDA compute capability; None for AMD."""
    generation: str = ""
    memory_source: str = ""
    source: str = ""
    checked: str = ""

    @property
    def supports_bf16(self) -> bool | None:
        """bf16 in hardware: compute capability 8.0 and up, and CDNA2 and later. None if not known."""
        if self.generation.startswith("cdna"):
            return True
        return None if self.compute_capability is None else float(self.compute_capability) >= 8.0

    @property
    def supports_flash_attention_2(self) -> bool | None:
        """FlashAttention-2 needs capability 8.0 and up, or CDNA2 and later (its README). None if unknown."""
        return self.supports_bf16


# Where a memory figure comes from.
SMI = "nvidia-smi memory.total, the same in several public logs of the card"
NVML = "NVML on the card"
ROCM = "rocm-smi VRAM total / hipDeviceProp totalGlobalMem, the same in several public logs of the card"
NOMINAL = "nominal: no reading of its driver found"

GEFORCE = "tensor rate 2 x fp32 with fp32 accumulation"  # GeForce Ampere, Ada and Blackwell whitepapers
AMPERE = f"NVIDIA Ampere GA102 GPU Architecture whitepaper and product page; {GEFORCE}"
ADA = f"NVIDIA Ada GPU Architecture whitepaper, appendix A, and product page; {GEFORCE}"
BLACKWELL = f"NVIDIA RTX Blackwell GPU Architecture whitepaper and product page; {GEFORCE}"

_MAKERS = {"7.0": "volta", "7.5": "turing", "8.0": "ampere", "8.6": "ampere", "8.9": "ada", "9.0": "hopper"}


def _nvidia(
    name: str,
    product: str,
    mib: int,
    nominal_gb: int,
    gb_per_s: float,
    bf16: float | None,
    fp32: float | None,
    watts: int,
    capability: str,
    source: str,
    *,
    fp16: float | None = None,
    aliases: tuple[str, ...] = (),
    products: tuple[str, ...] = (),
    group: str = "",
    memory_source: str = SMI,
) -> GpuSpec:
    """A row of NVIDIA's: `bf16`, `fp16` (as bf16 unless given) and `fp32` in 10**12 operations per second."""

    def tera(value: float | None) -> float | None:
        return None if value is None else value * 1e12

    return GpuSpec(
        name=name,
        memory_bytes=mib * MIB,
        products=(product, *products),
        aliases=aliases,
        group=group,
        nominal_gb=nominal_gb,
        bandwidth_bytes_per_s=gb_per_s * 1e9,
        bf16_flops=tera(bf16),
        fp16_flops=tera(bf16 if fp16 is None else fp16),
        fp32_flops=tera(fp32),
        tdp_watts=watts,
        compute_capability=capability,
        generation=_MAKERS.get(capability, "blackwell"),
        memory_source=memory_source,
        source=source,
        checked=CHECKED,
    )


def _amd(
    name: str,
    memory_bytes: int,
    nominal_gb: int,
    gb_per_s: float,
    bf16: float,
    fp32: float,
    watts: int,
    generation: str,
    source: str,
    *,
    aliases: tuple[str, ...] = (),
    memory_source: str = ROCM,
) -> GpuSpec:
    return GpuSpec(
        name=name,
        memory_bytes=memory_bytes,
        products=(f"Instinct {name.upper()}", f"Instinct {name.upper()} VF"),
        aliases=aliases,
        nominal_gb=nominal_gb,
        bandwidth_bytes_per_s=gb_per_s * 1e9,
        bf16_flops=bf16 * 1e12,
        fp16_flops=bf16 * 1e12,
        fp32_flops=fp32 * 1e12,
        tdp_watts=watts,
        generation=generation,
        memory_source=memory_source,
        source=source,
        checked=CHECKED,
    )


# name, driver's name, MiB, GB on the box, GB/s, dense bf16 and fp32 in TFLOP/s, W, capability, source
ROWS: tuple[GpuSpec, ...] = (
    # GeForce RTX 20: no bf16
    _nvidia("rtx-2060", "GeForce RTX 2060", 6144, 6, 336, None, 6.5, 160, "7.5", "NVIDIA product page"),
    _nvidia("rtx-2080", "GeForce RTX 2080", 8192, 8, 448, None, 10.1, 215, "7.5",
            "NVIDIA Turing GPU Architecture whitepaper, table 4 (reference card)", fp16=40.3),
    _nvidia("rtx-2080-ti", "GeForce RTX 2080 Ti", 11264, 11, 616, None, 13.4, 250, "7.5",
            "NVIDIA Turing GPU Architecture whitepaper, table 1 (reference card)", fp16=53.8),
    # GeForce RTX 30
    _nvidia("rtx-3060", "GeForce RTX 3060", 12288, 12, 360, 25.5, 12.74, 170, "8.6", AMPERE,
            aliases=("rtx-3060-12gb",)),
    _nvidia("rtx-3060-ti", "GeForce RTX 3060 Ti", 8192, 8, 448, 32.4, 16.2, 200, "8.6", AMPERE),
    _nvidia("rtx-3070", "GeForce RTX 3070", 8192, 8, 448, 40.6, 20.3, 220, "8.6", AMPERE),
    _nvidia("rtx-3080-10gb", "GeForce RTX 3080", 10240, 10, 760, 59.5, 29.8, 320, "8.6", AMPERE,
            group="rtx-3080"),
    _nvidia("rtx-3080-12gb", "GeForce RTX 3080", 12288, 12, 912, 61.3, 30.6, 350, "8.6", AMPERE,
            group="rtx-3080"),
    _nvidia("rtx-3080-ti", "GeForce RTX 3080 Ti", 12288, 12, 912, 68.2, 34.1, 350, "8.6", AMPERE),
    _nvidia("rtx-3090", "GeForce RTX 3090", 24576, 24, 936, 71.0, 35.6, 350, "8.6", AMPERE),
    _nvidia("rtx-3090-ti", "GeForce RTX 3090 Ti", 24564, 24, 1008, 80.0, 40.0, 450, "8.6", AMPERE),
    # GeForce RTX 40
    _nvidia("rtx-4060", "GeForce RTX 4060", 8188, 8, 272, 30.2, 15.1, 115, "8.9", ADA),
    _nvidia("rtx-4060-ti-8gb", "GeForce RTX 4060 Ti", 8188, 8, 288, 44.1, 22.1, 160, "8.9", ADA,
            group="rtx-4060-ti"),
    _nvidia("rtx-4060-ti-16gb", "GeForce RTX 4060 Ti", 16380, 16, 288, 44.1, 22.1, 165, "8.9", ADA,
            group="rtx-4060-ti"),
    _nvidia("rtx-4070", "GeForce RTX 4070", 12282, 12, 504, 58.3, 29.1, 200, "8.9", ADA),
    _nvidia("rtx-4070-super", "GeForce RTX 4070 SUPER", 12282, 12, 504, 71.0, 35.5, 220, "8.9", ADA),
    _nvidia("rtx-4070-ti", "GeForce RTX 4070 Ti", 12282, 12, 504, 80.2, 40.1, 285, "8.9", ADA),
    _nvidia("rtx-4070-ti-super", "GeForce RTX 4070 Ti SUPER", 16376, 16, 672, 88.2, 44.1, 285, "8.9", ADA),
    _nvidia("rtx-4080", "GeForce RTX 4080", 16376, 16, 716.8, 97.5, 48.7, 320, "8.9", ADA),
    _nvidia("rtx-4080-super", "GeForce RTX 4080 SUPER", 16376, 16, 736, 104.4, 52.2, 320, "8.9", ADA),
    _nvidia("rtx-4090", "GeForce RTX 4090", 24564, 24, 1008, 165.2, 82.6, 450, "8.9", ADA),
    # GeForce RTX 50
    _nvidia("rtx-5060", "GeForce RTX 5060", 8151, 8, 448, 38.4, 19.2, 145, "12.0", BLACKWELL),
    _nvidia("rtx-5060-ti-8gb", "GeForce RTX 5060 Ti", 8151, 8, 448, 47.4, 23.7, 180, "12.0", BLACKWELL,
            group="rtx-5060-ti"),
    _nvidia("rtx-5060-ti-16gb", "GeForce RTX 5060 Ti", 16311, 16, 448, 47.4, 23.7, 180, "12.0", BLACKWELL,
            group="rtx-5060-ti"),
    _nvidia("rtx-5070", "GeForce RTX 5070", 12227, 12, 672, 61.7, 30.9, 250, "12.0", BLACKWELL),
    _nvidia("rtx-5070-ti", "GeForce RTX 5070 Ti", 16303, 16, 896, 87.9, 43.9, 300, "12.0", BLACKWELL),
    _nvidia("rtx-5080", "GeForce RTX 5080", 16303, 16, 960, 112.6, 56.3, 360, "12.0", BLACKWELL),
    _nvidia("rtx-5090", "GeForce RTX 5090", 32607, 32, 1792, 209.5, 104.8, 575, "12.0", BLACKWELL),
    # Workstation
    _nvidia("quadro-rtx-6000", "Quadro RTX 6000", 24576, 24, 672, None, 16.3, 295, "7.5",
            "NVIDIA Quadro RTX 6000 datasheet", fp16=130.5),
    _nvidia("rtx-a4000", "RTX A4000", 16376, 16, 448, 76.7, 19.2, 140, "8.6",
            "NVIDIA RTX A4000 datasheet (153.4 TFLOPS with sparsity)", aliases=("a4000",)),
    _nvidia("rtx-a5000", "RTX A5000", 24564, 24, 768, 111.1, 27.8, 230, "8.6",
            "NVIDIA RTX A5000 datasheet (222.2 TFLOPS with sparsity)", aliases=("a5000",)),
    _nvidia("rtx-a6000", "RTX A6000", 49140, 48, 768, 154.8, 38.7, 300, "8.6",
            "NVIDIA RTX A6000 datasheet (309.7 TFLOPS with sparsity)", aliases=("a6000",),
            memory_source=f"{SMI}, ECC off as delivered (46068 MiB with ECC on)"),
    _nvidia("rtx-4000-ada", "RTX 4000 Ada Generation", 20475, 20, 360, 106.9, 26.7, 130, "8.9",
            "NVIDIA RTX 4000 Ada Generation datasheet (427.6 TFLOPS in fp8 with sparsity)"),
    _nvidia("rtx-6000-ada", "RTX 6000 Ada Generation", 49140, 48, 960, 364.2, 91.1, 300, "8.9",
            "NVIDIA RTX 6000 Ada Generation datasheet (1457 TFLOPS in fp8 with sparsity)"),
    _nvidia("rtx-pro-6000", "RTX PRO 6000 Blackwell Workstation Edition", 97887, 96, 1792, 503.8, 125.0,
            600, "12.0", "NVIDIA RTX Blackwell PRO GPU Architecture whitepaper and RTX PRO 6000 datasheet",
            products=("RTX PRO 6000 Blackwell Server Edition",),
            aliases=("rtx-pro-6000-blackwell", "pro-6000")),
    # Data centre
    _nvidia("t4", "Tesla T4", 15360, 16, 320, None, 8.1, 70, "7.5", "NVIDIA T4 datasheet", fp16=65.0),
    _nvidia("v100-16gb", "Tesla V100-SXM2-16GB", 16160, 16, 900, None, 15.7, 300, "7.0",
            "NVIDIA V100 datasheet (SXM2)", fp16=125.0, products=("Tesla V100-PCIE-16GB",), group="v100"),
    _nvidia("v100-32gb", "Tesla V100-SXM2-32GB", 32768, 32, 900, None, 15.7, 300, "7.0",
            "NVIDIA V100 datasheet (SXM2)", fp16=125.0, products=("Tesla V100-PCIE-32GB",), group="v100"),
    _nvidia("a10", "A10", 23028, 24, 600, 125.0, 31.2, 150, "8.6", "NVIDIA A10 datasheet"),
    _nvidia("a10g", "A10G", 23028, 24, 600, 70.0, 35.0, 300, "8.6", "NVIDIA A10G datasheet"),
    _nvidia("a30", "A30", 24576, 24, 933, 165.0, 10.3, 165, "8.0", "NVIDIA A30 datasheet"),
    _nvidia("a40", "A40", 46068, 48, 696, 149.7, 37.4, 300, "8.6", "NVIDIA A40 datasheet"),
    _nvidia("a100-40gb", "A100-SXM4-40GB", 40960, 40, 1555, 312.0, 19.5, 400, "8.0",
            "NVIDIA A100 datasheet (SXM)", aliases=("a100-40gb-sxm", "a100-sxm4-40gb"), group="a100",
            memory_source=f"{SMI} (40536 MiB with older drivers)"),
    _nvidia("a100-40gb-pcie", "A100-PCIE-40GB", 40960, 40, 1555, 312.0, 19.5, 250, "8.0",
            "NVIDIA A100 datasheet (PCIe)", group="a100"),
    _nvidia("a100-80gb", "A100-SXM4-80GB", 81920, 80, 2039, 312.0, 19.5, 400, "8.0",
            "NVIDIA A100 datasheet (SXM)", aliases=("a100-80gb-sxm", "a100-sxm4-80gb"), group="a100"),
    _nvidia("a100-80gb-pcie", "A100 80GB PCIe", 81920, 80, 1935, 312.0, 19.5, 300, "8.0",
            "NVIDIA A100 datasheet (PCIe)", group="a100"),
    _nvidia("l4", "L4", 23034, 24, 300, 121.0, 30.3, 72, "8.9", "NVIDIA L4 datasheet (242 with sparsity)"),
    _nvidia("l40", "L40", 46068, 48, 864, 181.0, 90.5, 300, "8.9", "NVIDIA L40 datasheet"),
    _nvidia("l40s", "L40S", 46068, 48, 864, 362.0, 91.6, 350, "8.9", "NVIDIA L40S datasheet"),
    _nvidia("h20", "H20", 97871, 96, 4000, 148.0, 44.0, 400, "9.0",
            "torchtitan 0.3.0 tools/utils.py get_peak_flops (148 TFLOPS); NVIDIA H20 brochure"),
    _nvidia("h100-pcie", "H100 PCIe", 81559, 80, 2000, 756.0, 51.0, 350, "9.0",
            "NVIDIA H100 datasheet (PCIe; 1513 with sparsity)", group="h100"),
    _nvidia("h100-sxm", "H100 80GB HBM3", 81559, 80, 3350, 989.0, 67.0, 700, "9.0",
            "NVIDIA H100 datasheet (SXM; 1979 with sparsity)", aliases=("h100-80gb", "h100-sxm5"),
            group="h100", memory_source=NVML),
    _nvidia("h100-nvl", "H100 NVL", 95830, 94, 3900, 835.0, 60.0, 400, "9.0",
            "NVIDIA H100 datasheet (NVL; 1671 with sparsity)", group="h100"),
    _nvidia("h200", "H200", 143771, 141, 4800, 989.0, 67.0, 700, "9.0",
            "NVIDIA H200 datasheet (SXM; 1979 with sparsity)", aliases=("h200-sxm", "h200-141gb"),
            memory_source=NVML),
    _nvidia("h200-nvl", "H200 NVL", 143771, 141, 4800, 835.0, 60.0, 600, "9.0",
            "NVIDIA H200 datasheet (NVL; 1671 with sparsity)"),
    _nvidia("gh200-96gb", "GH200 480GB", 97871, 96, 4000, 990.0, 67.0, 1000, "9.0",
            "NVIDIA GH200 Grace Hopper Superchip datasheet (power of the whole module)", group="gh200"),
    _nvidia("gh200-144gb", "GH200 144G HBM3e", 146831, 144, 4900, 990.0, 67.0, 1000, "9.0",
            "NVIDIA GH200 Grace Hopper Superchip datasheet (power of the whole module)", group="gh200",
            memory_source="nvidia-smi memory.total, one public log of the card"),
    _nvidia("b200", "B200", 183359, 180, 8000, 2250.0, 75.0, 1000, "10.0",
            "NVIDIA HGX B200 datasheet (4500 with sparsity)", aliases=("b200-180gb", "b200-192gb")),
    _nvidia("b300", "B300 SXM6 AC", 275040, 288, 8000, 2250.0, 75.0, 1400, "10.3",
            "torchtitan 0.3.0 tools/utils.py get_peak_flops; NVIDIA HGX B300 datasheet"),
    # AMD
    _amd("mi210", 64 * 10**9, 64, 1600, 181.0, 22.6, 300, "cdna2", "AMD Instinct MI210 data sheet",
         memory_source=NOMINAL),
    _amd("mi250x", 68702699520, 64, 1600, 191.5, 23.9, 280, "cdna2",
         "AMD Instinct MI250X data sheet, halved: one of the two devices that the card shows itself as",
         memory_source="HIP total memory of a 64 GB CDNA2 device, in a public log and in the ROCm sources"),
    _amd("mi300x", 205822885888, 192, 5300, 1307.4, 163.4, 750, "cdna3", "AMD Instinct MI300X data sheet",
         memory_source=f"{ROCM} (a virtual function; 206141652992 bytes on bare metal)"),
    _amd("mi325x", 256 * 10**9, 256, 6000, 1307.4, 163.4, 1000, "cdna3", "AMD Instinct MI325X data sheet",
         memory_source=NOMINAL),
    _amd("mi355x", 309220868096, 288, 8000, 2516.6, 157.3, 1400, "cdna4", "AMD Instinct MI355X data sheet"),
)  # fmt: skip
