"""The sweep: every causal language model of transformers, each in a process of its own."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from tests.fork_server import CONTEXT
from tests.models.architectures import Case
from tests.models.findings import Finding, Outcome, Verdict

N_PROCESSES = os.cpu_count() or 1
PATIENCE_S = 240.0
"""How long a model may take, with the advice that follows; the slowest takes some 15 seconds."""


def sweep(cases: Iterable[Case]) -> Iterator[Finding]:
    """Tries models, as many at once as there are cores; findings come in the order of ``cases``.

    A model that ends its process, or never ends, is a finding like others.
    """
    with ThreadPoolExecutor(N_PROCESSES) as threads:
        yield from threads.map(_try_apart, cases)


def _try_apart(case: Case) -> Finding:
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_try_and_send, args=(case, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(PATIENCE_S):
            finding: Finding = ours.recv()
            return finding
        return _lost(case, f"it was not done after {PATIENCE_S:.0f} s")
    except EOFError:
        process.join()
        return _lost(case, f"its process ended with status {process.exitcode}")
    finally:
        process.kill()
        process.join()
        ours.close()


def _lost(case: Case, reason: str) -> Finding:
    outcome = Outcome(Verdict.CRASHED, reason)
    return Finding(case, outcome, outcome)


def _try_and_send(case: Case, findings: Connection) -> None:
    """Runs in a process of its own."""
    import torch
    from transformers.utils import logging as hf_logging

    from tests.models.trial import try_case

    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable()
    warnings.simplefilter("ignore")  # transformers warns of much that is nobody's business here
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        finding = try_case(case)
    findings.send(finding)
