"""The section on the life of a page: the picture, and the same in words."""

from __future__ import annotations

from guest_memfd.draw.life import MAPPED, OUT, RUNS, ZAPPED, Life, Node, letters, numbered, ordered

WAY = (
    ("filemap_add_folio", Node("private", False)),
    ("set_direct_map_invalid_noflush", Node("private", True, "host", MAPPED)),
    ("flush_tlb_kernel_range", Node("private", True, "host", ZAPPED)),
    ("donate_guest", Node("private", True, "host", OUT)),
)
"""What the tour goes along: primitives, and where each begins."""

SECTION = """\
## The life of a page

The tour showed one way through the life of a page. The explorer ([explorer.md](explorer.md)) goes all ways: it runs the
same library on an abstract host, with several parties at once (a vCPU, threads of a VMM), in every order of their steps.
This picture is drawn from the states that it reaches with pKVM, without injected failures, in three scenarios: {runs}
([scenes](scenes.md)). These are {states:,} states. Each box is a group of states that say the same of page 0. Each arrow
is one primitive, or a guest's own call. Boxes with a thick border are where a scene begins. An arrow that is not there is
one that these three scenarios do not take, such as the end of a VM whose guest lets the host use a page; it may be possible
all the same.

![Boxes for the states of a page, arrows for the primitives between them](page-life.svg)

What a box says:

- *attribute*: private or shared, as the VMM and the guest have agreed. The library keeps it.
- *owner*: EL2's record of the frame. *host*: the host alone has it. *guest*: the guest alone has it. *shared*: it is the
  host's, and the guest may use it. *borrowed*: it is the guest's, and the guest lets the host use it.
- *direct map*: whether the kernel's direct map has the frame. After a zap the entry is gone, but a TLB may still have it.
  The flush ends that.
- *page cache*: whether the file has a folio for the page. Without a folio there is no owner and no entry.

Three things to see:

- Only one arrow makes the guest the owner, number {lend}. It begins out of the direct map, after the flush. The tour went
  along the arrows {way}.
- A page with a folio that becomes shared stays out of the direct map until the host uses it: numbers {late}.
- A page that the guest owns does not become shared in one step. The guest has to agree first: number {agree}.

What is not as in Linux 7.3: there a protected guest's memory is anonymous, and KVM_RUN fails on a slot with a guest_memfd;
and `share_guest` is for VMs that are not protected. Files that convert in place need both. `reclaim_dying_guest_page` is
refused while the VM lives, as in Linux: where an arrow names `punch` or `unbind`, the VM has been stopped before.

| box | attribute | owner | direct map | page cache | states |
| --- | --- | --- | --- | --- | --- |
{nodes}

| arrow | from | to | primitive | in which operation |
| --- | --- | --- | --- | --- |
{edges}
"""


def section(found: Life) -> str:
    """The end of docs/tour.md."""
    called = letters(found)
    nodes = "\n".join(f"| {called[each]} | {each.attribute} | {each.owner} | {each.direct} | "
                      f"{'a folio' if each.cached else 'none'} | {found.nodes[each]:,} |" for each in ordered(found))
    edges = "\n".join(f"| {number} | {called[edge.source]} | {called[edge.target]} | `{edge.primitive}` | "
                      f"{', '.join(sorted(found.edges[edge]))} |" for number, edge in numbered(found))
    way = [arrow(found, *step) for step in WAY]
    return SECTION.format(
        states=found.states, runs=_runs(), nodes=nodes, edges=edges, lend=way[-1], way=", ".join(map(str, way)),
        late=" and ".join(str(arrow(found, "set_direct_map_default_noflush", Node("shared", True, owner, OUT)))
                          for owner in ("host", "borrowed")),
        agree=arrow(found, "guest_consents", Node("private", True, "guest", OUT)))


def _runs() -> str:
    return "; ".join(f"{', '.join(f'`{name}`' for name in names[:-1])} and `{names[-1]}` in scene `{scene}`"
                     for scene, names in RUNS)


def arrow(found: Life, primitive: str, source: Node) -> int:
    """The number of the arrow of *primitive* out of *source*; StopIteration if there is none."""
    return next(number for number, edge in numbered(found) if (edge.primitive, edge.source) == (primitive, source))
