"""What the box lacks is told as it is: foreign memory, GPUs out of order, GPUs that are too small or too few."""

from __future__ import annotations

from builders import NOW, RESERVE, foreign, gpu, observed, spec, uuid

from reconciler.plan.board import Need
from reconciler.plan.lacks import Refusal, lacking
from reconciler.plan.ledger import Ledger, Quarantine
from reconciler.plan.observed import Gpu, Subject
from reconciler.plan.situation import Situation
from reconciler.units import GIB

FREE = 80 * GIB - RESERVE


def told(*gpus: Gpu, name: str = "ask", count: int = 1, size: int = FREE, ledger: Ledger | None = None) -> Refusal:
    """What a need of `size` on each of so many of these GPUs is told."""
    situation = Situation(spec(), observed(*gpus), ledger or Ledger(), NOW)
    return lacking(situation, [need(name, len(gpus), count, size)])


def need(name: str, gpus: int, count: int, size: int) -> Need:
    names = tuple(uuid(i) for i in range(gpus))
    return Need(Subject("endpoint", name), names, count, dict.fromkeys(names, size), exclusive=False)


def occupied(index: int) -> Gpu:
    return gpu(index, used=30 * GIB, processes=(foreign(77, 30 * GIB),))


def silent(index: int) -> Gpu:
    return gpu(index, used=None, state="unknown", processes=None, detail="no answer")


def test_foreign_memory_is_named_where_a_whole_gpu_would_be_free_without_it() -> None:
    said = told(occupied(0))
    assert (said.reason, said.message) == ("GpuOccupied", "GPU 0: 30GiB held by pid 77 (someone: python train.py)")
    assert said.transient, "whose process it is may end it"


def test_foreign_memory_is_not_to_blame_for_what_fits_on_no_gpu() -> None:
    said = told(occupied(0), size=FREE + 1 * GIB)
    assert (said.reason, said.message) == ("InsufficientMemory", "it wants 80GiB on a GPU; the largest offers 79GiB")
    assert not said.transient, "no time mends it"


def test_foreign_memory_is_not_to_blame_for_gpus_that_are_not_there() -> None:
    said = told(gpu(0), occupied(1), count=3)
    assert (said.reason, said.message) == ("InsufficientGpus", "it wants 3 GPUs, and 2 of this node may serve it")
    assert not said.transient


def test_a_gpu_out_of_order_is_named_where_those_in_order_do_not_suffice_even_without_foreign_memory() -> None:
    said = told(gpu(0), occupied(1), silent(2), count=3)
    assert (said.reason, said.message) == ("GpuUnknown", "GPU 2 cannot be used: no answer")
    assert said.transient, "it may be seen again"
    quarantine = Quarantine(uuid(0), NOW, "its memory did not come back")
    said = told(gpu(0), ledger=Ledger(quarantines={uuid(0): quarantine}))
    assert said.message == "GPU 0 cannot be used: its memory did not come back"
    assert said.alternatives == ("`reconciler reset 0` once it is mended",)
    assert not said.transient, "a person lets go of it"


def test_a_gpu_out_of_order_is_not_to_blame_where_it_would_not_suffice() -> None:
    said = told(gpu(0), silent(1), count=3)
    assert said.message == "it wants 3 GPUs, and 2 of this node may serve it"


def test_what_fits_by_itself_is_not_named_beside_what_does_not() -> None:
    small, large = need("small", 1, 1, GIB), need("large", 1, 2, GIB)
    situation = Situation(spec(), observed(gpu(0)), Ledger(), NOW)
    assert lacking(situation, [small, large]).message == "it wants 2 GPUs, and 1 of this node may serve it"
    assert lacking(situation, [small, small]).message == "no GPUs are left for small, small"
    assert lacking(situation, [small]).transient
