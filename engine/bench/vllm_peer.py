"""Answer a workload with vLLM: ``python vllm_peer.py TASK.json RESULT.json``.

This file runs in the interpreter that ``xpar bench generate --peer-python`` names. It imports nothing of
xpar, which that interpreter need not have.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any


class FirstUpdate:
    """A progress bar, as vLLM uses one, that notes when the first answer is complete."""

    first: float | None = None
    """The clock at the first update of the bar that was made last."""
    n = 0
    format_dict: dict[str, Any] = {"elapsed": 1.0}  # noqa: RUF012 - as tqdm has it
    postfix = ""

    def __init__(self, *args: object, **options: object) -> None:
        FirstUpdate.first = None

    def update(self, count: int = 1) -> None:
        """Note the first ``count`` above 0."""
        self.n += count
        if count and FirstUpdate.first is None:
            FirstUpdate.first = time.perf_counter()

    def refresh(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class PeakMemory(threading.Thread):
    """The peak memory in bytes of this process and each that it started, as vLLM does."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[int, int] = {}

    def run(self) -> None:
        """Look twice a second."""
        while True:
            self.look()
            time.sleep(0.5)

    def look(self) -> None:
        """Read the peaks that Linux keeps of this process and of those that it started."""
        found: dict[int, dict[str, str]] = {}
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            except OSError:  # it has just ended
                continue
            found[int(status.parent.name)] = lines
        parents = {pid: int(lines["PPid"]) for pid, lines in found.items()}
        for pid, lines in found.items():
            if "VmHWM" in lines and self._is_ours(pid, parents):
                self.peaks[pid] = 1024 * int(lines["VmHWM"].split()[0])

    @staticmethod
    def _is_ours(pid: int, parents: dict[int, int]) -> bool:
        while pid > 1 and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid == os.getpid()


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Answer the prompts of ``task`` greedily, after a few that are not measured."""
    from vllm import LLM, SamplingParams

    memory = PeakMemory()
    memory.start()
    prompts = task["prompts"]
    model = LLM(
        model=task["model"],
        dtype=task["dtype"],
        skip_tokenizer_init=True,
        max_model_len=max(map(len, prompts)) + task["new_tokens"],
        enable_prefix_caching=task["prefix_caching"],
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=task["new_tokens"], ignore_eos=True, detokenize=False
    )
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    model.generate(inputs[: task["trial"]], sampling, use_tqdm=False)
    if task["prefix_caching"]:
        model.reset_prefix_cache()
    begin = time.perf_counter()
    outputs = model.generate(inputs, sampling, use_tqdm=FirstUpdate)
    seconds = time.perf_counter() - begin
    memory.look()
    first = FirstUpdate.first
    return {
        "seconds": seconds,
        "first_s": None if first is None else first - begin,
        "answers": [list(output.outputs[0].token_ids) for output in outputs],
        "peak_bytes": list(memory.peaks.values()),
    }


if __name__ == "__main__":
    # Its engine's process imports this file again, and must find the guard above.
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
