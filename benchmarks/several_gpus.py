"""Check and measure xpar on all GPUs of one host, in one call of at most nine minutes.

    python benchmarks/several_gpus.py --out several-gpus --seconds 540

Each step is a command of its own with a limit of its own. Steps that check run beside others on GPUs of
their own; steps that measure run alone. What a step prints is in OUT/NAME.log, its figures are in
OUT/NAME.json. OUT/summary.json says after every step how it ended, so that a run that is cut off keeps what
it has. xpar must be installed, with mpirun on the PATH.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Condition

ROOT = Path(__file__).resolve().parents[1]
GPU = ROOT / "tests" / "gpu"
LAYERS = ("olmoe", "qwen3-30b-a3b", "qwen3-235b-a22b", "gpt-oss-120b", "deepseek-v3")
SCALES = {"deepseek-v3": "0.25"}
"""Factor on the widths, for a layer that one GPU could not hold beside its copies."""
CHECKED = ("olmoe", "mixtral", "deepseek_v3")


@dataclass(frozen=True)
class Step:
    """One command.

    ``gpus``: how many it takes, one rank each; 0 for a command without ranks. ``limit``: seconds after which
    it is killed. ``ends``: the exit codes of success, where a step is meant to end its job itself. ``alone``:
    no other step runs meanwhile.
    """

    name: str
    gpus: int
    limit: float
    command: tuple[str, ...]
    ends: tuple[int, ...] = (0,)
    alone: bool = False

    def argv(self, python: str) -> list[str]:
        """Return the command, under mpirun if it has ranks."""
        if not self.gpus:
            return list(self.command)
        words = self.command if self.command[0] == "xpar" else (python, "-m", "mpi4py", *self.command)
        return ["mpirun", "-n", str(self.gpus), *words]


def checks(gpus: int, work: Path, out: Path) -> Iterator[Step]:
    """The checks of communication, layers, whole models, late and killed ranks."""
    tiny = tuple(str(work / name) for name in CHECKED)
    for n in sizes(gpus):
        if n > 1:
            exchange = (str(GPU / "check_one_sided.py"), "access", "checks", "stress", "--steps", "2000")
            yield Step(f"one-sided-{n}", n, 100, (*exchange, "--json", f"{out}/one-sided-{n}.json"))
            yield Step(f"comm-{n}", n, 100, (str(GPU / "check_comm.py"), "--only", "checks"))
            yield Step(f"late-{n}", n, 40, (str(GPU / "check_one_sided.py"), "late"))
            yield Step(f"kill-{n}", n, 40, (str(GPU / "check_one_sided.py"), "kill"), ends=(9, 137))
            yield Step(f"hang-{n}", n, 40, (str(GPU / "check_one_sided.py"), "hang"), ends=(17,))
        yield Step(f"layer-{n}", n, 160, (str(GPU / "check_layer.py"), "--json", f"{out}/layer-{n}.json"))
        batches = ("--batch", "1", str(n + 1), "16")
        yield Step(
            f"model-{n}",
            n,
            120,
            (str(GPU / "check_generate.py"), *tiny, *batches, "--json", f"{out}/model-{n}.json"),
        )


def measurements(gpus: int, work: Path, out: Path, shapes: Sequence[str]) -> Iterator[Step]:
    """Dispatch and combine beside NCCL, layers and models on 1, 2, 4, ... GPUs."""
    for n in sizes(gpus):
        model = ("xpar", "bench", "generate", str(work / "olmoe4"), "--device", "cuda", "--rounds", "1")
        batches = ("--batch", "4", "16", "64", "256", "512")
        yield Step(
            f"generate-{n}", n, 90, (*model, *batches, "--json", f"{out}/generate-{n}.json"), alone=True
        )
    if gpus > 1:
        bench = (str(GPU / "check_one_sided.py"), "bench", "--json", f"{out}/exchange-{gpus}.json")
        yield Step(f"exchange-{gpus}", gpus, 90, bench, alone=True)
        wide = ("--hidden", "7168", "--experts", "256", "--tokens", "128", "1024", "4096", "--quantised-rows")
        rows = ("xpar", "bench", "comm", "--device", "cuda", *wide, "--json", f"{out}/fp8-rows-{gpus}.json")
        yield Step(f"fp8-rows-{gpus}", gpus, 60, rows, alone=True)
    for shape in shapes:
        words = ("xpar", "bench", "scaling", shape, "--scale", SCALES.get(shape, "1"), "--device", "cuda")
        sizes_of_work = ("--tokens", "1024", "--tokens-per-rank", "256", "--seconds", "0.5")
        yield Step(
            f"scaling-{shape}", gpus, 120, (*words, *sizes_of_work, "--out", f"{out}/{shape}"), alone=True
        )


def sizes(gpus: int) -> list[int]:
    """Return 1, 2, 4, ... up to ``gpus``."""
    return [n for n in (1, 2, 4, 8, 16) if n <= gpus]


def preparations(work: Path) -> Iterator[Step]:
    """Checkpoints that are not there yet: small ones in float32, and OLMoE's form with four layers."""
    small = (
        "--layers",
        "3",
        "--hidden",
        "256",
        "--intermediate",
        "128",
        "--experts",
        "12",
        "--dtype",
        "float32",
    )
    for family in CHECKED:
        if (work / family).exists():
            continue
        yield Step(f"make-{family}", 0, 120, ("xpar", "make-checkpoint", family, str(work / family), *small))
    widths = ("--experts", "64", "--hidden", "2048", "--intermediate", "1024", "--top-k", "8")
    form = ("make-checkpoint", "olmoe", str(work / "olmoe4"), "--layers", "4", *widths, "--vocab", "32000")
    if not (work / "olmoe4").exists():
        yield Step("make-olmoe4", 0, 200, ("xpar", *form))


class Host:
    """The GPUs of this host, which steps take and give back, and the time that is left."""

    def __init__(self, gpus: int, seconds: float, out: Path, python: str) -> None:
        self.free, self.count = set(range(gpus)), gpus
        self.end, self.out, self.python = time.monotonic() + seconds, out, python
        self.turn = Condition()
        self.summary: list[dict[str, object]] = []

    def run(self, step: Step) -> None:
        """Wait for GPUs, run ``step`` on them, note how it ended."""
        wanted = self.count if step.alone else step.gpus
        with self.turn:
            self.turn.wait_for(lambda: len(self.free) >= wanted)
            mine = sorted(self.free)[:wanted]
            self.free -= set(mine)
        try:
            self.note(step, self.launch(step, mine))
        finally:
            with self.turn:
                self.free |= set(mine)
                self.turn.notify_all()

    def launch(self, step: Step, mine: list[int]) -> dict[str, object]:
        left = self.end - time.monotonic()
        if left < 5:
            return {"ended": "no time was left"}
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, mine[: step.gpus]))}
        begin = time.monotonic()
        with (self.out / f"{step.name}.log").open("w") as log:
            job = subprocess.Popen(
                step.argv(self.python),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | visible,
                start_new_session=True,
            )
            try:
                code = job.wait(min(step.limit, left))
                how = "right" if code in step.ends else f"exit code {code}"
            except subprocess.TimeoutExpired:
                how = "cut off"
                os.killpg(job.pid, signal.SIGKILL)  # the ranks, too
                job.wait()
        return {"ended": how, "seconds": round(time.monotonic() - begin, 1)}

    def note(self, step: Step, how: dict[str, object]) -> None:
        with self.turn:
            self.summary.append({"step": step.name, "gpus": step.gpus, **how, "command": step.argv("python")})
            (self.out / "summary.json").write_text(json.dumps(self.summary, indent=1) + "\n")
        sys.stdout.write(f"{step.name}: {how['ended']}, {how.get('seconds', 0)} s\n")
        sys.stdout.flush()


def main() -> int:
    """Run everything that there is time for; return 1 if a step ended otherwise than it should."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for logs and figures")
    parser.add_argument("--work", type=Path, default=Path("checkpoints"), help="directory for checkpoints")
    parser.add_argument("--seconds", type=float, default=540.0, help="nothing runs longer than that in all")
    parser.add_argument("--gpus", type=int, help="number of GPUs (default: all)")
    parser.add_argument("--shapes", nargs="*", choices=LAYERS, default=LAYERS, help="layers to measure")
    parser.add_argument("--only", choices=["checks", "measurements"], help="one half")
    args = parser.parse_args()
    if shutil.which("mpirun") is None or shutil.which("xpar") is None:
        parser.error("mpirun and xpar must be on the PATH: activate the environment of scripts/setup.sh")
    import torch

    gpus = args.gpus or torch.cuda.device_count()
    if gpus < 1:
        parser.error("torch sees no GPU here")
    args.out.mkdir(parents=True, exist_ok=True)
    host = Host(gpus, args.seconds, args.out, sys.executable)
    steps = [] if args.only == "measurements" else list(checks(gpus, args.work, args.out))
    later = [] if args.only == "checks" else list(measurements(gpus, args.work, args.out, args.shapes))
    with ThreadPoolExecutor(max_workers=8) as pool:
        prepared = [pool.submit(host.run, step) for step in preparations(args.work)]
        for future in prepared[:-1] if steps else prepared:  # the large one is for later
            future.result()
        # The longest wait comes first: a step of all GPUs would wait for ever behind ever new steps of one.
        begun = [pool.submit(host.run, step) for step in sorted(steps, key=lambda s: -s.gpus)]
        for future in [*prepared, *begun]:
            future.result()
    for step in later:
        host.run(step)
    return int(any(how["ended"] != "right" for how in host.summary))


if __name__ == "__main__":
    sys.exit(main())
