"""The options of ``torch.compile(model, backend="mst", options={...})``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from mst_fx.errors import OptionError, did_you_mean
from mst_fx.group import Group, group_of

PASS_NAMES = ("attention", "mlp", "vocab")

ChunkRows = int | Literal["auto"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Validated options; the defaults are what users get.

    Attributes:
        chunk_rows: rows a chunk in MLP loops: ``"auto"`` or an int ≥ 1.
        vocab_chunk_rows: rows a chunk in vocabulary loops: ``"auto"`` or an int ≥ 1.
        attention_chunk_rows: queries a chunk where attention runs in chunks: ``"auto"`` or an int ≥ 1.
            Attention of no more queries is left alone.
        passes: the passes that run, a subset of :data:`PASS_NAMES`.
        accumulate: type of weight-gradient accumulators: ``"auto"`` (float32 for 16-bit weights, the weight's
            own type for others) or ``"weight"`` (the weight's own type).
        logits: whether a logits output may be deferred: ``"auto"`` (when the loss of the same graph
            consumes the logits), ``"keep"`` (never) or ``"defer"`` (also when there is no loss).
        inner: compiler of the rewritten graph and of the loops' bodies.
        layers: how layers that are equal are compiled: ``"once"`` (one of them, for all) or ``"each"`` by itself.
        memory: plans what is kept for the backward pass and what is made again, so that the step is the fastest that
            fits: bytes that may be allocated on the device at the peak of a step, as ``"70GiB"`` or an int, or ``"auto"``: what is
            free when the step is compiled, less an optimizer's states. None: no plan; the checkpointing in the model decides.
        host_memory: bytes of the host's memory that a plan may send to what it keeps, as ``"100GiB"`` or an int; ``"auto"``: four
            fifths of what is free when the step is compiled, shared by the processes of this machine, and none for a model on a CPU;
            ``"0"``: none.
        mode: as of ``torch.compile``, which takes it or options, and not both; passed on to Inductor.
        sequence_parallel: a 1-D ``DeviceMesh`` (``mesh["sp"]``) or a ``ProcessGroup``, of which all ranks get the same batches: each
            keeps its share of every sequence's tokens. None: no such group.
        average_gradients: what the backward pass returns for parameters is the mean over ranks, computed while it runs, and nothing
            else (DDP) needs to average them: True: over those of ``sequence_parallel``; a 1-D ``DeviceMesh`` or a ``ProcessGroup``: over
            its ranks, as those of all copies of the model. Of parameters in parts (FSDP) it is not for us.
        strict: raise on a refusal or a failure of a pass instead of leaving the graph as it was.
        inductor: patches of ``torch._inductor.config``.
    """

    chunk_rows: ChunkRows = "auto"
    vocab_chunk_rows: ChunkRows = "auto"
    attention_chunk_rows: ChunkRows = "auto"
    passes: tuple[str, ...] = PASS_NAMES
    accumulate: Literal["auto", "weight"] = "auto"
    logits: Literal["auto", "keep", "defer"] = "auto"
    inner: Literal["inductor", "aot_eager", "eager"] = "inductor"
    layers: Literal["once", "each"] = "once"
    memory: str | int | None = None
    host_memory: str | int = "auto"
    mode: str | None = None
    sequence_parallel: Any = None
    average_gradients: Any = False
    strict: bool = False
    inductor: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("chunk_rows", "vocab_chunk_rows", "attention_chunk_rows"):
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not is_count and value != "auto":
                raise _bad(name, value, "'auto' or an int ≥ 1")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise _bad(name, value, "one of " + ", ".join(map(repr, allowed)))
        _check_memory(self.memory, self.inner)
        host = self.host_memory
        if (host not in ("auto", "0", 0) and bytes_in(host) is None) or isinstance(host, bool):
            raise _bad("host_memory", host, "'auto', '0', bytes as in '100GiB' or an int ≥ 0")
        if not isinstance(self.mode, (str, type(None))):
            raise _bad("mode", self.mode, "a mode of torch.compile, as 'max-autotune', or None")
        _check_averages(self.average_gradients, self.sequence_parallel, self.inner)
        if not isinstance(self.strict, bool):
            raise _bad("strict", self.strict, "True or False")
        if not isinstance(self.inductor, Mapping):
            raise _bad("inductor", self.inductor, "a dict of Inductor config patches")
        if isinstance(self.passes, str) or not _all_strings(self.passes):
            raise _bad("passes", self.passes, _SOME_PASSES)
        if any(name not in PASS_NAMES for name in self.passes):
            raise _bad("passes", self.passes, _SOME_PASSES)
        object.__setattr__(self, "passes", tuple(self.passes))

    @property
    def group(self) -> Group | None:
        """The ranks among which sequences are cut; None: there is no other than this one."""
        found = group_of(self.sequence_parallel) if self.sequence_parallel is not None else None
        return found if found is not None and found.ranks > 1 else None

    @property
    def averaged_over(self) -> Group | None:
        """The ranks over which gradients are averaged; None: no other than this one."""
        if self.average_gradients is False:
            return None
        if self.average_gradients is True:
            return self.group
        found = group_of(self.average_gradients, "average_gradients")
        return found if found.ranks > 1 else None


_SOME_PASSES = f"a tuple or list of names out of {', '.join(map(repr, PASS_NAMES))}, as ('mlp',)"
_CHOICES = {
    "accumulate": ("auto", "weight"),
    "logits": ("auto", "keep", "defer"),
    "inner": ("inductor", "aot_eager", "eager"),
    "layers": ("once", "each"),
}


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_BYTES = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})")


def bytes_in(text: Any) -> int | None:
    """``"1.5GiB"`` → 1610612736; None if it is neither that nor an int ≥ 1."""
    found = _BYTES.fullmatch(text) if isinstance(text, str) else None
    count = int(float(found[1]) * _UNITS[found[2]]) if found else text
    return count if isinstance(count, int) and not isinstance(count, bool) and count >= 1 else None


def _all_strings(values: Any) -> bool:
    try:
        return all(isinstance(value, str) for value in values)
    except TypeError:
        return False


def _check_memory(memory: Any, inner: str) -> None:
    if memory is None:
        return
    if memory != "auto" and bytes_in(memory) is None:
        raise _bad("memory", memory, "'auto', bytes as in '70GiB' or an int ≥ 1, or None")
    if inner == "eager":
        raise _bad("memory", memory, "None with inner='eager', which has no graph of both passes")


def _check_averages(average: Any, group: Any, inner: str) -> None:
    if average is True and group is None:
        raise _bad(
            "average_gradients", True, "True with sequence_parallel; a DeviceMesh or a ProcessGroup; False"
        )
    if average is not False and inner == "eager":
        raise _bad(
            "average_gradients", average, "False with inner='eager', which has no graph of both passes"
        )


def _bad(name: str, value: Any, allowed: str) -> OptionError:
    return OptionError(f"mst option {name!r} is {value!r}; allowed: {allowed}")


def make_options(options: Mapping[str, Any] | Options | None) -> Options:
    """Checks a user's ``options`` and fills in the defaults.

    Raises:
        OptionError: for an unknown name, or for a value of the wrong kind.
    """
    if options is None:
        return Options()
    if isinstance(options, Options):
        return options
    if not isinstance(options, Mapping):
        raise OptionError(f"mst options are {options!r}; allowed: a dict")
    known = [field.name for field in dataclasses.fields(Options)]
    for name in options:
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise OptionError(f"mst has no option {name!r}{hint or ';'} allowed: {', '.join(known)}")
    return Options(**options)
